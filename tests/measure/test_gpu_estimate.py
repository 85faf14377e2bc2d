"""The bounds of a launch and of a program."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sana_jax.measure import gpu_estimate
from sana_jax.measure.gpu_compile import Kernel, gpu_devices, has_compiler
from sana_jax.measure.gpu_machine_code import Code, Launched
from sana_jax.measure.gpu_program import Launch
from sana_jax.measure.gpu_targets import CARDS
from sana_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
H100 = CARDS["h100"]


def launch(**figures):
    zero = dict(bytes_read=0, bytes_written=0, flops=0, dtype="")
    return Launch("x", "jit(f)/x", "loop", **dict(calls=3) | zero | figures)


def code(**figures):
    counts = dict(instructions=0, special=0, accesses=0, loaded_bytes=None, tensor_flops=0)
    counts |= dict(registers=32, spilled_bytes=0, shared_bytes=0, unknown_loops=0)
    return Code(target="sm_90a", **counts | figures)


def test_the_longest_bound_counts():
    product = launch(bytes_read=10**9, bytes_written=10**9, flops=10**13, dtype="bf16")
    found = gpu_estimate.bound(product, None, None, H100)
    assert found.memory == pytest.approx(2e9 / 3352e9)
    assert found.compute == pytest.approx(1e13 / 989.4e12)
    assert found.seconds == found.roofline == found.compute
    assert not found.instructions and not found.is_pallas
    exact = launch(flops=10**13, dtype="f32", highest=True)
    assert gpu_estimate.bound(exact, None, None, H100).compute > 14 * found.compute


def test_a_kernel_is_bound_by_its_instructions_too():
    kernel = Kernel("", Launched(132, 128, 0))
    copy = launch(bytes_read=1000)
    found = gpu_estimate.bound(copy, kernel, code(instructions=10**6), H100)
    assert found.seconds == found.instructions == pytest.approx(1e6 / 1.98e9)
    assert found.roofline < found.seconds


def test_a_kernel_reads_no_more_than_it_loads():
    """As one that takes only the keys and values of queries, keys and values side by side."""
    kernel = Kernel("", Launched(10, 64, 0))
    whole = launch(bytes_read=3000, bytes_written=8)
    assert gpu_estimate.bound(whole, kernel, code(loaded_bytes=100), H100).bytes == 2008
    assert gpu_estimate.bound(whole, kernel, code(loaded_bytes=None), H100).bytes == 3008


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="the CUDA compiler is not installed")
@pytest.mark.parametrize("name", ["a100", "4090", "h100"])
def test_a_program(name):
    card, devices = gpu_devices(f"{name}:1")
    here = jax.sharding.SingleDeviceSharding(devices[0])
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16", sharding=here) for shape in [(512, 256)] * 2)

    def layers(x, w):
        def layer(x, _):
            return jnp.tanh(x @ (w.T @ w)), None

        return jax.lax.scan(layer, x, None, length=7)[0]

    with jax.set_mesh(make_mesh(devices=devices)):
        found = gpu_estimate.estimate(layers, x, w, card=card)
    products = [bound for bound in found.bounds if bound.launch.flops]
    assert sum(b.launch.calls * b.launch.flops for b in products) >= 7 * 2 * 512 * 256**2
    (tanh,) = (b for b in found.bounds if b.code and b.launch.calls == 7 and b.code.special)
    assert tanh.kernel.launch.blocks * tanh.kernel.launch.threads > 2**10
    assert tanh.code.registers > 8 and not tanh.code.spilled_bytes
    assert found.argument_bytes == 2 * 2 * 512 * 256 and found.card is card
    assert found.launches >= 14 and found.seconds >= found.total(lambda b: b.roofline) > 0


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="the CUDA compiler is not installed")
def test_no_kernel_that_auto_takes_is_bounded_above_the_form_of_xla():
    """At the smallest size, where kernels win least; the command has all the others."""
    sizes = "--models=0.6B", "--pixels=512", "--batches=2"
    command = [sys.executable, "-m", "tests.benchmarks.gpu_bounds", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout
    assert done.stdout.count("| 0.6B |") == 6  # three operations, two passes
