"""Which queued trial goes to which free slot: pure. It starts nothing and knows no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raysearch.model import Trial


@dataclass(frozen=True)
class Slot:
    """A place for one trial at a time, as the schedule sees it."""

    id: str
    profile: str


def assign(queued: Iterable[Trial], free: Sequence[Slot]) -> list[tuple[Trial, Slot]]:
    """Gives each trial, in order of the queue, the first free slot of its profile."""
    by_profile: dict[str, list[Slot]] = {}
    for slot in reversed(free):
        by_profile.setdefault(slot.profile, []).append(slot)
    assigned: list[tuple[Trial, Slot]] = []
    for trial in queued:
        slots = by_profile.get(trial.profile)
        if slots:
            assigned.append((trial, slots.pop()))
    return assigned
