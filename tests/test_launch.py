"""The launchers: what they would run, and what they make of exit statuses. No cluster is there."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests import PATIENCE

ROOT = Path(__file__).parents[1]
LAUNCHERS = ["local", "slurm", "tpu", "gke", "sweep"]
SLICE = dict(NAME="run1", ZONE="us-west4-a", ACCELERATOR="v5litepod-16", RUNTIME="v2-alpha")
POOL = dict(NAME="run1", IMAGE="image", ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x4")
POOL |= dict(HOSTS="4", BUCKET="bucket")


def launch(script, *arguments, path=None, **environment):
    environment = {"RETRY_SECONDS": "0", "PATH": os.environ["PATH"], **environment}
    if script == "sweep":  # whose table needs the libraries of this Python
        environment.setdefault("PYTHON", sys.executable)
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", ROOT / "launch" / script, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def counting(tmp_path, *statuses):
    """A command that ends with the next of these statuses every time it runs."""
    script = tmp_path / "counting.py"
    script.write_text(
        "import pathlib, sys\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "n = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(n + 1))\n"
        f"sys.exit({list(statuses)}[n])\n"
    )
    return sys.executable, script


def fake(tmp_path, name, body):
    """A program on a PATH of its own that logs its arguments; returns that PATH and the log."""
    log, folder = tmp_path / f"{name}.log", tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f'#!/usr/bin/env bash\necho "$@" >> {log}\n{body}\n')
    program.chmod(0o755)
    return folder, log


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_bad_flags(script):
    shown = launch(script, "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert f"launch/{script}" in shown.stdout and "--dry_run" in shown.stdout
    assert "SBATCH" not in shown.stdout and "set -euo" not in shown.stdout
    for flags in ([], ["--unknown=1"], ["--dry_run"]):
        result = launch(script, *flags)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert "--help" in result.stderr and not result.stdout


@pytest.mark.parametrize("script", ["tpu", "gke"])
def test_a_missing_variable_is_named(script):
    known = (SLICE if script == "tpu" else POOL) | {"NAME": ""}
    result = launch(script, *(["create"] if script == "tpu" else ["python"]), **known)
    assert result.returncode == 2 and "NAME is not set" in result.stderr


@pytest.mark.parametrize(
    "statuses, wanted",
    [((0,), 0), ((75, 75, 0), 0), ((75, 76), 76), ((76,), 76), ((2,), 2), ((1,), 1), ((137, 0), 0)]
    + [((127,), 2)],
)
def test_only_75_and_lost_processes_are_tried_again(tmp_path, statuses, wanted):
    result = launch("local", "--processes=1", *counting(tmp_path, *statuses))
    assert result.returncode == wanted, result.stderr
    assert (tmp_path / "count").read_text() == str(len(statuses))


def test_retries_come_to_an_end(tmp_path):
    result = launch("local", "--processes=1", *counting(tmp_path, *[75] * 9), RETRIES="2")
    assert result.returncode == 75 and (tmp_path / "count").read_text() == "3"


def test_ctrl_c_is_not_tried_again(tmp_path):
    """A training ends with 75 after it too."""
    training = tmp_path / "train.py"
    training.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(75))\n"
        f"with open({str(tmp_path / 'started')!r}, 'a') as file: file.write('x')\n"
        "time.sleep(60)\n"
    )
    command = ["bash", ROOT / "launch/sweep", "--field=rate", "--values=1,2", f"--out={tmp_path}"]
    command += [sys.executable, training]
    environment = os.environ | {"RETRY_SECONDS": "0"}
    run = subprocess.Popen(command, env=environment, start_new_session=True)
    while not (tmp_path / "started").exists() and run.poll() is None:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(PATIENCE) == 130 and (tmp_path / "started").read_text() == "x"


WAITS = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    open({saved!r}, "a").write("x")
    sys.exit({status})
signal.signal(signal.SIGTERM, stop)
open({started!r}, "a").write("x")
time.sleep(60)
"""


