"""Which slots drift or are throttled: each run is compared with runs of the same program on other slots. Pure.

It knows no σ of its own and sets nothing aside; `plan` asks it, and says what follows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from raysearch.model import Measurement

WINDOW = 6  # comparisons of a slot that count
LEAST = 4  # comparisons before a slot is suspected
SLOWER = 0.05  # a slot this much slower than the others trains other models in the same seconds
SURE = 3.0  # standard deviations of the other slots' speeds
SURE_VALUE = 4.5  # standard errors of the mean difference of the metric
SPEED = "tokens_per_s"
PROGRAMS = 1000  # remembered, the latest ones


@dataclass(frozen=True)
class Comparison:
    """A run against the mean of the same program's runs on other slots.

    Attributes:
        value: Difference of the metric.
        scale: Its standard deviation in σ: sqrt(1 + 1/n) for n others.
        slots: How many other slots there were.
        log_speed: Difference of log(tokens a second); None where the program does not say.
    """

    trial: str
    value: float
    scale: float
    slots: int
    log_speed: float | None


@dataclass(frozen=True)
class Suspicion:
    """A slot that should get no more trials, why, and the trials that made it suspect."""

    slot: str
    reason: str
    trials: tuple[str, ...]


@dataclass
class Health:
    """The slots of one profile.

    Attributes:
        runs: Of each program: slot, metric, log(tokens a second).
        recent: Comparisons of each slot, the latest last.
        changed: Slots with a new comparison.
    """

    runs: dict[str, list[tuple[str, float, float | None]]] = field(
        default_factory=dict[str, list[tuple[str, float, float | None]]]
    )
    recent: dict[str, deque[Comparison]] = field(default_factory=dict[str, deque[Comparison]])
    changed: set[str] = field(default_factory=set[str], compare=False)

    def add(self, slot: str, trial: str, program: str, measured: Measurement) -> None:
        """Takes in a run."""
        speed = measured.facts.get(SPEED, 0.0)
        log_speed = math.log(speed) if speed > 0 else None
        runs = self.runs.setdefault(program, [])
        others = [run for run in runs if run[0] != slot]
        if others:
            self._compare(slot, trial, measured.value, log_speed, others)
        runs.append((slot, measured.value, log_speed))
        if len(self.runs) > PROGRAMS:
            del self.runs[next(iter(self.runs))]

    def _compare(
        self,
        slot: str,
        trial: str,
        value: float,
        log_speed: float | None,
        others: Sequence[tuple[str, float, float | None]],
    ) -> None:
        speeds = [speed for _, _, speed in others if speed is not None]
        slower = log_speed - fmean(speeds) if log_speed is not None and speeds else None
        found = Comparison(
            trial,
            value - fmean(other for _, other, _ in others),
            math.sqrt(1 + 1 / len(others)),
            len({name for name, _, _ in others}),
            slower,
        )
        self.recent.setdefault(slot, deque(maxlen=WINDOW)).append(found)
        self.changed.add(slot)

    def forget(self, slot: str) -> None:
        """Starts a slot anew."""
        self.recent.pop(slot, None)
        self.changed.discard(slot)

    def suspects(self, sigma: float) -> list[Suspicion]:
        """Slots that have become suspect since the last call."""
        found = [self._suspect(slot, sigma) for slot in sorted(self.changed)]
        self.changed.clear()
        return [one for one in found if one is not None]

    def _suspect(self, slot: str, sigma: float) -> Suspicion | None:
        recent = self.recent.get(slot, deque())
        trials = tuple(dict.fromkeys(one.trial for one in recent))
        speeds = [one.log_speed for one in recent if one.log_speed is not None]
        if len(speeds) >= LEAST and max(speeds[-LEAST:]) < -SLOWER and fmean(speeds) < -SURE * self._spread(slot):
            lost = 100 * (1 - math.exp(fmean(speeds)))
            return Suspicion(slot, f"it is {lost:.0f}% slower than the others; see to its cooling and power", trials)
        values = [one.value / (one.scale * sigma) for one in recent if one.slots >= 2 and sigma > 0]
        if len(values) >= LEAST and abs(fmean(values)) * math.sqrt(len(values)) > SURE_VALUE:
            apart = fmean(one.value for one in recent)
            return Suspicion(slot, f"it drifts: the same programs are {apart:+.4f} apart from other slots", trials)
        return None

    def _spread(self, slot: str) -> float:
        """Standard deviation of the other slots' comparisons of speed: shared machines are uneven by themselves."""
        others = [
            one.log_speed
            for name, recent in self.recent.items()
            if name != slot
            for one in recent
            if one.log_speed is not None and one.log_speed < 0  # above 0 they only say that this slot is slow
        ]
        return math.sqrt(fmean(one**2 for one in others)) if others else 0.0
