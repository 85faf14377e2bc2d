"""The loaders: order, purity, restarts, hosts, and counts of bad records that add up."""

import collections
import dataclasses
import json
import logging
import threading

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sana_jax.data.images import REASONS, BadImage, cover_crop, decode
from sana_jax.data.loader import EvaluationLoader, TrainingLoader
from sana_jax.data.rejections import Budget, Counts
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import ImageTransform
from sana_jax.runtime.errors import DoNotRetry, Retry, UserError
from tests import PATIENCE
from tests.data import bad_files
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
CROP = ImageTransform(16, 16, crop="random", flip=True)
ANY = Budget(fraction=1.0)


class Numbers:
    """Records that are numbers; those in `bad` cannot be used."""

    fingerprint = "numbers"

    def __init__(self, count: int, bad=()):
        self.count, self.bad, self.reads = count, set(bad), collections.Counter()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads[index] += 1
        if index in self.bad:
            raise BadImage("unreadable")
        return {"key": f"n{index}", "number": index}


@dataclasses.dataclass(frozen=True)
class Number:
    settings = {"kind": "number"}

    def __call__(self, record, rng):
        return {"number": np.int64(record["number"]), "chance": rng.random()}


def loader(source, **changes) -> TrainingLoader:
    return TrainingLoader(source, Number(), **{"batch_size": 4, "budget": ANY, **changes})


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def numbers(batches) -> list[int]:
    return np.concatenate([batch["number"] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve good images of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    files = {f"{i}.png": encode(picture(i)[: 20 + i], "PNG") for i in range(12)}
    return open_source(str(make(folder, files)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder with every odd and every bad file."""
    unusable = {name: data for name, (data, _) in bad_files.unusable().items()}
    return open_source(str(make(tmp_path_factory.mktemp("found"), bad_files.usable() | unusable)))


def test_an_epoch_has_every_record_once_and_the_next_another_order():
    epochs = np.array(numbers(take(iter(loader(Numbers(20))), 25))).reshape(5, 20)
    assert (np.sort(epochs) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert (epochs != np.arange(20)).any(1).all()


def test_the_order_of_a_seed_is_for_good():
    """A checkpoint's position means nothing under another rule: change `ORDER` with it."""
    assert numbers([loader(Numbers(100), seed=7).batch(0)]) == [3, 8, 48, 63]


def test_seeds_have_orders_of_their_own():
    orders = [numbers(take(iter(loader(Numbers(20), seed=seed)), 15)) for seed in (0, 1, 2**40)]
    epochs = {tuple(order[start : start + 20]) for order in orders for start in (0, 20, 40)}
    assert len(epochs) == 9
    assert orders[0] == numbers(take(iter(loader(Numbers(20), seed=0)), 15))


def test_a_batch_is_a_function_of_the_step(photos):
    plain = TrainingLoader(photos, CROP, batch_size=4, seed=5)
    threaded = TrainingLoader(photos, CROP, batch_size=4, seed=5, threads=7, prefetch=5)
    expected = [plain.batch(step)["image"] for step in (6, 3, 0, 5, 1, 4, 2)]
    batches = take(iter(threaded), 7)
    for image, step in zip(expected, (6, 3, 0, 5, 1, 4, 2), strict=True):
        np.testing.assert_array_equal(batches[step]["image"], image)
    other = TrainingLoader(photos, CROP, batch_size=4, seed=6).batch(0)["image"]
    assert (other != batches[0]["image"]).any()


def test_images_are_crops_of_the_photos(photos):
    batch = TrainingLoader(photos, ImageTransform(16, 20), batch_size=4).batch(2)["image"]
    assert batch.shape == (4, 16, 20, 3) and batch.dtype == np.uint8
    crops = [cover_crop(decode(photos[i]["image"]), 16, 20) for i in range(len(photos))]
    for image in batch:
        assert any((image == crop).all() for crop in crops)


def test_random_crops_differ_from_epoch_to_epoch(photos):
    batches = take(iter(TrainingLoader(photos, CROP, batch_size=12)), 3)
    rows = {row.tobytes() for batch in batches for row in batch["image"]}
    assert len(rows) == 36


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_a_batch_by_rows(photos, hosts):
    whole = TrainingLoader(photos, CROP, batch_size=8, seed=1)
    shares = [range(8)[i::hosts] for i in range(hosts)]
    parts = [iter(TrainingLoader(photos, CROP, batch_size=8, seed=1, rows=rows)) for rows in shares]
    for step in range(4):
        for rows, part in zip(shares, parts, strict=True):
            np.testing.assert_array_equal(next(part)["image"], whole.batch(step)["image"][rows])


class Limited:
    """The first batches of a loader, for grain's check of every restart."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, steps

    def __iter__(self):
        iterator, steps = iter(self.loader), self.steps

        class First(type(iterator)):
            def __next__(self):
                if self.step == steps:
                    raise StopIteration
                return super().__next__()

        iterator.__class__ = First
        return iterator


def test_every_restart_goes_on_as_if_unbroken(photos):
    grain.experimental.assert_equal_output_after_checkpoint(
        Limited(TrainingLoader(photos, CROP, batch_size=5, seed=2), 8)
    )
    grain.experimental.assert_equal_output_after_checkpoint(
        Limited(loader(Numbers(30, bad=range(0, 30, 7))), 12)
    )


def test_the_state_is_json_and_holds_the_counts():
    source = Numbers(30, bad=range(0, 30, 7))
    unbroken = iter(loader(source))
    take(unbroken, 11)
    state = json.loads(json.dumps(unbroken.get_state()))
    assert state["step"] == 11
    restored = iter(loader(source))
    take(restored, 2)  # whatever was done before does not count
    restored.set_state(state)
    assert numbers(take(restored, 9)) == numbers(take(unbroken, 9))
    assert restored.get_state() == unbroken.get_state()
    assert restored.counts.rejected["unreadable"] > 0


def test_two_hosts_go_on_as_one_and_as_four():
    """The batch is that of the step, whoever loads it; what was counted stays counted once."""
    source, counted = Numbers(32, bad=range(0, 32, 7)), Counts()

    def hosts(count):
        return [
            iter(loader(source, rows=range(i * 4 // count, (i + 1) * 4 // count)))
            for i in range(count)
        ]

    two = hosts(2)
    for iterator in two:
        take(iterator, 5)
        counted += iterator.counts
    states = [iterator.get_state() for iterator in two]
    whole = sum((numbers(take(iterator, 1)) for iterator in two), [])
    for count in 1, 4:
        others, total = hosts(count), Counts()
        for iterator in others:
            iterator.set_state(iterator.share(states))
            total += iterator.counts
        assert total.state() | {"hosts": 0} == counted.state() | {"hosts": 0}
        assert sum((numbers(take(iterator, 1)) for iterator in others), []) == whole


def test_orbax_saves_the_iterator(tmp_path, photos):
    batches = iter(TrainingLoader(photos, CROP, batch_size=4))
    take(batches, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        expected = next(batches)["image"]
        fresh = iter(TrainingLoader(photos, CROP, batch_size=4))
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(5, args=ocp.args.Composite(data=restore))
    np.testing.assert_array_equal(next(fresh)["image"], expected)


def test_a_bad_record_is_replaced_by_a_good_one_and_its_row_alone():
    bad = {3, 11, 12}
    good, mixed = loader(Numbers(30)), loader(Numbers(30, bad))
    replaced = 0
    for step in range(15):
        expected, batch = good.batch(step), mixed.batch(step)
        hit = np.isin(expected["number"], list(bad))
        np.testing.assert_array_equal(batch["number"][~hit], expected["number"][~hit])
        np.testing.assert_array_equal(batch["chance"][~hit], expected["chance"][~hit])
        assert not np.isin(batch["number"], list(bad)).any()
        replaced += hit.sum()
    assert replaced == 6  # two epochs


def test_counts_are_those_of_what_was_delivered():
    """What is read ahead is not counted: the counts are a function of the step, too."""
    source = Numbers(30, bad={3, 11, 12})
    batches = iter(loader(source, prefetch=8))
    expected = 0
    for step in range(20):
        expected += len(loader(source).load(step)[1])
        next(batches)
        counts = batches.counts
        assert (counts.used, sum(counts.rejected.values())) == (4 * (step + 1), expected)
        assert counts.read == counts.used + expected
    assert expected > 3


def test_item_28_every_kind_of_bad_file_is_counted_by_its_reason(found, caplog):
    """Through a folder and the loader: what is used is good, and the numbers add up."""
    usable, unusable = bad_files.usable(), bad_files.unusable()
    size = len(usable) + len(unusable)
    batches = iter(TrainingLoader(found, CROP, batch_size=size, budget=ANY))
    with caplog.at_level(logging.WARNING, "absl"):
        for epoch in (1, 2, 3):
            batch = next(batches)["image"]
            assert batch.shape == (size, 16, 16, 3) and np.isfinite(batch).all()
            counts = batches.counts
            assert counts.used == epoch * size
            assert counts.read == counts.used + sum(counts.rejected.values())
            assert sum(counts.rejected.values()) >= epoch * len(unusable)
    for name, (_, reason) in unusable.items():
        lines = [record.message for record in caplog.records if f" {name}: " in record.message]
        assert len(lines) == 1 and f"{name}: {reason}: " in lines[0]  # once, not every epoch
    seen = {reason for reason, count in counts.rejected.items() if count}
    assert seen == {reason for _, reason in unusable.values()}
    others = {"unreadable", "bad_caption", "bad_latents", "not_described", "low_score"}
    assert seen == set(REASONS) - others


def test_every_file_is_counted_once(found):
    usable, unusable = bad_files.usable(), bad_files.unusable()
    counts = bad_files.counts_of(found, CROP)
    assert (counts.read, counts.used) == (len(found), len(usable))
    expected = collections.Counter(reason for _, reason in unusable.values())
    assert +collections.Counter(counts.rejected) == expected
    assert counts.read == counts.used + sum(counts.rejected.values())
    assert set(counts.examples) == set(unusable)
    assert str(counts).startswith(f"{len(found)} read, {len(usable)} used, ")


def test_the_budget_stops_the_run():
    source = Numbers(1000, bad=range(0, 1000, 50))  # 2 %
    batches = iter(loader(source, batch_size=10, budget=Budget(fraction=0.01, minimum=3)))
    with pytest.raises(DoNotRetry) as caught:
        take(batches, 100)
    counts = batches.counts
    bad = counts.rejected["unreadable"]
    assert bad > max(3, 0.01 * counts.read) and counts.read < 500
    message = str(caught.value)
    assert f"{counts.read} read, {counts.used} used, {bad} unreadable" in message
    assert "1.000%" in message and "record " in message and "\n" not in message


def test_the_budget_stands_what_it_allows():
    take(
        iter(loader(Numbers(1000, range(0, 1000, 50)), batch_size=10, budget=Budget(0.05, 0))), 300
    )
    # ten bad records of a small set are no more in its twentieth epoch than in its first
    take(iter(loader(Numbers(500, range(10)), batch_size=50, budget=Budget(0.001, 12))), 200)


def test_fewer_hosts_stand_what_more_of_them_did():
    """Each of 16 hosts had 10 bad records, which one host is not to end of."""
    counts = Counts(read=6240, used=6240)
    counts.rejected["damaged"] = 10
    states = [{"step": 10, **counts.state()} for _ in range(16)]
    batches = iter(loader(Numbers(100_000), batch_size=10, budget=Budget()))
    batches.set_state(batches.share(states))
    next(batches)
    assert batches.counts.rejected["damaged"] == 160
    counts.rejected["damaged"] = 11
    batches.set_state(batches.share([{"step": 10, **counts.state()} for _ in range(16)]))
    with pytest.raises(DoNotRetry, match="too many bad records"):
        next(batches)


def test_small_images_are_left_out_and_cost_no_budget(tmp_path):
    files = {f"{i}.png": encode(picture(i)[: 20 if i % 2 else 40], "PNG") for i in range(8)}
    source = open_source(str(make(tmp_path, files)))
    strict = Budget(0.0, 0)
    batches = iter(TrainingLoader(source, ImageTransform(32, 32), batch_size=8, budget=strict))
    take(batches, 3)
    assert batches.counts.rejected["too_small"] >= 12
    enlarged = ImageTransform(32, 32, upscale=True)
    batches = iter(TrainingLoader(source, enlarged, batch_size=8, budget=strict))
    take(batches, 3)
    assert (batches.counts.read, batches.counts.used) == (24, 24)


def test_nothing_usable_stops_at_once():
    with pytest.raises(DoNotRetry, match=r"no usable record in 100 tries \(100 read, 0 used"):
        next(iter(loader(Numbers(10, bad=range(10)))))
    with pytest.raises(UserError, match="none of the first"):
        EvaluationLoader(Numbers(10, bad=range(10)), Number(), batch_size=4)


def test_storage_that_is_away_is_no_bad_record():
    class Away(Numbers):
        def __getitem__(self, index):
            raise Retry("the disk is away")

    with pytest.raises(Retry, match="the disk is away"):
        next(iter(loader(Away(10))))


def test_a_batch_of_few_records_repeats_them_if_it_may():
    source = Numbers(3)
    batches = iter(loader(source, batch_size=8, repeat=True))
    drawn = np.concatenate([next(batches)["number"] for _ in range(3)])
    assert collections.Counter(drawn.tolist()) == {0: 8, 1: 8, 2: 8}
    with pytest.raises(UserError, match="the data has 0 records"):
        loader(Numbers(0), repeat=True)


def test_item_18_no_data_at_all():
    with pytest.raises(UserError, match="batch_size=4: the data has 0 records, less than a batch"):
        loader(Numbers(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 31}, "batch_size=31: the data has 30 records"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_item_18_numbers_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        loader(Numbers(30), **changes)


def test_the_fingerprint_names_all_that_decides(photos, found):
    base = {"source": photos, "transform": CROP, "batch_size": 4, "seed": 0}
    changes = [
        {"source": found},
        {"batch_size": 8},
        {"seed": 1},
        {"transform": ImageTransform(16, 16)},
        {"transform": ImageTransform(16, 16, crop="random", flip=True, max_pixels=1)},
    ]
    prints = [json.dumps(TrainingLoader(**{**base, **c}).fingerprint) for c in changes]
    unchanged = json.dumps(TrainingLoader(**base).fingerprint)
    assert len({unchanged, *prints}) == len(changes) + 1
    same = [{"threads": 1}, {"prefetch": 3}, {"rows": [2, 3]}, {"budget": ANY}]
    assert {json.dumps(TrainingLoader(**base, **c).fingerprint) for c in same} == {unchanged}


def test_evaluation_is_one_pass_in_order():
    source = Numbers(10, bad={4})
    evaluation = EvaluationLoader(source, Number(), batch_size=4)
    for _ in range(2):
        batches = list(evaluation)
        assert len(batches) == len(evaluation) == 3
        assert all(batch["number"].shape == (4,) for batch in batches)
        mask = np.concatenate([batch["valid"] for batch in batches])
        assert mask.tolist() == [i < 10 and i != 4 for i in range(12)]
        assert numbers(batches) == [0, 1, 2, 3, 0, 5, 6, 7, 8, 9, 0, 0]
        assert np.concatenate([batch["index"] for batch in batches]).tolist() == list(range(12))
        counts = evaluation.counts
        assert (counts.read, counts.used, counts.rejected["unreadable"]) == (10, 9, 1)
    assert len(list(EvaluationLoader(source, Number(), batch_size=4, limit=5))) == 2


def test_batches_are_made_ahead_of_the_step():
    """While a step computes, the next batches are being read."""
    third = threading.Event()

    class Watched(Numbers):
        def __getitem__(self, index):
            if sum(self.reads.values()) >= 8:
                third.set()
            return super().__getitem__(index)

    batches = iter(loader(Watched(30), prefetch=2))
    next(batches)
    assert third.wait(PATIENCE)
    batches.close()
