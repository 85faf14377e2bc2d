"""Orders of records: one bucket a batch, every epoch shuffled, a pure function of the step."""

import collections
import json
import logging

import numpy as np
import pytest

from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import BucketOrder, GlobalOrder, bucket_order
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import BucketTransform
from sana_jax.models.buckets import assign, training_buckets
from sana_jax.runtime.errors import UserError
from tests.data.bad_files import encode, picture, unusable
from tests.data.test_folder import make
from tests.data.test_loader import ANY, Number, Numbers

BATCH = 4
# 13 records of bucket 0, 9 of 1, 3 of 2 (less than a batch), 8 of 5, 2 that cannot be used
BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5, -1], [13, 9, 3, 8, 2]))
TABLE = ((16, 32), (24, 24), (32, 16))


def epochs(order: BucketOrder, count: int) -> list[list[list[int]]]:
    steps = order.length // BATCH
    return [
        [[order[(e * steps + s) * BATCH + row] for row in range(BATCH)] for s in range(steps)]
        for e in range(count)
    ]


def test_a_batch_is_of_one_bucket_and_an_epoch_has_no_record_twice():
    order = BucketOrder(BUCKETS, BATCH, seed=3)
    assert order.length == (3 + 2 + 2) * BATCH
    left = []
    for epoch in epochs(order, 6):
        assert all(len(set(BUCKETS[batch])) == 1 for batch in epoch)
        counts = collections.Counter(BUCKETS[batch[0]] for batch in epoch)
        assert counts == {0: 3, 1: 2, 5: 2}
        records = np.ravel(epoch).tolist()
        assert len(set(records)) == len(records)
        left.append(frozenset(np.flatnonzero(np.isin(BUCKETS, [0, 1, 5]))) - set(records))
    assert all(len(rest) == 2 for rest in left) and len(set(left)) > 1  # another rest every epoch


def test_epochs_and_seeds_have_orders_of_their_own():
    ours = [str(epoch) for epoch in epochs(BucketOrder(BUCKETS, BATCH, seed=3), 4)]
    others = [str(epoch) for epoch in epochs(BucketOrder(BUCKETS, BATCH, seed=4), 4)]
    assert len({*ours, *others}) == 8
    assert ours == [str(epoch) for epoch in epochs(BucketOrder(BUCKETS, BATCH, seed=3), 4)]
    turns = [
        [BUCKETS[batch[0]] for batch in epoch]
        for epoch in epochs(BucketOrder(BUCKETS, BATCH, seed=3), 4)
    ]
    assert len({tuple(turn) for turn in turns}) > 1  # buckets take turns in no fixed order


def test_the_order_of_a_seed_is_for_good():
    """A checkpoint's position means nothing under another rule: change the version with it."""
    order = BucketOrder(np.arange(100) % 3, BATCH, seed=7)
    assert [order[i] for i in range(8)] == [48, 33, 12, 0, 10, 76, 49, 58]
    assert order.settings["version"] == 1


def test_what_is_never_drawn_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        order = BucketOrder(BUCKETS, BATCH)
    assert order.left_out == {-1: 2, 2: 3}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("5 of 35 records are never drawn") and "3 of bucket 2" in line


@pytest.mark.parametrize("buckets", [[0, 1, 2] * 3, [-1] * 20, []])
def test_item_18_no_bucket_holds_a_batch(buckets):
    with pytest.raises(UserError, match="batch_size=4: no bucket of images holds a batch"):
        BucketOrder(np.array(buckets, int), BATCH)


def test_a_bad_record_is_replaced_by_one_of_its_bucket():
    bad = set(np.flatnonzero(BUCKETS == 0)[:3].tolist())
    source = Numbers(len(BUCKETS), bad)
    order = BucketOrder(BUCKETS, BATCH, seed=1)
    loader = TrainingLoader(source, Number(), batch_size=BATCH, seed=1, order=order, budget=ANY)
    replaced = 0
    for step in range(30):
        batch, rejections = loader.load(step)
        wanted = [order[step * BATCH + row] for row in range(BATCH)]
        assert len(set(BUCKETS[batch["number"]])) == 1
        good = [number not in bad for number in wanted]
        np.testing.assert_array_equal(batch["number"][good], np.array(wanted)[good])
        assert not bad & set(batch["number"].tolist())
        replaced += len(rejections)
    assert replaced > 10


