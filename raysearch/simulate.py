"""A whole study in seconds: everything that decides is real, the machine is simulated, and the truth is known.

It is how the search is measured and tuned. It writes no study of a user's: what it needs on the disk goes with it.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysearch.config import StudyConfig, parse_config
from raysearch.console import Console, SlotProgress
from raysearch.coordinator import Coordinator, Session
from raysearch.executors.simulated import (
    Faults,
    MemoryRatchet,
    SimulatedExecutor,
    SimulatedSlot,
    VirtualAsker,
    VirtualClock,
)
from raysearch.executors.surrogate import PATH, Surrogate, program, values_of
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.knobs import Value
from raysearch.model import Outcome, Purpose, Record
from raysearch.proposers import Proposer
from raysearch.schedule import Slot
from raysearch.study import Lane, Study

HOUR_S = 3600.0
NEVER_RUN = ["simulated"]


@dataclass(frozen=True)
class Move:
    """One step of a ratchet, with what it was really worth.

    Attributes:
        at_s: Seconds after the study's start.
        slot_hours: That the profile's slots had been there by then, idle ones included.
        before: True value of the champion before it.
        after: The same after it.
    """

    candidate: str
    proposer: str
    operator: str
    at_s: float
    slot_hours: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        """True gain; the metric is minimised."""
        return self.before - self.after

    @property
    def is_false(self) -> bool:
        """Whether a change was kept that does not help."""
        return self.gain <= 0


@dataclass(frozen=True)
class Ratcheted:
    """What came of one profile.

    Attributes:
        start: True value of its first program.
        slot_hours: That its slots were there, idle ones included.
        moves: Steps of its ratchet.
    """

    slug: str
    start: float
    slot_hours: float
    moves: tuple[Move, ...]

    @property
    def end(self) -> float:
        """True value of the last champion."""
        return self.moves[-1].after if self.moves else self.start

    @property
    def gain(self) -> float:
        """True gain of the whole search."""
        return self.start - self.end

    @property
    def false_keeps(self) -> int:
        """Steps that do not help."""
        return sum(move.is_false for move in self.moves)

    def champion(self, at_s: float) -> float:
        """True value of the champion at a time."""
        return next((move.after for move in reversed(self.moves) if move.at_s <= at_s), self.start)


@dataclass(frozen=True)
class Simulated:
    """What came of a study.

    Attributes:
        reason: Why it ended.
        seconds: How long it took, in its own time.
        profiles: By slug.
        trials: That ended, by purpose.
        outcomes: The same by outcome.
        idle: Share of the slots' time in which nothing ran on them.
        idle_later: The same from the end of the first baseline run on, when a proposer has had time to think.
        aside: Slots that were set aside.
        study: Its state at the end.
    """

    reason: str
    seconds: float
    profiles: dict[str, Ratcheted]
    trials: dict[Purpose, int]
    outcomes: dict[Outcome, int]
    idle: float
    idle_later: float
    aside: tuple[str, ...]
    study: Study = field(compare=False, repr=False)


def fleet(surrogate: Surrogate, count: int, *, name: str = "") -> list[SimulatedSlot]:
    """So many slots with the same card, there from the start."""
    return [SimulatedSlot(f"{name or surrogate.slug}-{number}", surrogate) for number in range(count)]


def simulate(
    slots: Sequence[SimulatedSlot],
    *,
    proposers: Sequence[Proposer],
    hours: float,
    seed: int = 0,
    start: Mapping[str, Value] | None = None,
    options: Mapping[str, Any] | None = None,
    max_trials: int | None = None,
    latency_s: float | Mapping[str, float] = 0.0,
    hang_rate: Mapping[str, float] | None = None,
    paired: float = 0.3,
    faults: Faults | None = None,
) -> Simulated:
    """Runs a study to its end on slots that are imagined.

    Args:
        slots: All that will ever join.
        proposers: Who is asked; the first one has most of the line. Their seeds are their own.
        hours: Virtual hours after which the study is stopped.
        seed: Of the noise, the faults and the latencies, and of the study.
        start: Knob values of the first program, the published baseline by default; see `surrogate.starts`.
        options: Tables of `study.toml` (search, judge) that differ from its defaults.
        max_trials: First runs of each profile, as for `--trials`.
        latency_s: Mean of what an ask takes, for all proposers or by name.
        hang_rate: Share of the asks that never give an answer, by name.
        paired: See `SimulatedExecutor`.
        faults: See `SimulatedExecutor`.

    Returns:
        What came of it, with what is really true of it. The same arguments give the same, if the proposers' do.
    """
    config = _config(seed, options or {})
    clock = VirtualClock()
    began, executor = clock.now, SimulatedExecutor(clock, slots, seed=seed, paired=paired, faults=faults)
    study = Study(replace(config.settings(max_trials), proposers=tuple(proposer.name for proposer in proposers)))
    latencies = latency_s if isinstance(latency_s, Mapping) else {one.name: latency_s for one in proposers}
    hangs = hang_rate or {}
    with tempfile.TemporaryDirectory(prefix="raysearch-") as temporary:
        folder = Folder(Path(temporary))
        folder.trials.mkdir()
        repo = MemoryRatchet(folder.repo, {PATH: program(start or {})}, at=began)
        journal = Journal(folder.journal, writer=True, durable=False)
        coordinator = Coordinator(
            folder=folder,
            config=config,
            study=study,
            journal=journal,
            repo=repo,
            executor=executor,
            askers=[
                VirtualAsker(
                    proposer,
                    clock,
                    latency_s=latencies.get(proposer.name, 0.0),
                    hang_rate=hangs.get(proposer.name, 0.0),
                    seed=seed,
                )
                for proposer in proposers
            ],
            console=_Silent(study, name=config.name, metric="val_bpb", stream=io.StringIO(), clock=clock),
            session=Session("simulated", "session", began + hours * HOUR_S),
            clock=clock,
        )
        clock.at(began + hours * HOUR_S, coordinator.stop)
        try:
            reason = coordinator.run()
        finally:
            journal.close()
    seconds = min(clock.now - began, hours * HOUR_S)
    cards = {slot.surrogate.slug: slot.surrogate for slot in slots}
    profiles = {
        slug: _ratcheted(study, lane, repo, cards[slug], slots, began=began, seconds=seconds)
        for slug, lane in study.lanes.items()
    }
    ended = [state for state in study.trials.values() if state.outcome is not None]
    return Simulated(
        reason=reason,
        seconds=seconds,
        profiles=profiles,
        trials=dict(Counter(state.trial.purpose for state in ended)),
        outcomes=dict(Counter(state.outcome for state in ended if state.outcome is not None)),
        idle=_idle(executor, slots, began=began, since_s=0.0, until_s=seconds),
        idle_later=_idle(executor, slots, began=began, since_s=_first_baseline_s(study, began), until_s=seconds),
        aside=tuple(study.aside),
        study=study,
    )


def _config(seed: int, options: Mapping[str, Any]) -> StudyConfig:
    task = {"kind": "command", "command": NEVER_RUN, "metric": "val_bpb"}
    search = {"seed": seed, **options.get("search", {})}
    return parse_config({"name": "simulated", "objective": task, **options, "search": search}, where="options")


def _ratcheted(
    study: Study,
    lane: Lane,
    repo: MemoryRatchet,
    card: Surrogate,
    slots: Sequence[SimulatedSlot],
    *,
    began: float,
    seconds: float,
) -> Ratcheted:
    own = [slot for slot in slots if slot.surrogate.slug == card.slug]
    value = start = card.value(values_of(repo.read(study.candidates[lane.base].candidate.commit, PATH)))
    moves: list[Move] = []
    for win in lane.wins:
        before, value = value, card.value(values_of(repo.read(win.commit, PATH)))
        proposal = study.candidates[win.candidate].candidate.proposal
        at_s = win.at - began
        hours = _slot_seconds(own, at_s) / HOUR_S
        moves.append(Move(proposal.id, proposal.proposer, proposal.operator.value, at_s, hours, before, value))
    return Ratcheted(card.slug, start, _slot_seconds(own, seconds) / HOUR_S, tuple(moves))


def _first_baseline_s(study: Study, began: float) -> float:
    """Seconds after the start when the first baseline run ended."""
    runs = [run for run in study.trials.values() if run.trial.purpose is Purpose.BASELINE]
    return min((run.finished_at - began for run in runs if run.finished_at is not None), default=0.0)


def _idle(
    executor: SimulatedExecutor, slots: Sequence[SimulatedSlot], *, began: float, since_s: float, until_s: float
) -> float:
    """Share of the slots' time between two times after the start in which nothing ran on them."""
    there_s = _slot_seconds(slots, until_s) - _slot_seconds(slots, since_s)
    return 1 - executor.busy_s(began + until_s, since=began + since_s) / max(1e-9, there_s)


def _slot_seconds(slots: Sequence[SimulatedSlot], until_s: float) -> float:
    """Seconds that the slots were there, together, up to a time after the start."""
    return sum(max(0.0, min(slot.leaves_at, until_s) - slot.joins_at) for slot in slots)


class _Silent(Console):
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def record(self, record: Record) -> None:
        """Tells nothing."""

    def refresh(
        self, now: float, *, slots: Sequence[Slot], progress: Mapping[str, SlotProgress], draining: bool = False
    ) -> None:
        """Draws nothing."""
