"""Conversion between layouts: exact, in bounded memory, and nothing left where it fails."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline as TheirPipeline
from flax import traverse_util
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from sana_jax import SanaPipeline, checkpoints, random_checkpoint
from sana_jax.checkpoints import scale
from sana_jax.checkpoints.components import param_shapes
from sana_jax.checkpoints.diffusers_configs import dc_ae_from_diffusers
from sana_jax.checkpoints.find import file_sha256
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.sharding import make_mesh
from tests import commands, toy
from tests.checkpoints.test_nvlabs import official

ROOT = Path(__file__).parents[1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def convert(*flags, environment=None):
    command = [sys.executable, "-m", "sana_jax.convert", *flags]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def refused(result, *words):
    """One line, status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if "B/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def theirs():
    return toy.pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "model"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def native(folder, tmp_path_factory):
    """diffusers -> native, in small shards, with an instruction of its own."""
    out = tmp_path_factory.mktemp("native") / "model"
    instruction = out.parent / "instruction.txt"
    instruction.write_text("think of: ")
    flags = f"--instruction_file={instruction}", "--max_shard_mb=1"
    result = convert(f"--source={folder}", f"--out={out}", *flags)
    assert result.returncode == 0, result.stderr
    assert "instruction.txt" in result.stdout
    return out


def tensors(folder: Path) -> dict:
    """All tensors under a folder, as (bits, dtype)."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.relative_to(folder)}/{name}": array
        for file in files
        for name, array in load_file(file).items()
    }


def assert_same_bits(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_clip_attention_is_stored(native, tmp_path):
    out = tmp_path / "out"
    assert convert(f"--source={native}", f"--out={out}", "--clip_attention").returncode == 0
    assert json.loads((out / "model.json").read_text())["dit"]["clip_attention"] is True
    assert json.loads((native / "model.json").read_text())["dit"]["clip_attention"] is None


def test_instruction_is_stored(native):
    model = json.loads((native / "model.json").read_text())
    assert model["instruction"]["text"] == "think of: "
    assert model["instruction"]["source"] == "instruction.txt"
    assert len(model["instruction"]["sha256"]) == 64


def test_round_trip_to_the_bit(folder, native, tmp_path):
    """diffusers -> native -> diffusers -> native."""
    back, again = tmp_path / "back", tmp_path / "again"
    assert convert(f"--source={native}", f"--out={back}", "--format=diffusers").returncode == 0
    assert_same_bits(tensors(back), tensors(folder))
    instruction = native.parent / "instruction.txt"
    flags = f"--instruction_file={instruction}", "--max_shard_mb=1"
    assert convert(f"--source={back}", f"--out={again}", *flags).returncode == 0
    assert_same_bits(tensors(again), tensors(native))
    for name in ("dit", "vae", "text_encoder", "instruction", "sampler"):
        first, second = (json.loads((f / "model.json").read_text())[name] for f in (native, again))
        assert first == second, name


def test_diffusers_draws_the_same_picture_from_our_folder(theirs, native, tmp_path):
    out = tmp_path / "out"
    assert convert(f"--source={native}", f"--out={out}", "--format=diffusers").returncode == 0
    latents = torch.tensor(np.random.default_rng(0).standard_normal((1, 8, 4, 4), np.float32))

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        size = dict(height=128, width=128, use_resolution_binning=False)
        with torch.no_grad():
            return pipe("a cat", latents=latents, num_inference_steps=3, **size).images[0]

    found, expected = draw(TheirPipeline.from_pretrained(out)), draw(theirs)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_native_and_diffusers_folders_draw_alike(folder, native):
    mesh = make_mesh(devices=toy.devices(1))
    pictures = [
        SanaPipeline.from_pretrained(str(path), dtype="float32", mesh=mesh)(
            "a cat", height=128, width=128, num_steps=2, instruction=None, output="np"
        )
        for path in (folder, native)
    ]
    np.testing.assert_array_equal(*pictures)


def test_batch_norm_survives(tmp_path):
    """torch's counters are written too: diffusers loads the autoencoder without complaint."""
    pipe = toy.pipeline()
    norms = ("batch_norm",) * 3 + ("rms_norm",) * 3
    pipe.vae = toy.autoencoder(decoder_norm_types=norms)
    source, middle, out = (tmp_path / name for name in ("source", "middle", "out"))
    pipe.save_pretrained(source)
    assert convert(f"--source={source}", f"--out={middle}").returncode == 0
    assert convert(f"--source={middle}", f"--out={out}", "--format=diffusers").returncode == 0
    again = TheirPipeline.from_pretrained(out).vae.state_dict()
    for name, tensor in pipe.vae.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(folder, tmp_path, dtype):
    """The autoencoder and Gemma do not fit float16: they become bfloat16."""
    out = tmp_path / "out"
    result = convert(f"--source={folder}", f"--out={out}", f"--dtype={dtype}")
    assert result.returncode == 0, result.stderr
    for stem, expected in (("dit", dtype), ("vae", "bfloat16"), ("text_encoder", "bfloat16")):
        (types,) = {array.dtype.name for array in load_file(out / f"{stem}.safetensors").values()}
        assert types == expected
    kernel = load_file(out / "dit.safetensors")["proj_out/kernel"]
    exact = load_file(folder / WEIGHTS)["proj_out.weight"].T
    np.testing.assert_array_equal(kernel, exact.astype(kernel.dtype))