HALVES = slice(BATCH // 2), slice(BATCH // 2, None)


def test_hosts_and_restarts_agree():
    def loader(**changes):
        order = BucketOrder(BUCKETS, BATCH, seed=1)
        numbers = Numbers(len(BUCKETS))
        return TrainingLoader(numbers, Number(), batch_size=BATCH, seed=1, order=order, **changes)

    whole, parts = loader(), [loader(rows=np.arange(BATCH)[half]) for half in HALVES]
    for step in (0, 5, 40):
        joined = np.concatenate([part.batch(step)["number"] for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(step)["number"])
    batches = iter(whole)
    for _ in range(9):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    assert state["step"] == 9
    fresh = iter(loader())
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["number"], next(batches)["number"])


def test_fingerprints_name_the_order():
    def fingerprint(order):
        numbers = Numbers(len(BUCKETS))
        loader = TrainingLoader(numbers, Number(), batch_size=BATCH, order=order)
        return json.dumps(loader.fingerprint)

    moved = np.where(BUCKETS == 5, 1, BUCKETS)
    orders = [None, BucketOrder(BUCKETS, BATCH), BucketOrder(moved, BATCH)]
    assert len({fingerprint(order) for order in orders}) == 3
    assert fingerprint(orders[0]) == fingerprint(GlobalOrder(len(BUCKETS), 0))
    with pytest.raises(ValueError, match="in batches of 4, not 2"):
        TrainingLoader(Numbers(35), Number(), batch_size=2, order=orders[1])
    with pytest.raises(ValueError, match="an order of 35 records"):
        TrainingLoader(Numbers(36), Number(), batch_size=BATCH, order=orders[1])


def test_assignment_is_the_nearest_ratio():
    table = training_buckets(512)
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 4000, (500, 2))
    ratios = [round(h / w, 2) for h, w in table]
    expected = [
        min(range(40), key=lambda b, h=h, w=w: abs(ratios[b] - h / w)) for h, w in sizes.tolist()
    ]
    np.testing.assert_array_equal(assign(sizes, table, upscale=True), expected)
    strict = assign(sizes, table)
    for (h, w), bucket, near in zip(sizes.tolist(), strict, expected, strict=True):
        fits = h >= table[near][0] and w >= table[near][1]
        assert bucket == (near if fits else -1)
    assert assign(np.array([[0, 0], [512, 512]]), table).tolist()[0] == -1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_batch_of_images_has_one_published_shape(tmp_path):
    """Item 28 with buckets: several shapes and all bad files, from the headers to the batch."""
    shapes = [(40, 48), (48, 40), (20, 48), (48, 20), (33, 34)]
    files = {
        f"{i}.png": encode(np.resize(picture(i), (*shapes[i % 5], 3)), "PNG") for i in range(40)
    }
    files |= {name: data for name, (data, _) in unusable().items()}
    source = open_source(str(make(tmp_path / "data", files)))
    order = bucket_order(source, TABLE, 8, seed=2, cache=tmp_path / "cache")
    transform = BucketTransform(TABLE)
    loader = TrainingLoader(source, transform, batch_size=8, seed=2, order=order, budget=ANY)
    seen = collections.Counter()
    for step in range(20):
        batch = loader.batch(step)["image"]
        assert batch.shape[0] == 8 and batch.shape[1:3] in TABLE
        seen[batch.shape[1:3]] += 1
    assert set(seen) == set(TABLE)


def test_a_batch_may_be_larger_than_a_bucket_where_records_repeat():
    """No record is left out: after as many epochs as a batch has rows, all were drawn as often."""
    buckets = np.array([0, 1, 1, -1, 2, 2, 2, 2, 2])
    order = BucketOrder(buckets, BATCH, seed=3, repeat=True)
    assert (order.length, order.left_out) == (8, {-1: 1})
    rounds = []
    for first in (0, 8 * BATCH):  # positions of a round, which are four epochs
        batches = [[order[first + 4 * step + row] for row in range(BATCH)] for step in range(8)]
        assert all(len(set(buckets[batch])) == 1 for batch in batches)
        counts = collections.Counter(np.ravel(batches).tolist())
        assert counts == {index: BATCH for index in range(9) if index != 3}
        rounds.append(str(batches))
    assert len(set(rounds)) == 2
    assert order.settings["repeat"] is True
    with pytest.raises(UserError, match="no bucket of images holds a batch; the largest has 0"):
        BucketOrder(np.array([-1]), BATCH, repeat=True)


@pytest.mark.parametrize("repeat", [False, True])
def test_turns_number_the_batches_of_a_bucket(repeat):
    order, seen = BucketOrder(BUCKETS, BATCH, seed=3, repeat=repeat), collections.defaultdict(list)
    for step in range(2 * (33 if repeat else 7)):  # two rounds
        bucket, number = order.turn(step)
        assert bucket == BUCKETS[order[step * BATCH]]
        seen[bucket].append(number)
    assert set(seen) == {0, 1, 2, 5} if repeat else {0, 1, 5}
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in seen.values())
