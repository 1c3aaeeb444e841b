"""Where the seconds between and around trials go: a table from a study's journal. It changes no study.

`python benchmarks/overhead.py` runs a study of a program that sleeps for half a second, and prints what lies between
two trials on a slot. `python benchmarks/overhead.py --study DIR` does so for any study, with the parts of its trials.
`python benchmarks/overhead.py --waiting 8` runs short trials of the bundled trainer, by turns started as usual and by a
process in waiting, and prints the parts of both side by side. `--row 3` runs trials as a slot does, one after the
other, the next one's process started beside each, and prints each: what the first one takes where nothing is compiled.
"""
# ruff: noqa: E402  # the path is put right before anything of this repository is imported

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # another file here is named as a package is
    sys.path = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]

from raysearch import objective, profile
from raysearch.data import prepare
from raysearch.journal import Journal
from raysearch.model import Measurement, Outcome, RatchetMoved, Record, SessionStarted, TrialFinished, TrialStarted
from raysearch.nursery import Nursery
from raysearch.runner import Run, RunSpec
from raysearch.wording import plural

OBJECTIVE = """
[objective]
editable = ["score.py"]
command = ["{python}", "score.py"]
metric = "score"
timeout_s = 30
"""
PROGRAM = """
import time

LR = 0.003  # in [0.0001, 1.0] log: step size
WIDTH = 64  # in [16, 256] log: units
time.sleep(0.5)
print(f"score: {abs(LR - 0.1) + abs(WIDTH - 100) / 1000 + time.time() % 0.001}")
"""
PARTS = ("start", "import", "data", "build", "first_step", "train", "halfway", "eval", "holdout")
TELLING = ("tokens_per_s", "mfu_measured_percent", "matmul_tflops", "sm_clock_mhz", "power_w", "throttled_share")


@dataclass(frozen=True)
class Attempt:
    """A measured attempt; times are Unix times in seconds, `spawned_at` and `ended_at` by its supervisor."""

    trial: str
    slot: str
    started_at: float
    finished_at: float
    spawned_at: float
    ended_at: float
    measurement: Measurement


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=Path, help="Folder of a study; without it a quick one is run.")
    parser.add_argument("--trials", type=int, default=12, help="Of the quick study.")
    parser.add_argument("--waiting", type=int, help="Pairs of trials, by turns without and with a process in waiting.")
    parser.add_argument("--row", type=int, help="Trials in a row, as on a slot.")
    parser.add_argument("--data", type=Path, help="Prepared data for these; default: the preset's.")
    parser.add_argument("--budget-s", type=float, default=4.0, help="Of these.")
    arguments = parser.parse_args()
    if arguments.waiting or arguments.row:
        here = Here.found(arguments.budget_s, arguments.data)
        if arguments.waiting:
            side_by_side(here, arguments.waiting)
        else:
            in_a_row(here, arguments.row)
        return
    if arguments.study:
        show(arguments.study)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(quick_study(Path(folder), trials=arguments.trials))


