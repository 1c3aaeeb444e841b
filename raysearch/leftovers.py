"""Finds processes by marks in their environment and ends them. It knows no trials, only marks.

As a program (`python -I -S leftovers.py MARK VALUE FOLDER`) it waits until its standard input is closed, then ends what
bears the mark and removes the folder: so a process that was killed still has its things tidied away behind it. Only the
standard library, because it is started without site-packages.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping

PREFIX = "RAYSEARCH_"
END_WITHIN_S = 10.0  # what was killed is gone within this, or hangs in the kernel and cannot be ended at all


def marks(pid: int) -> dict[str, str]:
    """The variables of a process that begin with `RAYSEARCH_`; empty if it is gone or somebody else's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0") if entry.startswith(PREFIX.encode()))
            return {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
    except OSError:
        return {}


def marked(matches: Callable[[Mapping[str, str]], bool]) -> list[int]:
    """Ids of the processes on this machine whose marks match, but for this process."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    return [pid for pid in pids if (found := marks(pid)) and matches(found)]


def end(matches: Callable[[Mapping[str, str]], bool]) -> list[int]:
    """Kills all processes whose marks match, and those that they start meanwhile; returns their ids."""
    ended: dict[int, None] = {}
    deadline = time.monotonic() + END_WITHIN_S
    while (found := marked(matches)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                ended[pid] = None
        time.sleep(0.02)
    return list(ended)


def _tidy_behind(mark: str, value: str, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    end(lambda found: found.get(mark) == value)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _tidy_behind(*sys.argv[1:4])
