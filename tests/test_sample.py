"""The command as a user meets it: statuses, one line of complaint, signals and kills."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import PATIENCE, commands, mini

ROOT = Path(__file__).parents[1]
# python -m sana_jax.sample, which hears Ctrl-C even where a parent ignores it.
MAIN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("sana_jax.sample", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A checkpoint and what all runs keep of their compilations."""
    path = tmp_path_factory.mktemp("shared")
    mini.save(path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def environment(shared):
    """One device, and the default folder of compilations."""
    changes = dict(PYTHONPATH=str(ROOT), XLA_FLAGS="", XDG_CACHE_HOME=str(shared / "caches"))
    return os.environ | changes | dict(JAX_COMPILATION_CACHE_DIR="")


@pytest.fixture
def sample(shared, environment, tmp_path):
    """Starts the command in an empty folder."""

    def start(*arguments, **changes):
        (tmp_path / "here").mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, f"--checkpoint={shared / 'checkpoint'}", *arguments],
            cwd=tmp_path / "here",
            env=environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


MISTAKES = [
    (["--prompt=", "--height=0"], "--height=0: it takes a whole number of pixels above 0"),
    (["--prompt=a", "--height=-32"], "--height=-32"),
    (["--prompt=a", "--height=32.5"], "--height=32.5"),
    (["--prompt=a", "--height=nan"], "--height=nan"),
    (["--prompt=a", "--guidance_scale=nan"], "--guidance_scale=nan"),
    (["--prompt=a", "--guidance_scale=-1"], "--guidance_scale=-1"),
    (["--prompt=a", "--num_steps=1000000000"], "--num_steps=1000000000: it takes"),
    (["--prompt=a", "--seed=-1"], "--seed=-1: it takes a whole number in 0 .. 18446744"),
    (["--prompt=a", f"--seed={2**64}"], "--seed=18446744073709551616"),
    (["--prompt=a", f"--seed={2**64 - 1}", "--num_images_per_prompt=2"], "seeds count up"),
    (["--prompt=a", "--seed=randomly"], "--seed=randomly"),
    (["--prompt=a", "--unconditional_mask=x"], "--unconditional_mask=x"),
    (["--prompt=a", "--candidates=1", "--judge=clip"], "--candidates=1"),
    (["--prompt=a", "--candidates=4"], "--judge is missing"),
    (["--prompt=a", "--judge=clip"], "--judge is of no use without --candidates=N"),
    (["--prompt=a", "--candidates=4", "--judge=clip"], "--judge_weights is missing"),
    (["--prompt=a", "--candidates=4", "--judge=no-judge"], "there is no program 'no-judge'"),
    (["--prompt=a", "--candidates=4", "--judge=true", "--out=gs://a/b"], "local folders only"),
    (["--prompt=a", "--sampler=ddim"], "--sampler=ddim"),
    (["--prompt=a", "--dtype=float64"], "--dtype=float64"),
    (["--prompt=a", "--flow_shift=inf"], "--flow_shift inf is not a number in 0.001 .. 1000"),
    (["--prompt=a", "--tile=16,32"], "stride"),
    (["--prompt=a", "--no_instruction", "--instruction_file=F"], "--no_instruction and --inst"),
    (["--prompt=a", "--out="], "--out= is empty"),
    (["--prompt=a", "--guidance_interval=0.9,0.1"], "--guidance_interval=0.9,0.1"),
    (["--prompt=a", "--guidance_interval=low"], "--guidance_interval=low"),
    (["--prompt=a", "--angles=1.5,low"], "--angles=1.5,low: give angles"),
    (["--prompt=a", "--angles=1.5,0"], "--angles are for Sana-Sprint, which this checkpoint"),
    (["--prompt=a", "--image=a.png", "--strength=0"], "--strength=0.0: it takes a number abo"),
    (
        ["--prompt=a", "--mask=m.png"],
        "--mask=m.png is of no use without an image: give --image",
    ),
    (["--prompt=a", "--image=absent.png"], "--image=absent.png: No such file"),
    (["--prompt=a", "--batch_size=0"], "--batch_size=0"),
    (["--prompt=a", "--prompts=b.txt"], "give one of --prompt"),
    ([], "give one of --prompt"),
    (["--prompts=absent.txt"], "--prompts=absent.txt: No such file"),
    (["--prompt=a", "--heigth=64"], "did you mean --height?"),
    (["--prompt=a", "--checkpoint=absent"], "no checkpoint 'absent'"),
    (["--prompt=a", "--out=/proc/nothing"], "--out=/proc/nothing: "),
    (["--prompt=a", "--lora=absent.safetensors:0.5"], "no LoRA 'absent.safetensors'"),
    (["--prompt=a", "--lora=absent.safetensors:much"], "the weight 'much' is no number"),
    (["--prompt=a", "--lora="], "a path is empty"),
]


