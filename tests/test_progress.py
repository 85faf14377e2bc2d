"""What a job's log shows of long work."""

from sana_jax import progress


def test_without_a_terminal_it_is_a_line_a_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(9, "image", "shapes", initial=1) as bar:
        for clock[0] in (30.0, 61.0, 100.0, 122.0):
            bar.update(2)
    assert bar.disable
    assert capsys.readouterr().err.splitlines() == [
        "shapes: 5 of 9 images",
        "shapes: 9 of 9 images",
    ]
