"""What a study on several kinds of cards came to: steps of each ratchet, and where the cards' time went, as JSON.

    python benchmarks/two_kinds.py figures STUDY OUT          OUT gets figures.json and a copy of the journal
    python benchmarks/two_kinds.py edit TRAIN.py KNOB=VALUE…  prints the program with these values

It runs nothing: `two_kinds.sh` does.
"""
# ruff: noqa: E402  # the path is put right before anything of this repository is imported

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # another file here is named as a package is
    sys.path = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]

from raysearch import folder, knobs, tally
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.model import (
    Outcome,
    ProfileAdded,
    Record,
    SessionEnded,
    SessionStarted,
    SlotGauged,
    Trial,
    TrialFinished,
    TrialStarted,
)
from raysearch.study import Study, baseline_id


@dataclass(frozen=True)
class Attempt:
    """One attempt at a trial on a slot.

    Attributes:
        started_at, finished_at: Unix times of the journal; the end of the session where the attempt was cut off by it.
        outcome: None if it was cut off.
        parts_s: Seconds by part, as its harness reported them; empty where it reported none.
    """

    trial: Trial
    slot: str
    started_at: float
    finished_at: float
    outcome: Outcome | None
    parts_s: Mapping[str, float]
    facts: Mapping[str, float]
    peak_vram_mb: float

    @property
    def wall_s(self) -> float:
        """From the journal's intent to its outcome."""
        return self.finished_at - self.started_at


def figures(place: Folder) -> dict[str, Any]:
    """All figures of a study's last session.

    Args:
        place: The study's folder.

    Raises:
        UserError: It is no study.
    """
    config = folder.load_config(place.config)
    with closing(Journal(place.journal, writer=False)) as journal:
        records = list(journal.read())
        study = folder.replay(config, journal)
    first = max((i for i, record in enumerate(records) if isinstance(record.event, SessionStarted)), default=0)
    began_at, ended_at = records[first].at, records[-1].at
    ends = [record.at for record in records[first:] if isinstance(record.event, SessionEnded)]
    ended_at = ends[-1] if ends else ended_at
    done = attempts(records[first:], place, ended_at)
    joined = joins(records[first:])
    profiles = {slug: of_profile(study, slug, done, joined, ended_at=ended_at) for slug in study.lanes}
    held_s, train_s = (sum(one[name] for one in profiles.values()) for name in ("held_s", "training_s"))
    return {
        "study": config.name,
        "session_s": round(ended_at - began_at, 1),
        "first_slot_joined_after_s": round(min(joined.values()) - began_at, 1) if joined else None,
        "held_s": round(held_s, 1),
        "training_s": round(train_s, 1),
        "training_share": share(train_s, held_s),
        "profiles": profiles,
    }


def joins(records: Sequence[Record]) -> dict[str, float]:
    """When each slot of a session that had a trial joined, in Unix time; one that was not gauged, with its profile."""
    added = {record.event.profile.slug: record.at for record in records if isinstance(record.event, ProfileAdded)}
    gauged = {record.event.slot: record.at for record in reversed(records) if isinstance(record.event, SlotGauged)}
    starts = [record.event for record in records if isinstance(record.event, TrialStarted)]
    return {start.slot: gauged.get(start.slot, added.get(start.trial.profile, records[0].at)) for start in starts}


def attempts(records: Iterable[Record], place: Folder, ended_at: float) -> list[Attempt]:
    """The attempts of a session in the order in which they ended."""
    running: dict[tuple[str, int], tuple[float, TrialStarted]] = {}
    found: list[Attempt] = []
    for record in records:
        match record.event:
            case TrialStarted(trial=trial, attempt=number) as event:
                running[trial.id, number] = record.at, event
            case TrialFinished(trial_id=name, attempt=number) as event if (name, number) in running:
                at, start = running.pop((name, number))
                found.append(_attempt(start, event, at, record.at, place))
            case _:
                pass
    return found + [_attempt(start, None, at, ended_at, place) for at, start in running.values()]


def _attempt(start: TrialStarted, end: TrialFinished | None, at: float, ended_at: float, place: Folder) -> Attempt:
    measured = end.measurement if end else None
    reported = _reported(place.run(start.trial.id, start.attempt) / "result.json")
    seconds = reported.get("seconds")
    parts: Mapping[str, float] = measured.parts_s if measured else seconds if isinstance(seconds, dict) else {}
    facts = measured.facts if measured else {}
    peak_mb = measured.peak_vram_mb if measured else float(reported.get("peak_vram_mb") or 0.0)
    return Attempt(start.trial, start.slot, at, ended_at, end.outcome if end else None, parts, facts, peak_mb)


