"""Writes pictures as other programs' judges read them, and reads what these say.

    python -m sana_jax.judge --task=prompts --benchmark=dpg --source=ELLA/dpg_bench/prompts \\
        --out=dpg.jsonl
    python -m sana_jax.sample --checkpoint=SANA --prompts=dpg.jsonl --num_images_per_prompt=4 \\
        --out=RUN
    python -m sana_jax.judge --task=pictures --benchmark=dpg --data=RUN --out=DPG
    python -m sana_jax.judge --task=geneval --data=GENEVAL --detections=found.jsonl \\
        --out=results.jsonl
    python -m sana_jax.judge --task=table --results=geneval:results.jsonl \\
        --results=dpg:DPG/dpg-bench_results.txt

prompts: a benchmark's own prompts as a .jsonl file for `sample`, with the fields that name the
pictures. Sources are dpg_bench/prompts (dpg), benchmark-prompts.json (imagereward), the folder with
anime.json and the other styles (hps), and meta_data.json of MJHQ-30K (mjhq, for evaluate
--task=fid). GenEval's evaluation_metadata.jsonl is what `sample` reads.

pictures: those of a run as the judge looks for them, in OUT/pictures with nothing beside them:

    geneval      00000/metadata.jsonl, 00000/samples/00000.png ...; 4 of a prompt
    dpg          ITEM.png, 4 of a prompt in 2 x 2; --resolution is the side of one, --pic-num=4
    imagereward  RUN/ID_0.png ..., 10 of a prompt; OUT/prompts.json is the list beside them
    hps          RUN/STYLE/00000.jpg ..., one of a prompt; OUT/STYLE.json are the lists

geneval: GenEval's verdicts from objects that a detector has found, with the rules and thresholds of
its own program. A line of --detections is {"filename": "00000/samples/00000.png", "detections":
[{"class": "dog", "box": [X0, Y0, X1, Y1], "score": 0.9, "color": "brown"}]}; color is needed where
the prompt asks for one.

table: the judges' result files in one table, which also says of how many pictures each figure is.

Killed and run again, --task=pictures goes on. The last line of geneval and table is JSON.
"""

import json
import os

from absl import flags
from etils import epath

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_is_file, local, storage, write_atomically

OWN = {
    "prompts": ("benchmark", "source", "out"),
    "pictures": ("benchmark", "data", "out", "each"),
    "geneval": ("data", "detections", "out"),
    "table": ("results",),
}
OPTIONAL = ("each",)

FLAGS = flags.FLAGS
_TASK = flags.DEFINE_enum("task", None, list(OWN), "the task, as described above", required=True)
_BENCHMARK = flags.DEFINE_enum(
    "benchmark",
    None,
    ["geneval", "dpg", "imagereward", "hps", "mjhq"],
    "whose prompts, or whose judge",
)
_SOURCE = flags.DEFINE_string("source", None, "the benchmark's own file or folder of prompts")
_DATA = flags.DEFINE_string(
    "data", None, "a folder that `sample` wrote; for geneval one of --task=pictures"
)
_OUT = flags.DEFINE_string(
    "out", None, "a folder, new or of the same pictures; for prompts and geneval a .jsonl file"
)
_EACH = flags.DEFINE_integer(
    "each", None, "pictures of a prompt; default: the benchmark's own number", 1, 10**6
)
_DETECTIONS = flags.DEFINE_string("detections", None, "a .jsonl file of detected objects")
_RESULTS = flags.DEFINE_multi_string(
    "results", [], "a judge's result as BENCHMARK:FILE; may be given several times"
)


def prompts() -> None:
    """Writes a benchmark's prompts for `sample`."""
    from sana_jax.judges.benchmarks import SOURCES, read_prompts

    if _BENCHMARK.value not in SOURCES:
        raise UserError("--benchmark=geneval: `sample` reads evaluation_metadata.jsonl as it is")
    text = read_prompts(_BENCHMARK.value, _SOURCE.value)
    _write_lines(text, _SOURCE.value)
    print(f"{text.count(chr(10))} prompts in {_OUT.value}")


def pictures() -> None:
    """Lays a run's pictures out for a judge."""
    from sana_jax.judges.benchmarks import BENCHMARKS
    from sana_jax.judges.layouts import export

    if _BENCHMARK.value not in BENCHMARKS:
        raise UserError("--benchmark=mjhq: its judge is evaluate --task=fid, which reads the run")
    count = export(_BENCHMARK.value, _DATA.value, _OUT.value, _EACH.value)
    print(f"pictures of {count} prompts in {_OUT.value}/pictures")


def geneval() -> None:
    """Judges detected objects by GenEval's rules."""
    from sana_jax.judges.geneval import judge

    rows = judge(_DATA.value, _DETECTIONS.value)
    _write_lines("".join(json.dumps(row) + "\n" for row in rows), _DETECTIONS.value)
    _show([f"geneval:{_OUT.value}"])


def table() -> None:
    """Shows the judges' results."""
    _show(_RESULTS.value)


def _show(results: list[str]) -> None:
    from sana_jax.judges.results import read
    from sana_jax.judges.results import table as formatted

    found = dict(map(read, results))
    if len(found) < len(results):
        raise UserError("--results: a benchmark is there twice")
    print(formatted(found))
    print(json.dumps({"task": _TASK.value} | found))


def _write_lines(text: str, source: str) -> None:
    """Writes --out. Raises UserError where it is `source`, from which the text was made."""
    path = epath.Path(local(_OUT.value))
    if path.suffix != ".jsonl":
        raise UserError(f"--out={_OUT.value}: give a file whose name ends with .jsonl")
    check_is_file(path, f"--out={path}")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {path.parent}; make it first")
    with storage(path):
        if path.exists() and os.path.samefile(path, source):
            raise UserError(f"--out={path} is the file that is read; name another")
        write_atomically(path, text.encode())


TASKS = {"prompts": prompts, "pictures": pictures, "geneval": geneval, "table": table}


def main(argv):
    del argv
    own = OWN[_TASK.value]
    for name in sorted({name for names in OWN.values() for name in names}):
        if name not in own and FLAGS[name].present:
            raise UserError(f"--{name} is not of --task={_TASK.value}; leave it out")
        if name in own and name not in OPTIONAL and not FLAGS[name].value:
            raise UserError(f"--{name} is missing; --task={_TASK.value} needs it")
    TASKS[_TASK.value]()


if __name__ == "__main__":
    cli.run(main)
