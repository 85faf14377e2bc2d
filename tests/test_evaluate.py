"""The command as a user meets it."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import module_for
from sana_jax.shapes.evaluation import Options
from tests import commands, mini, toy_clip
from tests.metrics.test_lpips import Twin

ROOT = Path(__file__).parents[1]
SIZE = 48


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An autoencoder that stands alone, and a folder of pictures, one of them none."""
    path = tmp_path_factory.mktemp("shared")
    mini.save(path / "whole")
    alone = mini.alone(path / "whole")
    native.save(alone, path / "checkpoint")
    (path / "run").mkdir()
    native.save(alone, path / "run" / "model")
    params = _arrays(alone.params["vae"])
    params["decoder"]["conv_out"]["kernel"] *= np.float32(3e38)
    native.save(dataclasses.replace(alone, params={"vae": params}), path / "overflowing")
    twin = Twin("alex")
    torch.save(twin.package(), path / "alex.pth")
    (path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(5):
        picture = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(picture).resize((64, 52)).save(path / "pictures" / f"{i}.png")
    (path / "pictures" / "2.jpg").write_text("<html>not found</html>")
    return path


def environment(cwd):
    return os.environ | dict(PYTHONPATH=str(ROOT), XLA_FLAGS="", XDG_CACHE_HOME=str(cwd / "caches"))


def several(lines, cwd):
    return commands.several("sana_jax.evaluate", lines, cwd, environment(cwd))


def test_reconstruction(shared, tmp_path):
    """The figures are scikit-image's, of what the network makes of the same squares."""
    line = [sys.executable, "-m", "sana_jax.evaluate", "--task=reconstruction", f"--size={SIZE}"]
    line += [f"--checkpoint={shared / 'checkpoint'}", f"--data={shared / 'pictures'}"]
    line += ["--batch_size=2", "--out=pairs.png", f"--lpips_weights={shared / 'alex.pth'}"]
    result = subprocess.run(
        line, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.strip().splitlines()
    found = json.loads(last)

    checkpoint = native.open_folder(shared / "checkpoint")
    draw = jax.jit(module_for(checkpoint.vae, "float32").apply)
    params = {"params": _arrays(checkpoint.params["vae"])}
    psnr, ssim, lpips, twin = [], [], [], Twin("alex")
    for file in sorted((shared / "pictures").glob("*.png")):
        middle = (6, 0, 58, 52)
        image = Image.open(file).resize((SIZE, SIZE), Image.Resampling.BICUBIC, middle)
        image = np.asarray(image)
        drawn = draw(params, jnp.asarray(image[None] / np.float32(127.5) - 1))[0]
        drawn = np.floor(255 * (np.asarray(drawn, np.float64) + 1) / 2 + 0.5)
        drawn = drawn.clip(0, 255).astype(np.uint8)
        psnr.append(peak_signal_noise_ratio(image, drawn, data_range=255))
        options = dict(sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)
        ssim.append(structural_similarity(image, drawn, gaussian_weights=True, **options))
        lpips.append(twin(*(x[None] / np.float32(127.5) - 1 for x in (image, drawn)))[0])
    assert found["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert found["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)
    assert found["lpips"] == pytest.approx(np.mean(lpips), rel=1e-3)
    assert found["task"] == "reconstruction"
    assert (found["count"], found["split"], found["size"]) == (5, None, SIZE)
    assert found["rejected"] == {"not_an_image": 1}
    # 12 x 12 latents of 8 channels are 1152 values.
    assert found["baseline_size"] == [19, 19] and found["baseline_psnr"] > found["psnr"]
    assert any(
        line.startswith("reconstruction") and f"{np.mean(psnr):.2f}" in line for line in table
    )
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.height >= 2 * SIZE and sheet.width >= 2 * SIZE
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.png", "caches"}


def _arrays(tree):
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    return np.asarray(tree)


def test_bad_input_is_one_line_and_writes_nothing(shared, tmp_path):
    checkpoint, pictures = f"--checkpoint={shared / 'checkpoint'}", f"--data={shared / 'pictures'}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jpg").write_text("<html>")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "small" / "a.png")
    (tmp_path / "weights.pth").write_text("<html>not found</html>")
    sana = ["--protocol=sana", "--reference=empty"]
    fid = ["--task=fid", pictures, "--weights=weights.pth"]
    cases = {
        "--checkpoint is missing": [pictures],
        f"give {shared / 'run' / 'model'}": [f"--checkpoint={shared / 'run'}", pictures],
        "no checkpoint 'nowhere'": ["--checkpoint=nowhere", pictures],
        "--task": ["--task=generation", checkpoint, pictures],
        "nowhere: there is no such folder": [checkpoint, "--data=nowhere"],
        "precomputed:x: these are latents": [checkpoint, "--data=precomputed:x"],
        "no split 'val'": [checkpoint, pictures, "--split=val"],
        "--size=50 is not a multiple of 4: try 48 or 52": [checkpoint, pictures, "--size=50"],
        "size": [checkpoint, pictures, "--size=0"],
        "count": [checkpoint, pictures, "--count=0"],
        "batch": [checkpoint, pictures, "--batch_size=-1"],
        "web page": [checkpoint, pictures, "--lpips_weights=weights.pth"],
        "none.pth is missing": [checkpoint, pictures, "--lpips_weights=none.pth"],
        "ends with .png": [checkpoint, pictures, "--out=pairs.jpg"],
        "make it first": [checkpoint, pictures, "--out=new/pairs.png"],
        "is a folder": [checkpoint, pictures, "--out=folder.png"],
        "none of the first records can be used": [checkpoint, "--data=empty"],
        "a.png, too_small: 20 x 20": [checkpoint, "--data=small", "--out=pairs.png"],
        "NaN or infinite": [f"--checkpoint={shared / 'overflowing'}", pictures, "--size=16"],
        "--data_dir": [checkpoint, "--data=shapes", "--split=train"],
        "--seed is not of --task=reconstruction": [checkpoint, pictures, "--seed=0"],
        "--data is not of --task=shapes": [checkpoint, pictures, "--task=shapes"],
        "--seed is not of --task=fid": ["--seed=0", pictures, "--task=fid"],
        "--prompts is missing; --task=fid": [*fid, checkpoint, "--reference=empty"],
        "--checkpoint is missing; --task=fid": [*fid, "--variant=fp16", "--reference=empty"],
        "--data is missing; --task=fid": ["--task=fid", "--weights=weights.pth"],
        "--weights is missing; --task=cmmd": ["--task=cmmd", pictures],
        "--reference is missing; --task=cmmd": ["--task=cmmd", pictures, "--weights=x"],
        "--reference is missing; without it": ["--task=fid", pictures, "--weights=x"],
        "x is no folder: give one with CLIP": ["--task=clip_score", pictures, "--weights=x"],
        "statistics is written; give it": [*fid, "--statistics=out.txt"],
        "weights.pth is a web page": [*fid, "--reference=empty"],
        "none.npz is missing": [*fid, "--reference=none.npz"],
        "--resize": [*fid, "--reference=empty", "--resize=lanczos"],
        "--size is decided by --protocol=sana": [*fid, *sana, "--size=256"],
    }
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    answers = several(list(cases.values()), tmp_path)
    for (words, arguments), (status, _, told) in zip(cases.items(), answers, strict=True):
        assert status == 2, (arguments, told)
        assert told.startswith("error: ") and told.count("\n") == 1, told
        assert words in told, (words, told)
    assert sorted(tmp_path.rglob("*")) == before


