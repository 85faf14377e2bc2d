"""Every file that the project reads may hold anything: it is read, or refused in one line."""

import itertools

import pytest

from sana_jax.runtime.errors import Retry, UserError
from tests.mutations import worker
from tests.mutations.inputs import INPUTS, write
from tests.mutations.run import Result, mutations, table

COUNT = 12  # of each input; python -m tests.mutations tries thousands


def test_mutated_files_are_read_or_refused_in_one_line():
    names = [name for name in INPUTS if not INPUTS[name].slow]
    results = [*mutations(names, seed=0, count=COUNT)]
    assert [r for r in results if r.how == "failed"] == []
    assert len(results) == COUNT * len(names)
    assert {r.name for r in results if r.how == "refused"} > {"model.pth", "model.json", "lock"}


def test_a_number_repeats_its_mutation_and_others_differ(tmp_path):
    write(tmp_path)
    for name, input in INPUTS.items():
        example = (tmp_path / input.file).read_bytes()
        made = [worker.content_of(name, 0, i, example) for i in range(20)]
        assert made == [worker.content_of(name, 0, i, example) for i in range(20)], name
        assert len({*made}) > 10, name
        assert worker.content_of(name, 0, -1, example) == example


def test_a_refusal_for_lack_of_memory_counts_as_a_failure():
    def refusal(cause: Exception) -> UserError:
        with pytest.raises(UserError) as raised:
            try:
                raise cause
            except Exception:
                raise UserError("file is damaged") from None
        return raised.value

    assert worker._judged(refusal(KeyError("a")))["how"] == "refused"
    assert worker._judged(refusal(MemoryError()))["how"] == "failed"
    assert worker._judged(Retry("x" * 10_000))["how"] == "failed"


def test_the_table_counts_each_input():
    hows = "read", "refused", "refused", "failed"
    results = [Result("lock", i, how, seconds=i) for i, how in enumerate(hows)]
    lines = table(results).splitlines()
    assert lines[1].split() == ["lock", "4", "1", "2", "1", "3.0"]
    assert all(len(a) == len(b) for a, b in itertools.pairwise(lines))