@pytest.mark.parametrize("status, wanted", [(75, 75), (0, 143), (3, 3)])
@pytest.mark.parametrize("script", ["sweep", "train_shapes", "tpu"])
def test_sigterm_reaches_the_program_and_is_not_tried_again(tmp_path, script, status, wanted):
    """The launcher ends when the program has saved, and as it ended; 0 would say: all is done."""
    started, saved = tmp_path / "started", tmp_path / "saved"
    training = tmp_path / "train.py"
    training.write_text(WAITS.format(started=str(started), saved=str(saved), status=status))
    arguments, given = [], {"RETRY_SECONDS": "0", "PATH": os.environ["PATH"]}
    if script == "sweep":
        arguments = ["--field=rate", "--values=1,2", f"--out={tmp_path}", sys.executable, training]
    elif script == "train_shapes":
        path, _ = fake(tmp_path, "python", f"exec {sys.executable} {training}")
        arguments, given["PYTHON"] = [tmp_path / "run"], str(path / "python")
    else:
        body = f'case "$*" in *describe*) echo ACTIVE ;; *.venv/bin:*) exec {sys.executable} '
        path, _ = fake(tmp_path, "gcloud", f"{body}{training} ;; esac")
        arguments = ["run", "python", "x.py"]
        given |= SLICE | {"PATH": f"{path}:{given['PATH']}"}
    command = ["bash", ROOT / "launch" / script, *map(str, arguments)]
    run = subprocess.Popen(command, env=given, cwd=ROOT, start_new_session=True)
    while not started.exists() and run.poll() is None:
        time.sleep(0.05)
    time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(PATIENCE) == wanted
    assert started.read_text() == saved.read_text() == "x"


def test_sigterm_between_two_tries_ends_the_launcher(tmp_path):
    command = ["bash", ROOT / "launch/sweep", "--field=rate", "--values=1", f"--out={tmp_path}"]
    command += map(str, counting(tmp_path, 75, 0))
    run = subprocess.Popen(command, env=os.environ | {"RETRY_SECONDS": "60"})
    while not (tmp_path / "count").exists() and run.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(PATIENCE) == 143 and (tmp_path / "count").read_text() == "1"


def test_programs_of_a_launcher_read_its_input():
    """In the background, bash would give them nothing to read."""
    given = ["--field=rate", "--values=1", "--out=x", "bash", "-c", "read line; [ $line = hello ]"]
    command = ["bash", ROOT / "launch/sweep", *given]
    given = dict(env=os.environ | {"PYTHON": sys.executable}, cwd=ROOT)
    assert subprocess.run(command, input="hello\n", text=True, **given).returncode == 0


@pytest.mark.parametrize("number", ["many", "-1", "08", "1m", "1\n2", " 1", "9" * 20])
@pytest.mark.parametrize(
    "name, script, arguments",
    [
        ("RETRIES", "local", ["true"]),
        ("RETRIES", "sweep", ["--field=a", "--values=1", "--out=x", "true"]),
        ("RETRIES", "train_shapes", ["--dry_run", "x"]),
        ("RETRIES", "slurm", ["--dry_run", "true"]),
        ("RETRY_SECONDS", "tpu", ["--dry_run", "status"]),
        ("GRACE_SECONDS", "local", ["true"]),
        ("POLL_SECONDS", "tpu", ["--dry_run", "status"]),
        ("HOSTS", "gke", ["--dry_run", "true"]),
        ("CHIPS", "gke", ["--dry_run", "true"]),
    ],
)
def test_a_number_that_is_none_is_refused_at_the_start(name, script, arguments, number):
    known = POOL if script == "gke" else SLICE
    result = launch(script, *arguments, **known | {name: number})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{script}: error: {name}=") and result.stderr.count("\n") == 1


def test_seconds_may_have_a_part(tmp_path):
    command = counting(tmp_path, 75, 0)
    assert launch("local", "--processes=1", *command, RETRY_SECONDS="0.1").returncode == 0


