"""Small programs for four TPU chips that are not there, and the command as a user meets it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sana_jax import sharding
from sana_jax.checkpoints import random_weights
from sana_jax.measure import gpu_compile, programs, tpu_estimate
from sana_jax.models import flops
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder.recipe import autoencoder
from sana_jax.training.distillation.recipe import distillation
from sana_jax.training.text_to_image.recipe import text_to_image
from tests import commands

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    not tpu_estimate.has_libtpu(), reason="libtpu, the TPU compiler, is not installed"
)
DIT, _, GEMMA = random_weights.configs("tiny")
SMALL = DCAEConfig(
    encoder_channels=(16, 32),
    decoder_channels=(16, 32),
    encoder_blocks=("ResBlock",) * 2,
    decoder_blocks=("ResBlock",) * 2,
    encoder_layers=(0, 1),
    decoder_layers=(0, 1),
    encoder_qkv_multiscales=((),) * 2,
    decoder_qkv_multiscales=((),) * 2,
    decoder_norms=("rms_norm",) * 2,
    decoder_activations=("silu",) * 2,
    latent_channels=8,
)
KEYS = ["topology", "what", "batch", "config", "fits", "hbm_bytes", "cycles", "kernel_cycles"]
KEYS += ["step_seconds", "mfu", "collectives"]


def mesh(**sizes):
    return sharding.make_mesh(**sizes, devices=tpu_estimate.tpu_devices("v5e:2x2")[1])


def estimate(program, mesh):
    with jax.set_mesh(mesh):
        return tpu_estimate.estimate(program.function, *program.arguments, **program.options)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:16x16", "v6e:16x16", "v5p:4x4x16"])
def test_a_mesh_may_split_the_sides_of_a_slice(topology):
    devices = tpu_estimate.tpu_devices(topology)[1]
    made = sharding.make_mesh(replica=4, fsdp=64, devices=devices)
    assert made.shape["fsdp"] == 64 and len(set(made.devices.flat)) == 256


@needs_libtpu
def test_forward_uses_the_kernels_of_a_tpu():
    here = mesh(fsdp=2)
    program = programs.drawing("forward", DIT, SMALL, here, 8, size=16)
    found = estimate(program, here)
    names = {name.partition(".")[0] for name in found.kernels}
    assert {"linear_attention_state", "glumbconv_forward", "cross_attention_forward"} <= names
    # Every block's, gathered from the two chips that share them.
    assert found.collectives["all-gather"][0] >= DIT.depth
    assert program.flops == 8 * flops.trunk(DIT, 8, 8, 300)
    assert 0 < found.utilisation(program.flops / 4) < 1


@needs_libtpu
def test_sample_is_so_many_forward_passes():
    here = mesh()
    program = programs.drawing("sample", DIT, SMALL, here, 4, size=16, steps=9)
    found = estimate(program, here)
    # Every layer has a kernel of its own.
    states = [name for name in found.kernels if name.startswith("linear_attention_state")]
    assert len(states) == DIT.depth
    assert sum(found.kernels[name][0] for name in states) == 9 * DIT.depth
    assert program.flops == 2 * 9 * 4 * flops.trunk(DIT, 8, 8, 300)


@needs_libtpu
def test_decode():
    here = mesh()
    program = programs.drawing("decode", DIT, SMALL, here, 4, size=32)
    found = estimate(program, here)
    weights = sum(leaf.size for leaf in jax.tree.leaves(program.arguments[0]))
    assert found.argument_bytes >= 2 * weights and program.calls == 1
    assert program.flops == 4 * flops.decode(SMALL, 32, 32)


@needs_libtpu
def test_large_pictures_are_decoded_in_tiles():
    program = programs.drawing("decode", DIT, SMALL, mesh(), 4, size=4096)
    assert program.size == 1024 and program.calls == 25
    assert program.flops == 4 * flops.decode(SMALL, 1024, 1024)


def autoencoder_config(**phase):
    config = autoencoder(SMALL)
    config.perceptual.name = "none"
    config.phases.low_resolution.update(image_size=16, batch_size=8, **phase)
    return config


@needs_libtpu
def test_training_of_an_autoencoder():
    here = mesh(fsdp=4)
    program = programs.training(autoencoder_config(), here, None, None)
    found = estimate(program, here)
    # Of four chips each has a quarter, but of what has no "embed" axis, such as biases.
    leaves = jax.tree.leaves(program.arguments[0])
    share = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert share < 0.45 * sum(leaf.size for leaf in leaves)
    # Parameters, two moments and the average: the new ones take the place of the old ones.
    assert 0.5 * found.argument_bytes < found.alias_bytes <= found.argument_bytes
    assert found.collectives


def test_figures_of_an_autoencoder_training():
    here = sharding.make_mesh(devices=jax.devices()[:4])  # of no TPU: nothing is compiled
    program = programs.training(autoencoder_config(), here, 16, "low_resolution")
    once = flops.encode(SMALL, 16, 16) + flops.decode(SMALL, 16, 16)
    assert (program.batch, program.size, program.flops) == (16, 16, 3 * 16 * once)
    assert program.arguments[1]["image"].dtype == "uint8"  # as the loader's are
    partly = programs.training(autoencoder_config(trainable=("decoder/.*",)), here, 16, None)
    assert partly.flops is None
    config = autoencoder_config()
    config.perceptual.name = "lpips_alex"  # no file of its weights is asked for
    weights = programs.training(config, here, 16, None).arguments[2]
    assert len(weights["convs"]) == len(weights["heads"]) == 5


def text_to_image_config(network=DIT, make=text_to_image, **recipe):
    config = make(network, steps=10, batch_size=8)
    config.text_encoder.update(rows=20, instruction=False)
    config.text_encoder.network.update(dataclasses.asdict(GEMMA))
    config.data.update(source="precomputed:DIR", size=256)
    config.mesh.update(replica=2, fsdp=2)
    config.recipe.optimizer.warmup_steps = 0
    config.recipe.update(recipe)
    return config


STUDENT = dataclasses.replace(DIT, guidance_embedding=0.1)


def distillation_config():
    config = text_to_image_config(STUDENT, distillation)
    config.distillation.discriminator.warmup_steps = 0
    config.distillation.blocks = (0,)
    return config


def test_the_steps_of_a_distillation():
    """Both can be lowered: the student's with its derivative, and the discriminator's."""
    config = distillation_config()
    here = sharding.make_mesh(**config.mesh, devices=jax.devices()[:4])
    for phase in "student", "discriminator":
        program = programs.training(config, here, None, phase)
        with jax.set_mesh(here):
            jax.jit(program.function, **program.options).trace(*program.arguments)
        text = flops.text(GEMMA, program.arguments[1]["tokens"].shape[1])
        # Of 12 passes and of 3, the mean.
        assert program.flops == 8 * round(7.5 * flops.trunk(STUDENT, 8, 8, 20) + text)


@needs_libtpu
def test_training_of_text_to_image():
    config = text_to_image_config()
    here = mesh(**config.mesh)
    program = programs.training(config, here, None, None)
    found = estimate(program, here)
    assert found.kernels and found.collectives
    assert found.alias_bytes > 0.5 * found.argument_bytes
    text = flops.text(GEMMA, program.arguments[1]["tokens"].shape[1])
    assert program.flops == 8 * (3 * flops.trunk(DIT, 8, 8, 20) + text)
    assert program.batch == 8 and program.size == 256


@pytest.mark.parametrize(
    "config, batch, phase, words",
    [
        (autoencoder_config(), 6, None, "batch_size=6: it is a multiple of 4"),
        (autoencoder_config(microbatches=4), 8, None, "it is a multiple of 16"),
        (
            autoencoder_config(),
            None,
            "third",
            "--phase=third is not one of latent_adaptation, local",
        ),
        (text_to_image_config(), 6, None, "config.recipe.batch_size=6: it is a multiple of 4"),
        (
            text_to_image_config(microbatches=4),
            None,
            None,
            "recipe.batch_size=8: it is a multiple of 16",
        ),
        (text_to_image_config(), None, "first", "this config has no phases"),
        (distillation_config(), None, "first", "--phase=first is not one of student, discrim"),
    ],
)
def test_what_cannot_be_trained(config, batch, phase, words):
    here = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(UserError, match=words):
        programs.training(config, here, batch, phase)


def test_a_size_that_does_not_divide():
    with pytest.raises(UserError, match="--size=17 is not a multiple of 2"):
        programs.drawing("forward", DIT, SMALL, sharding.make_mesh(), 8, size=17)


def command(*flags, setup=""):
    main = 'import runpy; runpy.run_module("sana_jax.compile", run_name="__main__", alter_sys=True)'
    start = ["-c", f"{setup}\n{main}"] if setup else ["-m", "sana_jax.compile"]
    return subprocess.run(
        [sys.executable, *start, *flags], capture_output=True, text=True, timeout=300
    )


@needs_libtpu
def test_the_command():
    flags = "--preset=tiny", "--size=64", "--topology=v5e:2x2", "--batch_size=2", "--top=3"
    result = command(*flags)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(KEYS) <= found.keys() and found["fits"] is True
    assert (found["topology"], found["what"], found["batch"]) == ("v5e:2x2", "forward", 2)
    assert found["preset"] == "tiny" and found["config"] is None
    cycles = found["cycles"] + found["kernel_cycles"]
    assert found["step_seconds"] == pytest.approx(cycles / 1.503e9)
    assert found["mfu"] == pytest.approx(found["model_flops"] / (cycles * 131072))
    each = [kernel["calls"] * kernel["cycles"] for kernel in found["kernels"].values()]
    assert sum(each) == found["kernel_cycles"] > 0
    assert "2 pictures of 64 px a chip, on v5e:2x2 (replica 4)" in result.stdout
    assert "Collectives have no cycles: they are not in the step time." in result.stdout
    assert all(name in result.stdout for name in found["kernels"])


@needs_libtpu
def test_memory_alone_and_without_kernels():
    flags = "--preset=tiny", "--size=64", "--topology=v5e:2x2", "--implementation=xla"
    result = command(*flags, "--memory")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(KEYS) <= found.keys() and found["fits"] is True
    assert found["cycles"] is None and "cycles" not in result.stdout.splitlines()[-2]
    whole = json.loads(command(*flags).stdout.splitlines()[-1])
    assert found["hbm_bytes"] == whole["hbm_bytes"] > found["argument_bytes"]
    assert whole["kernel_cycles"] == 0 < whole["cycles"]


@needs_libtpu
@pytest.mark.slow
def test_int8_weights_take_less_memory():
    flags = "--preset=tiny", "--topology=v5e:2x2", "--size=64", "--memory"
    found = [
        json.loads(command(*flags, *more).stdout.splitlines()[-1])
        for more in ([], ["--quantise=w8"], ["--quantise=w8a8"])
    ]
    assert [each.get("quantise") for each in found] == [None, "w8", "w8a8"]
    sizes = [each["argument_bytes"] for each in found]
    assert sizes[2] == sizes[1] < 0.7 * sizes[0]


TOO_LARGE = """
from sana_jax.measure import tpu_estimate
def estimate(*args, **kwargs):
    raise tpu_estimate.TooLarge(20 * 2**30, 15 * 2**30)
