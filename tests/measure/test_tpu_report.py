"""What is said of a program on a TPU, with an estimate made here."""

from sana_jax.measure import tpu_report
from sana_jax.measure.tpu_estimate import CHIPS, Estimate, Kernel


def test_the_report():
    found = Estimate(
        argument_bytes=2**30,
        output_bytes=0,
        temp_bytes=2**29,
        alias_bytes=0,
        chip=CHIPS["v5e"],
        operations=[(3000, "jit(f)/dot"), (1000, "kernel state")],
        cycles=3000,
        kernel_cycles=1000,
        kernels={"state": (1, Kernel(500, 400, 300)), "state.1": (1, Kernel(500, 400, 300))},
        collectives={"all-gather": (4, 10**9)},
    )
    figures = tpu_report.figures(found, 2, 131072 * 1000)
    assert figures["cycles"] == 6000 and figures["mfu"] == 0.25
    assert figures["kernels"]["state"] == dict(
        calls=2, cycles=500, bundles=500, compute=400, memory=300
    )
    result = dict(what="forward", config=None, preset="tiny", batch=1, size=64, topology="v5e:2x2")
    result |= dict(mesh=dict(replica=4), calls=2, libtpu="0.0", fits=True, hbm_bytes=1)
    text = tpu_report.text(result | dict(hbm_available=2**34) | figures, found, top=5)
    assert "forward of tiny, 1 pictures of 64 px a chip, on v5e:2x2 (replica 4), libtpu 0.0" in text
    assert "75.0%  dot" in text and "25.0%  kernel state" in text and "in 2 calls" in text
    (row,) = [line.split() for line in text.splitlines() if line.endswith("  state")]
    assert row == ["2", "500", "400", "300", "state"]  # of layers that are alike
    assert "1.000  all-gather" in text and "MFU 25.0%; by the compiler's estimate" in text