def test_launchers_are_started_through_links_and_from_elsewhere(tmp_path):
    arguments = {
        "local": ["true"],
        "gke": ["true"],
        "sweep": ["--field=a", "--values=1", "--out=runs", "true"],
        "tpu": ["status"],
        "train_shapes": ["run"],
    }
    for script, given in arguments.items():
        (tmp_path / script).symlink_to(ROOT / "launch" / script)
        command = ["bash", tmp_path / script, "--dry_run", *given]
        known = {"PATH": os.environ["PATH"], **(POOL if script == "gke" else SLICE)}
        result = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_kills_what_does_not_end(tmp_path, number):
    """A stopped process hears nothing, and may have children."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, signal, subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(f'{os.getpid()} {child.pid}')\n"
        "part.rename(part.with_name('pids'))\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    command = ["bash", ROOT / "launch/local", "--processes=1", sys.executable, worker]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or bash may not hear it
    run = subprocess.Popen(command, env=os.environ | {"GRACE_SECONDS": "1"})
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "pids").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(PATIENCE) == 128 + number
    deadline = time.monotonic() + PATIENCE  # a killed process ends when the system next runs it
    for pid in (tmp_path / "pids").read_text().split():
        while is_alive(pid):
            assert time.monotonic() < deadline, pid
            time.sleep(0.05)


def is_alive(pid):
    """A process whose parent has not heard of its end is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_local_processes_meet(tmp_path):
    script = (
        "import jax\n"
        "from jax.experimental import multihost_utils\n"
        "jax.distributed.initialize()\n"
        "rows = multihost_utils.process_allgather(jax.numpy.array(jax.process_index() + 1))\n"
        "print(jax.process_count(), jax.device_count(), int(rows.sum()), flush=True)\n"
        "from sana_jax.data.sizes import image_sizes\n"  # each reads its share of three
        "from sana_jax.data.sources import open_source\n"
        f"found = image_sizes(open_source({str(tmp_path)!r}), {str(tmp_path / 'sizes')!r})\n"
        "print(found[0].tolist(), found[1].used, flush=True)\n"
    )
    for i in range(3):
        Image.new("RGB", (20 + i, 30)).save(tmp_path / f"{i}.png")
    result = launch("local", "--processes=2", "--devices=2", sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert sorted(lines) == ["2 4 3"] * 2 + ["[[30, 20], [30, 21], [30, 22]] 3"] * 2
    assert len(list((tmp_path / "sizes").iterdir())) == 1


def test_one_process_that_gives_up_ends_the_others():
    script = (
        "import os, sys, time\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': sys.exit(76)\n"
        "time.sleep(60)\n"
    )
    result = launch("local", "--processes=3", sys.executable, "-c", script, GRACE_SECONDS="0")
    assert result.returncode == 76 and "ended with 76" in result.stderr


def test_a_clock_that_stands_still_ends_the_grace_time_too(tmp_path):
    """As of one that is set back: bash takes its SECONDS from it."""
    (tmp_path / "clock").write_text("set -T; trap SECONDS=0 DEBUG\n")
    script = (
        "import os, sys, time\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': sys.exit(76)\n"
        "time.sleep(600)\n"
    )
    clock = dict(GRACE_SECONDS="1", BASH_ENV=f"{tmp_path / 'clock'}")
    result = launch("local", sys.executable, "-c", script, **clock)
    assert result.returncode == 76 and "the others have 1 s" in result.stderr


def test_local_shows_what_it_would_run():
    result = launch("local", "--processes=3", "--dry_run", "python", "-c", "two words")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 3
    for rank, line in enumerate(lines):
        assert f"OMPI_COMM_WORLD_RANK={rank}" in line and line.endswith(r"python -c two\ words")


def test_slurm_shows_what_it_would_run():
    result = launch("slurm", "--dry_run", "python", "train.py")
    assert result.returncode == 0 and result.stdout.startswith("srun ")
    assert "python train.py" in result.stdout
    assert launch("slurm", "python").returncode == 2  # outside a job


def test_slurm_says_where_to_submit_it(tmp_path):
    job = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    result = launch("slurm", "true", **job)
    assert result.returncode == 2 and "the root of the clone" in result.stderr


@pytest.mark.parametrize(
    "statuses, restarts, wanted, requeued",
    [
        ("0 0", 0, 0, False),
        ("0 75", 0, 75, True),
        ("0 75", 100, 75, False),
        ("0 137", 0, 75, True),
        ("1 75", 0, 75, True),
        ("1 0", 0, 1, False),
        # one that gives up decides
        ("76 75", 0, 76, False),
        ("137 2", 0, 2, False),
        ("76 2", 0, 2, False),
        ("127 127", 0, 2, False),
    ],
)
def test_slurm_puts_a_job_back_after_75(tmp_path, statuses, restarts, wanted, requeued):
    # Two tasks, one after the other, and the highest status, as srun has it.
    tasks = 'for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; ended=$?'
    worst = "[ $ended -le $worst ] || worst=$ended; done; exit $worst"
    fake(tmp_path, "srun", f"shift; worst=0; {tasks}; {worst}")
    path, log = fake(tmp_path, "scontrol", "")
    job = dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts), SLURM_SUBMIT_DIR=str(ROOT))
    task = f"set -- {statuses}; shift $SLURM_PROCID; exit $1"
    result = launch("slurm", "bash", "-c", task, path=path, **job)
    assert result.returncode == wanted, result.stderr
    assert log.exists() == requeued and (not requeued or log.read_text() == "requeue 7\n")