def test_shapes(shared, tmp_path):
    """Random weights draw nothing that is right; the ground truth is parsed without an error."""
    arguments = ["--task=shapes", "--count=6", "--batch_size=4", "--size=64"]
    options = Options(count=6, batch_size=4, size=64, guidance_scale=2.0)
    cases = [
        [f"--checkpoint={shared / 'whole'}", "--num_steps=2", "--out=sheet.png"],
        [f"--checkpoint={shared / 'checkpoint'}"],
        [f"--checkpoint={shared / 'overflowing'}", "--out=none.png"],
        [f"--checkpoint={shared / 'checkpoint'}", "--size=50"],
        [f"--checkpoint={shared / 'checkpoint'}", "--novel"],
        [f"--checkpoint={shared / 'checkpoint'}", "--num_steps=2"],
    ]
    answers = several([arguments + case for case in cases], tmp_path)
    lines = "".join(out for _, out, _ in answers).splitlines()
    whole, alone, novel = (json.loads(line) for line in lines if line.startswith("{"))
    assert novel["novel"] == "yellow green" and not {"novel"} & {*whole, *alone}
    assert any("6 held-out prompts with yellow green, 64 px" in line for line in lines)
    for found in (whole, alone, novel):
        assert (found["prompts"], found["pixels"]) == (6, 64)
        assert found["parser_overall"] == 1 and found["ceiling"] == 0
        # What no flag says is as in Python.
        steps = {"num_steps": 2 if found is whole else 20}
        assert found["options"] == dataclasses.asdict(options) | steps
        told = ast.get_docstring(ast.parse((ROOT / "sana_jax/evaluate.py").read_text()))
        assert not [key for key in found if not re.search(rf"\b{key}\b", told)]
    names = ("overall", "count", "shape", "colour", "position", "relation", "control_shuffled")
    assert whole["overall"] == whole["control_shuffled"] == 0 and whole["facts"] < 0.5
    assert set(whole["by_objects"]) == set("1234") and set(whole["by_style"]) == {"short", "long"}
    assert all(alone[name] is None for name in (*names, "facts"))
    assert any(line.startswith("note: ") for line in lines)
    told = [told for _, _, told in answers]
    assert "reconstructs some pictures with NaN or infinite" in told[2]
    assert "--size=50 is not a multiple of 4" in told[3]
    assert "checkpoint lacks a transformer, so it draws nothing" in told[5]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 70 + 5 * 2, 70)
    assert not (tmp_path / "none.png").exists()


