#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (with jax 0.10.2, Python 3.11): a wall clock that is set forward while a checkpoint is saved
# makes the save fail, since its waits for other threads count with time.time() and not with a monotonic clock.
#
# Valid input: an asynchronous save of one array of 64 MiB. After it has begun, the clock is set forward by a day, as NTP
# does on a machine that booted with a wrong date; here time.time is replaced, since setting a clock needs rights.
# Seen: TimeoutError ChainedFuture completed 2/3 futures but timed out after 86400.07 seconds. A save of a second fails
# for its limit of 20 minutes; the next save, after the jump, is fine.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'orbax-checkpoint==0.12.8'
cat > "$folder/save.py" <<'PYTHON'
import sys
import time

import jax.numpy as jnp
import orbax.checkpoint as ocp

real, jump = time.time, [0.0]
time.time = lambda: real() + jump[0]
manager = ocp.CheckpointManager(sys.argv[1] + "/run")
manager.save(0, args=ocp.args.StandardSave({"x": jnp.ones(2**24)}))
jump[0] = 86400.0
try:
    manager.wait_until_finished()
    print("saved:", manager.all_steps())
except Exception as error:
    print(type(error).__name__, error)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/save.py" "$folder" 2>/dev/null | tee "$folder/out"
grep -q TimeoutError "$folder/out"
