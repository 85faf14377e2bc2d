"""Faults from within a process, as $SANA_FAULT describes them in JSON; Python imports this itself.

{"folder": F, "count": FILE}                    counts what changes files below F, for the others
{"folder": F, "at": N, "signal": 9}             the process signals itself at the N-th such change
{"folder": F, "at": N, "errno": 28, "for": M}   M changes from the N-th on fail with that error
{"clock": [[0, 1e9], [50, -1e8]]}               seconds to add to the time, from the n-th call on

It sees what Python's audit events show: files that are opened to be written, and names that change.
"""

import atexit
import datetime
import json
import os
import sys
import threading
import time

NAMES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


def watch(fault):
    lock, done = threading.Lock(), 0

    def hook(event, arguments):
        nonlocal done
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in NAMES:
            path = arguments[0]
        else:
            return
        if isinstance(path, int) or not os.fsdecode(path).startswith(fault["folder"]):
            return
        with lock:
            done += 1
            number = done
        if "signal" in fault and number == fault["at"]:
            os.kill(os.getpid(), fault["signal"])
        if "errno" in fault and 0 <= number - fault["at"] < fault["for"]:
            raise OSError(fault["errno"], os.strerror(fault["errno"]), path)

    def count():
        with open(fault["count"], "w") as file:
            file.write(str(done))

    sys.addaudithook(hook)
    if "count" in fault:
        atexit.register(count)


def move_clock(jumps):
    calls, seconds, nanoseconds = 0, time.time, time.time_ns
    real = datetime.datetime

    def shift():
        nonlocal calls
        calls += 1
        return [shift for after, shift in jumps if calls > after][-1]

    class Kind(type):
        def __instancecheck__(cls, thing):
            return isinstance(thing, real)

    class Moved(real, metaclass=Kind):
        @classmethod
        def now(cls, tz=None):
            return real.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls):
            return real.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    time.time = lambda: seconds() + shift()
    time.time_ns = lambda: nanoseconds() + int(shift() * 1e9)
    datetime.datetime = Moved


def install():
    fault = json.loads(os.environ.get("SANA_FAULT", "{}"))
    if "folder" in fault:
        watch(fault)
    if "clock" in fault:
        move_clock(fault["clock"])


install()