def test_a_protocol_draws_what_is_missing_and_names_every_choice(shared, tmp_path):
    toy_clip.save(tmp_path / "clip")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "thing {i}"}}\n' for i in range(3)))
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "num_steps": 2}')
    command = ["--task=clip_score", "--weights=clip", f"--checkpoint={shared / 'whole'}"]
    run = [*command, "--data=run", "--prompts=p.jsonl"]
    clean = [*command[:2], "--data=run", "--protocol=clean"]
    cases = {
        "--protocol is missing, which says how": run,
        "--prompts is missing": [*command, "--data=run", "--protocol=sana"],
        "--checkpoint is missing": [*command[:2], "--data=run", "--prompts=p.jsonl"],
        "there is no such folder": [*clean, "--data=nowhere"],
        "none.jsonl: No such file": [*run, "--protocol=sana", "--prompts=none.jsonl"],
        "own.jsonl line 1: num_steps is decided": [*run, "--protocol=sana", "--prompts=own.jsonl"],
        "x is no folder: give one with CLIP": [*run, "--protocol=sana", "--weights=x"],
        "no checkpoint 'none'": [*run, "--protocol=sana", "--checkpoint=none"],
    }
    before = sorted(tmp_path.iterdir())
    answers = several(list(cases.values()), tmp_path)
    for words, (status, _, told) in zip(cases, answers, strict=True):
        assert status == 2 and told.count("\n") == 1 and words in told, (words, told)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "caches"] == before

    two = [*command, "--data=two", "--prompts=p.jsonl", "--protocol=sana", "--count=2"]
    lines = [two, [*run, "--protocol=sana"], [*clean, "--count=2"]]
    answers = several(lines, tmp_path)
    assert [status for status, _, _ in answers] == [0, 0, 0], answers
    two, sana, other = (json.loads(out.splitlines()[-1]) for _, out, _ in answers)
    next((tmp_path / "run").glob("000001*.png")).unlink()  # which the same command draws again
    (_, again, told), *_ = several([lines[1]], tmp_path)
    assert json.loads(again.splitlines()[-1]) == sana and "1 image in" in told
    assert (two["count"], sana["count"]) == (2, 3) and sana["deviations"] == []
    assert (sana["jpeg"], other["jpeg"]) == (True, False) and other["deviations"] == []
    assert (sana["jpeg_quality"], sana["seeds"], other["seeds"]) == (75, [0, 2], [0, 1])
    drawing = dict(sampler="flow_dpm_solver", num_steps=20, guidance_scale=4.5, batch_size=3)
    drawing |= dict(unconditional_mask="prompt", flow_shift=3.0, negative_prompt="", height=64)
    assert drawing.items() <= sana["drawing"].items()
    told = ast.get_docstring(ast.parse((ROOT / "sana_jax/evaluate.py").read_text()))
    names = "drawing", "seeds", "prompts_sha256", "deviations", "jpeg_quality"
    assert all(name in sana and re.search(rf"\b{name}\b", told) for name in names)


def test_a_killed_measurement_of_pictures_goes_on(tmp_path):
    """SIGKILL at the first batches; then the figures are those of an unbroken run, to the bit."""
    toy_clip.save(tmp_path / "clip")
    random = np.random.default_rng(0)
    for name, count in (("data", 120), ("reference", 9)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:03}.png")
    (tmp_path / "data" / "060.png").write_text("cut short")
    command = ["-m", "sana_jax.evaluate", "--task=cmmd", "--weights=clip", "--data=data"]
    command += ["--reference=reference", "--batch_size=1"]
    killed = subprocess.Popen(
        [sys.executable, *command, "--workdir=killed"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def done():
        return len(list((tmp_path / "killed").glob("*/0*.npz")))

    while done() < 3 and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    assert killed.communicate()[0] == b"" and 3 <= done() < 129
    lines = [[*command[2:], f"--workdir={name}"] for name in ("killed", "whole")]
    (status, told, err), (_, last, _) = several(lines, tmp_path)
    assert status == 0, err
    found, expected = (json.loads(out.splitlines()[-1]) for out in (told, last))
    assert found.pop("workdir") == "killed" and expected.pop("workdir") == "whole"
    assert found == expected and found["count"] == 119 and found["cmmd"] > 0
    assert list(found["rejected_pictures"]) == ["060.png"]
    described = ast.get_docstring(ast.parse((ROOT / "sana_jax/evaluate.py").read_text()))
    assert re.search(r"\bcmmd\b", described) and "119 pictures, 1 left out" in told
