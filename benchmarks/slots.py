"""What a slot costs on a real Ray: from a node that joins to its first trial, between trials, the coordinator's CPU.

`python benchmarks/slots.py --slots 1 8 64` runs a study for each number on a node of this machine, with trials that
sleep: it measures what is not training. More slots than cores are fine as long as trials sleep long enough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from ray.cluster_utils import Cluster

from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.model import Record, TrialFinished, TrialStarted

OBJECTIVE = """
[objective]
editable = ["score.py"]
command = ["{python}", "-S", "score.py", "--seed", "{seed}"]
metric = "score"
timeout_s = 600
"""
PROGRAM = """
import random, sys, time

A = 1.0  # in [0.1, 10.0] log: a
B = 1.0  # in [0.1, 10.0] log: b

time.sleep(SECONDS)
print(f"score: {(A - 3) ** 2 + (B - 2) ** 2 + random.Random(str(sys.argv)).gauss(0, 0.01)}")
"""
POLL_S = 0.05


@dataclass(frozen=True)
class Row:
    """What a study came to; seconds, and CPU seconds of the coordinator."""

    slots: int
    trials: int
    join_s: float
    last_join_s: float
    gap_s: float
    longest_gap_s: float
    cpu_s: float


def measured(slots: int, *, trial_s: float, rounds: int) -> Row:
    """Runs a study on a node that joins when the study is already there."""
    with tempfile.TemporaryDirectory(prefix="slots-", dir="/tmp") as name:
        place = Path(name)
        (place / "objective.toml").write_text(OBJECTIVE)
        (place / "score.py").write_text(PROGRAM.replace("SECONDS", str(trial_s)))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        try:
            command = [sys.executable, "-m", "raysearch.run", "--study", "s", "--objective", "objective.toml"]
            command += ["--address", cluster.address, "--device", "cpu", "--proposers", "tune", "--judge", "greedy"]
            with (place / "log").open("wb") as log:
                study = subprocess.Popen(
                    [*command, "--trials", str(rounds * slots)],
                    cwd=place,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            try:
                while b"session on" not in (place / "log").read_bytes() and study.poll() is None:
                    time.sleep(POLL_S)
                joined_at = time.time()
                cluster.add_node(num_cpus=slots, object_store_memory=100 * 2**20)
                cpu_s = _cpu_from_its_first_trial(study, place / "log")
            finally:
                study.kill()
                study.wait()
            if study.returncode:
                raise SystemExit((place / "log").read_text())
            return _row(_events(place), slots, joined_at, cpu_s)
        finally:
            cluster.shutdown()


def _cpu_from_its_first_trial(study: subprocess.Popen[bytes], log: Path) -> float:
    process, before, now = psutil.Process(study.pid), None, 0.0
    while study.poll() is None:
        times = process.cpu_times()
        now = times.user + times.system or now  # 0 of one that has just ended
        if before is None and b" start cpu-base-1" in log.read_bytes():
            before = now
        time.sleep(POLL_S)
    return now - (before or 0.0)


def _events(place: Path) -> list[Record]:
    journal = Journal(Folder(place / "studies" / "s").journal, writer=False)
    try:
        return list(journal.read())
    finally:
        journal.close()


def _row(events: list[Record], slots: int, joined_at: float, cpu_s: float) -> Row:
    first: dict[str, float] = {}
    slot_of: dict[str, str] = {}
    ended: dict[str, float] = {}
    gaps: list[float] = []
    for record in events:
        match record.event:
            case TrialStarted(trial=trial, slot=slot):
                first.setdefault(slot, record.at - joined_at)
                slot_of[trial.id] = slot
                gaps += [record.at - ended.pop(slot)] if slot in ended else []
            case TrialFinished(trial_id=trial_id):
                ended[slot_of[trial_id]] = record.at
            case _:
                pass
    joins = sorted(first.values())
    return Row(slots, len(slot_of), joins[0], joins[-1], median(gaps), max(gaps), cpu_s)


def main() -> None:
    """Prints one row for each number of slots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--trial-s", type=float, default=0.5, help="for each slot: 64 slots have trials 64 times as long"
    )
    parser.add_argument("--rounds", type=int, default=6, help="trials a slot")
    options = parser.parse_args()
    print(
        "| slots | trials | first trial after join, s | on the last slot, s | gap, ms | longest, ms | CPU a trial, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for slots in options.slots:
        row = measured(slots, trial_s=options.trial_s * slots, rounds=options.rounds)
        cells = [
            f"{row.join_s:.1f}",
            f"{row.last_join_s:.1f}",
            f"{1000 * row.gap_s:.0f}",
            f"{1000 * row.longest_gap_s:.0f}",
        ]
        print(f"| {row.slots} | {row.trials} | {' | '.join(cells)} | {1000 * row.cpu_s / row.trials:.0f} |", flush=True)


if __name__ == "__main__":
    main()