def _reported(path: Path) -> dict[str, Any]:
    """What the harness of an attempt wrote; nothing where it was ended first."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def of_profile(
    study: Study, slug: str, done: Iterable[Attempt], joined: Mapping[str, float], *, ended_at: float
) -> dict[str, Any]:
    """The figures of one kind of card; its time is that of its slots from joining to the end of the session."""
    at, lane = tally.standing(study, slug), study.lane(slug)
    own = [attempt for attempt in done if attempt.trial.profile == slug]
    first = study.trials.get(baseline_id(lane.base, 1))
    slots = sorted({attempt.slot for attempt in own})
    since = {slot: joined[slot] for slot in slots}
    held_s = sum(ended_at - at for at in since.values())
    parts, gaps = time_of(own, since, ended_at=ended_at)
    return {
        "hardware": at.profile.hardware,
        "memory_mb": at.profile.memory_mb,
        "capability": at.profile.software.get("capability"),
        "preset": at.profile.preset,
        "evaluation": at.profile.evaluation,
        "budget": at.profile.budget,
        "slots": slots,
        "trials_by_outcome": Counter(attempt.outcome.value if attempt.outcome else "cut off" for attempt in own),
        "trials_by_purpose": Counter(attempt.trial.purpose.value for attempt in own),
        "first_baseline": first.value if first else None,
        "baseline": at.baseline,
        "baseline_runs": at.baseline_runs,
        "sigma": at.noise.sigma if at.noise else None,
        "champion": at.value,
        "champion_runs": at.runs,
        "champion_commit": at.commit,
        "wins": len(at.steps),
        "steps": [
            {
                "candidate": state.id,
                "hypothesis": state.candidate.proposal.hypothesis,
                "proposer": state.candidate.proposal.proposer,
                "operator": state.candidate.proposal.operator.value,
                "carries": state.candidate.proposal.carries,
                "delta": state.delta,
                "delta_se": state.delta_se,
                "pairs": state.pairs,
                "val_bpb": study.value(state.id),
            }
            for state in at.steps
        ],
        "held_s": round(held_s, 1),
        "training_s": round(parts.get("train", 0.0), 1),
        "training_share": share(parts.get("train", 0.0), held_s),
        "shares": {name: share(seconds, held_s) for name, seconds in {**parts, **gaps}.items()},
        "seconds": {name: round(seconds, 2) for name, seconds in {**parts, **gaps}.items()},
        "median_of_a_measured_trial_s": medians(own),
        "median_tokens_per_s": _median(attempt.facts.get("tokens_per_s") for attempt in own),
        "median_mfu_percent": _median(attempt.facts.get("mfu_percent") for attempt in own),
        "largest_peak_vram_mb": max((attempt.peak_vram_mb for attempt in own), default=None),
        "blocked": at.blocked,
    }


def time_of(
    own: Sequence[Attempt], since: Mapping[str, float], *, ended_at: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a profile's slots by part of its attempts, and those on no attempt.

    Args:
        own: Its attempts.
        since: When each of its slots joined, in Unix time.
        ended_at: When the session ended.
    """
    parts: dict[str, float] = {}
    for attempt in own:
        rest = "rest of trials" if attempt.parts_s else "trials without a report"
        for name, seconds in {**attempt.parts_s, rest: attempt.wall_s - sum(attempt.parts_s.values())}.items():
            parts[name] = parts.get(name, 0.0) + seconds
    between = {"before the first trial": 0.0, "between trials": 0.0, "after the last trial": 0.0}
    for slot, joined_at in since.items():
        row = sorted((attempt for attempt in own if attempt.slot == slot), key=lambda attempt: attempt.started_at)
        between["before the first trial"] += row[0].started_at - joined_at
        between["between trials"] += sum(two.started_at - one.finished_at for one, two in itertools.pairwise(row))
        between["after the last trial"] += ended_at - row[-1].finished_at
    return parts, between


def medians(own: Iterable[Attempt]) -> dict[str, float]:
    """The median of each part over the measured trials that had it, and of the whole, in seconds."""
    measured = [attempt for attempt in own if attempt.outcome is Outcome.MEASURED]
    names = dict.fromkeys(name for attempt in measured for name in attempt.parts_s)
    rows = {name: [a.parts_s[name] for a in measured if a.parts_s.get(name)] for name in names}
    rows["whole"] = [attempt.wall_s for attempt in measured]
    return {name: round(median(row), 3) for name, row in rows.items() if row}


def share(part: float, whole: float) -> float | None:
    """A part of a whole; None of nothing."""
    return round(part / whole, 4) if whole > 0 else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def write_figures(study: Path, out: Path) -> None:
    """Writes figures.json and journal.db into a folder, and prints the former."""
    place = Folder(study.resolve())
    text = json.dumps(figures(place), indent=1)
    (out / "figures.json").write_text(f"{text}\n")
    copy = out / "journal.db"
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(place.journal)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)  # with what is still in its write-ahead log
        target.execute("PRAGMA journal_mode=DELETE")
    print(text)


def edited(path: Path, settings: Sequence[str]) -> str:
    """A program with other values of its knobs.

    Args:
        path: The program.
        settings: KNOB=VALUE each, the value as Python has it.
    """
    pairs = (setting.partition("=") for setting in settings)
    return knobs.rewrite(path.read_text(), {name: ast.literal_eval(value) for name, _, value in pairs})


def main() -> None:
    """Does what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_study = commands.add_parser("figures", help="of a study")
    of_study.add_argument("study", type=Path)
    of_study.add_argument("out", type=Path)
    edit = commands.add_parser("edit", help="a program's knobs")
    edit.add_argument("program", type=Path)
    edit.add_argument("settings", nargs="+", metavar="KNOB=VALUE")
    arguments = parser.parse_args()
    if arguments.command == "edit":
        print(edited(arguments.program, arguments.settings), end="")
    else:
        write_figures(arguments.study, arguments.out)


if __name__ == "__main__":
    main()