def test_vae_alone(tmp_path):
    """A native folder may hold the autoencoder alone; such a folder draws nothing."""
    from sana_jax.checkpoints.components import Checkpoint
    from sana_jax.checkpoints.load import open_checkpoint

    vae = toy.autoencoder()
    config = dc_ae_from_diffusers(dict(vae.config))
    params = {"vae": toy.params(vae, config)}
    checkpoints.native.save(Checkpoint(vae=config, params=params), tmp_path / "vae")
    found = open_checkpoint(str(tmp_path / "vae"))
    assert found.dit is None and found.vae == config
    jax.tree.map(np.testing.assert_array_equal, found.params["vae"], params["vae"])
    with pytest.raises(ValueError, match="lacks dit, text_encoder"):
        SanaPipeline.from_pretrained(str(tmp_path / "vae"))
    result = convert(
        f"--source={tmp_path / 'vae'}", f"--out={tmp_path / 'out'}", "--format=diffusers"
    )
    refused(result, "dit", "text_encoder")
    assert not (tmp_path / "out").exists()


def test_a_wrong_scaling_factor_is_noticed(tmp_path):
    """In checkpoints that say they are trained: of random weights there is nothing to expect."""
    made = random_checkpoint.make("tiny")
    right = made.vae.scaling_factor / scale.latent_scale(made)

    def stderr(name, factor, provenance):
        vae = dataclasses.replace(made.vae, scaling_factor=factor)
        checkpoints.native.save(
            dataclasses.replace(made, vae=vae, provenance=provenance), tmp_path / name
        )
        result = convert(f"--source={tmp_path / name}", f"--out={tmp_path / name}_out")
        assert result.returncode == 0
        return [line for line in result.stderr.splitlines() if "scaling_factor" in line]

    assert stderr("right", right, {"trained": True}) == []
    (line,) = stderr("wrong", 1.4 * right, {"trained": True})
    assert "mean square of 1.40" in line
    assert stderr("random", 1.4 * right, {}) == []


def test_a_fine_tunes_transformer_with_the_rest_of_another(folder, tmp_path):
    module, config = toy.transformer(seed=1)
    source, out = tmp_path / "tune" / "transformer", tmp_path / "out"
    module.save_pretrained(source)
    result = convert(f"--source={source}", f"--rest={folder}", f"--out={out}")
    assert result.returncode == 0, result.stderr
    found, rest = open_checkpoint(str(out)), open_checkpoint(str(folder))
    assert found.dit == config and found.flow_shift == rest.flow_shift
    jax.tree.map(np.testing.assert_array_equal, found.params["dit"], toy.params(module, config))
    for name in "vae", "text_encoder":
        jax.tree.map(np.testing.assert_array_equal, found.params[name], rest.params[name])
    told = {"source": "tune", "layout": "diffusers", "rest": rest.provenance}
    assert found.provenance == told


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_loras_are_merged(layout, folder, tmp_path):
    base, rng = open_checkpoint(str(folder)), np.random.default_rng(0)
    site = {"a": rng.standard_normal((64, 4)), "b": rng.standard_normal((4, 8))}
    site = {half: array.astype(np.float32) for half, array in site.items()}
    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    write_adapter(file, {"proj_out": site}, base.dit, alpha=8)
    result = convert(
        f"--source={folder}", f"--out={out}", f"--lora={file}:0.25", f"--format={layout}"
    )
    assert result.returncode == 0, result.stderr
    found = open_checkpoint(str(out))
    kernel = found.params["dit"]["proj_out"].pop("kernel")
    before = base.params["dit"]["proj_out"].pop("kernel")
    np.testing.assert_allclose(kernel, before + 0.5 * site["a"] @ site["b"], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found.params["dit"], base.params["dit"])
    if layout == "native":
        told = {"name": "lora.safetensors", "weight": 0.25, "sha256": file_sha256(file)}
        assert found.provenance == base.provenance | {"loras": [told]}