@pytest.fixture(scope="module")
def answers(shared, environment, tmp_path_factory):
    """What the command answers to each of MISTAKES; it has written nothing."""
    here = tmp_path_factory.mktemp("here")
    given = [f"--checkpoint={shared / 'checkpoint'}", "--out=out"]
    found = commands.answers("sana_jax.sample", MISTAKES, given, here, environment)
    assert names(here) == []
    return found


@pytest.mark.parametrize("arguments, words", MISTAKES)
def test_mistake_is_one_line_and_nothing_is_written(answers, arguments, words):
    status, stdout, stderr = answers[tuple(arguments)]
    assert (status, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert words in stderr


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_no_device(sample, platform):
    status, stdout, stderr = finish(sample("--out=out", "--prompt=a", JAX_PLATFORMS=platform))
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert f"error: no device for JAX_PLATFORMS={platform}: " in stderr


def test_draws_into_out_and_nowhere_else(sample, tmp_path, shared):
    prompt = "../../etc/x\n🎨 שלום " + "very long " * 10_000
    arguments = "--out=out", "--num_steps=2", "--seed=7", "--grid", "--prompt=" + prompt
    status, stdout, stderr = finish(sample(*arguments))
    assert (status, stdout) == (0, "out/000000_7.png\n"), stderr
    assert "prompts were cut" in stderr and "1 image in" in stderr
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == ["out"]
    assert names(tmp_path / "here/out") == ["000000_7.png", "grid.png", "manifest.jsonl"]
    with Image.open(tmp_path / "here/out/000000_7.png") as image:
        assert image.size == (mini.NATIVE_SIZE, mini.NATIVE_SIZE)
        assert image.text["prompt"] == prompt
    assert names(shared / "caches" / "sana_jax")


def test_fields_of_other_programs_and_a_random_seed_are_in_the_manifest(sample, tmp_path):
    given = [{"prompt": "a", "tag": "two", "include": [{"class": "cat", "count": 2}], "seed": None}]
    given.append({"prompt": "b", "seed": 2**64 - 1, "height": None})
    (tmp_path / "p.jsonl").write_text("\r\n".join(map(json.dumps, given)))
    arguments = f"--prompts={tmp_path / 'p.jsonl'}", "--num_steps=1", "--out=out", "--height=32"
    status, _, stderr = finish(sample(*arguments, "--seed=random"))
    assert status == 0, stderr
    seed = int(re.search(r"--seed=(\d+) was drawn", stderr)[1])
    found = [json.loads(line) for line in lines(tmp_path / "here/out")]
    assert [line["seed"] for line in found] == [seed, 2**64 - 1]
    assert found[0]["include"] == given[0]["include"] and found[0]["tag"] == "two"
    assert names(tmp_path / "here/out")[:2] == [f"000000_{seed}.png", f"000001_{2**64 - 1}.png"]
    status, _, stderr = finish(sample(*arguments, f"--seed={seed}"))
    assert status == 0 and "nothing to draw: 2 of 2 images are done" in stderr


def test_the_best_of_several_is_kept_and_a_judge_that_stops_goes_on(sample, tmp_path):
    (tmp_path / "judge.py").write_text(
        "import os, sys\n"
        "for i, line in enumerate(sys.stdin):\n"
        "    path, _, prompt = line.rstrip('\\n').partition('\\t')\n"
        "    assert prompt == 'a fox' and os.path.isfile(path)\n"
        "    if i == 2 and not os.path.exists('again'):\n"
        "        open('again', 'w'); sys.exit(9)\n"
        "    print(os.path.getsize(path), flush=True)\n"
    )
    arguments = "--prompt=a fox", "--num_steps=1", "--out=out", "--candidates=4"
    arguments += (f"--judge={sys.executable} {tmp_path / 'judge.py'}", "--height=32")
    status, _, stderr = finish(sample(*arguments))
    assert status == 2 and "it ended with status 9 after 2 of 4 pictures" in stderr
    assert len(lines(tmp_path / "here/out/candidates")) == 4
    status, stdout, stderr = finish(sample(*arguments))
    assert status == 0 and "nothing to draw: 4 of 4" in stderr, stderr
    (line,) = map(json.loads, lines(tmp_path / "here/out"))
    assert stdout == f"out/{line['file']}\n"
    sizes = [path.stat().st_size for path in (tmp_path / "here/out/candidates").glob("*.png")]
    assert (tmp_path / "here/out" / line["file"]).stat().st_size == max(sizes) == line["score"]


def test_draws_from_a_picture_and_finds_it_again(sample, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in/a.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "in/m.png")
    (tmp_path / "in/p.jsonl").write_text('{"prompt": "a", "image": "a.png", "mask": "m.png"}')
    arguments = f"--prompts={tmp_path / 'in/p.jsonl'}", "--num_steps=2", "--out=out"
    status, stdout, stderr = finish(sample(*arguments, "--strength=0.9"))
    assert (status, stdout) == (0, "out/000000_0.png\n"), stderr
    with Image.open(tmp_path / "here/out/000000_0.png") as image:
        assert image.size == (32, 32) and image.crop((0, 0, 16, 32)).getcolors() == [
            (16 * 32, (255, 0, 0))
        ]
    status, _, stderr = finish(sample(*arguments, "--strength=0.9"))
    assert status == 0 and "nothing to draw: 1 of 1 images are done" in stderr
    status, _, stderr = finish(sample(*arguments, "--strength=0.8"))
    assert status == 2 and "strength 0.9 -> 0.8" in stderr and stderr.count("\n") == 1


def lines(out) -> list[bytes]:
    manifest = out / "manifest.jsonl"
    return manifest.read_bytes().split(b"\n")[:-1] if manifest.exists() else []


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def wait_for(process, out, count: int) -> None:
    while len(lines(out)) < count and process.poll() is None:
        time.sleep(0.002)


def assert_whole(out) -> None:
    """Of a run that was not killed: every picture is whole and has its line, and nothing else."""
    files = {json.loads(line)["file"] for line in lines(out)}
    assert {*names(out)} == files | {"manifest.jsonl"} and len(files) == len(lines(out))
    for file in files:
        with Image.open(out / file) as image:
            image.load()


def test_killed_and_resumed_is_unbroken(sample, tmp_path):
    """Three kills, SIGTERM and Ctrl-C at random moments change no byte."""
    prompts, out, unbroken = (tmp_path / name for name in ("p.txt", "out", "unbroken"))
    prompts.write_text("\n".join(f"a thing number {i}" for i in range(32)))
    command = f"--prompts={prompts}", "--batch_size=3", "--num_steps=100", "--height=96"
    reference = sample(*command, f"--out={unbroken}")
    generator, seen = random.Random(0), 0
    kill = signal.SIGKILL, -9
    for number, expected in [kill, (signal.SIGTERM, 143), kill, (signal.SIGINT, 130), kill]:
        process = sample(*command, f"--out={out}")
        wait_for(process, out, seen + 1)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(number)
        start = time.monotonic()
        status, stdout, stderr = finish(process)
        assert (status, stdout) == (expected, ""), stderr
        assert time.monotonic() - start < 10
        if number != signal.SIGKILL:
            assert stderr == {143: "terminated\n", 130: "interrupted\n"}[expected]
            assert_whole(out)
        seen = len(lines(out))
    assert 0 < seen < 32
    for process, count in (sample(*command, f"--out={out}"), 32 - seen), (reference, 32):
        status, stdout, stderr = finish(process)
        assert status == 0 and f"{count} image" in stderr and "32 pictures in" in stdout, stderr
    assert_whole(out)
    assert contents(out) == contents(unbroken) and len(lines(out)) == 32


@pytest.mark.slow
def test_a_thousand_prompts(sample, tmp_path):
    """The device works for 90 % of the time; killed three times, the bytes are those of one run.

    With random weights on a CPU, 128 px: `pytest -m slow -rP tests/test_sample.py` shows figures.
    """
    maker = [sys.executable, "-m", "sana_jax.random_checkpoint", f"--out={tmp_path / 'tiny'}"]
    subprocess.run(maker, cwd=ROOT, check=True)
    prompts, out, unbroken = (tmp_path / name for name in ("p.txt", "out", "unbroken"))
    prompts.write_text("\n".join(f"a {'red blue'.split()[i % 2]} thing {i}" for i in range(1000)))
    command = f"--checkpoint={tmp_path / 'tiny'}", f"--prompts={prompts}", "--num_steps=8"
    command += "--height=128", "--width=128"
    status, _, stderr = finish(sample(*command, f"--out={unbroken}"))
    print("unbroken:", stderr)
    assert status == 0
    assert float(re.search(r"busy ([\d.]+)%", stderr)[1]) >= 90
    generator = random.Random(1)
    for count in (100, 400, 700):
        process = sample(*command, f"--out={out}")
        wait_for(process, out, count)
        time.sleep(generator.uniform(0, 0.5))
        process.kill()
        assert finish(process)[0] == -9
        print("killed with", len(lines(out)), "lines,", len(names(out)), "files")
    status, _, stderr = finish(sample(*command, f"--out={out}"))
    print("resumed:", stderr)
    assert status == 0
    assert_whole(out)
    assert contents(out) == contents(unbroken) and len(lines(out)) == 1000