tpu_estimate.estimate = estimate
"""


@needs_libtpu
def test_what_does_not_fit_is_an_answer():
    flags = "--preset=tiny", "--size=64", "--topology=v5e:2x2"
    result = command(*flags, setup=TOO_LARGE)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(KEYS) <= found.keys() and found["fits"] is False
    assert found["hbm_bytes"] == 20 * 2**30 and found["cycles"] is None
    assert "DOES NOT FIT: at least 20.00 GiB a chip of 15.75, 4.25 too many" in result.stdout


BAD_FLAGS = [
    (["--preset=tiny"], "--topology is missing"),
    (["--preset=tiny", "--topology=v7:2x2"], "topology 'v7:2x2' is neither CHIP:SHAPE of TPUs"),
    (["--preset=tiny", "--topology=v5e:2"], "topology 'v5e:2' is not CHIP:SHAPE"),
    (["--preset=tiny", "--topology=h100:2x2"], "topology 'h100:2x2' is not CARD:COUNT"),
    (["--preset=tiny", "--topology=h100:9"], "more than 8 cards are hosts of so many"),
    (["--topology=v5e:2x2"], "--what=forward needs --preset"),
    (["--topology=v5e:2x2", "--preset=tiny", "--what=train"], "--what=train needs --config"),
    (["--topology=v5e:2x2", "--preset=tiny", "--what=draw"], "should be one of"),
    (
        ["--topology=v5e:2x2", f"--config={ROOT}/configs/sana_600m_512.py", "--quantise=w8"],
        "--quantise goes with --preset",
    ),
]


@pytest.fixture(scope="module")
def answers():
    return commands.answers("sana_jax.compile", BAD_FLAGS, [], ROOT, os.environ)


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, stdout, stderr = answers[tuple(flags)]
    assert status == 2 and len(stderr.splitlines()) == 1, stderr
    assert words in stderr and not stdout


@pytest.mark.skipif(gpu_compile.has_compiler(), reason="the CUDA compiler is installed")
def test_without_the_cuda_compiler():
    result = command("--preset=tiny", "--topology=h100:1")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "the CUDA compiler is not installed: pip install -e '.[gpu-compile]'" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not gpu_compile.has_compiler(), reason="the CUDA compiler is not installed")
def test_the_command_for_gpus():
    flags = "--preset=tiny", "--size=64", "--topology=h100:2", "--batch_size=2", "--what=sample"
    result = command(*flags, "--implementation=pallas", "--fsdp=2", "--num_steps=3")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["fits"] and (found["topology"], found["batch"]) == ("h100:2", 2)
    calls = {
        x["operation"].split("/")[-2]: x["calls"]
        for x in found["operations"]
        if "pallas" in x["operation"]
    }
    assert calls["glumbconv_forward"] == calls["linear_attention_state"] == 3 * DIT.depth
    assert found["collectives"]["all-gather"]["executions"] >= 3 * DIT.depth
    assert 0 < found["roofline_seconds"] <= found["bound_seconds"] < 0.1
    assert not any(x.get("spilled_bytes") for x in found["operations"])
    assert "2 pictures of 64 px a card, on h100:2 (fsdp 2), jax_cuda13_plugin" in result.stdout
    fits = command(*flags, "--memory")
    assert fits.returncode == 0 and json.loads(fits.stdout.splitlines()[-1])["launches"] is None


@needs_libtpu
def test_an_unknown_preset():
    result = command("--topology=v5e:2x2", "--preset=sana_9b")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "preset 'sana_9b' is not one of tiny" in result.stderr
