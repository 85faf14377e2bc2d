"""Optimised HLO written here, with the instructions whose cost is a rule of its own."""

from pathlib import Path

import pytest

from sana_jax.measure.gpu_program import parse, read, size

HLO = Path(__file__).with_name("gpu_program.hlo").read_text()


@pytest.fixture(scope="module")
def program():
    return read(HLO)


def launch(program, name):
    (found,) = (x for x in program.launches if x.name == name)
    return found


def test_loops_multiply_what_is_in_them(program):
    calls = {x.name: x.calls for x in program.launches}
    assert calls == dict(less=6, slice=5, call=5, triton=1, conv=1, aside=1, copied=1, out=1)


def test_only_the_slice_of_a_stack_is_read(program):
    found = launch(program, "slice")
    assert (found.bytes_read, found.bytes_written) == (2 * 64 * 64 + 4, 2 * 64 * 64)


def test_an_update_in_place_writes_what_it_updates(program):
    for name in "out", "aside":  # the second in two halves, beside others
        found = launch(program, name)
        assert (found.bytes_read, found.bytes_written) == (4 * 64 + 4, 4 * 64)
        assert found.kind == "loop"


def test_products(program):
    found = launch(program, "call")
    assert (found.flops, found.dtype, found.highest) == (2 * 16 * 64 * 64, "bf16", False)
    assert found.bytes_written == 2 * 16 * 64  # without scratch
    assert found.label == "jit(step)/while/body/dot_general" and found.kind == "__cublas$lt$matmul"
    inside = launch(program, "triton")
    assert (inside.kind, inside.flops, inside.dtype) == ("triton_gemm", 2 * 16 * 64 * 32, "bf16")
    convolution = launch(program, "conv")
    assert convolution.flops == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 4) and convolution.highest


@pytest.mark.parametrize(
    "target, shapes, flops",
    [
        ("convBackwardInput", ("2,8,8,16", "16,3,3,4", "2,8,8,4"), 2 * 2 * 64 * 16 * 36),
        ("convBackwardFilter", ("2,8,8,4", "2,8,8,16", "16,3,3,4"), 2 * 2 * 64 * 16 * 36),
        ("fmhaSoftmax", ("2,10,3,8", "2,7,3,8", "2,10,3,8"), 4 * 2 * 10 * 3 * 8 * 7),
        ("fmhaSoftmaxBackward", ("2,10,3,8", "2,7,3,8", "2,10,3,8"), 10 * 2 * 10 * 3 * 8 * 7),
    ],
)
def test_flops_of_cudnn(target, shapes, flops):
    attributes = f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"'
    x, y, out = (f"bf16[{shape}]{{3,2,1,0}}" for shape in shapes)
    text = f"""HloModule one

ENTRY %main (x: {x}, y: {y}) -> {out} {{
  %x = {x} parameter(0)
  %y = {y} parameter(1)
  ROOT %z = ({out}, u8[64]{{0}}) custom-call(%x, %y), {attributes}
}}
"""
    assert launch(read(text), "z").flops == flops


def test_collectives_are_counted_beside(program):
    found = {"all-gather": (1, 4 * 32 * 64), "all-reduce": (1, 4 * 64)}
    assert program.collectives == found | {"collective-permute": (1, 4 * 2 * 64)}


def test_of_a_conditional_the_costliest_branch_counts():
    text = """HloModule one

%little (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %one = f32[8]{0} copy(%a)
}

%much (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %two = f32[8]{0} copy(%b)
  ROOT %three = f32[8]{0} copy(%two)
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %out = f32[8]{0} conditional(%i, %x, %x), branch_computations={%little, %much}
}
"""
    assert [x.name for x in read(text).launches] == ["two", "three"]


def test_sizes_of_shapes():
    assert size("(bf16[2,3]{1,0}, s8[5]{0}, pred[])") == 12 + 5 + 1
    assert size("f8e4m3fn[7]{0}") == 7 and size("f32[]") == 4
    assert parse(HLO)[1] == "main"
