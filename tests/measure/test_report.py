"""The table for people: its columns, its figures and its warnings."""

from sana_jax.measure import report

ROW = dict(seconds=0.5, images_per_second=4.0, flops_per_second=16e12, share_of_peak=0.5)


def result(**row):
    return dict(
        preset="tiny", batch=2, size=64, dtype="float32", platform="cpu", device="a CPU", cores=2,
        against="none", parts={"loop": {**ROW, "peak_flops": 32e12, **row}}, memory=None,
        steps=6, timed_steps=2,
    )  # fmt: skip


def test_columns_that_nothing_fills_are_left_out():
    heading, columns, figures, steps = report.text(result()).splitlines()
    assert heading == (
        "tiny, 2 x 64 x 64 px, float32, on a CPU, 2 cores (matrix products 32 TFLOP/s)"
    )
    assert columns.split("  ") == ["part", "ours s", "images/s", "TFLOP/s", "of peak"]
    assert figures.split() == ["loop", "0.5", "4", "16", "50", "%"]
    assert len(columns) == len(figures)
    assert steps == "loop: 2 steps were run, times are those times 3"


def test_a_part_that_one_side_lacks_has_a_dash():
    parts = {"text": dict(seconds=1.0), "trunk": dict(seconds=2.0, peak_bytes=3e9)}
    lines = [line.split() for line in report.table(parts).splitlines()]
    assert lines == [["part", "ours", "s", "GB"], ["text", "1", "-"], ["trunk", "2", "3.00"]]


def test_results_that_differ_and_sides_apart_are_told():
    row = dict(reference_seconds=1.0, ratio=0.5, relative_error=0.25, agrees=False)
    found = result(**row, interleaved=False)
    found |= dict(against="diffusers", diffusers="0.42.1", torch="2.9")
    text = report.text(found)
    assert "\ntheirs: diffusers, diffusers 0.42.1, torch 2.9\n" in text and " 2.5e-01\n" in text
    assert "loop: THE RESULTS DIFFER" in text
    assert "loop: ours first, theirs after: memory does not hold both at once" in text


def test_memory_is_told_in_gigabytes():
    memory = dict(platform="tpu", dtype="bfloat16", peak=9e9, peak_without_text_encoder=4e9)
    memory |= dict(weights={"dit": 1.2e9}, working={"loop": 0.5e9, "decode": 2e9})
    text = report.text(result() | dict(parts={}, memory=memory))
    assert "tpu, bfloat16, GB: all parts 9.00, text encoder dropped 4.00\n" in text
    assert text.endswith("weights: dit 1.20\n  beside them: loop 0.50, decode 2.00")
