"""A judge that is a program: what it is given, and what it may not do."""

import sys

import pytest

from sana_jax.judges.command import check, judged
from sana_jax.runtime.errors import UserError

PICTURES = [("a b/0.png", "a cat"), ("1.png", "two\n\tdogs"), ("2.png", "\ud800")]


def command(tmp_path, body):
    (tmp_path / "judge.py").write_text("import sys\n" + body)
    return f"{sys.executable} {tmp_path / 'judge.py'}"


def test_it_reads_paths_and_prompts_and_its_numbers_are_taken_in_order(tmp_path):
    line = command(
        tmp_path,
        "for i, t in enumerate(sys.stdin.buffer.read().splitlines()):\n"
        "    open(sys.argv[0] + '.told', 'ab').write(t + b'|'); print(i - 0.5)\n",
    )
    assert list(judged(line, PICTURES, says=False)) == [-0.5, 0.5, 1.5]
    told = (tmp_path / "judge.py.told").read_bytes()
    assert told == b"a b/0.png\ta cat|1.png\ttwo dogs|2.png\t?|"


def test_answers_of_a_tournament(tmp_path):
    line = command(tmp_path, "print('yes -0.1 -2\\n\\nNO -3 -1e-2\\nyes 0 -9')")
    expected = [["yes", -0.1, -2.0], ["no", -3.0, -0.01], ["yes", 0.0, -9.0]]
    assert list(judged(line, PICTURES, says=True)) == expected


@pytest.mark.parametrize(
    "body, says, words, count",
    [
        ("print(1); sys.exit(3)", False, "it ended with status 3 after 1 of 3 pictures", 1),
        ("print(1)", False, "it printed 1 lines for 3 pictures", 1),
        ("print('1\\n2\\n3\\n4')", False, "it prints more than 3 lines: '4'", 3),
        ("print('loading')", False, "of a b/0.png it prints 'loading', not a number", 0),
        ("print('1\\nnan')", False, "of 1.png it prints 'nan', not a number", 1),
        ("print('inf')", False, "not a number", 0),
        ("print(0.5)", True, "not yes or no and two logarithms", 0),
        ("print('maybe 1 2')", True, "not yes or no and two logarithms", 0),
        ("print('yes 1')", True, "not yes or no and two logarithms", 0),
    ],
)
def test_what_a_judge_does_wrong_is_told_and_what_came_before_is_kept(
    tmp_path, body, says, words, count
):
    found = []
    with pytest.raises(UserError) as error:
        for answer in judged(command(tmp_path, body), PICTURES, says):
            found.append(answer)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(found) == count


def test_a_judge_does_not_outlive_its_reader(tmp_path):
    line = command(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    answers = judged(line, PICTURES, says=False)
    pid = int(next(answers))
    answers.close()
    with pytest.raises(ProcessLookupError):
        import os

        os.kill(pid, 0)


def test_a_file_that_the_system_cannot_start(tmp_path):
    (tmp_path / "judge").write_text("no shebang")
    (tmp_path / "judge").chmod(0o755)
    with pytest.raises(UserError, match="--judge=.*judge: Exec format error"):
        list(judged(str(tmp_path / "judge"), PICTURES, says=False))


@pytest.mark.parametrize("line", ["", "no-such-program", "'half", "/nowhere/judge x"])
def test_no_program(line):
    with pytest.raises(UserError, match="--judge="):
        check(line)