def test_tpu_shows_what_it_would_run():
    for action, words in {
        "create": "queued-resources create run1 --zone=us-west4-a --node-id=run1",
        "setup": "scp",
        "status": "queued-resources describe run1",
        "delete": "queued-resources delete run1 --zone=us-west4-a --force",
    }.items():
        result = launch("tpu", "--dry_run", action, **SLICE)
        assert result.returncode == 0 and words in result.stdout, result.stderr
    result = launch("tpu", "--dry_run", "run", "python", "a b.py", **SLICE)
    assert result.returncode == 0, result.stderr
    assert "tpu-vm ssh run1 --zone=us-west4-a --worker=all" in result.stdout
    assert launch("tpu", "--dry_run", "run", **SLICE).returncode == 2


GCLOUD = """
count() {{ n=$(cat {folder}/$1 2> /dev/null || echo 0); echo $((n + 1)) > {folder}/$1; }}
case "$*" in
    *queued-resources\\ describe*)
        count states
        states=({states})
        case "${{states[$n]}}" in
            NONE) echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1 ;;
            AWAY) echo "ERROR: the network is unreachable" >&2; exit 1 ;;
        esac
        echo "${{states[$n]:-FAILED}}" ;;
    *queued-resources\\ create*) rm -f {folder}/ready ;;
    *test\\ -e*) [ -e {folder}/ready ] ;;
    *pip\\ install*)
        count setups
        setups=({setups})
        [ "${{setups[$n]}}" != bad ] && touch {folder}/ready ;;
    *tpu-vm\\ ssh*.venv/bin:*)
        count runs
        rounds=({rounds})
        for status in ${{rounds[$n]//,/ }}; do
            [ "$status" = lost ] && exit 255
            echo "[worker] worker ended with $status"
        done ;;
esac
"""


def gcloud(tmp_path, states, rounds, setups=""):
    return fake(
        tmp_path,
        "gcloud",
        GCLOUD.format(folder=tmp_path, states=states, rounds=rounds, setups=setups),
    )


@pytest.mark.parametrize(
    "rounds, wanted",
    [
        ("0,0", 0),
        ("1,137 0,0", 0),
        ("1,1", 1),
        ("75,75 0,0", 0),
        ("0,lost 0,0", 0),  # a worker that was not heard of
        ("134,76", 76),
        ("2,2", 2),
        ("75,134 76,76", 76),
    ],
)
def test_tpu_runs_again_after_75(tmp_path, rounds, wanted):
    path, log = gcloud(tmp_path, "ACTIVE " * 9, rounds)
    (tmp_path / "ready").touch()
    result = launch("tpu", "run", "python", "x.py", path=path, **SLICE)
    assert result.returncode == wanted, result.stderr
    assert (tmp_path / "runs").read_text() == f"{len(rounds.split())}\n"
    assert "create" not in log.read_text()


@pytest.mark.parametrize(
    "states, setups, rounds, wanted",
    [
        # Preempted; then nothing is deleted because one look at the queue fails.
        (
            "ACTIVE SUSPENDED WAITING_FOR_RESOURCES AWAY ACTIVE",
            "good",
            "lost 0",
            ["start", "delete", "create", "scp", "setup", "start"],
        ),
        ("ACTIVE AWAY ACTIVE", "", "lost 0", ["start", "start"]),
        ("PROVISIONING ACTIVE", "", "0", ["start"]),
        # One worker could not install: the next try does not run on half a slice.
        ("NONE ACTIVE ACTIVE", "bad good", "0", ["create", *["scp", "setup"] * 2, "start"]),
    ],
)
def test_tpu_makes_a_lost_slice_anew(tmp_path, states, setups, rounds, wanted):
    path, log = gcloud(tmp_path, states, rounds, setups)
    if "NONE" not in states:
        (tmp_path / "ready").touch()
    result = launch("tpu", "run", "python", "x.py", path=path, POLL_SECONDS="0", **SLICE)
    assert result.returncode == 0, result.stderr
    found = re.findall(
        r"resources (create|delete)|tpu-vm (scp)|(pip install)|(worker ended)", log.read_text()
    )
    names = {"pip install": "setup", "worker ended": "start"}
    assert [names.get(name := "".join(groups), name) for groups in found] == wanted


def test_tpu_that_could_not_be_made_anew_is_not_started(tmp_path):
    path, log = gcloud(tmp_path, "SUSPENDED", "0")
    result = launch("tpu", "run", "true", path=path, **SLICE | {"RUNTIME": ""})
    assert result.returncode == 2 and "RUNTIME is not set" in result.stderr
    assert not log.exists()


