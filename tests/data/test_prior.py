"""Batches of which half are pictures of the class: their order, weights and fingerprints."""

import collections
import json

import numpy as np
import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import BucketOrder, GlobalOrder
from sana_jax.data.prior import ClassPictures, PriorOrder, WeightedRows, WithPrior, share_out
from sana_jax.runtime.errors import UserError
from tests.data.test_folder import PNG, make
from tests.data.test_loader import ANY, Number, Numbers

BATCH, OWN, CLASS = 8, 5, 6


class Named(Numbers):
    fingerprint = "the class"


def loader(bad=(), weight=1.0, **changes):
    source = WithPrior(Numbers(OWN), Named(CLASS, bad))
    order = PriorOrder(GlobalOrder(OWN, 3), OWN, np.zeros(CLASS, int), BATCH, seed=3)
    changes = dict(batch_size=BATCH, seed=3, order=order, budget=ANY) | changes
    return TrainingLoader(source, WeightedRows(Number(), weight), **changes)


def test_half_of_each_batch_is_of_the_class_and_has_its_weight():
    own, of_class = collections.Counter(), collections.Counter()
    for step in range(15):
        batch = loader(weight=0.25).batch(step)
        np.testing.assert_array_equal(batch["weight"], np.float32([2] * 4 + [0.5] * 4))
        own.update(batch["number"][:4].tolist())
        of_class.update(batch["number"][4:].tolist())
    assert own == dict.fromkeys(range(OWN), 12)  # 60 draws of each half
    assert of_class == dict.fromkeys(range(CLASS), 10)


def test_both_halves_of_a_batch_are_of_one_bucket():
    own = np.array([0, 0, 0, 2, 2])
    of_class = share_out(CLASS, own)
    order = PriorOrder(BucketOrder(own, 4, 1, repeat=True), OWN, of_class, BATCH, seed=1)
    buckets, drawn = np.concatenate([own, of_class]), collections.Counter()
    for step in range(30):
        batch = [order[BATCH * step + row] for row in range(BATCH)]
        assert len(set(buckets[batch])) == 1
        assert all(index < OWN for index in batch[:4]) and all(index >= OWN for index in batch[4:])
        drawn.update(batch[4:])
        replaced = order.replacement(BATCH * step + 7, np.random.default_rng(step))
        assert replaced >= OWN and buckets[replaced] == buckets[batch[0]]
        replaced = order.replacement(BATCH * step, np.random.default_rng(step))
        assert replaced < OWN and buckets[replaced] == buckets[batch[0]]
    # 18 of 30 batches are of bucket 0, and each bucket's pictures are drawn alike.
    assert drawn == {5: 18, 6: 18, 7: 18, 8: 18, 9: 24, 10: 24}


def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_hosts():
    halves = [loader(rows=np.arange(BATCH)[rows]).batch(7) for rows in (slice(4), slice(4, 8))]
    whole = loader().batch(7)
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), whole[name])


def test_a_bad_picture_of_the_class_is_replaced_by_another_of_the_class():
    made = loader(bad=[0, 1])
    for step in range(10):
        batch, _ = made.load(step)
        assert not {0, 1} & set(batch["number"][4:].tolist())
        assert (batch["weight"][4:] == 2).all()


def test_the_fingerprint_is_of_both_and_of_the_weight():
    own, other = Numbers(OWN), Named(OWN)
    prints = {WithPrior(*pair).fingerprint for pair in ((own, own), (own, other), (other, own))}
    assert len(prints) == 3
    assert len({json.dumps(loader(weight=w).fingerprint) for w in (1.0, 0.5)}) == 2
    assert loader().fingerprint["records"] == OWN + CLASS


def test_pictures_of_the_class_have_their_prompts(tmp_path):
    source = ClassPictures(make(tmp_path, {"0.png": PNG}), ["0.png", "1.png"], ["a {dog}", "b"])
    assert source[0]["captions"] == ["a {dog}"] and source[0]["image"] == PNG
    with pytest.raises(BadImage, match="1.png is gone"):
        source[1]


def test_class_pictures_are_shared_out_as_the_data_is():
    assert share_out(4, np.array([3, 3, 3, 7])).tolist() == [3, 3, 3, 7]
    assert share_out(100, np.zeros(5, int)).tolist() == [0] * 100
    shared = share_out(2, np.array([1] * 97 + [2, 5, 9]))
    assert set(shared.tolist()) == {1, 2, 5, 9}


def test_what_does_not_fit_is_refused():
    order = BucketOrder(np.array([0, 2]), 4, repeat=True)
    with pytest.raises(UserError, match="there is no picture of the size of bucket 2"):
        PriorOrder(order, 2, np.zeros(CLASS, int), BATCH)
