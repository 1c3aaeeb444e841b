"""On the worker: runs one trial in a process group of its own, under limits, and leaves one result and no process.

`Run` starts a `supervisor`, which starts the trial, watches its clock from outside and ends every process that it has
left; `read_result` says what came of it. Neither judges a result.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import select
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from raysearch import leftovers
from raysearch.model import Measurement, Outcome
from raysearch.nursery import Ahead, Nursery, join, start_supervisor
from raysearch.secrecy import without_secrets

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 4000
LOG_BYTES = 2**20  # of an output, the end: what is searched for the metric, and sent to the coordinator
RETURNED_BYTES = 64 * 2**20  # of any other file that is sent; a longer one is not
CLOCK_TOLERANCE_S = 5.0
LOOK_EVERY_S = 0.5
LEAST_FREE_BYTES = 32 * 2**20  # of the disk that a run writes to; with less, its failure says nothing of the program
STUDY_MARK = "RAYSEARCH_STUDY"
SESSION_MARK = "RAYSEARCH_SESSION"
SLOT_MARK = "RAYSEARCH_SLOT"
RETURNED_FILES = ("run.log", "result.json", "curve.jsonl", "documents.npz", "exit.json")

# What a program says whose child was killed: subprocess, torch's data loader, concurrent.futures.
_CHILD_KILLED = re.compile(r"Signals\.SIGKILL|killed by signal: Killed|BrokenProcessPool")
_EXIT_CODES = {3: Outcome.INVALID, 4: Outcome.OUT_OF_MEMORY}
_FUTILE_EXIT = 5
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
        futile_above: As the command says it, for executors that run no command.
        waiting: Argument vector of a process that loads ahead what such a trial needs, and takes what the command
            says beyond it by an order; empty for none.
        withheld: Names of variables that the trial does not see, beside those that look like secrets.
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
    futile_above: float | None = None
    waiting: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """How an attempt ended.

    Attributes:
        reason: One line for anything but `measured`.
        halfway: The metric on a slice at half of the budget, where the program measured it.
        files: Those that the coordinator cannot see by itself, by name.
    """

    outcome: Outcome
    reason: str
    measurement: Measurement | None = None
    log_tail: str = ""
    halfway: float | None = None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict[str, bytes])


class Run:
    """An attempt in flight.

    Args:
        spec: What to run.
        out: Folder for what the run leaves; emptied first.
        data: Folder of the prepared data, empty if the objective has none.
        env: Environment of the trial beside what is set here on purpose.
        slot: Id of the slot, which runs one trial at a time.
        nursery: Of the slot: where the trial's process may be waiting already, and the next one's will.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        out: Path,
        data: str,
        env: Mapping[str, str],
        slot: str,
        nursery: Nursery | None = None,
    ) -> None:
        self._spec, self._out, self._slot = spec, out, slot
        shutil.rmtree(out, ignore_errors=True)
        work = out / "work"
        work.mkdir(parents=True)
        for path, text in spec.files.items():
            target = work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        places = {"{python}": sys.executable, "{data}": data, "{out}": str(out), "{seed}": str(spec.seed)}
        trial_env = trial_environment(env, spec, slot)
        command = [_filled(argument, places) for argument in spec.command]
        waiting = [_filled(argument, places) for argument in spec.waiting]
        order = {  # without the environment, which no file holds
            "command": command,
            "arguments": _beyond(waiting, command),  # for a process in waiting
            "attempt": spec.attempt,
            "startup_limit_s": spec.startup_limit_s,
            "total_limit_s": spec.total_limit_s,
            "niceness": spec.niceness,
        }
        (out / "order.json").write_text(json.dumps(order))
        self._nursery = nursery if waiting else None
        self._ahead = Ahead(tuple(waiting), trial_env, spec.niceness)
        taken = self._nursery.take(self._ahead, out) if self._nursery else None
        self._supervisor = taken or start_supervisor(str(out), env=trial_env, log=out / "supervisor.log")

    def wait(self) -> RunResult:
        """Waits for the end and reads the result; LOST if the supervisor itself was killed."""
        if self._nursery:
            self._see_to_the_next(self._nursery)
        join(self._supervisor)
        result = read_result(self._out, metric=self._spec.metric, attempt=self._spec.attempt)
        if result is not None:
            return self._without_blame(result)
        # Nobody has ended the trial's tree. A process in waiting goes too: it bears the same marks, and costs seconds.
        sweep(self._spec.study, session=self._spec.session, slot=self._slot)
        said = log_tail(self._out / "supervisor.log")
        return RunResult(Outcome.LOST, f"its supervisor failed: {said.splitlines()[-1] if said else 'it was killed'}")

    def _without_blame(self, result: RunResult) -> RunResult:
        """A program that fails on a full disk is run again."""
        failed = result.outcome in (Outcome.CRASHED, Outcome.INVALID)
        full = full_disk(self._out) if failed else None
        return dataclasses.replace(result, outcome=Outcome.LOST, reason=full) if full else result

    def _see_to_the_next(self, nursery: Nursery) -> None:
        """Has a process wait for the next trial as soon as this one trains: its start-up is over, and nothing is lost
        to it on a GPU's machine, where a trial leaves cores free.
        """
        assert self._supervisor.stdout is not None
        while not select.select([self._supervisor.stdout], [], [], LOOK_EVERY_S)[0]:
            if self.progress().get("phase") == "train":
                nursery.prepare(self._ahead)
                return

    def cancel(self) -> None:
        """Asks the supervisor to end the trial now; `wait` then returns CANCELLED."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def progress(self) -> dict[str, Any]:
        """What the program last said of itself (phase, progress 0 to 1, at); empty if nothing."""
        return _json_or_empty(self._out / "progress.json")


def full_disk(folder: Path) -> str | None:
    """Why nothing can be run in a folder: its disk is full. None if it is not."""
    free_mib = shutil.disk_usage(folder).free // 2**20
    least_mib = LEAST_FREE_BYTES // 2**20
    return f"the disk of {folder} has {free_mib} MiB left; a run needs {least_mib}" if free_mib < least_mib else None


def trial_environment(env: Mapping[str, str], spec: RunSpec, slot: str) -> dict[str, str]:
    """The environment of a trial: inherited but for secrets, since a model may have written what runs in it; with
    threads set on purpose and marks to find its processes by.
    """
    # The first doubles a trial's start-up, the others are what Ray's workers need and nobody else does.
    dropped = {"PYTHONDONTWRITEBYTECODE", "PYTHONBREAKPOINT", "SPT_NOENV"}
    seen = without_secrets(env, spec.withheld)
    kept = {name: value for name, value in seen.items() if name not in dropped and not name.startswith("RAY_")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        kept.pop(name, None)  # Ray sets 1 for its actors
        if spec.threads:
            kept[name] = str(spec.threads)
    return kept | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        STUDY_MARK: spec.study,
        SESSION_MARK: spec.session,
        SLOT_MARK: slot,
    }


def sweep(study: str, *, session: str, slot: str | None = None) -> list[int]:
    """Ends what a study left running on this machine.

    Args:
        study: Id of the study.
        session: Id of the session that goes on: what others have left is ended.
        slot: A slot with no trial; what is left of an earlier one there is ended too.

    Returns:
        The ids of the processes.
    """

    def matches(marks: Mapping[str, str]) -> bool:
        if marks.get(STUDY_MARK) != study:
            return False
        if SESSION_MARK not in marks:  # a process that shows a title of its own may have lost part of its environment
            return False
        return marks[SESSION_MARK] != session or (slot is not None and marks.get(SLOT_MARK) == slot)

    return leftovers.end(matches)


# ---- what came of it ----


def read_result(out: Path, *, metric: str, attempt: int) -> RunResult | None:
    """What an attempt came to, by what its supervisor and its program left.

    Args:
        out: Its folder.
        metric: Name of the number that counts.
        attempt: Its number.

    Returns:
        None if the supervisor of that attempt did not come to its end.
    """
    found = _json_or_empty(out / "exit.json")
    if found.get("attempt") != attempt:
        return None
    if found["ended"]:
        result = RunResult(Outcome(found["ended"]), found["reason"])
    elif found["code"] == 0:
        result = _measured(out, metric, found["wall_s"])
    else:
        result = _failure(found["code"], out)
    if result.outcome is Outcome.MEASURED:
        return result
    return dataclasses.replace(result, log_tail=log_tail(out / "run.log"))


def _measured(out: Path, metric: str, wall_s: float) -> RunResult:
    result = _json_or_empty(out / "result.json")
    value = result.get(metric) if result else _printed(out / "run.log", metric)
    if not _is_number(value):
        return RunResult(Outcome.INVALID, f"it ended well, but gave no finite number `{metric}: …`")
    total_s = result.get("total_seconds", wall_s)
    if not _is_number(total_s) or abs(total_s - wall_s) > max(CLOCK_TOLERANCE_S, 0.1 * wall_s):
        return RunResult(Outcome.INVALID, f"it says that it took {total_s} s; measured from outside: {wall_s:.1f} s")
    halfway = _numbers(result).get("halfway_bpb")
    return RunResult(Outcome.MEASURED, "", _measurement(result, float(value), wall_s), halfway=halfway)


def _failure(code: int, out: Path) -> RunResult:
    result = _json_or_empty(out / "result.json")
    reason = str(result.get("reason") or "").strip()
    said = reason or _last_line(out) or f"exit code {code}"
    # another command may mean a failure by this code
    if code == _FUTILE_EXIT and result.get("outcome") == Outcome.FUTILE.value:
        return RunResult(Outcome.FUTILE, said, halfway=_numbers(result).get("halfway_bpb"))
    if code in _EXIT_CODES:
        return RunResult(_EXIT_CODES[code], said)
    lost = _not_its_own_doing(code, said) if code != _INFRASTRUCTURE_EXIT or not reason else None
    if lost:
        return RunResult(Outcome.LOST, lost)
    if code < 0:
        return RunResult(Outcome.CRASHED, f"killed by signal {-code} ({signal.strsignal(-code)}); last line: {said}")
    return RunResult(Outcome.CRASHED, said)


def _not_its_own_doing(code: int, said: str) -> str | None:
    """Why an exit says nothing of the program, so that it is run again, though not for ever; None if it does."""
    if code == _INFRASTRUCTURE_EXIT:
        return f"it could not be run here: {said}"
    if code == -signal.SIGKILL:  # whoever did it, perhaps the kernel for the sake of another
        return "killed from outside; the machine may have run out of memory"
    if code > 0 and _CHILD_KILLED.search(said):
        return f"one of its processes was killed from outside: {said}"
    return None


def _measurement(result: Mapping[str, Any], value: float, wall_s: float) -> Measurement:
    numbers = _numbers(result)  # anything else, NaN included, could not be read back from the journal
    named = ("training_seconds", "peak_vram_mb", "holdout_bpb", "whole_bpb", "halfway_bpb")
    parts = result.get("seconds")
    return Measurement(
        value=value,
        wall_s=wall_s,
        holdout=numbers.get("holdout_bpb"),
        whole=numbers.get("whole_bpb"),
        training_s=numbers.get("training_seconds", 0.0),
        peak_vram_mb=numbers.get("peak_vram_mb", 0.0),
        parts_s=_numbers(parts) if isinstance(parts, dict) else {},  # pyright: ignore[reportUnknownArgumentType]
        facts={name: number for name, number in numbers.items() if name not in named},
    )


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in table.items() if _is_number(value)}


def _is_number(value: Any) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond a float's range
        return False


def _printed(log: Path, metric: str) -> float | None:
    """The last `metric: number` of the output."""
    for line in reversed(_end_of(log, LOG_BYTES).decode(errors="replace").splitlines()):
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


def log_tail(path: Path) -> str:
    """The last lines of an output, without terminal control characters."""
    text = _end_of(path, LOG_TAIL_BYTES).decode(errors="replace")
    lines = ["".join(char for char in line if char.isprintable() or char == "\t") for line in text.splitlines()]
    return "\n".join(lines[-LOG_TAIL_LINES:])


def returned_files(out: Path) -> dict[str, bytes]:
    """The files of a run that are worth sending to the coordinator; a long log by its end."""
    found = {name: out / name for name in RETURNED_FILES if (out / name).exists()}
    whole = {name: path for name, path in found.items() if path.stat().st_size <= RETURNED_BYTES}
    logs = {name: _end_of(path, LOG_BYTES) for name, path in found.items() if path.suffix == ".log"}
    return {name: _end_of(path, RETURNED_BYTES) for name, path in whole.items()} | logs


def _end_of(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            return file.read()
    except OSError:  # the trial may have removed it
        return b""


def _filled(argument: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        argument = argument.replace(place, value)
    return argument


def _beyond(waiting: Sequence[str], command: Sequence[str]) -> list[str]:
    """What a command says that the process in waiting was not started with."""
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(waiting, command, strict=False))))
    return list(command[shared:])


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]