def test_tpu_setup_on_workers(tmp_path):
    """Its lines in a worker's home: an old Python ends it for good; a new one makes .venv."""
    made = 'mkdir -p .venv/bin; echo "touch installed" > .venv/bin/pip; chmod +x .venv/bin/pip'
    fake(tmp_path, "new", f'case "$*" in *venv*) {made} ;; esac')
    fake(tmp_path, "old", 'case "$*" in *version*) exit 1 ;; esac')
    path, log = fake(
        tmp_path,
        "gcloud",
        f'cd {tmp_path}; for last; do :; done; case "$4" in scp) cp "$5" sana_jax.tar.gz ;; '
        'ssh) bash -c "${last#--command=}" ;; esac',
    )
    result = launch("tpu", "setup", path=path, PYTHON="old", **SLICE)
    assert result.returncode == 2 and "old of a worker is older than 3.11" in result.stderr
    assert not (tmp_path / "sana_jax").exists()
    result = launch("tpu", "setup", path=path, PYTHON="new", **SLICE)
    assert result.returncode == 0, result.stderr
    found = {
        name: (tmp_path / "sana_jax" / name).exists()
        for name in ("README.md", ".ready", "installed")
    }
    assert all(found.values()), found


def on_a_worker(*command):
    """Returns the command that `launch/tpu run` gives to a worker's shell, in its home folder."""
    line = launch("tpu", "--dry_run", "run", *command, **SLICE).stdout
    (flag,) = (word for word in shlex.split(line) if word.startswith("--command="))
    return ["bash", "-c", flag.removeprefix("--command=")]


def test_tpu_ends_what_still_runs(tmp_path):
    """The command line of a worker: an earlier start is told to end, and waited for."""
    command = on_a_worker("bash", "-c", "exit 7")
    (tmp_path / "sana_jax").mkdir()
    old = subprocess.Popen(
        ["bash", "-c", f"trap 'sleep 1; echo saved > {tmp_path}/saved; exit' TERM; sleep 60 & wait"]
    )
    stat = Path(f"/proc/{old.pid}/stat").read_text().rpartition(")")[2].split()
    (tmp_path / "sana_jax/.pid").write_text(f"{old.pid} {stat[19]}\n")
    threading.Thread(target=old.wait).start()  # or it would stay as a zombie
    time.sleep(0.5)  # its trap is set
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout.splitlines()[-1] == "worker ended with 7", result
    assert (tmp_path / "saved").exists() and not (tmp_path / "sana_jax/.pid").exists()


@pytest.mark.parametrize("held", ["{pid}\n", "{pid} 123\n", "{pid} \n", "", "junk junk\n", "\0\0"])
def test_tpu_leaves_a_process_alone_that_got_the_number_of_an_old_one(tmp_path, held):
    command = on_a_worker("true")
    (tmp_path / "sana_jax").mkdir()
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (tmp_path / "sana_jax/.pid").write_text(held.format(pid=stranger.pid))
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == "worker ended with 0", result
        assert stranger.poll() is None and not (tmp_path / "sana_jax/.pid").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_tpu_takes_flags_from_several_lines():
    result = launch("tpu", "--dry_run", "create", **SLICE, CREATE_FLAGS="--spot\n  --internal-ips")
    assert result.stdout.endswith("--spot --internal-ips\n")


def test_gke_names_and_words_are_what_was_given():
    words = [
        "bash",
        "-c",
        "echo 'a'\necho \"b: #c\"",
        "",
        "on",
        "1",
        "é 😀\u2028\x85\x7f",
        "[x], {y}",
    ]
    odd = dict(NAME="on", ACCELERATOR="no", TOPOLOGY="4", IMAGE="a: b #c", BUCKET="0x1F")
    result = launch("gke", "--dry_run", *words, **POOL | odd)
    found = yaml.safe_load(result.stdout)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == words and found["metadata"]["name"] == "on"
    assert container["image"] == "a: b #c" and [*pod["nodeSelector"].values()] == ["no", "4"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "0x1F"}


def test_gke_keeps_kubernetes_from_expanding_words():
    """It reads $(NAME) as a variable, and $$ as $."""
    result = launch("gke", "--dry_run", "bash", "-c", "echo $$ $(date) $HOME", **POOL)
    job = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c", "echo $$$ $$(date) $HOME"]


def test_gke_manifest():
    result = launch("gke", "--dry_run", "python", "-c", "print('hi')", RETRIES="5", **POOL)
    assert result.returncode == 0, result.stderr
    spec = yaml.safe_load(result.stdout)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2, 76]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-c", "print('hi')"]
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    plain = launch("gke", "--dry_run", "python", **POOL | {"BUCKET": ""})
    assert "volumes" not in yaml.safe_load(plain.stdout)["spec"]["replicatedJobs"][0]


