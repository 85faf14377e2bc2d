"""The document of a step is JSON, told apart by its hash and compared by its keys."""

import json

import pytest

from sana_jax.training.checkpoints import document


def test_document_is_plain(saved):
    found = json.loads((saved / "checkpoints" / "3" / "run" / "metadata").read_text())
    assert found["config"]["sizes"] == [1, 2] and found["step"] == 3
    assert found["leaves"]["params/net/b"][:2] == ["bfloat16", [128]]


@pytest.mark.parametrize("state", [b"\x00\xff", {"row": 3, "rows": [1, 2]}, None])
def test_states_of_iterators_come_back_from_json(state):
    assert document.decode(json.loads(json.dumps(document.encode(state)))) == state


def test_the_order_of_keys_does_not_matter_to_the_hash():
    one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert document.sha256(one) == document.sha256(other) != document.sha256(one | {"a": 2})


def test_values_are_shown_by_their_dotted_keys():
    flat = document.keys({"model": {"width": 64, "name": "dit"}, "empty": {}, "sizes": [1, 2]})
    assert flat == {"model.width": 64, "model.name": "dit", "empty": {}, "sizes": [1, 2]}
    shown = [document.show(flat, key) for key in ("model.width", "model.name", "sizes", "rate")]
    assert shown == ["64", "dit", "[1, 2]", "absent"]
    assert document.some(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert document.some(["a", "b"], most=2) == "a, b"
