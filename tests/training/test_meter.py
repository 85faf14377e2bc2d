"""The rows: means of applied updates, and rates without compilation and other pauses."""

import numpy as np

from sana_jax.training.meter import Meter


def test_every_shape_of_batch_is_compiled_apart_from_the_rate():
    meter, found = Meter(), []
    for width, seconds in (2, 5.0), (2, 0.0), (3, 7.0), (2, 0.0):
        meter.dispatched({"x": np.zeros((4, width))}, seconds, 0.0)
        found.append(meter.row().get("compile_seconds"))
    assert found == [5.0, None, 7.0, None]


def test_skipped_updates_count_in_no_mean():
    meter = Meter()
    for loss, skipped, streak in (1.0, 0, 0), (np.nan, 1, 1), (np.nan, 2, 2), (4.0, 2, 0):
        meter.read({"loss": loss, "skipped": skipped, "streak": streak}, rows=8)
        assert meter.streak == streak
    row = meter.row()
    assert (row["loss"], row["skipped"]) == (2.5, 2)
    assert "loss" not in meter.row()


def test_pauses_are_told_apart_and_count_in_no_rate(monkeypatch):
    """8 images in 12 seconds, of which a checkpoint took 6 and hooks 2; the peak is 4 images/s."""
    now = [100.0]
    monkeypatch.setattr("sana_jax.training.meter.time.monotonic", lambda: now[0])
    meter = Meter(peak_rate=4.0)
    meter.read({"skipped": 0, "streak": 0}, rows=8)
    for name, seconds in ("checkpoint", 6.0), ("hook", 1.5), ("hook", 0.5):
        meter.paused(name, seconds)
    now[0] += 12
    row = meter.row()
    assert (row["checkpoint_seconds"], row["hook_seconds"]) == (6.0, 2.0)
    assert (row["images_per_second"], row["mfu"]) == (2.0, 0.5)