def spoiled(folder, tmp_path, change):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "spoiled")
    state = load_torch(copy / WEIGHTS)
    change(state)
    save_file(state, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("proj_out.bias"), ["missing proj_out.bias"]),
        (lambda t: t["proj_out.bias"].fill_(float("nan")), ["proj_out.bias", "NaN"]),
        (lambda t: t["proj_out.bias"].fill_(float("inf")), ["proj_out.bias", "Inf"]),
    ],
)
def test_bad_tensors_leave_nothing_behind(folder, tmp_path, change, words):
    out = tmp_path / "deep" / "out"
    result = convert(f"--source={spoiled(folder, tmp_path, change)}", f"--out={out}")
    refused(result, *words)
    assert not (tmp_path / "deep").exists()


def test_a_link_to_an_empty_folder_stays_one(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    spoil = spoiled(folder, tmp_path, lambda t: t["proj_out.bias"].fill_(float("nan")))
    refused(convert(f"--source={spoil}", f"--out={tmp_path / 'link'}"), "NaN")
    assert (tmp_path / "link").is_symlink() and not any((tmp_path / "real").iterdir())


def test_networks_that_do_not_fit_are_refused(folder, tmp_path):
    other = toy.pipeline(caption_channels=32)
    other.save_pretrained(tmp_path / "other")
    refused(
        convert(f"--source={tmp_path / 'other'}", f"--out={tmp_path / 'out'}"), "width 32", "48"
    )
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_stays_empty_on_failure(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    spoil = spoiled(folder, tmp_path, lambda t: t["proj_out.bias"].fill_(float("nan")))
    refused(convert(f"--source={spoil}", f"--out={out}"), "NaN")
    assert out.is_dir() and not any(out.iterdir())


def test_values_that_overflow_the_asked_type(folder, tmp_path):
    spoil = spoiled(folder, tmp_path, lambda t: t["proj_out.bias"].fill_(1e6))
    result = convert(f"--source={spoil}", f"--out={tmp_path / 'out'}", "--dtype=float16")
    refused(result, "proj_out.bias", "float16")


BAD_FLAGS = [
    (["--source=no/such/place"], ["no/such/place"]),
    (["--source=nowhere"], ["no checkpoint 'nowhere'"]),
    (["--source=" + "a" * 300], ["name too long"]),
    (["--source={folder}/model_index.json"], ["is a file"]),
    (["--source={theirs}"], ["NVlabs/checkpoints/Sana.pth"]),
    (["--source={folder}", "--out={folder}/inside"], ["inside --source"]),
    (["--source=launch/quickstar"], ["'launch/quickstar'", "launch is a folder here"]),
    (["--source={folder}", "--variant=bf16"], ["bf16"]),
    (
        ["--source={folder}", "--ema"],
        ["--ema", "or a training", "checkpoints/"],
    ),
    (["--source={folder}", "--clip_attention", "--format=diffusers"], ["--clip_attention"]),
    (["--source={folder}", "--format=onnx"], ["--format"]),
    (["--source={folder}", "--share=shapes", "--format=diffusers"], ["--share", "native layout"]),
    (["--source={folder}", "--share={folder}"], ["model.json"]),
    (["--source={folder}", "--dense_time", "--format=diffusers"], ["--dense_time", "native"]),
    (["--source={folder}", "--instruction_file=/no/such"], ["/no/such"]),
    (["--source={folder}", "--lora={folder}:0.5"], ["no pytorch_lora_weights.safetensors"]),
    (["--source={folder}", "--lora={folder}/" + WEIGHTS], ["holds no LoRA, but"]),
    (["--source=missing.pth"], ["--rest"]),
    (["--source=missing.safetensors"], ["--rest"]),
    (["--source=missing.pth", "--rest={folder}"], ["missing.pth"]),
    ([], ["--source"]),
]


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """What the command answers to each of BAD_FLAGS; it has written nothing."""
    here, out = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("bad") / "out"
    weights = here / "NVlabs" / "checkpoints"
    weights.mkdir(parents=True)
    (weights / "Sana.pth").touch()
    lines = [
        [f"--out={out}", *(flag.format(folder=folder, theirs=weights.parent) for flag in flags)]
        for flags, _ in BAD_FLAGS
    ]
    before = sorted([*here.rglob("*"), *folder.rglob("*")])
    found = commands.several("sana_jax.convert", lines, ROOT, os.environ)
    assert sorted([*here.rglob("*"), *folder.rglob("*")]) == before and not out.exists()
    return [SimpleNamespace(returncode=status, stderr=stderr) for status, _, stderr in found]


@pytest.mark.parametrize("number", range(len(BAD_FLAGS)), ids=lambda i: " ".join(BAD_FLAGS[i][0]))
def test_bad_flags(answers, number):
    refused(answers[number], *BAD_FLAGS[number][1])


def test_an_occupied_folder_is_kept(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    refused(convert(f"--source={folder}", f"--out={tmp_path}"), "not an empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


MEASURED = """
import re, runpy, sys, threading, time
peak = 0
def watch():
    global peak
    while True:
        status = open("/proc/self/status").read()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["convert", *sys.argv[1:]]
try:
    runpy.run_module("sana_jax.convert", run_name="__main__")
finally:
    print("peak", peak)
"""


def ones(shape, dtype):
    return np.ones(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "diffusers"])
def test_memory_on_a_gigabyte(tmp_path, format):
    """Peak anonymous memory <= 2 x the largest stacked tensor + 300 MB, on 0.6B in bfloat16."""
    from sana_jax.checkpoints import diffusers, native
    from sana_jax.models.dit import PRESETS

    # The full transformer beside tiny networks, and three equal large stacks after each other.
    large = random_checkpoint.make("sana_600m_512", "bfloat16")
    tiny = random_checkpoint.make("tiny", "bfloat16")
    kernel = tiny.params["text_encoder"]["layers"]["gate"]["kernel"]
    config = dataclasses.replace(
        tiny.text_encoder, hidden_size=1152, intermediate_size=9216, num_layers=26
    )
    text_encoder = {
        path: dataclasses.replace(kernel, shape=leaf.shape, load=partial(ones, leaf.shape))
        for path, leaf in param_shapes(config).items()
    }
    text_encoder = traverse_util.unflatten_dict(text_encoder, sep="/")
    dit = dataclasses.replace(PRESETS["sana_600m_512"], caption_channels=1152)
    large_dit = dict(large.params["dit"])
    first, square = large_dit["caption_embed"]["linear_1"]["kernel"], (1152, 1152)
    large_dit["caption_embed"] = {
        **large_dit["caption_embed"],
        "linear_1": {
            **large_dit["caption_embed"]["linear_1"],
            "kernel": dataclasses.replace(first, shape=square, load=partial(ones, square)),
        },
    }
    params = {**tiny.params, "dit": large_dit, "text_encoder": text_encoder}
    mixed = dataclasses.replace(tiny, dit=dit, text_encoder=config, params=params)
    source, out = tmp_path / "source", tmp_path / "out"
    (native if format == "diffusers" else diffusers).save(mixed, source)
    size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    assert size >= 10**9
    largest = max(2 * np.prod(x.shape) for x in jax.tree.leaves(params))
    flags = f"--source={source}", f"--out={out}", f"--format={format}"
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *flags], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split("peak")[-1])
    print(
        f"{format}: {size / 1e9:.2f} GB, largest {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"
    )
    assert peak <= 2 * largest + 300e6


def test_pth(folder, tmp_path):
    """NVlabs' file brings the transformer, --rest the others; the name tells the native size."""
    heads = dict(num_attention_heads=36, attention_head_dim=32)
    cross = dict(num_cross_attention_heads=16, cross_attention_head_dim=72)
    module, config = toy.transformer(**heads, **cross, cross_attention_dim=1152, num_layers=1)
    source, out = tmp_path / "Sana_toy_4Kpx.pth", tmp_path / "out"
    averaged = {name: tensor / 2 for name, tensor in official(module).items()}
    torch.save({"state_dict": official(module), "state_dict_ema": averaged, "step": 3}, source)
    result = convert(f"--source={source}", f"--rest={folder}", f"--out={out}", "--ema")
    assert result.returncode == 0, result.stderr
    found = open_checkpoint(str(out))
    assert found.dit == dataclasses.replace(config, sample_size=128, interpolation_scale=2.0)
    assert found.flow_shift == 6.0 and found.provenance["source"] == source.name
    for name, params in (
        ("dit", jax.tree.map(lambda x: x / 2, toy.params(module, config))),
        ("vae", open_checkpoint(str(folder)).params["vae"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, found.params[name], params)


def test_pth_of_unknown_width(theirs, folder, tmp_path):
    source, out = tmp_path / "Sana_toy_512px.pth", tmp_path / "out"
    torch.save(official(theirs.transformer), source)
    flags = f"--source={source}", f"--rest={folder}", f"--out={out}"
    refused(convert(*flags), "width 64", "--cross_heads")
    assert not out.exists()
