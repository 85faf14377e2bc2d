"""Machine code written here, as nvdisasm lists it, and the assembler itself where it is."""

import pytest

from sana_jax.measure import gpu_machine_code
from sana_jax.measure.gpu_compile import has_compiler
from sana_jax.measure.gpu_machine_code import Code, Launched, executions, parse_resources, read
from sana_jax.measure.gpu_targets import CARDS

SAID = "ptxas info : 4 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
SAID += "ptxas info : Used 40 registers, used 1 barriers, 512 bytes smem, 376 bytes cmem[0]\n"
USED = parse_resources("sm_90a", SAID)


def listing(*lines):
    """Lines of nvdisasm; a label ends in a colon."""
    text, at = [".text.work:"], 0
    for line in (*lines, "EXIT", ".L_x_9:", "BRA `(.L_x_9)", "NOP"):
        if not line.endswith(":"):
            predicate, _, rest = line.rpartition("@@")
            line = f"        /*{at:04x}*/ {predicate:>20} {rest} ;"
            at += 16
        text.append(line)
    return "\n".join(text)


def counted(start, add, compare, branch="@P0@@BRA `(.L_x_0)"):
    """A loop of four instructions behind one; those behind it are two."""
    code = [start, ".L_x_0:", "LDG.E.128 R8, desc[UR8][R2.64]", add, compare, branch]
    return executions(listing(*code))


@pytest.mark.parametrize(
    "start, add, compare, turns",
    [
        ("MOV R5, RZ", "IADD3 R5, R5, 0x1, RZ", "ISETP.NE.U32.AND P0, PT, R5, 0x20, PT", 32),
        ("MOV R5, 0xfffffff8", "VIADD R5, R5, 0x1", "ISETP.NE.U32.AND P0, PT, R5, RZ, PT", 8),
        (
            "IMAD.MOV.U32 R5, RZ, RZ, 0x10",
            "VIADD R5, R5, 0xffffffff",
            "ISETP.NE.U32.AND P0, PT, R5, RZ, PT",
            16,
        ),
        ("UMOV UR4, 0x3", "UIADD3 UR4, UR4, 0x4, URZ", "ISETP.GE.AND P0, PT, 0x20, UR4, PT", 8),
        ("CS2R R4, SRZ", "IADD3 R5, R5, 0x3, RZ", "ISETP.LT.AND P0, PT, R5.reuse, 0xa, PT", 4),
        ("HFMA2.MMA R5, -RZ, RZ, 0, 5.9604644775390625e-08", "IADD3 R5, R5, -0x1, RZ",
         "ISETP.GT.AND P0, PT, R5, -0x3, PT", 4),
    ],
)  # fmt: skip
def test_a_loop_turns_as_often_as_its_counter_says(start, add, compare, turns):
    _, times, unknown = counted(start, add, compare)
    assert times.tolist() == [1, *[turns] * 4, 1, 1] and unknown == 0


def test_a_counter_that_is_compared_before_its_step_turns_once_more():
    compare, add = "ISETP.NE.AND P0, PT, R5, 0x7, PT", "IADD3 R5, R5, 0x1, RZ"
    assert counted("MOV R5, RZ", compare, add)[1][1] == 8


def test_a_loop_that_ends_by_a_branch_out_of_it():
    compare = "ISETP.NE.U32.AND P1, PT, R5, 0x20, PT"
    code = ["MOV R5, RZ", ".L_x_0:", "IADD3 R5, R5, 0x4, RZ", compare]
    code += ["@!P1@@CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:"]
    assert executions(listing(*code))[1].tolist() == [1, 8, 8, 8, 8, 1, 1]


@pytest.mark.parametrize(
    "start, compare",
    [
        ("LDG.E R5, desc[UR8][R2.64]", "ISETP.NE.AND P0, PT, R5, 0x20, PT"),
        ("MOV R5, RZ", "ISETP.NE.AND P0, PT, R5, R7, PT"),
        ("MOV R5, RZ", "ISETP.NE.AND P0, PT, R5, 0x20, !P3"),
        ("MOV R5, RZ", "FSETP.GT.AND P0, PT, R9, 1, PT"),
    ],
)
def test_an_unknown_loop_counts_once(start, compare):
    _, times, unknown = counted(start, "IADD3 R5, R5, 0x1, RZ", compare)
    assert set(times.tolist()) == {1} and unknown == 1


