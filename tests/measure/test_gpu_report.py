"""What is said of a program on a GPU, with bounds made here."""

import dataclasses
import json

from sana_jax.measure import gpu_report
from sana_jax.measure.account import Memory
from sana_jax.measure.gpu_compile import Kernel
from sana_jax.measure.gpu_estimate import Bound, Estimate
from sana_jax.measure.gpu_machine_code import Code, Launched
from sana_jax.measure.gpu_program import Launch
from sana_jax.measure.gpu_targets import CARDS

CARD = CARDS["4090"]
CODE = Code("sm_89", 255, 820, 0, 10**4, 0, 0, None, 0, unknown_loops=1)


def estimate():
    product = Launch("dot", "jit(f)/dot", "__cublas$lt$matmul", 20, 10**6, 10**6, 1e12, "bf16")
    kernel = Launch("call", "jit(f)/state/pallas_call", "__gpu$xla.gpu.triton", 10, 1, 1, 0, "")
    launched = Kernel("", Launched(1, 128, 0))
    bounds = [
        Bound(product, None, None, 2 * 10**6, 2e-6, 6e-3, 0.0),
        Bound(kernel, launched, CODE, 2, 1e-9, 0.0, 1e-3),
    ]
    sizes = dict(argument_bytes=20 * 2**30, output_bytes=0, temp_bytes=2**30, alias_bytes=0)
    collectives = {"all-reduce": (3, 3 * 10**6)}
    return Estimate(card=CARD, bounds=bounds, collectives=collectives, **sizes)


def result(found, **figures):
    head = dict(what="sample", config=None, preset="tiny", batch=1, size=64, topology="4090:1")
    head |= dict(mesh=dict(replica=1), calls=2, steps=10, jax_cuda13_plugin="0.10.2")
    head |= dict(hbm_bytes=found.hbm_bytes, hbm_available=CARD.memory_bytes)
    return head | dict(fits=True, fits_preallocated=False) | figures


def test_the_report():
    found = estimate()
    figures = gpu_report.figures(found, 2, 1e13)
    assert figures["launches"] == 60 and figures["flops"] == 4e13
    assert figures["bound_seconds"] == 2 * (20 * 6e-3 + 10 * 1e-3)
    assert abs(figures["roofline_seconds"] - 2 * (20 * 6e-3 + 10 * 1e-9)) < 1e-12
    assert figures["product_seconds"] == 2 * 20 * 6e-3 and figures["model_flops"] == 2e13
    assert figures["collectives"] == {"all-reduce": {"executions": 6, "bytes": 6 * 10**6}}
    assert figures["operations"][1]["spilled_bytes"] == 820
    json.dumps(figures)
    text = gpu_report.text(result(found, **figures), found, top=1)
    assert "in all 21.00 of 23.99" in text and "XLA_PYTHON_CLIENT_MEM_FRACTION=.95" in text
    assert "60 launches (6 a step)" in text and "0.26 s with instructions" in text
    assert "MFU at most 46.6%" in text and "nothing was timed" in text
    assert "255       820    8/48       10,000      1  state/pallas_call" in text
    assert "gpu$xla.gpu.triton" in text and "all-reduce" in text
    assert "Not known without a card: times; the kernels that cuBLASLt" in text


def test_layers_that_are_alike_have_one_row():
    found = estimate()
    twice = dataclasses.replace(found, bounds=[*found.bounds, *found.bounds])
    figures = gpu_report.figures(twice, 2, 1e13)
    lines = gpu_report.text(result(twice, **figures), twice, top=9).splitlines()
    (row,) = [line for line in lines if line.endswith("  dot")]
    assert row.split()[:3] == ["240.000", "92.3%", "40"]
    assert len([line for line in lines if line.endswith("  state/pallas_call")]) == 2


def test_memory_alone_and_what_does_not_fit():
    sizes = dict(output_bytes=0, temp_bytes=0, alias_bytes=0)
    found = Memory(argument_bytes=30 * 2**30, **sizes)
    text = gpu_report.text(result(found, fits=False), found, top=9)
    assert "DOES NOT FIT: 30.00 GiB a card of 23.99, 6.01 too many" in text
    assert len(text.splitlines()) == 3