def test_gke_says_which_buckets_will_do():
    shown = launch("gke", "--help").stdout
    assert "--enable-hierarchical-namespace" in shown and "no locks" in shown


def test_gke_applies_the_manifest(tmp_path):
    path, log = fake(tmp_path, "kubectl", f"cat > {tmp_path}/manifest")
    result = launch("gke", "python", path=path, **POOL)
    assert result.returncode == 0 and log.read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "manifest").read_text())["kind"] == "JobSet"


TRAINING = """
import json, pathlib, sys
rate, workdir = (a.partition("=")[2] for a in sys.argv[1:])
folder = pathlib.Path(workdir)
first = not folder.exists()
folder.mkdir(parents=True, exist_ok=True)
for step in 1, 2:
    row = {"step": step, "loss": step * float(rate)}
    if step == 2 and rate == "0.3":
        del row["loss"]  # it diverged
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps(row), file=file)
with open(folder / "results.json", "w") as file:
    json.dump({"after": {"128": {"psnr": 30 + float(rate), "count": 5}}}, file)
sys.exit({"0.1": 75 if first else 0, "0.3": 76, "0.9": 2}.get(rate, 0))
"""


def test_sweep(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    out = tmp_path / "runs"
    flags = "--field=rate", "--values=0.1,0.2,0.3", f"--out={out}", "--metrics=loss,psnr_128"
    command = sys.executable, tmp_path / "train.py"
    shown = launch("sweep", "--dry_run", *flags, *command)
    assert shown.returncode == 0 and not out.exists()
    assert shown.stdout.splitlines()[1].endswith(f"--rate=0.2 --workdir={out}/0.2")
    result = launch("sweep", *flags, *command)
    assert result.returncode == 76 and "rate=0.3 stopped itself" in result.stderr
    table = [line.split() for line in result.stdout.splitlines()]
    assert table == [
        ["rate", "end", "step", "loss", "psnr_128"],
        ["0.1", "done", "2", "0.2", "30.1"],
        ["0.2", "done", "2", "0.4", "30.2"],
        ["0.3", "stopped", "2", "-", "30.3"],
    ]
    lines = (out / "0.1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 1, 2]  # 75: a second time

    again = launch("sweep", *flags[:-1], "--metrics=loss,los", *command)
    assert (
        again.returncode == 2 and "no run has los; they have rate, end, step, loss" in again.stderr
    )
    assert again.stdout.splitlines()[0].split() == ["rate", "end", "step", "loss"]


VARIED = """
import json, pathlib, sys
given = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(given["workdir"])
folder.mkdir(parents=True, exist_ok=True)
loss = float(given["rate"]) + len(given["config.kind"]) + int(given.get("config.seed", 0))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}))
"""


def test_a_sweep_varies_one_field_at_a_time_over_seeds(tmp_path):
    (tmp_path / "train.py").write_text(VARIED)
    out, plot = tmp_path / "runs", tmp_path / "plot.png"
    flags = "--vary=config.kind=a,bbb", "--vary=rate=0.5,10,20", "--seeds=0,2", f"--out={out}"
    command = sys.executable, tmp_path / "train.py"
    shown = launch("sweep", "--dry_run", *flags, *command)
    lines = [line.split()[2:] for line in shown.stdout.splitlines()]
    settings = {
        "base": ["--config.kind=a", "--rate=0.5"],
        "kind=bbb": ["--rate=0.5", "--config.kind=bbb"],
        "rate=10": ["--config.kind=a", "--rate=10"],
        "rate=20": ["--config.kind=a", "--rate=20"],
    }
    assert lines == [
        [*fields, f"--config.seed={seed}", f"--workdir={out}/{name}/seed_{seed}"]
        for seed in (0, 2)
        for name, fields in settings.items()
    ]
    result = launch("sweep", *flags, "--metrics=loss", f"--plot={plot}", *command)
    assert result.returncode == 0 and plot.exists(), result.stderr
    table = [line.split() for line in result.stdout.splitlines()]
    assert table == [
        ["setting", "end", "runs", "step", "loss"],
        *(
            [name, "done", "2", "1", mean, "±", "1.4"]
            for name, mean in zip(settings, ("2.5", "4.5", "12", "22"), strict=True)
        ),
        [str(plot)],
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vary=rate=1,2", "--field=rate", "--values=1"], "give --vary and --out, without"),
        (["--vary=rate=1"], "has one value"),
        (["--vary=rate"], "is not FIELD=VALUE,VALUE"),
        (["--vary=rate=1,../x"], "cannot name a folder"),
        (["--vary=rate=1,2", "--vary=rate=3,4"], "--vary=rate is given twice"),
        (["--vary=rate=1,2", "--seeds=0,x"], "--seeds=0,x: give numbers"),
        (["--vary=rate=1,2", "--seeds=1,"], "give numbers"),
        (["--vary=rate=1,2", "--plot=plot.png"], "name what it shows"),
        (["--vary=rate=1,2", "--plot=/nowhere/plot.png", "--metrics=loss"], "no such folder"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_run(tmp_path, flags, words):
    result = launch("sweep", *flags, f"--out={tmp_path}/runs", "touch", tmp_path / "ran")
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0", b"\xff", b"[1]\n{}\n"])
def test_a_sweep_reads_past_what_a_killed_run_left_half_written(tmp_path, torn):
    run = tmp_path / "1"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b'{"step": 2, "loss": 0.5}\n' + torn)
    (run / "results.json").write_bytes(torn)
    result = launch("sweep", "--field=rate", "--values=1", f"--out={tmp_path}", "true")
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["rate", "end", "step", "loss"], ["1", "done", "2", "0.5"]
    ]  # fmt: skip


def test_a_bad_sweep_ends_at_once_with_the_table_so_far(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    flags = "--field=rate", "--values=0.2,0.9,0.4", f"--out={tmp_path}/runs", "--metrics=loss"
    result = launch("sweep", *flags, sys.executable, tmp_path / "train.py")
    assert result.returncode == 2 and "rate=0.9 ended with 2" in result.stderr
    ends = [line.split()[:2] for line in result.stdout.splitlines()]
    assert ends == [["rate", "end"], ["0.2", "done"], ["0.9", "failed"]]
    assert not (tmp_path / "runs/0.4").exists()


def test_a_bad_sweep_ends_at_once(tmp_path):
    flags = "--field=rate", "--values=1,2", f"--out={tmp_path}"
    result = launch("sweep", *flags, *counting(tmp_path, 2, 0))
    assert result.returncode == 2 and (tmp_path / "count").read_text() == "1"
    result = launch("sweep", "--field=rate", "--values=../x", f"--out={tmp_path}", "true")
    assert result.returncode == 2 and "cannot name a folder" in result.stderr


def test_train_shapes_goes_on_after_75_and_half_a_tokenizer(tmp_path):
    body = (
        f'echo "$GLIBC_TUNABLES" > "{tmp_path}/tunables"\n'
        'case "$2" in\n'
        "    sana_jax.train | sana_jax.train_dc_ae)\n"
        f'        if [ ! -e "{tmp_path}/$2" ]; then touch "{tmp_path}/$2"; exit 75; fi ;;\n'
        "esac"
    )
    path, log = fake(tmp_path, "python", body)
    tokenizer = tmp_path / "run/tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    known = dict(PYTHON=str(path / "python"), GLIBC_TUNABLES="")
    result = launch("train_shapes", tmp_path / "run", **known)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tunables").read_text() == "glibc.malloc.hugetlb=1\n"
    ran = [line.split()[1].removeprefix("sana_jax.") for line in log.read_text().splitlines()]
    assert ran == [
        *["train_dc_ae"] * 2, "train_tokenizer", "make_shapes", *["precompute"] * 2,
        *["train"] * 2, "evaluate",
    ]  # fmt: skip
    # Of other numbers of pictures, which one folder would refuse.
    folders = re.findall(r"(\S+) .*data_dir=(\S+)", log.read_text())
    assert len({folder for _, folder in folders}) == 2
    (tokenizer / "tokenizer.json").write_text("{}")
    log.unlink()
    known["GLIBC_TUNABLES"] = "glibc.malloc.check=0"  # one's own stays
    assert launch("train_shapes", tmp_path / "run", **known).returncode == 0
    assert "train_tokenizer" not in log.read_text()
    assert (tmp_path / "tunables").read_text() == "glibc.malloc.check=0\n"


@pytest.mark.parametrize(
    "values", ["0.1,0.2\n0.3", "0.1\n", "\n", "0.1,\t,0.2", ",0.1", "0.1,,0.2"]
)
def test_no_value_of_a_sweep_is_dropped(tmp_path, values):
    flags = "--field=rate", f"--values={values}", f"--out={tmp_path}/runs"
    result = launch("sweep", *flags, "touch", tmp_path / "ran")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "cannot name a folder" in result.stderr and not (tmp_path / "ran").exists()


def test_the_quickstart_makes_nothing_where_it_is_asked_for_help(tmp_path):
    nowhere = {"VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"}
    shown = launch("quickstart", "--help", **nowhere)
    assert shown.returncode == 0 and "Draws a first picture" in shown.stdout
    refused = launch("quickstart", "--seed=3", **nowhere)
    assert refused.returncode == 2 and "it takes no arguments" in refused.stderr


def test_a_sweep_finds_its_runs_at_home(tmp_path):
    """Shells leave the ~ of --out=~/runs alone; the command reads it as home."""
    (tmp_path / "train.py").write_text(TRAINING)
    flags = "--field=rate", "--values=0.2", "--out=~/my runs/", "--metrics=loss"
    result = launch("sweep", *flags, sys.executable, tmp_path / "train.py", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["rate", "end", "step", "loss", "0.2", "done", "2", "0.4"]
    assert (tmp_path / "my runs/0.2").is_dir()


def test_train_shapes_takes_paths_from_where_it_is_started(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.json").touch()
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)  # as environments have it
    command = ["bash", ROOT / "launch/train_shapes", "--dry_run", "my run/", "--config.seed=3"]
    given = dict(START="weights/", AUTOENCODER="shapes", PYTHON="bin/python")
    known = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **given}
    shown = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True).stdout
    (train,) = (line for line in shown.splitlines() if "sana_jax.train " in line)
    words = shlex.split(train)
    assert words[0] == str(python) and f"--workdir={tmp_path}/my run/text_to_image" in words
    assert f"--config.start={tmp_path}/weights" in words and "--config.autoencoder=shapes" in words
    at_home = launch("train_shapes", "--dry_run", "~/run", HOME=str(tmp_path)).stdout
    assert f"--workdir={tmp_path}/run/autoencoder" in at_home


def test_train_shapes_goes_on_from_weights(tmp_path):
    environment = dict(START="shapes", AUTOENCODER="shapes")
    result = launch("train_shapes", "--dry_run", tmp_path, "--config.seed=3", **environment)
    flags = "--config.start=shapes --config.text_encoder.checkpoint=shapes"
    (train,) = (line for line in result.stdout.splitlines() if "sana_jax.train " in line)
    assert flags in train and train.endswith(" --config.seed=3")
    assert "tokenizer" not in result.stdout and "train_dc_ae" not in result.stdout


def test_tpu_workers_go_on_without_a_connection(tmp_path):
    """Whoever reads what they print may go away at any time."""
    script = f"echo started; sleep 1; echo more; echo more; touch {tmp_path}/saved"
    command = on_a_worker("bash", "-ec", script)
    (tmp_path / "sana_jax").mkdir()
    worker = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert worker.stdout.readline() == b"started\n"
    worker.stdout.close()
    worker.stderr.close()
    worker.wait(PATIENCE)
    assert (tmp_path / "saved").exists() and not (tmp_path / "sana_jax/.pid").exists()


def test_tpu_keeps_the_pid_of_a_later_start(tmp_path):
    """The shell of the start before may live on, where its connection is only half gone."""
    (tmp_path / "sana_jax").mkdir()

    def worker(script):
        command = on_a_worker("bash", "-ec", script)
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)

    first = worker(f"touch {tmp_path}/first; sleep 60")
    while not (tmp_path / "first").exists():
        time.sleep(0.05)
    second = worker(f"touch {tmp_path}/second; sleep 4")
    first.wait(PATIENCE)  # it has removed now what it would remove
    while second.poll() is None and not (tmp_path / "second").exists():
        time.sleep(0.05)
    time.sleep(1)  # it has written its own
    assert second.poll() is None and (tmp_path / "sana_jax/.pid").exists()
    second.wait(PATIENCE)
    assert not (tmp_path / "sana_jax/.pid").exists()


def test_ctrl_c_lets_local_processes_save(tmp_path):
    """They hear of it once: a second signal kills at once."""
    training = tmp_path / "train.py"
    training.write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, signal.SIG_DFL)\n"
        "    time.sleep(1)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w')\n"
        "    sys.exit(75)\n"
        "for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, stop)\n"
        f"open({str(tmp_path / 'started')!r}, 'w')\n"
        "time.sleep(60)\n"
    )
    command = ["bash", ROOT / "launch/local", "--processes=1", sys.executable, training]
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", terminal, *command]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (tmp_path / "started").exists() and run.poll() is None:
        time.sleep(0.05)
    run.stdin.write(b"\x03")
    run.stdin.flush()
    assert run.wait(PATIENCE) == 130 and (tmp_path / "saved").exists()