def test_loops_in_loops_multiply():
    code = ["MOV R1, RZ", ".L_x_0:", "MOV R2, RZ", ".L_x_1:", "MUFU.EX2 R3, R3"]
    code += ["VIADD R2, R2, 0x1", "ISETP.NE.AND P0, PT, R2, 0x5, PT", "@P0@@BRA `(.L_x_1)"]
    code += ["VIADD R1, R1, 0x1", "ISETP.NE.AND P0, PT, R1, 0x3, PT", "@P0@@BRA `(.L_x_0)"]
    found = read(USED, listing(*code))
    assert found.special == 15 and found.instructions == 1 + 3 * (1 + 5 * 4 + 3) + 2


def test_what_a_warp_executes():
    code = ["LDG.E.U16 R1, desc[UR8][R2.64]", "LDGSTS.E.BYPASS.128 [R1], [R2.64]"]
    code += ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24"]
    code += ["STG.E desc[UR8][R2.64], R1", "STS [R3], R4", "@!P0@@MUFU.RCP R5, R6"]
    found = read(USED, listing(*code))
    assert (found.registers, found.spilled_bytes, found.shared_bytes) == (40, 20, 512)
    assert (found.accesses, found.special, found.loaded_bytes) == (4, 1, 32 * (2 + 16))
    assert found.tensor_flops == 2 * 16 * 8 * 16 + 2 * 64 * 32 * 16 // 4
    by_tensor_memory = read(USED, listing(*code, "UTMALDG.2D [UR4], [UR6]"))
    assert by_tensor_memory.loaded_bytes is None


def code(**figures):
    zero = dict.fromkeys(["special", "accesses", "loaded_bytes", "tensor_flops"], 0)
    zero |= dict(registers=64, spilled_bytes=0, shared_bytes=0, instructions=0, unknown_loops=0)
    return Code(target="sm_90a", **zero | figures)


def test_the_fullest_multiprocessor_bounds_a_kernel():
    card, four_warps = CARDS["h100"], Launched(133, 128, 0)  # two blocks on one of 132
    assert code(instructions=1000).seconds(four_warps, card) == pytest.approx(2000 / 1.98e9)
    assert code(special=1000).seconds(four_warps, card) == pytest.approx(16000 / 1.98e9)
    assert code(accesses=1000).seconds(four_warps, card) == pytest.approx(8000 / 1.98e9)
    assert code(instructions=8).seconds(Launched(1, 32, 0), card) == pytest.approx(8 / 1.98e9)
    busy = code(tensor_flops=10**9).seconds(four_warps, card)
    assert busy == pytest.approx(133 * 4 * 1e9 / card.half_flops)


def test_warps_at_once():
    h100, rtx = CARDS["h100"], CARDS["4090"]
    assert code(registers=247).occupancy(Launched(100, 128, 0), h100) == 8
    assert code(registers=32).occupancy(Launched(100, 128, 0), h100) == 64
    assert code(registers=32).occupancy(Launched(100, 128, 0), rtx) == 48
    assert code(registers=32).occupancy(Launched(100, 128, 40 * 1024), rtx) == 8
    assert code(registers=32).occupancy(Launched(100, 32, 0), h100) == 32  # of blocks


PTX = """.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 x) {
    .reg .b64 %rd<3>; .reg .f32 %f<3>;
    ld.param.u64 %rd1, [x];
    cvta.to.global.u64 %rd2, %rd1;
    ld.global.f32 %f1, [%rd2];
    add.f32 %f2, %f1, %f1;
    st.global.f32 [%rd2], %f2;
    ret;
}
"""


@pytest.mark.skipif(not has_compiler(), reason="the CUDA compiler is not installed")
def test_the_assembler():
    found = gpu_machine_code.assemble(PTX)
    assert found.target == "sm_80" and 0 < found.registers < 32 and not found.spilled_bytes
    assert (found.accesses, found.loaded_bytes) == (2, 128) and 3 < found.instructions < 16
    with pytest.raises(ValueError, match="ptxas: "):
        gpu_machine_code.assemble(PTX.replace("add.f32", "add.nothing"))
