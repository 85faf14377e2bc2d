"""The files that the project reads, each with an example and with the reader that users reach.

An example is written once by `write`; a reader gets the folder with one file of it mutated.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations import archives, mutate

JSON, LINES, TEXT, YAML = mutate.json_text, mutate.json_lines, mutate.text, mutate.yaml_text
SAFETENSORS, PTH = mutate.safetensors, mutate.pth


@dataclasses.dataclass(frozen=True)
class Input:
    """A file, and how it is read.

    file: its path in the example. read: called with the example's folder. mutation: by the
    structure of its format; None: by bytes alone. slow: it builds networks, and gets fewer rounds.
    """

    file: str
    read: Callable[[Path], Any]
    mutation: Callable[[bytes, Random], bytes] | None = None
    slow: bool = False

    def mutated(self, content: bytes, rng: Random) -> bytes:
        if self.mutation is None or rng.random() < 0.3:
            return mutate.byte_level(content, rng)
        return self.mutation(content, rng)


NOTES = {"version": "1"}


def _wanted(count: int) -> dict[str, dict]:
    files = [f"{i:06d}_{i}.png" for i in range(count)]
    common = {"prompt": "a", "negative_prompt": "", "height": 32, "width": 32}
    return {f: {**common, "seed": i} for i, f in enumerate(files)}


@contextlib.contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """Yields a copy for a reader that writes too."""
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was ended
    try:
        yield Path(shutil.copytree(folder, copy))
    finally:
        shutil.rmtree(copy)


def _prompts(name: str):
    def read(folder: Path):
        from sana_jax.batch.tasks import make_batches, make_tasks, read_rows, with_defaults
        from sana_jax.pipeline.facts import Facts

        common = {"height": None, "width": None, "num_steps": 20, "guidance_scale": 4.5}
        common = {k: v for k, v in common.items() if v is not None}
        tasks = make_tasks(read_rows(str(folder / name)), common, 0, 2)
        facts = Facts(32, 1, 512, 32, 300, 2304, 3.0)
        make_batches(with_defaults(tasks, facts, 2**24), 8, 1)

    return read


def _manifest(folder: Path):
    from sana_jax.batch.outputs import OutputFolder

    with _copied(folder / "pictures") as copy, OutputFolder(str(copy), _wanted(3), NOTES):
        pass


def _picture(folder: Path):
    from sana_jax.data.images import decode, size_of

    data = (folder / "pictures/000000_0.png").read_bytes()
    size_of(data, min_side=1)
    decode(data, min_side=1)


def _captions(folder: Path):
    from sana_jax.data.captions import KINDS, CaptionChoice
    from sana_jax.data.folder import Folder
    from sana_jax.data.images import BadImage

    record = Folder(folder / "images")[0]
    for kind in KINDS:
        try:
            CaptionChoice(kind, proportions={0: 1, "short": 2}).probabilities(record)
        except BadImage:  # other kinds may still have a caption
            pass


def _component(name: str):
    """Reads the config of a network and lists the tensors that it needs; nothing is built."""

    def read(folder: Path):
        from sana_jax.checkpoints import diffusers
        from sana_jax.checkpoints.diffusers_names import entries

        path = folder / "diffusers" / diffusers.COMPONENTS[name][0] / "config.json"
        for entry in entries(diffusers.read_config(path, name)):
            entry.layer_names()

    return read


def _diffusers(folder: Path):
    from sana_jax.checkpoints import diffusers
    from sana_jax.checkpoints.components import abstract_params, check_fit

    abstract_params.cache_clear()
    check_fit(diffusers.open_folder(folder / "diffusers"))


def _scheduler(folder: Path):
    from sana_jax.checkpoints.diffusers import _read_scheduler

    _read_scheduler(folder / "diffusers/scheduler")


def _model_index(folder: Path):
    from sana_jax.checkpoints.diffusers import component_names

    component_names(folder / "diffusers")


def _model_json(folder: Path):
    from sana_jax.checkpoints import native
    from sana_jax.checkpoints.components import CONFIGS
    from sana_jax.checkpoints.diffusers_names import entries

    checkpoint, files, _ = native.read_model(folder / "native")
    native.verify(folder / "native", files)
    for name in CONFIGS:
        if config := getattr(checkpoint, name):
            for entry in entries(config):
                entry.layer_names()


def _native(folder: Path):
    from sana_jax.checkpoints import native
    from sana_jax.checkpoints.components import abstract_params, check_fit

    abstract_params.cache_clear()
    check_fit(native.open_folder(folder / "native"))


def _tensors(file: str):
    def read(folder: Path):
        import numpy as np

        from sana_jax.checkpoints.components import param_shapes
        from sana_jax.checkpoints.mapping import Entry, check, lazy_params
        from sana_jax.checkpoints.random_weights import TINY, configs
        from sana_jax.checkpoints.tensors import TensorReader

        shapes = param_shapes(configs(TINY)[0])
        entries = [Entry(path, (path,)) for path in shapes]
        tensors = TensorReader(folder / file)
        check("transformer", entries, shapes, tensors)
        import jax

        jax.tree.map(np.asarray, lazy_params(entries, shapes, tensors))

    return read


def _pth(folder: Path):
    from sana_jax.checkpoints.nvlabs import open_checkpoint
    from sana_jax.checkpoints.pth import PthReader
    from sana_jax.runtime.errors import UserError

    reader = PthReader(folder / "model.pth")
    for part in [reader, *(PthReader(folder / "model.pth", p) for p in reader.sections.values())]:
        for name in [*part][:100]:
            part.shape(name), part.dtype(name), part[name]
    try:
        open_checkpoint(folder / "model.pth", cross_heads=2)
    except UserError as error:  # the example is a part of a transformer
        if "is no Sana transformer" not in str(error):
            raise


def _old_pth(folder: Path):
    from sana_jax.checkpoints.pth import PthReader

    reader = PthReader(folder / "old.pth")
    for name in [*reader][:100]:
        reader.shape(name), reader.dtype(name), reader[name]


def _clip(folder: Path):
    from sana_jax.checkpoints.clip import read_config

    read_config(folder / "clip.json")


def _statistics(folder: Path):
    from sana_jax.metrics.frechet import read_statistics

    read_statistics(folder / "statistics.npz", 4)


def _tokenizer(folder: Path):
    from sana_jax.text.prompts import tokenize
    from sana_jax.text.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder / "native/tokenizer")
    for prompts in ["a red cat", ""], ["é\0 <bos> 日本 a"]:
        tokenize(tokenizer, prompts, 8, "describe: ")


def _instruction(name: str):
    def read(folder: Path):
        from sana_jax.text.instruction import find_instruction

        assert find_instruction(folder / name).sha256

    return read


def _lock(folder: Path):
    from etils import epath

    from sana_jax.runtime.lock import NAME, locked

    with _copied(folder / "locked") as copy:
        shutil.copy(folder / "lock", copy / NAME)
        with locked(epath.Path(copy)):
            pass


def _metrics(folder: Path):
    from sana_jax.training.metrics_writer import MetricsWriter

    with _copied(folder / "run") as copy, MetricsWriter(copy, step=30, steps=50) as metrics:
        metrics.write(40, {"loss": 1.0})


def _seconds(folder: Path):
    from types import SimpleNamespace

    from sana_jax.training.autoencoder.run import _training_seconds

    _training_seconds(folder / "run", SimpleNamespace(batch_size=8))


def _index(folder: Path):
    from sana_jax.data.precomputed import Precomputed

    records = Precomputed(folder / "precomputed")
    for i in range(min(len(records), 5)):
        records[i]


def _shard(folder: Path):
    from sana_jax.data.precomputed import finished_shard

    finished_shard(folder / "precomputed", 0)


def _settings(folder: Path):
    from sana_jax.data.begun import begun

    begun(folder / "encoded", {"batch_size": 8, "captions": ["a"]})


def _sizes(folder: Path):
    from sana_jax.data.sizes import _load

    _load(folder / "sizes.npz", 3)


def _archive(spec: str):
    return lambda folder: archives.reader(spec)(folder / "archives")


def _tar_index(folder: Path):
    archives.read_index(folder / "archives")


INPUTS = {
    "prompts.txt": Input("prompts.txt", _prompts("prompts.txt"), TEXT),
    "prompts.jsonl": Input("prompts.jsonl", _prompts("prompts.jsonl"), LINES),
    "manifest.jsonl": Input("pictures/manifest.jsonl", _manifest, LINES),
    "picture of a manifest": Input("pictures/000000_0.png", _manifest),
    "picture": Input("pictures/000000_0.png", _picture),
    "caption.json": Input("images/a.json", _captions, JSON),
    "caption.txt": Input("images/b.txt", _captions, TEXT),
    "model_index.json": Input("diffusers/model_index.json", _model_index, JSON),
    "transformer/config.json": Input("diffusers/transformer/config.json", _component("dit"), JSON),
    "vae/config.json": Input("diffusers/vae/config.json", _component("vae"), JSON),
    "text_encoder/config.json": Input(
        "diffusers/text_encoder/config.json", _component("text_encoder"), JSON
    ),
    "scheduler_config.json": Input("diffusers/scheduler/scheduler_config.json", _scheduler, JSON),
    "model.json": Input("native/model.json", _model_json, JSON),
    "tensors.safetensors": Input(
        "tensors.safetensors", _tensors("tensors.safetensors"), SAFETENSORS
    ),
    "index of safetensors": Input(
        "shards/dit.safetensors.index.json", _tensors("shards/dit.safetensors.index.json"), JSON
    ),
    "model.pth": Input("model.pth", _pth, PTH),
    "model.pth of before 1.6": Input("old.pth", _old_pth),
    "config.json of CLIP": Input("clip.json", _clip, JSON),
    "statistics.npz": Input("statistics.npz", _statistics),
    "tokenizer.json": Input("native/tokenizer/tokenizer.json", _tokenizer, JSON),
    "tokenizer_config.json": Input("native/tokenizer/tokenizer_config.json", _tokenizer, JSON),
    "instruction.yaml": Input("instruction.yaml", _instruction("instruction.yaml"), YAML),
    "instruction.txt": Input("instruction.txt", _instruction("instruction.txt"), TEXT),
    "lock": Input("lock", _lock, TEXT),
    "metrics.jsonl": Input("run/metrics.jsonl", _metrics, LINES),
    "metrics.jsonl of a phase": Input("run/metrics.jsonl", _seconds, LINES),
    "index.json of precomputed": Input("precomputed/index.json", _index, JSON),
    "shard.json of precomputed": Input("precomputed/shard-00000.json", _shard, JSON),
    "shard of precomputed": Input("precomputed/shard-00000.array_record", _index),
    "settings.json of precomputed": Input("encoded/settings.json", _settings, JSON),
    "sizes.npz": Input("sizes.npz", _sizes),
    "tar": Input("archives/tars/0.tar", _archive("webdataset:{folder}/tars/0.tar")),
    "wids-meta.json": Input(
        "archives/tars/wids-meta.json", _archive("webdataset:{folder}/tars"), JSON
    ),
    "captions beside a tar": Input(
        "archives/tars/0_A.json", _archive("webdataset:{folder}/tars"), JSON
    ),
    "scores beside a tar": Input(
        "archives/tars/0_A_score.json", _archive("webdataset:{folder}/tars"), JSON
    ),
    "tar of latents": Input("archives/latents/0.tar", _archive("latents:{folder}/latents")),
    "Parquet": Input("archives/parquet/x.parquet", _archive("parquet:{folder}/parquet")),
    "index of a tar": Input("archives/index.npz", _tar_index),
    "diffusers transformer": Input(
        "diffusers/transformer/config.json", _diffusers, JSON, slow=True
    ),
    "diffusers vae": Input("diffusers/vae/config.json", _diffusers, JSON, slow=True),
    "diffusers text encoder": Input(
        "diffusers/text_encoder/config.json", _diffusers, JSON, slow=True
    ),
    "native folder": Input("native/model.json", _native, JSON, slow=True),
}


def write(folder: Path) -> None:
    """Writes an example of every input."""
    from sana_jax.checkpoints import diffusers, native, random_weights
    from sana_jax.text.instruction import Instruction

    checkpoint = random_weights.make("tiny")
    checkpoint.instruction = Instruction("describe: ", "here")
    native.save(checkpoint, _new(folder / "native"))
    diffusers.save(checkpoint, folder / "diffusers")
    shutil.copy(folder / "native/dit.safetensors", folder / "tensors.safetensors")
    rows = [{"prompt": "a cat", "seed": 3}, {"prompt": "b", "height": 64, "guidance_scale": 1.5}]
    _write_lines(folder / "prompts.jsonl", rows)
    (folder / "prompts.txt").write_text("a cat\na dog, é\n\nthree\n")
    (folder / "instruction.txt").write_text("describe\nwell: ")
    chi = {"model": {"image_size": 512, "lr": 1e-4}, "text_encoder": {"chi_prompt": ["a", "b: "]}}
    (folder / "instruction.yaml").write_text(json.dumps(chi, indent=1))
    _new(folder / "locked")
    (folder / "lock").write_text("sana_jax: pid 1234, host\n")
    metrics = [{"step": step, "loss": 0.5, "images_per_second": 3.5} for step in (10, 20, 30, 40)]
    _new(folder / "run")
    _write_lines(folder / "run/metrics.jsonl", metrics)
    _write_pictures(folder)
    _write_tensors(folder, checkpoint)
    _write_precomputed(folder)
    archives.write(_new(folder / "archives"))


def _write_pictures(folder: Path) -> None:
    import numpy as np

    from sana_jax.batch.outputs import OutputFolder
    from sana_jax.data.sizes import _save

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    with OutputFolder(str(folder / "pictures"), _wanted(2), NOTES) as pictures:
        for file in _wanted(2):
            pictures.save(file, pixels)
    _new(folder / "images")
    for name in "ab":
        shutil.copy(folder / "pictures/000000_0.png", folder / f"images/{name}.png")
    caption = {"captions": ["a cat", "b"], "scores": [25.5, 30], "truth": {"captions": [
        {"style": "short"}, {"style": "long"}]}}  # fmt: skip
    (folder / "images/a.json").write_text(json.dumps(caption))
    (folder / "images/b.txt").write_text("a cat\nanother\n")
    _save(folder / "sizes.npz", np.full((3, 2), 64, np.int32), np.zeros(3, np.uint8))


def _write_tensors(folder: Path, checkpoint) -> None:
    import numpy as np
    import torch
    from flax import traverse_util

    from sana_jax.checkpoints.tensors import write_tensors

    flat = traverse_util.flatten_dict(checkpoint.params["dit"], sep="/")
    write_tensors(flat.items(), folder / "shards", "dit", max_shard_bytes=200_000)
    tensors = {
        "x_embedder.proj.weight": torch.ones(64, 4, 1, 1),
        "blocks.0.mlp.point_conv.conv.weight": torch.ones(64, 160, 1, 1).half(),
        "y_embedder.y_proj.fc1.weight": torch.ones(64, 48),
        "pos_embed": torch.ones(1, 16, 64).bfloat16()[:, ::2],
    }
    contents = {"state_dict": tensors, "state_dict_ema": tensors, "epoch": 3, "lr": 1e-4}
    torch.save(contents, folder / "model.pth")
    contents |= {"weight": torch.ones(3, 4), "bias": torch.ones(3).half()}
    torch.save(contents, folder / "old.pth", _use_new_zipfile_serialization=False)
    np.savez_compressed(folder / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    tower = {"hidden_size": 48, "num_attention_heads": 4, "hidden_act": "gelu"}
    groups = {"text_config": tower | {"eos_token_id": 2}, "vision_config": tower}
    (folder / "clip.json").write_text(json.dumps({"model_type": "clip"} | groups))


def _write_precomputed(folder: Path) -> None:
    import numpy as np

    from sana_jax.data.precomputed import FORMAT, ShardWriter, write_json

    with ShardWriter(_new(folder / "precomputed"), 0) as shard:
        for i in range(3):
            latents = np.ones((2, 2, 4), np.float32)
            record = {"key": str(i), "captions": ["a"], "scores": [], "truth": ""}
            shard.add(record | {"latents": latents, "scaled": True})
        entry = shard.finish({"rejected": {}})
    index = {"format": FORMAT, "split": "train", "shards": [entry], "text": None}
    write_json(folder / "precomputed/index.json", index | {"scaling_factor": 0.4})
    _new(folder / "encoded")
    write_json(folder / "encoded/settings.json", {"batch_size": 8, "captions": ["a"]})


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
