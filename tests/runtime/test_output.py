"""Output that cannot be printed: nobody reads it, letters that are missing, a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from sana_jax.runtime import cli

def main(argv):
    for i in range(int(os.environ.get("COUNT", 1))):
        print("K\\xf6ln \\u8c93 \\udcff")
        print("drawing \\u8c93", file=sys.stderr)
    open("after", "w").write("written")

cli.run(main)
"""


def run(tmp_path, stdout=subprocess.PIPE, before="", flag="", **environment):
    (tmp_path / "script.py").write_text(SCRIPT)
    shell = f'"$0" script.py {flag} {before}'
    return subprocess.run(
        ["bash", "-c", shell, sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_are_missing_are_escaped(tmp_path, encoding):
    result = run(tmp_path, PYTHONIOENCODING=encoding)
    wanted = "Köln 貓 \udcff\n".encode(encoding, "backslashreplace")
    assert (result.returncode, result.stdout) == (0, wanted)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_when_nobody_reads_any_more(tmp_path, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    both = "2>&1"
    result = run(tmp_path, writer, both, PYTHONUNBUFFERED=unbuffered, COUNT="10000")
    os.close(writer)
    assert result.returncode == 0 and (tmp_path / "after").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_give_their_numbers_to_files(tmp_path, closed):
    result = run(tmp_path, before=closed)
    assert result.returncode == 0 and (tmp_path / "after").read_text() == "written"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="not Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flag", ["", "--help"])
def test_a_disk_that_is_full_of_output_is_worth_a_retry(tmp_path, flag, unbuffered):
    result = run(tmp_path, None, "2> told > /dev/full", flag, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 75
    last = (tmp_path / "told").read_text().splitlines()[-1]
    assert last == "error: standard output: No space left on device"
