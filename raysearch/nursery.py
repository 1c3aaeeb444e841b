"""On the worker: keeps one process in waiting for a slot, which has loaded what the slot's next trial needs.

It runs no trial: it hands a supervisor over, with the process that is to become the trial. A process in waiting serves
one trial, of the very environment that it was started with; for any other trial it is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raysearch import supervisor


@dataclass(frozen=True)
class Ahead:
    """What a process in waiting is started with: a trial with anything else needs another one.

    Attributes:
        command: Argument vector of the process in waiting.
        env: All of its environment. Threads are read when torch is loaded, and the marks by which its processes are
            found are there from the beginning.
        niceness: Of its processes: a process may not take it back.
    """

    command: tuple[str, ...]
    env: Mapping[str, str]
    niceness: int


class Nursery:
    """The process in waiting of one slot; at most one. It ends with the process that holds this object."""

    def __init__(self) -> None:
        self._ahead: Ahead | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    def prepare(self, ahead: Ahead) -> None:
        """Starts a process in waiting if there is none of this kind."""
        if self._supervisor and self._ahead == ahead and not _is_gone(self._supervisor):
            return
        self.close()
        # the environment bears the marks by which the supervisor is found when its slot was killed
        self._supervisor = start_supervisor("--wait", env=ahead.env, log=None)
        self._ahead = ahead
        told = {"command": ahead.command, "env": dict(ahead.env), "niceness": ahead.niceness}
        if not _tell(self._supervisor, json.dumps(told)):
            self.close()
        else:
            self._supervisor.wait()  # for its starter, which would be a zombie for as long as the process waits

    def take(self, ahead: Ahead, out: Path) -> subprocess.Popen[bytes] | None:
        """Makes the process in waiting the trial of a folder.

        Args:
            ahead: What the trial needs.
            out: Its folder, with `order.json` in it.

        Returns:
            Its supervisor; None if there is no process of this kind, so that the trial is to be started as any other.
        """
        found = self._supervisor
        if found is None:
            return None
        if self._ahead != ahead or _is_gone(found) or not _tell(found, str(out)):
            self.close()
            return None
        self._supervisor = None
        return found

    def close(self) -> None:
        """Ends the process in waiting, if there is one."""
        if self._supervisor:
            assert self._supervisor.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()
            join(self._supervisor)
            self._supervisor = None


def start_supervisor(argument: str, *, env: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """Starts a supervisor, which is nobody's child: what is returned ends at once, its pipes are the supervisor's.

    Args:
        argument: `--wait`, or the folder of the trial.
        env: Its environment.
        log: What it says when it fails; None: it says so when it knows its trial.
    """
    with (log or Path(os.devnull)).open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=env,
        )


def join(found: subprocess.Popen[bytes]) -> None:
    """Waits until a supervisor is gone."""
    assert found.stdin is not None
    assert found.stdout is not None
    found.wait()
    found.stdout.read()  # nothing is written: it ends with the supervisor
    with contextlib.suppress(BrokenPipeError):  # it never read what it was told
        found.stdin.close()
    found.stdout.close()


def _is_gone(found: subprocess.Popen[bytes]) -> bool:
    assert found.stdout is not None
    ready, _, _ = select.select([found.stdout], [], [], 0)
    return bool(ready)


def _tell(found: subprocess.Popen[bytes], line: str) -> bool:
    assert found.stdin is not None
    try:
        found.stdin.write(line.encode() + b"\n")
        found.stdin.flush()
    except BrokenPipeError:
        return False
    return True
