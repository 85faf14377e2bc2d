"""Rows are read from whatever a run, or a killed one, has left."""

import json
import math

import pytest
from etils import epath

from sana_jax.training.rows import curve, read_rows, row_of


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b'{"step": 3, "lo',
        b'{"loss": 1}',
        b"[1]",
        b"null",
        b'{"step": -1}',
        b'{"step": 1e3}',
        b'{"step": 9007199254740993}',
        b"\xff",
        b"[" * 10**5,
    ],
    ids=lambda line: repr(line[:30]),
)
def test_a_line_that_is_no_whole_row_is_none(line):
    assert row_of(line) is None


def test_torn_lines_and_a_missing_file_are_no_rows(tmp_path):
    folder = epath.Path(tmp_path)
    assert read_rows(folder) == []
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n\n{"step": 2, "lo')
    assert read_rows(folder) == [{"step": 1, "loss": 2}]


def test_a_curve_takes_the_later_of_two_values_and_has_gaps_where_nothing_is_finite():
    lines = '{"step": 1, "loss": 9}', '{"step": 1, "loss": 8.0}', '{"step": 2}'
    lines += '{"step": 3, "loss": null}', '{"step": 4, "loss": NaN}', '{"step": 5, "loss": "x"}'
    found = curve([json.loads(line) for line in lines], "loss")
    assert found.pop(1) == 8.0
    assert set(found) == {3, 4, 5} and all(map(math.isnan, found.values()))
