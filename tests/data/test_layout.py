"""Which images of a folder are of a split: by every way that people name folders after splits."""

import pytest

from sana_jax.data.layout import choose, split_of
from sana_jax.data.records import NoData
from sana_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    "kind, names",
    [
        ("train", "train Train TRAIN training train2017 train_images images_train trainA trainset"),
        ("validation", "val Val val2017 valid validation dev VALID val_images DIV2K_valid_HR valA"),
        ("test", "test Test testing test2015 testB test-images TestSet eval held_out HeldOut"),
        ("test", "holdout hold-out evaluation ILSVRC2012_img_test"),
        ("train", "trn trn_256 TrnImages"),
        ("validation", "vld minival2014"),
        ("test", "tst tst_256 imagesTst"),
        ("", "bus trains validity device tested latest contest images 2017 ä trainval evaluated"),
        ("", "train_station steam_train DIV2K_train_HR"),
    ],
)
def test_what_the_name_of_a_folder_says(kind, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize(
    "files, train, test",
    [
        ("a b/c", "a b/c", None),  # classes, or no folders at all
        ("train/a test/b", "train/a", "test/b"),
        ("train2017/a val2017/b", "train2017/a", "val2017/b"),
        ("Train/a Test/b", "Train/a", "Test/b"),
        ("training/a validation/b testing/c", "training/a", "testing/c"),
        ("trainset/a dev/b", "trainset/a", "dev/b"),
        ("trn/x/a tst/x/b vld/x/c", "trn/x/a", "tst/x/b"),
        ("train/x/a train/y/b valid/x/c", "train/x/a train/y/b", "valid/x/c"),
        # Splits below other folders, and splits of every class.
        ("a/train/x a/val/y b/train/z", "a/train/x b/train/z", "a/val/y"),
        ("coco/train2017/a coco/val2017/b", "coco/train2017/a", "coco/val2017/b"),
        ("a/train/x b/train/y b/test/z", "a/train/x b/train/y", "b/test/z"),
        # What is held out below the split, and classes called after a split in what is held out.
        ("train/a train/val/b test/c", "train/a", "test/c"),
        ("train/x/a train/train/b test/train/c", "train/x/a train/train/b", "test/train/c"),
        # Other folders and loose images are left out.
        ("train2017/a val2017/b unlabeled2017/c d", "train2017/a", "val2017/b"),
        ("train/a b", "train/a", None),
    ],
)  # fmt: skip
def test_images_of_the_splits(files, train, test):
    images = files.split()
    for split, expected in ("train", train), ("test", test):
        if expected is None:
            with pytest.raises(NoData, match="no split 'test'"):
                choose(images, split, "photos")
            continue
        chosen = choose(images, split, "photos")
        assert [name for name in images if chosen.keeps(name)] == expected.split()
        assert all(name.startswith(chosen.folder) for name in expected.split())


def test_a_name_that_is_there_is_the_split_whatever_else_it_says():
    images = ["val2017/a", "fold_1/b", "fold_1/val/c", "cats/train/d"]
    for split, expected in (
        ("val2017", ["val2017/a"]),
        ("fold_1", ["fold_1/b"]),
        ("cats/train", ["cats/train/d"]),
    ):
        chosen = choose(images, split, "photos")
        assert [name for name in images if chosen.keeps(name)] == expected


@pytest.mark.parametrize(
    "files, words",
    [
        (
            "bus/a car/b train/c",
            "photos: train may be the split train or, like bus, car beside it,",
        ),
        ("bus/a Train/c", "give photos/Train as the data to use it alone, or rename it to use all"),
        ("x/bus/a x/train/b y/c", "photos: x/train may be the split train or, like x, y"),
        (
            "train2014/a train2017/b",
            "photos: train2014, train2017 may each be the split train: name",
        ),
        ("trainA/a trainB/b testA/c", "photos: trainA, trainB may each be the split train"),
        ("a val2017/b", "photos: no split 'train', .* there are val2017"),
        ("cats/a dogs/b Test/c", "photos: no split 'train', .* there are Test, cats, dogs"),
        ("DIV2K_train_HR/a DIV2K_valid_HR/b", "no split 'train', .* DIV2K_train_HR, DIV2K_valid"),
    ],
)
def test_what_may_mean_two_things_is_refused(files, words):
    with pytest.raises(UserError, match=words):
        choose(files.split(), "train", "photos")


def test_one_line_says_what_is_used_held_out_and_left_out():
    images = "train2017/a train2017/b val2017/c unlabeled2017/d train2017/test/e f".split()
    assert choose(images, "train", "photos").note == (
        "split train: 2 of train2017; held out: 1 of val2017, 1 of train2017/test; left out: 1 of"
        " unlabeled2017, 1 in no folder"
    )
    assert choose(["a", "bus/b"], "train", "photos").note == ""
    assert choose(["train/a", "Train/b"], "train", "photos").note == (
        "split train: 1 of train; left out: 1 of Train"
    )
