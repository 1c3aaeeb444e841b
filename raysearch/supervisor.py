"""Runs one trial under limits, ends every process that it has left, and writes down how it ended. It judges nothing.

`python -I -S supervisor.py OUT` reads `OUT/order.json` and writes `OUT/exit.json`, last. Only the standard library and
nothing of this package: it is started for every trial, without site-packages, in a third of the time.

It is nobody's child, so that what Ray ends together with a slot does not include it. Its standard input is a pipe from
the slot: when that closes, for whatever reason, the trial is ended. Its standard output is a pipe to the slot: when
that closes, the supervisor is gone.

`supervisor.py --wait` has a process in waiting: it reads one line of JSON from its standard input, starts the process
that it describes, and then waits for a second line, the OUT of the one trial that this process becomes. From there on
it is like any other: a trial's clock begins with its order.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

LOG_LIMIT_BYTES = 64 * 2**20
GRACE_S = 3.0
LOOK_EVERY_S = 0.5
WAIT_LIMIT_S = 3600.0  # of a process in waiting: it holds some hundred MB, for the seconds that it saves
SAID_LIMIT_BYTES = 2**20

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


def supervise(out: str) -> None:
    """Runs the trial that `order.json` describes and writes `exit.json` when none of its processes is left."""
    _take_charge()
    _run(out, None)


def wait_and_supervise() -> None:
    """Has a process in waiting and supervises the trial that it becomes; ends it if none comes in time."""
    _take_charge()
    lines = io.FileIO(0, closefd=False)  # unbuffered: the end of the input has to be seen by `_watch`
    spare = _Spare(json.loads(lines.readline()))
    ready, _, _ = select.select([0], [], [], WAIT_LIMIT_S)
    out = lines.readline().decode().rstrip("\n") if ready else ""
    if not out:
        spare.end()
        return
    errors = os.open(f"{out}/supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.close(errors)
    _run(out, spare)


class _Spare:
    """A process in waiting, of one trial to come. What it prints before its turn goes into the trial's log."""

    def __init__(self, ahead: Mapping[str, Any]) -> None:
        self._said = os.memfd_create("said")  # no file that could be left behind
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # then the trial is started as without it, and says why it cannot be
            self._process = _spawn(
                ahead["command"],
                cwd="/",
                env=ahead["env"],
                niceness=ahead["niceness"],
                stdin=subprocess.PIPE,
                stdout=self._said,
            )

    def become(
        self, order: Mapping[str, Any], out: str, log: BinaryIO, env: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | None:
        """Hands the trial over; None if the process is gone."""
        process = self._process
        if process is None:
            return None
        assert process.stdin is not None
        log.write(os.pread(self._said, SAID_LIMIT_BYTES, 0))
        log.flush()
        told = {"arguments": order["arguments"], "folder": f"{out}/work", "log": f"{out}/run.log", "environment": env}
        try:
            if process.poll() is None:
                process.stdin.write(json.dumps(told).encode() + b"\n")
                process.stdin.close()
                return process
        except BrokenPipeError:
            pass
        self.end()
        log.write(f"(a process in waiting was gone, exit code {process.returncode}: started anew)\n".encode())
        log.flush()
        return None

    def end(self) -> None:
        """Ends it with all that it has started."""
        if self._process is not None:
            _end_all(self._process)


def _take_charge() -> None:
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a grandchild that daemonises comes back to us
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe says when to stop


def _run(out: str, spare: _Spare | None) -> None:
    with open(f"{out}/order.json") as file:
        order: dict[str, Any] = json.load(file)
    started = time.monotonic()
    found: dict[str, Any] = {"attempt": order["attempt"], "code": None, "ended": "", "reason": ""}
    found["spawned_at"] = time.time()
    with open(f"{out}/run.log", "wb") as log:
        try:
            process = _start(order, out, log, spare, found["spawned_at"])
        except OSError as error:
            found |= {"ended": "lost", "reason": f"it could not be started: {error}"}
        else:
            found["ended"], found["reason"] = _watch(process, order, out, log, started)
            _end_all(process)
            found["code"] = process.returncode
    found["wall_s"] = time.monotonic() - started
    with open(f"{out}/exit.json.tmp", "w") as file:
        json.dump(found, file)
    os.replace(f"{out}/exit.json.tmp", f"{out}/exit.json")


def _start(
    order: Mapping[str, Any], out: str, log: BinaryIO, spare: _Spare | None, spawned_at: float
) -> subprocess.Popen[bytes]:
    """Hands the trial to the process in waiting, or starts one where there is none any more."""
    own = {"RAYSEARCH_SPAWNED_AT": repr(spawned_at)}
    if spare and (process := spare.become(order, out, log, own)):
        return process
    return _spawn(
        order["command"],
        cwd=f"{out}/work",
        env={**os.environ, **own},  # this process's own, which no file holds
        niceness=order["niceness"],
        stdin=subprocess.DEVNULL,
        stdout=log,
    )


def _spawn(
    command: list[str], *, cwd: str, env: Mapping[str, str], niceness: int, stdin: int, stdout: int | BinaryIO
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: _in_child(niceness),  # noqa: PLW1509 - this process has one thread
    )


def _in_child(niceness: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a killed supervisor takes the trial along
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's workers block SIGINT
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(PermissionError):  # Ray's workers may be nicer than we may be
        os.setpriority(os.PRIO_PROCESS, 0, niceness)


def _watch(
    process: subprocess.Popen[bytes], order: Mapping[str, Any], out: str, log: BinaryIO, started: float
) -> tuple[str, str]:
    """Waits for the trial's end; if a limit is passed or the slot is gone, says which outcome that is, and why."""
    exit_fd = os.pidfd_open(process.pid)
    starting = order["startup_limit_s"] > 0
    try:
        while True:
            ready, _, _ = select.select([exit_fd, 0], [], [], LOOK_EVERY_S)
            if exit_fd in ready:
                return "", ""
            if 0 in ready and not os.read(0, 1):
                return "cancelled", "stopped by its slot"
            elapsed_s = time.monotonic() - started
            if starting:
                starting = _phase(out) in ("start", "first_step")
            if starting and elapsed_s > order["startup_limit_s"]:
                return "timed_out", f"no first step within the start-up limit of {order['startup_limit_s']:g} s"
            if elapsed_s > order["total_limit_s"]:
                return "timed_out", f"not done within {order['total_limit_s']:g} s in all"
            if os.fstat(log.fileno()).st_size > LOG_LIMIT_BYTES:
                return "crashed", f"it printed more than {LOG_LIMIT_BYTES // 2**20} MiB"
    finally:
        os.close(exit_fd)


def _phase(out: str) -> str:
    try:
        with open(f"{out}/progress.json") as file:
            return json.load(file)["phase"]
    except (OSError, ValueError, KeyError, TypeError):
        return "start"


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole tree: the trial may have started compile workers, data loaders, daemons."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GRACE_S
    while _has_children() and time.monotonic() < deadline:
        for pid in _children():  # whatever left the group is our child by now, or will be when its parent is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _has_children() -> bool:
    """Whether a child is left, after collecting those that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                # the name in parentheses may hold anything; state and parent follow the last one
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    if sys.argv[1] == "--wait":
        wait_and_supervise()
    else:
        supervise(sys.argv[1])
