"""The command: a folder of its own, whole or not at all."""

import resource
import subprocess
import sys
from functools import partial


def test_the_command_leaves_no_half_of_a_folder(tmp_path):
    def run(out):
        command = [sys.executable, "-m", "sana_jax.train_tokenizer", f"--out={out}", "--records=9"]
        full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=full)

    result = run(tmp_path / "new" / "tokenizer")
    assert result.returncode and "large" in result.stderr, result.stderr
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "tokenizer")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
