"""Progress in a job's log, and on a terminal."""

import io

from sana_jax.runtime import progress


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


def test_a_note_follows_the_numbers(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    terminal = Terminal()
    for options in {}, {"file": terminal, "mininterval": 0}:
        with progress.Progress(9, "picture", **options) as bar:
            bar.tell("$0.20")
            bar.update(2)
    assert capsys.readouterr().err == "2 of 9 pictures, $0.20\n"
    assert "2/9" in terminal.getvalue() and "$0.20" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_is_a_bar():
    terminal = Terminal()
    with progress.Progress(9, "image", initial=1, file=terminal, mininterval=0) as bar:
        for _ in range(4):
            bar.update(2)
        assert not bar.disable and bar.n == 9
    assert "9/9" in terminal.getvalue() and " image/s" in terminal.getvalue()