def quick_study(folder: Path, *, trials: int) -> Path:
    """Runs a study of short trials on two slots; returns its folder."""
    (folder / "objective.toml").write_text(OBJECTIVE)
    (folder / "score.py").write_text(PROGRAM)
    options = ["--study", "quick", "--objective", "objective.toml", "--cpu-slots", "2", "--trials", str(trials)]
    subprocess.run([sys.executable, "-m", "raysearch.run", *options], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "studies/quick"


def show(study: Path) -> None:
    """Prints what lies between the trials of a study, and the parts of each."""
    journal = Journal(study / "journal.db", writer=False)
    try:
        records = list(journal.read())
    finally:
        journal.close()
    attempts = measured(records, study)
    slots = plural(len({attempt.slot for attempt in attempts}), "slot")
    print(f"{study.name}: {plural(len(attempts), 'measured trial')} on {slots}\n")
    between(attempts, records)
    inside(attempts)


def measured(records: Sequence[Record], study: Path) -> list[Attempt]:
    """The measured attempts in the order in which they ended, as far as their supervisors' words are on this disk."""
    started: dict[str, Record] = {}
    found: list[Attempt] = []
    for record in records:
        if isinstance(record.event, TrialStarted):
            started[record.event.trial.id] = record
        if not isinstance(record.event, TrialFinished) or record.event.outcome is not Outcome.MEASURED:
            continue
        start, measurement = started[record.event.trial_id], record.event.measurement
        said = study / "trials" / record.event.trial_id / "exit.json"
        if not isinstance(start.event, TrialStarted) or measurement is None or not said.exists():
            continue
        spawned_at = float(json.loads(said.read_text())["spawned_at"])
        ended_at = spawned_at + measurement.wall_s
        name, slot = record.event.trial_id, start.event.slot
        found.append(Attempt(name, slot, start.at, record.at, spawned_at, ended_at, measurement))
    return found


def between(attempts: Sequence[Attempt], records: Sequence[Record]) -> None:
    """The way from the end of one trial's process to the start of the next one's on the same slot."""
    sessions = [record.at for record in records if isinstance(record.event, SessionStarted)]
    pairs: list[tuple[Attempt, Attempt]] = []
    for slot in {attempt.slot for attempt in attempts}:
        row = sorted((attempt for attempt in attempts if attempt.slot == slot), key=lambda attempt: attempt.started_at)
        for one, two in itertools.pairwise(row):
            if not any(one.finished_at < at < two.started_at for at in sessions):
                pairs.append((one, two))
    rows = {
        "process ended -> journalled (supervisor, Ray)": [one.finished_at - one.ended_at for one, _ in pairs],
        "journalled -> next one journalled (coordinator)": [two.started_at - one.finished_at for one, two in pairs],
        "journalled -> process spawned (Ray, supervisor)": [two.spawned_at - two.started_at for _, two in pairs],
        "the whole gap between two processes": [two.spawned_at - one.ended_at for one, two in pairs],
    }
    table("between two trials on a slot, ms", {name: [1000 * gap for gap in gaps] for name, gaps in rows.items()}, 1)
    longer = [(one, two) for one, two in pairs if two.started_at - one.finished_at > 0.1]
    moves = [record.at for record in records if isinstance(record.event, RatchetMoved)]
    moved = sum(any(one.finished_at <= at <= two.started_at for at in moves) for one, two in longer)
    print(f"the coordinator's part is longer than 100 ms in {len(longer)} of {len(pairs)} gaps;")
    print(f"in {moved} of them the ratchet moved, and what was in line had to be merged onto it or proposed anew\n")


def inside(attempts: Sequence[Attempt]) -> None:
    """The parts of a trial as it was seen from outside, and as the harness reports them."""
    rows = {
        "journal to journal": [attempt.finished_at - attempt.started_at for attempt in attempts],
        "slot and supervisor": [
            attempt.finished_at - attempt.started_at - attempt.measurement.wall_s for attempt in attempts
        ],
        "process": [attempt.measurement.wall_s for attempt in attempts],
    }
    parts = [part for part in PARTS if any(part in attempt.measurement.parts_s for attempt in attempts)]
    rows |= {
        f"  {part}": [a.measurement.parts_s[part] for a in attempts if a.measurement.parts_s.get(part)]
        for part in parts
    }
    if parts:
        rows["  rest"] = [
            a.measurement.wall_s - sum(a.measurement.parts_s.get(p, 0.0) for p in parts) for a in attempts
        ]
        rows["overhead: journal to journal without train"] = [
            a.finished_at - a.started_at - a.measurement.training_s for a in attempts
        ]
    table("a trial, s", rows, 3)


@dataclass(frozen=True)
class Here:
    """The bundled trainer's first program, as this machine runs it."""

    title: str
    spec: RunSpec
    waiting: tuple[str, ...]
    data: str

    @classmethod
    def found(cls, budget_s: float, data: Path | None) -> Here:
        """With the preset that fits, and its data unless others are named."""
        hardware = profile.detect()[0]
        preset = objective.choose_preset(objective.load_presets(), device=hardware.device, memory_mb=hardware.memory_mb)
        source = objective.base_program((objective.trainer_folder() / objective.TRAIN_FILE).read_text(), preset)
        threads = 1 if hardware.device == "cpu" else 0
        budget = objective.Budget(seconds=budget_s)
        how = objective.plan_trial(
            objective.TRAINER, preset, budget, device=hardware.device, threads=threads, holdout=False
        )
        spec = RunSpec(
            trial_id="",
            attempt=1,
            study="overhead",
            session=str(os.getpid()),
            files={objective.TRAIN_FILE: source},
            command=how.command,
            metric="val_bpb",
            seed=0,
            startup_limit_s=how.startup_limit_s,
            total_limit_s=how.total_limit_s,
            threads=threads,
            niceness=0,
        )
        waiting = how.waiting or (*how.command[:4], "--wait")  # a CPU slot has none otherwise
        title = f"{hardware.name}, preset {preset.name}, {budget_s:g} s of training"
        return cls(title, spec, waiting, str(data.resolve()) if data else prepare(preset, None).folder)

    def run(self, name: str, folder: Path, nursery: Nursery, *, served: bool) -> Measurement:
        """Runs one trial; with `served`, a process that waits takes it, and another one is started for the next."""
        spec = dataclasses.replace(self.spec, trial_id=name, waiting=self.waiting if served else ())
        result = Run(spec, out=folder / name, data=self.data, env=os.environ, slot="here", nursery=nursery).wait()
        if result.measurement is None:
            raise SystemExit(f"{name}: {result.outcome.value}: {result.reason}")
        return result.measurement


def side_by_side(here: Here, pairs: int) -> None:
    """Runs trials with and without a process in waiting, and prints what each of them spent beside its training."""
    nursery = Nursery()
    found: dict[bool, list[Measurement]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2 * pairs + 2):
            served = number % 2 == 1
            measurement = here.run(f"t{number}", Path(folder), nursery, served=served)
            if number > 1:  # the first of them fill the caches, and nobody waits for the first one that is served
                found[served].append(measurement)
    nursery.close()
    print(f"{here.title}\n")
    for served, title in ((False, "started as usual, s"), (True, "by a process in waiting, s")):
        overhead(title, found[served])


def in_a_row(here: Here, count: int) -> None:
    """Runs trials as a slot does, and prints each as it ends."""
    nursery = Nursery()
    print(f"{here.title}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            measurement = here.run(f"t{number}", Path(folder), nursery, served=True)
            overhead(f"trial {number}: {measurement.wall_s:.1f} s in all, of which", [measurement])
            facts = {name: measurement.facts[name] for name in TELLING if name in measurement.facts}
            print(", ".join(f"{name} {value:,.0f}" for name, value in facts.items()) + "\n", flush=True)
    nursery.close()


def overhead(title: str, measurements: Sequence[Measurement]) -> None:
    """Prints the parts of trials without their training."""
    rows = {part: [m.parts_s.get(part, 0.0) for m in measurements] for part in PARTS if part != "train"}
    rows = {name: numbers for name, numbers in rows.items() if any(numbers)}
    rows["process without train"] = [m.wall_s - m.parts_s["train"] for m in measurements]
    rows["import ahead of the trial"] = [m.facts["import_ahead_seconds"] for m in measurements]
    table(title, rows, 3)


def table(title: str, rows: Mapping[str, Sequence[float]], digits: int) -> None:
    """Prints median, smallest and largest of each row."""
    print(f"{title:<52}{'median':>9}{'min':>9}{'max':>9}{'n':>6}")
    for name, values in rows.items():
        if values:
            numbers = (statistics.median(values), min(values), max(values))
            print(f"{name:<52}{''.join(f'{number:>9.{digits}f}' for number in numbers)}{len(values):>6}")
    print()


if __name__ == "__main__":
    main()
