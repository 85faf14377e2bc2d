"""Products of int8 rows for TPU (Pallas Mosaic), with all that follows until the next int8 rows.

A grid step takes a block of whole rows, which rows.py rounds; the weights stay in VMEM.

    product        rows W + bias                                  (qkv, q, Mix-FFN's first product)
    add_product    x + gate (rows W + bias), and that as int8 rows, or its modulated norm as such

Rounding to the network's dtype is where the plain form has it, so that one differs from the other
where a division or a sum over channels does, in the last place.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.int8.rows import Rows, bytes_of, quantised, row_shapes
from sana_jax.kernels.int8.weights import Quantised
from sana_jax.kernels.modulated_norm.reference import modulated_norm
from sana_jax.kernels.mosaic import LANES, MIB, compiler_params, vmem_bytes, whole_lanes

ROWS = TPU["int8"]  # of a grid step


def supported(inputs: int, outputs: int) -> bool:
    """Returns True if VMEM holds such weights, and the rows of a grid step beside them.

    Rows in bfloat16 and their results have two buffers; the sums are there in int32 and float32.
    """
    rows = ROWS * (4 * whole_lanes(inputs) + 12 * whole_lanes(outputs))
    return inputs * outputs + rows + 8 * MIB < vmem_bytes()


def product(
    rows: Rows | Float[Array, "B N C"],
    kernel: Quantised,
    bias: Float[Array, " D"] | None,
    dtype: DTypeLike,
    columns: tuple[int, int] | None = None,
) -> Float[Array, "B N E"]:
    """Returns rows times kernel, plus bias, in `dtype`; rows that are not int8 yet become so.

    `columns` are the first of the outputs to compute, and the first after them; None means all.
    """
    rows, transposed = _arrays(rows), _lies_transposed(kernel)
    start, stop = columns or (0, kernel.shape[1])
    skip = start % LANES  # a block of weights begins with a whole tile
    result = jax.ShapeDtypeStruct((*rows[0].shape[:2], stop - start), dtype)
    body = partial(_product_kernel, rows=len(rows), transposed=transposed, skip=skip)
    weights = _weights(kernel, bias, transposed, columns and (start - skip, stop))
    return _call(body, rows, weights, (), (result,), "product")[0]


def add_product(
    x: Float[Array, "B N D"],
    rows: Rows | Float[Array, "B N C"],
    kernel: Quantised,
    bias: Float[Array, " D"] | None,
    gate: Float[Array, "B 1 D"] | None = None,
    then: str = "",
    modulation: tuple[Float[Array, "B 1 D"], ...] = (),
) -> tuple[Float[Array, "B N D"], Rows | None]:
    """Returns x + gate (rows times kernel + bias), and what follows as int8 rows.

    Args:
      gate: float32; None means one.
      then: what follows, "rows": the sum itself, "norm": its modulated norm with the shift and
        the scale of `modulation`, in float32; "": nothing, and the second result is None.
    """
    rows, transposed = _arrays(rows), _lies_transposed(kernel)
    body = partial(
        _add_product_kernel,
        rows=len(rows),
        transposed=transposed,
        bias=bias is not None,
        gate=gate is not None,
        then=then,
    )
    vectors = (() if gate is None else (gate,)) + modulation
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    results += row_shapes(*x.shape) if then else ()
    weights = _weights(kernel, bias, transposed)
    x, *made = _call(body, (*rows, x), weights, vectors, results, "add_product")
    return x, Rows(*made) if then else None


def _arrays(rows: Rows | Array) -> tuple[Array, ...]:
    return tuple(rows) if isinstance(rows, Rows) else (rows,)


def _lies_transposed(kernel: Quantised) -> bool:
    """Returns True if XLA keeps these weights with their inputs along the lanes.

    It chooses the axis that pads less; the kernel takes weights as they lie, without a copy.
    """
    inputs, outputs = kernel.shape
    return whole_lanes(inputs) * outputs < whole_lanes(outputs) * inputs


class _Weights(NamedTuple):
    stack: Int8[Array, "L C D"]  # or (L, D, C), as it lies
    layer: Int32[Array, " 1"]
    block: tuple[pl.Element, pl.Element]  # of a layer, as it lies
    start: tuple[int, int]  # of the block
    vectors: tuple[Float[Array, "1 D"], ...]  # the scale, and the bias if there is one


def _weights(kernel: Quantised, bias, transposed, columns=None) -> _Weights:
    """Returns the kernel as a Pallas kernel takes it, or whole tiles with some columns of it."""
    stack, layer = kernel.values, kernel.layer
    if layer is None:
        stack, layer = stack[None], jnp.int32(0)
    inputs, outputs = kernel.shape
    start, stop = columns or (0, outputs)
    size = whole_lanes(stop - start) if columns else outputs
    beyond = max(0, start + size - outputs)
    block, starts = (pl.Element(inputs), pl.Element(size, (0, beyond))), (0, start)
    if transposed:
        stack, block, starts = stack.swapaxes(1, 2), block[::-1], starts[::-1]
    vectors = (kernel.scale,) + (() if bias is None else (bias[None],))
    vectors = tuple(jnp.pad(v, ((0, 0), (0, beyond)))[:, start : start + size] for v in vectors)
    return _Weights(stack, layer[None], block, starts, vectors)


def _call(body, tokens, weights: _Weights, vectors, results, name):
    """Calls a kernel over (image, block of rows), with all weights in VMEM.

    `tokens` and `results` are (B, N, _), `vectors` (B, 1, D).
    """
    batch, count, channels = tokens[0].shape
    rows = min(ROWS, -(-count // 32) * 32)  # 32: a tile of int8 in the sublanes
    once = dict(pipeline_mode=pl.Buffered(1))  # a second buffer would stay empty

    def token_block(array):
        return pl.BlockSpec((1, rows, array.shape[-1]), lambda b, i, layer: (b, i, 0))

    def vector(array):
        return pl.BlockSpec((1, 1, array.shape[-1]), lambda b, i, layer: (b, 0, 0))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda b, i, layer: (0, 0), **once)

    kernel = pl.BlockSpec(
        (pl.Element(1), *weights.block),
        lambda b, i, layer: (layer[0], *weights.start),
        **once,
    )
    in_specs = [*map(token_block, tokens), kernel, *map(whole, weights.vectors)]
    in_specs += map(vector, vectors)
    out_specs = list(map(token_block, results))
    moving = zip((*in_specs[: len(tokens)], *out_specs), (*tokens, *results), strict=True)
    outputs = weights.vectors[0].shape[1]
    size = channels * outputs
    scratch = size + 2 * rows * whole_lanes(outputs) * 4  # weights, int32 sums, and in float32
    return pl.pallas_call(
        body,
        out_shape=list(results),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(count, rows)),
            in_specs=in_specs,
            out_specs=out_specs,
        ),
        compiler_params=compiler_params(("parallel", "parallel"), list(moving), scratch),
        cost_estimate=pl.CostEstimate(
            # Of the matrix unit's bfloat16 FLOPs, of which int8 takes half.
            flops=batch * count * channels * outputs,
            bytes_accessed=size + bytes_of((*tokens, *results)),
            transcendentals=0,
        ),
        name=f"int8_{name}",
    )(weights.layer, *tokens, weights.stack, *weights.vectors, *vectors)


def _scaled_sums(row_refs, kernel_ref, kernel_scale_ref, transposed):
    """Returns the product of rows in float32; rows that are not int8 yet are rounded here."""
    rows = Rows(*(ref[0] for ref in row_refs)) if len(row_refs) == 2 else quantised(row_refs[0][0])
    sums = jax.lax.dot_general(
        rows.values,
        kernel_ref[0],
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,  # integers have no other
        preferred_element_type=jnp.int32,
    )
    return sums.astype(jnp.float32) * rows.scale * kernel_scale_ref[...]


def _product_kernel(_, *refs, rows, transposed, skip):
    row_refs, (kernel_ref, scale_ref, *bias_ref, out_ref) = refs[:rows], refs[rows:]
    y = _scaled_sums(row_refs, kernel_ref, scale_ref, transposed)
    out_ref[0] = _with_bias(y.astype(out_ref.dtype), bias_ref)[:, skip : skip + out_ref.shape[2]]


def _with_bias(y, bias_ref):
    return y + bias_ref[0][...].astype(y.dtype) if bias_ref else y


def _add_product_kernel(_, *refs, rows, transposed, bias, gate, then):
    row_refs, (x_ref, kernel_ref, scale_ref, *refs) = refs[:rows], refs[rows:]
    bias_ref, gate_ref = ([refs.pop(0)] if has else [] for has in (bias, gate))
    modulation = [refs.pop(0)[...] for _ in range(2)] if then == "norm" else []
    out_ref, *row_refs_out = refs
    y = _scaled_sums(row_refs, kernel_ref, scale_ref, transposed)
    y = _with_bias(y.astype(x_ref.dtype), bias_ref)
    if gate_ref:
        y = (gate_ref[0][0] * y.astype(jnp.float32)).astype(x_ref.dtype)
    out_ref[0] = x_ref[0] + y
    if then:
        x = out_ref[0]  # what comes next is made of rounded numbers
        made = quantised(modulated_norm(x[None], *modulation)[0] if then == "norm" else x)
        for ref, array in zip(row_refs_out, made, strict=True):
            ref[0] = array
