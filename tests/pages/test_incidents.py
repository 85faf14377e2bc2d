"""What went wrong in a run is found in its files."""

from etils import epath

from sana_jax.pages.incidents import incidents_of, restarts
from sana_jax.pages.runs import find
from sana_jax.training.metrics_writer import MetricsWriter
from tests.pages import made


def test_a_quiet_run_has_no_incidents(tmp_path):
    rows = [{"step": step, "skipped": 0} for step in (1, 2)]
    (run,) = find([str(made.run(tmp_path / "run", rows, {}, rejected={"truncated": 0}))])
    assert incidents_of(run) == [] and restarts(run) == 0


def test_every_incident_is_told_with_its_step(tmp_path, monkeypatch):
    counts = (1, 0), (2, 3), (3, 3), (4, 5)
    rows = [{"step": step, "skipped": count} for step, count in counts] + [{"step": 4, "loss": 1}]
    rejected = {"truncated": 1, "empty": 0, "damaged": 2}
    folder = made.run(tmp_path / "run", rows, {}, rejected=rejected)
    for step, now in (0, 10**9), (2, 1_700_000_000):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with MetricsWriter(tmp_path / "other", step):
            pass
    (tmp_path / "other/tensorboard").rename(folder / "tensorboard")
    empty = folder / "tensorboard/events.out.tfevents.1800000000.host"
    empty.touch()
    (folder / "checkpoints/3.bad").mkdir()
    epath.Path(folder / "metrics.jsonl.bad").write_text("x\ny\n")
    (run,) = find([str(folder)])
    assert restarts(run) == 2
    assert incidents_of(run) == [
        (2, "restart at 2023-11-14 22:13:20 UTC: it went on from here"),
        (None, "restart at 2027-01-15 08:00:00 UTC: it did not get as far as a row"),
        (2, "3 updates after step 1 were not finite and left out"),
        (4, "2 updates after step 3 were not finite and left out"),
        (4, "bad records of 160 read: 2 truncated, 4 damaged"),
        (3, "damaged checkpoint, set aside as 3.bad"),
        (None, "2 damaged lines of metrics.jsonl, now in metrics.jsonl.bad"),
    ]


def test_a_second_run_of_one_that_is_over_is_no_restart(tmp_path, monkeypatch):
    folder = made.run(tmp_path / "run", [{"step": 4}], {"recipe": {"steps": 4}})
    for step, now in (0, 10**9), (2, 10**9 + 1), (4, 10**9 + 2):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with MetricsWriter(tmp_path / "other", step):
            pass
    (tmp_path / "other/tensorboard").rename(folder / "tensorboard")
    (run,) = find([str(folder)])
    assert restarts(run) == 1 and [each.step for each in incidents_of(run)] == [2]
