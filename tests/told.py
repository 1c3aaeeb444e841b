"""A study with a pen, for tests: writes the events that a test is about, in as few words as may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from histories import commit_of, cpu_profile

from raysearch import plan
from raysearch.model import (
    Event,
    Judged,
    Materialised,
    Measurement,
    Operator,
    Outcome,
    Profile,
    ProfileAdded,
    Proposal,
    Proposed,
    RatchetMoved,
    Record,
    SessionStarted,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.pace import Pace
from raysearch.plan import Carry, Command, Conclude, MoveRatchet, StartTrial
from raysearch.schedule import Slot, assign
from raysearch.study import CandidateState, InvalidTransition, Lane, Settings, Study, candidate_id

CPU = cpu_profile()
BASE = commit_of("base")
TWO = (Slot("a", "cpu"), Slot("b", "cpu"))
TRIAL_S = 20.0


class Told:
    """A study and what is written into it.

    Attributes:
        slots: Those that are there.
        asking: How the proposers stand.
        at: Unix time in seconds of the latest event.
    """

    def __init__(self, slots: Sequence[Slot] = TWO, **options: Any) -> None:
        self.study = Study(Settings(**options))
        self.records: list[Record] = []
        self.slots = slots
        self.asking: dict[tuple[str, str], Pace] = {}
        self.at = 1000.0

    def add(self, *events: Event, after_s: float = 0.0) -> None:
        for event in events:
            self.at += after_s
            record = Record(self.study.seq + 1, self.at, event)
            self.study.apply(record)
            self.records.append(record)

    def refuses(self, event: Event, match: str | None = None) -> None:
        with pytest.raises(InvalidTransition, match=match):
            self.study.apply(Record(self.study.seq + 1, 0.0, event))

    def begin(self, *profiles: Profile) -> None:
        self.add(SessionStarted("host", 1, "0"))
        for profile in profiles or (CPU,):
            self.add(ProfileAdded(profile, BASE, f"{profile.slug} program"))

    @property
    def lane(self) -> Lane:
        return self.study.lanes["cpu"]

    def state(self, name: str) -> CandidateState:
        return self.study.candidates[name]

    # ---- what it wants ----

    def commands(self, **options: Any) -> list[Command]:
        return plan.next_commands(self.study, self.slots, asking=self.asking, **options)

    def starts(self, **options: Any) -> list[Trial]:
        return [command.trial for command in self.commands(**options) if isinstance(command, StartTrial)]

    def ids(self, **options: Any) -> list[str]:
        """What would be started now, as `trial@slot`."""
        started = [command for command in self.commands(**options) if isinstance(command, StartTrial)]
        return [f"{command.trial.id}@{command.slot}" for command in started]

    def carries(self) -> tuple[str, ...]:
        """What is to be carried now."""
        for command in self.commands():
            if isinstance(command, Carry):
                return tuple(candidate.id for candidate in command.candidates)
        return ()

    def could(self, slug: str = "cpu") -> dict[str, Trial]:
        """All trials of a profile that would start if there were slots enough, by id."""
        many = [Slot(str(number), slug) for number in range(99)]
        return {trial.id: trial for trial, _ in assign(self.study, self.study.lanes[slug], many)}

    # ---- what happens ----

    def run(self, trial_id: str, value: float | None = 1.0, *, outcome: Outcome | None = None, slot: str = "a") -> None:
        """Starts a trial that is wanted, and ends it."""
        self.start(trial_id, slot=slot)
        self.end(trial_id, value, outcome=outcome)

    def wait(self, seconds: float) -> None:
        """Time passes, and another session takes over."""
        self.add(SessionStarted("host", 2, "0"), after_s=seconds)
        self.warm()

    def warm(self) -> None:
        """Makes as if every slot had had a run in this session, so that none is the first one there."""
        self.study.warm |= {*"abcdg", *(str(number) for number in range(99))}

    def start(self, trial_id: str, *, slot: str = "a") -> None:
        (trial,) = (found[trial_id] for slug in self.study.lanes if trial_id in (found := self.could(slug)))
        before = self.study.trials.get(trial_id)
        self.add(TrialStarted(trial, before.attempt + 1 if before else 1, slot))

    def end(
        self,
        trial_id: str,
        value: float | None = 1.0,
        *,
        outcome: Outcome | None = None,
        seconds: float = TRIAL_S,
        halfway: float | None = None,
        speed: float = 0.0,
        facts: dict[str, float] | None = None,
    ) -> None:
        attempt = self.study.trials[trial_id].attempt
        facts = ({"tokens_per_s": speed} if speed else {}) | (facts or {})
        measurement = None if value is None or outcome else Measurement(value, wall_s=seconds, facts=facts)
        outcome = outcome or (Outcome.MEASURED if measurement else Outcome.CRASHED)
        reason = "" if measurement else "why"
        self.add(TrialFinished(trial_id, attempt, outcome, reason, measurement, halfway=halfway), after_s=seconds)

    def baselines(self, slug: str = "cpu", values: Sequence[float] = (1.0, 1.01, 0.99)) -> None:
        for number, value in enumerate(values, start=1):
            self.run(f"{slug}-base-{number}", value)

    def propose(
        self,
        *,
        base: str | None = None,
        on: str | None = None,
        slug: str = "cpu",
        carries: tuple[str, ...] = (),
        proposer: str = "tune",
        operator: Operator = Operator.TUNE,
        hypothesis: str = "an idea",
        **about: Any,
    ) -> str:
        """Writes a proposal on the champion, on the candidate `on` or on the commit `base`."""
        name = candidate_id(self.study.proposals + 1)
        base = base or (commit_of(on) if on else self.study.lane(slug).champion_commit)
        proposal = Proposal(name, slug, base, "a patch", operator, hypothesis, proposer, carries=carries, **about)
        self.add(Proposed(proposal))
        return name

    def candidate(self, *, size: int = 0, **options: Any) -> str:
        name = self.propose(**options)
        self.materialise(name, size=size)
        return name

    def materialise(self, name: str, *, size: int = 0) -> None:
        self.add(Materialised(name, commit_of(name), f"{name} program", size))

    def carry(self) -> str:
        """Does what is to be carried now, without conflict; gives the new candidate's id."""
        (command,) = (command for command in self.commands() if isinstance(command, Carry))
        return self.candidate(base=command.onto, carries=tuple(candidate.id for candidate in command.candidates))

    def conclude(self) -> list[Judged]:
        """Writes down all verdicts that are due."""
        events = [command.event for command in self.commands() if isinstance(command, Conclude)]
        self.add(*events)
        return [event for event in events if isinstance(event, Judged)]

    def promise(self, *names: str, value: float = 0.5) -> None:
        """Runs candidates for the first time, well enough to be raced."""
        for name in names:
            self.run(f"{name}-screen", value)
        for event in self.conclude():
            assert event.verdict is Verdict.RETEST

    def run_pair(self, name: str, *, gain: float = 0.3, than: float = 1.0) -> None:
        """Runs the next pair of a race, as far as it has not run."""
        number = len(self.state(name).races) + 1
        theirs = self.could()[f"{name}-pair{number}"].rival
        assert theirs is not None
        if theirs not in self.study.trials:
            self.run(theirs, than, slot="b")
        value = self.study.trials[theirs].value
        assert value is not None
        self.run(f"{name}-pair{number}", value - gain)

    def pair(self, name: str, *, gain: float = 0.3, than: float = 1.0) -> Judged:
        """Runs the next pair of a race and writes down the verdict."""
        self.run_pair(name, gain=gain, than=than)
        (event,) = (event for event in self.conclude() if event.candidate == name)
        return event

    def confirm(self, *names: str, gain: float = 0.3, than: float = 1.0) -> None:
        """Runs candidates that were promising to their verdicts: better by `gain`, and all at once."""
        for name in names:
            self.run_pair(name, gain=gain, than=than)
        for event in self.conclude():
            assert event.verdict is Verdict.KEEP

    def refute(self, name: str) -> None:
        """Ends a candidate's race with a crash."""
        number = len(self.state(name).races) + 1
        theirs = self.could()[f"{name}-pair{number}"].rival
        if theirs is not None and theirs not in self.study.trials:
            self.run(theirs, 1.0, slot="b")
        self.run(f"{name}-pair{number}", outcome=Outcome.CRASHED)
        self.conclude()
        assert self.state(name).verdict is Verdict.DISCARD

    def move(self) -> None:
        """The ratchet moves, as it is to now."""
        (command,) = self.commands()
        assert isinstance(command, MoveRatchet)
        step = commit_of(f"step {command.candidate.id}")
        self.add(RatchetMoved(command.profile, command.candidate.id, step, command.expected))

    def win(self, name: str, *, gain: float = 0.3, than: float = 1.0) -> None:
        """A candidate that was promising becomes the champion."""
        self.confirm(name, gain=gain, than=than)
        self.move()

    def crown(self, *, size: int) -> float:
        """A new candidate of that size becomes the champion; gives its value."""
        name = self.candidate(size=size)
        self.promise(name)
        self.win(name)
        value = self.study.value(name)
        assert value is not None
        return value


def ready(**options: Any) -> Told:
    """A study whose baselines are done: 1.0, 1.01 and 0.99."""
    told = Told(**options)
    told.begin()
    told.warm()
    told.baselines()
    return told
