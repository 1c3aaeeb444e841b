"""Which slots drift or are throttled: each run is compared with runs of the same program on other slots. Pure.

It knows no σ of its own and sets nothing aside; `plan` asks it, and says what follows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from raysearch.model import Measurement, SlotGauged

WINDOW = 6  # comparisons of a slot that count
LEAST = 4  # comparisons before a slot is suspected
FEWEST = 2  # when each of them is far off by itself
SLOWER = 0.05  # a slot this much slower than the others trains other models in the same seconds
SURE = 3.0  # standard deviations of one run's speed
JUMPS = 12  # from one comparison of a slot to its next, before it is known how uneven runs are by themselves
SURE_VALUE = 4.5  # standard errors of the mean difference of the metric
SPEED = "tokens_per_s"
HOT = 3  # throttled trials in a row, after which a slot is suspected
THROTTLED, THROTTLED_SHARE = "throttled", "throttled_share"  # 1 of a trial so marked; share of its training
SLOW_SHARE = 0.03  # below the others of its kind, from which on a card is said to be slow when it joins
GAUGES = 20  # of a slot that are remembered
PROGRAMS = 1000  # remembered, the latest ones


@dataclass(frozen=True)
class Comparison:
    """A run against the mean of the same program's runs on other slots.

    Attributes:
        value: Difference of the metric.
        others: How many runs that mean is of.
        slots: On how many other slots they were.
        log_speed: Difference of log(tokens a second); None where the program does not say.
    """

    trial: str
    value: float
    others: int
    slots: int
    log_speed: float | None


@dataclass(frozen=True)
class Suspicion:
    """A slot that should get no more trials, why, and the trials that made it suspect."""

    slot: str
    reason: str
    trials: tuple[str, ...]


@dataclass(frozen=True)
class Slow:
    """A slot whose card reached less, when it was last measured, than others of its kind or than it did before."""

    slot: str
    what: str
    unit: str
    value: float
    usual: float
    others: int  # slots whose median `usual` is; 0 for the slot's own earlier measurements

    @property
    def share(self) -> float:
        """How much less, of the usual."""
        return 1 - self.value / self.usual

    @property
    def reason(self) -> str:
        """In a line."""
        of = "its own earlier ones" if not self.others else "the other slot" if self.others == 1 else "the others"
        return (
            f"{100 * self.share:.1f} % slower in {self.what} than {'the median of ' if self.others != 1 else ''}{of}: "
            f"{self.value:.4g} against {self.usual:.4g} {self.unit}; see to its cooling, power limit and clocks"
        )


def slow(gauges: Mapping[str, Sequence[SlotGauged]]) -> list[Slow]:
    """The slots of a profile that are slower than the others; one that is alone is compared with its own past.

    Args:
        gauges: What was measured on each slot, oldest first.
    """
    figures = (("matmul", "TFLOPS"), ("copy", "GB/s"))
    found: list[Slow] = []
    for slot, own in gauges.items():
        others = [theirs[-1] for name, theirs in gauges.items() if name != slot]
        if not others and len(own) < 2:
            continue
        worst: Slow | None = None
        for number, (what, unit) in enumerate(figures):
            usual = median(_figures(one)[number] for one in (others or own[:-1]))
            one = Slow(slot, what, unit, _figures(own[-1])[number], usual, len(others))
            if usual > 0 and one.share >= (worst.share if worst else SLOW_SHARE):
                worst = one
        if worst:
            found.append(worst)
    return found


def _figures(gauge: SlotGauged) -> tuple[float, float]:
    return gauge.matmul_tflops, gauge.copy_gb_per_s


@dataclass
class Heat:
    """How often a slot was throttled, as far as its trials say.

    Attributes:
        trials: How many say whether they were.
        share: Sum of the shares of their training for which they were.
        throttled: Those that are marked, oldest first.
    """

    trials: int = 0
    share: float = 0.0
    throttled: list[str] = field(default_factory=list[str])

    def add(self, trial: str, measured: Measurement) -> None:
        """Takes in a run; one that does not say counts for nothing."""
        if THROTTLED_SHARE not in measured.facts:
            return
        self.trials += 1
        self.share += measured.facts[THROTTLED_SHARE]
        if is_throttled(measured):
            self.throttled.append(trial)


@dataclass
class Jumps:
    """How much one run differs from the next on the same slot: does not see what a slot does all the time."""

    count: int = 0
    squares: float = 0.0

    def add(self, jump: float) -> None:
        """Takes in one difference."""
        self.count += 1
        self.squares += jump**2

    def spread(self) -> float | None:
        """Standard deviation of one of the two; None while too few are known."""
        return math.sqrt(self.squares / self.count / 2) if self.count >= JUMPS else None


@dataclass
class Health:
    """The slots of one profile.

    Attributes:
        runs: Of each program: slot, metric, log(tokens a second).
        recent: Comparisons of each slot, the latest last.
        changed: Slots with a new comparison.
        heat: The latest trials of each slot that say whether they were throttled, and what they say.
        speed_jumps: Differences of log_speed between successive comparisons of a slot.
        value_jumps: Likewise, of the metric.
    """

    runs: dict[str, list[tuple[str, float, float | None]]] = field(
        default_factory=dict[str, list[tuple[str, float, float | None]]]
    )
    recent: dict[str, deque[Comparison]] = field(default_factory=dict[str, deque[Comparison]])
    changed: set[str] = field(default_factory=set[str], compare=False)
    heat: dict[str, deque[tuple[str, bool]]] = field(default_factory=dict[str, deque[tuple[str, bool]]])
    speed_jumps: Jumps = field(default_factory=Jumps)
    value_jumps: Jumps = field(default_factory=Jumps)

    def add(self, slot: str, trial: str, program: str, measured: Measurement) -> None:
        """Takes in a run."""
        if THROTTLED_SHARE in measured.facts:
            hot = is_throttled(measured)
            self.heat.setdefault(slot, deque(maxlen=HOT)).append((trial, hot))
            if hot:
                self.changed.add(slot)
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
            len(others),
            len({name for name, _, _ in others}),
            slower,
        )
        recent = self.recent.setdefault(slot, deque(maxlen=WINDOW))
        if recent:
            before = recent[-1]
            self.value_jumps.add(found.value - before.value)
            if slower is not None and before.log_speed is not None:
                self.speed_jumps.add(slower - before.log_speed)
        recent.append(found)
        self.changed.add(slot)

    def forget(self, slot: str) -> None:
        """Starts anew without what a slot has said: it is no measure for the others either."""
        for program, runs in self.runs.items():
            self.runs[program] = [run for run in runs if run[0] != slot]
        self.heat.pop(slot, None)
        self.recent.clear()
        self.changed.clear()

    def suspects(self, sigma: float) -> list[Suspicion]:
        """Slots that have become suspect since the last call."""
        found = [self._suspect(slot, sigma) for slot in sorted(self.changed)]
        self.changed.clear()
        return [one for one in found if one is not None]

    def _suspect(self, slot: str, sigma: float) -> Suspicion | None:
        hot = self._overheated(slot)
        if hot is not None:
            return hot
        recent = self.recent.get(slot, deque())
        trials = tuple(dict.fromkeys(one.trial for one in recent))
        speeds = [one.log_speed for one in recent if one.log_speed is not None][-LEAST:]
        uneven = self.speed_jumps.spread()
        if len(speeds) == LEAST and uneven is not None and max(speeds) < -SLOWER and fmean(speeds) < -SURE * uneven:
            lost = 100 * (1 - math.exp(fmean(speeds)))
            return Suspicion(slot, f"it is {lost:.0f}% slower than the others; see to its cooling and power", trials)
        compared = [one for one in recent if one.slots >= 2]
        # σ of the profile has seen the slot that drifts, and jumps have not
        sigma = min(sigma, self.value_jumps.spread() or sigma)
        if len(compared) >= (LEAST if not _each_is_far(compared, sigma) else FEWEST) and sigma > 0:
            apart = fmean(one.value for one in compared)
            # the others' share of the error does not shrink with more comparisons: they may be the same runs
            error = sigma * math.sqrt(1 / len(compared) + fmean(1 / one.others for one in compared))
            if abs(apart) > max(SURE_VALUE * error, self._furthest(slot)):
                reason = f"it drifts: the same programs are {apart:+.4f} apart from other slots"
                return Suspicion(slot, reason, trials)
        return None

    def _overheated(self, slot: str) -> Suspicion | None:
        """A slot that is throttled again and again where others are not: if most are, that is how this profile runs."""
        heat = self.heat.get(slot, deque())
        others = [trials[-1][1] for name, trials in self.heat.items() if name != slot]
        if len(heat) < HOT or not all(hot for _, hot in heat) or not others or 2 * sum(others) > len(others):
            return None
        hot = f"{HOT} of its last {HOT} trials"
        reason = f"its clock was throttled by heat or the power brake in {hot}; see to its cooling and power"
        return Suspicion(slot, reason, tuple(trial for trial, _ in heat))

    def _furthest(self, slot: str) -> float:
        """How far apart the worst of the other slots is: next to a slot that drifts, a healthy one seems to."""
        others = [recent for name, recent in self.recent.items() if name != slot]
        return max((abs(fmean(one.value for one in recent)) for recent in others), default=0.0)


def is_throttled(measured: Measurement) -> bool:
    """Whether the trainer has marked the run: heat or the power brake held its clock down for too much of it."""
    return measured.facts.get(THROTTLED, 0.0) > 0


def _each_is_far(compared: Sequence[Comparison], sigma: float) -> bool:
    """Whether every run by itself is beyond doubt, all in one direction."""
    far = [one.value / (sigma * math.sqrt(1 + 1 / one.others)) for one in compared if sigma > 0]
    return bool(far) and (min(far) > SURE_VALUE or max(far) < -SURE_VALUE)
