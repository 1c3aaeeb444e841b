"""On the worker: runs one trial in a process group of its own, under limits, and leaves one result and no process.

Two sides. `Run` is used by a slot: it starts `python -m raysearch.runner`, the supervisor, and reads what that wrote.
The supervisor starts the trial, watches its clock from outside, and ends every process that the trial has left. It
holds the reading end of a pipe from the slot: when the slot dies, for whatever reason, the pipe closes and the trial
is ended. Neither side judges a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raysearch.model import Measurement, Outcome

LOG_LIMIT_BYTES = 64 * 2**20
LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 4000
GRACE_S = 3.0
CLOCK_TOLERANCE_S = 5.0
STUDY_MARKER = "RAYSEARCH_STUDY"
SESSION_MARKER = "RAYSEARCH_SESSION"
RETURNED_FILES = ("run.log", "result.json", "curve.jsonl", "documents.npz", "outcome.json")

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_EXIT_CODES = {3: Outcome.INVALID, 4: Outcome.OUT_OF_MEMORY}
_INFRASTRUCTURE_EXIT = 2  # the harness could not run at all: no data, wrong usage


@dataclass(frozen=True)
class RunSpec:
    """All that a worker needs to run one attempt of one trial.

    Attributes:
        trial_id: Of the trial.
        attempt: Its number, from 1.
        study: Id of the study, to find what it left behind.
        session: Id of the coordinator's session, likewise.
        files: The candidate's files, text by path.
        command: Argument vector with the places {python}, {data}, {out}, {seed}.
        metric: Name of the number that counts.
        seed: Of the trial.
        startup_limit_s: From start to the first step's end; 0 for none.
        total_limit_s: From start to end.
        threads: CPU threads of the trial; 0 leaves the number to the libraries.
        niceness: Of the trial's processes.
        out: Folder for what the run leaves; empty lets the worker choose one of its own.
    """

    trial_id: str
    attempt: int
    study: str
    session: str
    files: dict[str, str]
    command: tuple[str, ...]
    metric: str
    seed: int
    startup_limit_s: float
    total_limit_s: float
    threads: int
    niceness: int
    out: str = ""


@dataclass(frozen=True)
class RunResult:
    """How an attempt ended; `files` are those that the coordinator cannot see by itself, by name."""

    outcome: Outcome
    reason: str
    measurement: Measurement | None = None
    log_tail: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict[str, bytes])


# ---- the slot's side ----


class Run:
    """An attempt in flight.

    Args:
        spec: What to run.
        out: Folder for what the run leaves; emptied first.
        data: Folder of the prepared data, empty if the objective has none.
        env: Environment of the trial beside what is set here on purpose.
    """

    def __init__(self, spec: RunSpec, *, out: Path, data: str, env: Mapping[str, str]) -> None:
        self._out = out
        shutil.rmtree(out, ignore_errors=True)
        work = out / "work"
        for path, text in spec.files.items():
            target = work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        places = {"{python}": sys.executable, "{data}": data, "{out}": str(out), "{seed}": str(spec.seed)}
        trial_env = trial_environment(env, spec)
        order = {
            "command": [_filled(argument, places) for argument in spec.command],
            "env": trial_env,
            "attempt": spec.attempt,
            "metric": spec.metric,
            "startup_limit_s": spec.startup_limit_s,
            "total_limit_s": spec.total_limit_s,
            "niceness": spec.niceness,
        }
        (out / "order.json").write_text(json.dumps(order))
        with (out / "supervisor.log").open("wb") as log:
            self._supervisor = subprocess.Popen(
                # -P: nothing in the current folder can shadow a module of the supervisor
                [sys.executable, "-P", "-m", "raysearch.runner", str(out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                env=trial_env,
            )

    def wait(self) -> RunResult:
        """Waits for the end and reads the result; LOST if the supervisor itself was killed."""
        self._supervisor.wait()
        if self._supervisor.stdin:
            self._supervisor.stdin.close()
        try:
            found: dict[str, Any] = json.loads((self._out / "outcome.json").read_text())
        except (OSError, ValueError):
            tail = log_tail(self._out / "supervisor.log")
            return RunResult(Outcome.LOST, f"the supervisor ended with {self._supervisor.returncode}", log_tail=tail)
        measurement = Measurement(**found["measurement"]) if found["measurement"] else None
        return RunResult(Outcome(found["outcome"]), found["reason"], measurement, found["log_tail"])

    def cancel(self) -> None:
        """Asks the supervisor to end the trial now; `wait` then returns CANCELLED."""
        if self._supervisor.stdin and not self._supervisor.stdin.closed:
            self._supervisor.stdin.close()

    def progress(self) -> dict[str, Any]:
        """What the program last said of itself (phase, progress 0 to 1, at); empty if nothing."""
        return _json_or_empty(self._out / "progress.json")


def trial_environment(env: Mapping[str, str], spec: RunSpec) -> dict[str, str]:
    """The environment of a trial: inherited, with threads set on purpose and marks to find its processes by."""
    dropped = {"PYTHONDONTWRITEBYTECODE"}  # it doubles a trial's start-up
    kept = {name: value for name, value in env.items() if name not in dropped and not name.startswith("RAY_")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        kept.pop(name, None)  # Ray sets 1 for its actors
        if spec.threads:
            kept[name] = str(spec.threads)
    return kept | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        STUDY_MARKER: spec.study,
        SESSION_MARKER: spec.session,
    }


def sweep(study: str, *, session: str) -> list[int]:
    """Ends what earlier sessions of a study left running on this machine; returns the process ids."""
    ended: list[int] = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get(STUDY_MARKER) == study and env.get(SESSION_MARKER) != session:
                process.kill()
                ended.append(process.pid)
        except psutil.Error:
            continue  # gone meanwhile, or somebody else's
    return ended


def returned_files(out: Path) -> dict[str, bytes]:
    """The files of a run that are worth sending to the coordinator; a long log by its end."""
    return {name: _end_of(out / name) for name in RETURNED_FILES if (out / name).exists()}


def log_tail(path: Path) -> str:
    """The last lines of an output, without terminal control characters."""
    text = _end_of(path, LOG_TAIL_BYTES).decode(errors="replace") if path.exists() else ""
    lines = ["".join(char for char in line if char.isprintable() or char == "\t") for line in text.splitlines()]
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _end_of(path: Path, limit: int = 2**20) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - limit))
        return file.read()


def _filled(argument: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        argument = argument.replace(place, value)
    return argument


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]


# ---- the supervisor's side ----


def supervise(out: Path) -> None:
    """Runs the trial that `order.json` describes and writes `outcome.json` when none of its processes is left."""
    order: dict[str, Any] = json.loads((out / "order.json").read_text())
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a grandchild that daemonises comes back to us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the pipe says when to stop
    started = time.monotonic()
    with (out / "run.log").open("wb") as log:
        process = subprocess.Popen(
            order["command"],
            cwd=out / "work",
            env={**order["env"], "RAYSEARCH_SPAWNED_AT": repr(time.time())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: _in_child(order["niceness"]),  # noqa: PLW1509 - this process has one thread
        )
    stopped = _watch(process, order, out, started)
    _end_all(process)
    wall_s = time.monotonic() - started
    result = stopped if stopped else _outcome(process.returncode, out, order["metric"], wall_s)
    written = {
        "attempt": order["attempt"],
        "outcome": result.outcome.value,
        "reason": result.reason,
        "measurement": dataclasses.asdict(result.measurement) if result.measurement else None,
        "log_tail": "" if result.outcome is Outcome.MEASURED else log_tail(out / "run.log"),
    }
    (out / "outcome.json.tmp").write_text(json.dumps(written))
    (out / "outcome.json.tmp").replace(out / "outcome.json")


def _in_child(niceness: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a killed supervisor takes the trial along
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(PermissionError):  # Ray's workers may be nicer than we may be
        os.setpriority(os.PRIO_PROCESS, 0, niceness)


def _watch(process: subprocess.Popen[bytes], order: Mapping[str, Any], out: Path, started: float) -> RunResult | None:
    """Waits for the trial's end, and ends it early when a limit is passed or the slot is gone; says why, if so."""
    exit_fd = os.pidfd_open(process.pid)
    slot_fd = sys.stdin.fileno()
    starting = order["startup_limit_s"] > 0
    try:
        while True:
            ready, _, _ = select.select([exit_fd, slot_fd], [], [], 0.5)
            if exit_fd in ready:
                process.wait()
                return None
            if slot_fd in ready and not os.read(slot_fd, 1):
                return RunResult(Outcome.CANCELLED, "stopped by its slot")
            elapsed_s = time.monotonic() - started
            if starting:
                starting = _json_or_empty(out / "progress.json").get("phase", "start") in ("start", "first_step")
            if starting and elapsed_s > order["startup_limit_s"]:
                limit_s = order["startup_limit_s"]
                return RunResult(Outcome.TIMED_OUT, f"no first step within the start-up limit of {limit_s:g} s")
            if elapsed_s > order["total_limit_s"]:
                return RunResult(Outcome.TIMED_OUT, f"not done within {order['total_limit_s']:g} s in all")
            if (out / "run.log").stat().st_size > LOG_LIMIT_BYTES:
                return RunResult(Outcome.CRASHED, f"it printed more than {LOG_LIMIT_BYTES // 2**20} MiB")
    finally:
        os.close(exit_fd)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole tree: the trial may have started compile workers, data loaders, daemons."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        left = psutil.Process().children(recursive=True)  # whatever left the group is our child by now
        if not left:
            return
        for child in left:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.2)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _outcome(code: int, out: Path, metric: str, wall_s: float) -> RunResult:
    result = _json_or_empty(out / "result.json")
    if code != 0:
        return _failure(code, out, str(result.get("reason") or "").strip())
    value = result.get(metric) if result else _printed(out / "run.log", metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return RunResult(Outcome.INVALID, f"it ended well, but gave no finite number `{metric}: …`")
    total_s = result.get("total_seconds", wall_s)
    if abs(total_s - wall_s) > max(CLOCK_TOLERANCE_S, 0.1 * wall_s):
        return RunResult(
            Outcome.INVALID, f"it says that it took {total_s:.1f} s; measured from outside: {wall_s:.1f} s"
        )
    return RunResult(Outcome.MEASURED, "", _measurement(result, float(value), wall_s))


def _failure(code: int, out: Path, reason: str) -> RunResult:
    said = reason or _last_line(out) or f"exit code {code}"
    if code in _EXIT_CODES:
        return RunResult(_EXIT_CODES[code], said)
    if code == _INFRASTRUCTURE_EXIT and not reason:
        return RunResult(Outcome.LOST, f"it could not be run here: {said}")
    if code == -signal.SIGKILL:
        return RunResult(Outcome.CRASHED, "killed from outside; the machine may have run out of memory")
    return RunResult(Outcome.CRASHED, said)


def _measurement(result: Mapping[str, Any], value: float, wall_s: float) -> Measurement:
    named = {"training_seconds", "peak_vram_mb", "holdout_bpb"}
    facts = {
        name: float(number)
        for name, number in result.items()
        if isinstance(number, int | float) and not isinstance(number, bool) and name not in named
    }
    return Measurement(
        value=value,
        wall_s=wall_s,
        holdout=result.get("holdout_bpb"),
        training_s=float(result.get("training_seconds", 0.0)),
        peak_vram_mb=float(result.get("peak_vram_mb", 0.0)),
        parts_s={name: float(seconds or 0.0) for name, seconds in result.get("seconds", {}).items()},
        facts=facts,
    )


def _printed(log: Path, metric: str) -> float | None:
    """The last `metric: number` of the output."""
    for line in reversed(_end_of(log).decode(errors="replace").splitlines()):
        name, colon, number = line.strip().partition(":")
        if colon and name.strip() == metric:
            try:
                return float(number)
            except ValueError:
                return None
    return None


def _last_line(out: Path) -> str:
    lines = [line.strip() for line in log_tail(out / "run.log").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
