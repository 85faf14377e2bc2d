"""Figures of the TPU compiler for programs whose cost is known, and for schedules written here."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.measure import tpu_estimate
from sana_jax.runtime.errors import UserError

needs_libtpu = pytest.mark.skipif(
    not tpu_estimate.has_libtpu(), reason="libtpu, the TPU compiler, is not installed"
)


@cache  # every call makes other devices
def mesh(chips):
    return tpu_estimate.tpu_mesh("2x2", {"fsdp": chips})


def array(*shape, dtype="bfloat16", axes=(), chips=1):
    sharding = NamedSharding(mesh(chips), P(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


@needs_libtpu
def test_matrix_products_take_about_their_flops_over_the_peak():
    rows, width = 8192, 1152
    x, w = array(rows, width), array(width, width)
    once = tpu_estimate.estimate(lambda x, w: x @ w, x, w)
    assert 0.85 < once.utilisation(2 * rows * width * width) <= 1
    assert once.hbm_bytes == pytest.approx(2 * (2 * rows * width + width * width), rel=0.01)
    assert not once.kernels and not once.collectives and once.kernel_cycles == 0
    seven = tpu_estimate.estimate(
        lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0], x, w
    )
    (products,) = (cycles for cycles, name in seven.operations if name.endswith("dot_general"))
    assert 0.9 < products / (7 * once.cycles) < 1.1  # the rest are copies


@needs_libtpu
def test_collectives_are_counted_beside():
    x = array(1024, 512, axes=(None, "fsdp"), chips=4)
    w = array(512, 256, axes=("fsdp",), chips=4)
    found = tpu_estimate.estimate(lambda x, w: x @ w, x, w)
    (kind,) = found.collectives
    executions, size = found.collectives[kind]
    assert kind in ("all-reduce", "reduce-scatter") and executions == 1
    assert 1024 * 256 * 2 / 4 <= size <= 1024 * 256 * 4


def kernel(x, cost=None):
    """Some work on every block of 256 rows."""

    def body(x_ref, out_ref):
        out_ref[...] = jnp.tanh(jnp.tanh(x_ref[...]))

    block = pl.BlockSpec((256, 512), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        out_shape=x,
        grid=(x.shape[0] // 256,),
        in_specs=[block],
        out_specs=block,
        cost_estimate=cost,
        name="work",
    )(x)


@needs_libtpu
def test_a_kernel_costs_its_bundles_times_its_grid():
    def cost(rows, calls):
        def fn(x):
            return lax.scan(lambda x, _: (kernel(x), None), x, None, length=calls)[0]

        found = tpu_estimate.estimate(fn, array(rows, 512, dtype="float32"))
        ((count, one),) = found.kernels.values()
        assert found.kernel_cycles == count * one.cycles and count == calls
        return one

    half, whole, again = cost(2048, calls=2), cost(4096, calls=2), cost(2048, calls=4)
    assert half == again  # of one call
    # 8 and 16 blocks, and two steps to fill and to drain the pipeline.
    assert whole.bundles / half.bundles == pytest.approx(18 / 10, rel=0.02)
    assert whole.memory == pytest.approx(2 * half.memory, rel=1e-3)
    chip = tpu_estimate.CHIPS["v5e"]
    seconds = 2 * 2048 * 512 * 4 / chip.hbm_bytes_per_second  # nothing declared: read and written
    assert half.memory == pytest.approx(seconds * chip.hertz, rel=1e-3)


@needs_libtpu
def test_a_kernel_costs_at_least_what_it_declares():
    chip = tpu_estimate.CHIPS["v5e"]
    declared = pl.CostEstimate(flops=10**12, bytes_accessed=10**9, transcendentals=0)
    x = array(1024, 512, dtype="float32")
    found = tpu_estimate.estimate(partial(kernel, cost=declared), x)
    ((_, cost),) = found.kernels.values()
    assert cost.compute == pytest.approx(10**12 / chip.flops_per_cycle, rel=1e-6)
    assert cost.memory == pytest.approx(10**9 / chip.hbm_bytes_per_second * chip.hertz, rel=1e-6)
    assert cost.cycles == cost.compute > cost.memory > cost.bundles


CALL = """\
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %work.1 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"abc"}}
}
"""


def test_a_kernel_without_a_schedule_is_an_error(tmp_path):
    read = partial(tpu_estimate._Program, CALL, chip=tpu_estimate.CHIPS["v5e"])
    with pytest.raises(ValueError, match="no schedule of kernel work.1"):
        read(set())
    schedule = tmp_path / "12-work.1-34-final_bundles.txt"
    schedule.write_text("head\n  0x0  :  { a }\n  0x1  :  { b }\n")
    found = read({schedule})
    assert found.kernels["work.1"].bundles == 2
    assert found.cost("main").kernels == {"work.1": 1}


LOOP = """\
head
   0x0   :  { %s1 = smov 0 }
   0x1 LB: > { %s3 = sadd.s32 2, %s2 /* copy */  ;;  %s2 = sphi %s1, %s3 } /* Start region 7 */
   0x2   : > { %p4 = scmp.ge.s32.totalorder %s3, END }
   0x3   : > { %5 = sbr.rel (!%p4) target = $region7 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  { done }
"""


def test_loops_of_a_schedule_are_unrolled():
    # The loop's three bundles and the four after its branch, in 5 trips; two stand outside.
    assert tpu_estimate.scheduled_bundles(LOOP.replace("END", "10 /* loop exit test */")) == 37
    assert tpu_estimate.scheduled_bundles(LOOP.replace("END", "9 ")) == 37
    with pytest.raises(ValueError, match="a loop of unknown length"):
        tpu_estimate.scheduled_bundles(LOOP.replace("END", "%s9"))
    once = LOOP.replace("scmp.ge.s32.totalorder %s3, END", "pmov 1 /* constant */")
    assert tpu_estimate.scheduled_bundles(once) == 9


@pytest.mark.parametrize(
    "message, needed, available",
    [
        ("RESOURCE_EXHAUSTED: temporaries (80.00G) exceeds available HBM (15.75G).", 80, 15.75),
        ("Ran out of memory: Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5, 15.75),
    ],
)
def test_too_large_is_read_from_the_message(message, needed, available):
    found = tpu_estimate.TooLarge.read(message)
    assert (found.needed, found.available) == (needed * 2**30, available * 2**30)


def test_other_messages_are_not():
    assert tpu_estimate.TooLarge.read("INTERNAL: Mosaic failed to compile") is None


@needs_libtpu
def test_what_does_not_fit_is_refused():
    with pytest.raises(tpu_estimate.TooLarge) as found:
        tpu_estimate.estimate(lambda x: x[::-1] * 2, array(2**33))
    assert found.value.needed >= 16 * 2**30 > found.value.available


@pytest.mark.parametrize(
    "topology, words",
    [
        ("16x16", "'16x16' is not CHIP:SHAPE"),
        ("v4:2x2", "one of the chips v5e, v5p, v6e"),
        ("v5e:", "such as v5e:16x16"),
        ("v5e:4", "such as v5e:16x16"),
        pytest.param("v5e:3x5", "'v5e:3x5' does not exist", marks=needs_libtpu),
    ],
)
def test_an_unknown_topology(topology, words):
    with pytest.raises(UserError, match=words):
        tpu_estimate.tpu_devices(topology)


@needs_libtpu
@pytest.mark.parametrize(
    "topology, chip, count", [("v5e:16x16", "v5e", 256), ("v5p:2x2x1", "v5p", 4)]
)
def test_topologies(topology, chip, count):
    found, devices = tpu_estimate.tpu_devices(topology)
    assert found == chip and len(devices) == count


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(tpu_estimate, "has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"libtpu is not installed: pip install 'jax\[tpu\]'"):
        tpu_estimate.tpu_devices("v5e:2x2")
