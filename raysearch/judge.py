"""Noise, prior, screening, races, verdicts: pure statistics on numbers. It knows no trials, no slots and no git.

The model: a program's metric on one profile is its true value plus normal noise of a standard deviation σ that changes
slowly along the lineage of programs (docs/adr/0017). σ is estimated from replicates with some degrees of freedom, so
that every likelihood here is Student's t. What a change is worth before it was run is no flat prior: most changes make
a program worse, and the later in a search, the fewer help. The prior over effects is learned from the profile's own
candidates (empirical Bayes, docs/adr/0011), which is what keeps false wins rare when there is little left to find.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from raysearch.model import Direction, Verdict


@dataclass(frozen=True)
class Noise:
    """Run-to-run noise: standard deviation in units of the metric, and its effective degrees of freedom."""

    sigma: float
    dof: float


@dataclass(frozen=True)
class Rules:
    """When a difference is believed. Every P is a posterior, with the profile's prior over effects.

    P(better) is that of an improvement of at least `least_effect`.

    Attributes:
        screen_probability: P(better) after the screening run from which a candidate is raced.
        frontier_probability: P(better) from which others may be built on a candidate that is still raced.
        keep_probability: P(better) after fresh pairs from which the candidate wins.
        drop_probability: P(better) after fresh pairs under which it loses; in between another pair is run.
        max_pairs: After that many pairs an undecided candidate loses.
        least_effect: Improvement in σ from which it counts as one: a change that does nothing is no win.
        simplify_margin: How much worse a smaller program may be, in σ, for it to be called equal.
        greedy: Keep whatever looks better than the champion in one run, as autoresearch does: for comparison.
    """

    screen_probability: float = 0.3
    frontier_probability: float = 0.8
    keep_probability: float = 0.95
    drop_probability: float = 0.25
    max_pairs: int = 5
    least_effect: float = 0.25
    simplify_margin: float = 1.0
    greedy: bool = False


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Attributes:
        delta: Estimated change in the metric's own sign (negative: the number went down).
        delta_se: Its standard error.
        p_better: Posterior probability that the true change is an improvement.
        gain: Posterior mean of the improvement, in units of the metric: `delta` shrunk by the prior.
    """

    verdict: Verdict
    reason: str
    delta: float
    delta_se: float
    p_better: float
    gain: float


# ---- noise ----


DISCOUNT = 0.5  # of what a program says of the noise, for each step of the lineage between it and the one in question
INHERITED_DOF = 2.0  # degrees of freedom that the programs at all other steps count for together, at most
NEAR_STEPS = 6  # steps of the lineage that are looked at, the nearest ones that have replicates
NEAR_PROGRAMS, NEAR_VALUES = 16, 24  # at each step the latest programs; of each its latest values
FAR = 2.5  # robust standard deviations from its program's median beyond which a run counts as if it were there
NORMAL_APART = 0.9539  # median of |x - y| for two draws of the standard normal distribution: sqrt(2) times 0.6745
LEAST_DOF = 1.0


@dataclass
class Replicates:
    """Values by program, each with its place in the lineage, and what they say about the noise there.

    The noise is not the same for all programs: a first program of few steps may be five times as noisy as what a search
    arrives at after two wins. See `noise`.
    """

    _values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    _means: dict[str, float] = field(default_factory=dict[str, float])
    _steps: dict[int, dict[str, None]] = field(default_factory=dict[int, dict[str, None]])  # those with replicates
    _known: dict[int, Noise | None] = field(default_factory=dict[int, "Noise | None"], compare=False, repr=False)
    _runs: dict[str, Repeated] = field(default_factory=dict[str, "Repeated"], compare=False, repr=False)
    _sound: dict[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]], compare=False, repr=False)

    def add(self, name: str, value: float, *, step: int = 0) -> None:
        """Takes in one value of a program at a step of the lineage."""
        values = self._values.setdefault(name, [])
        values.append(value)
        mean = self._means.get(name, 0.0)
        self._means[name] = mean + (value - mean) / len(values)
        if len(values) > 1:
            self._steps.setdefault(step, {})[name] = None
        self._forget(name)

    def remove(self, name: str, value: float) -> None:
        """Takes one value out again."""
        values = self._values[name]
        values.remove(value)
        self._means[name] = fmean(values) if values else 0.0
        if len(values) < 2:
            for names in self._steps.values():
                names.pop(name, None)
            self._steps = {step: names for step, names in self._steps.items() if names}
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._known.clear()
        self._sound.clear()
        self._runs.pop(name, None)

    def values(self, name: str) -> Sequence[float]:
        """All values of a program, oldest first."""
        return self._values.get(name, ())

    def mean(self, name: str) -> float | None:
        """Mean of a program's values."""
        return self._means[name] if self._values.get(name) else None

    def sound(self, name: str, step: int) -> Sequence[float]:
        """What a program gives now: its values that others back, since they last changed; see `backed` and `current`.

        Args:
            name: Of the program.
            step: Its step of the lineage.
        """
        if name not in self._sound:
            values, noise = self.values(name), self.noise(step)
            if noise is not None:
                agree = backed(values, noise.sigma)
                found = [value for value, is_backed in zip(values, agree, strict=True) if is_backed]
                values = current(found or values, noise.sigma)
            self._sound[name] = tuple(values)
        return self._sound[name]

    def noise(self, step: int = 0) -> Noise | None:
        """σ of the programs at a step of the lineage, see `local_noise`; None without replicates of any program."""
        if step not in self._known:
            near = heapq.nsmallest(NEAR_STEPS, self._steps, key=lambda other: (abs(other - step), -other))
            groups = [
                (DISCOUNT ** abs(other - step), self._runs.get(name) or self._run(name))
                for other in near
                for name in list(self._steps[other])[-NEAR_PROGRAMS:]
            ]
            inherited = sum(weight * (len(runs.values) - 1) for weight, runs in groups if weight < 1.0)
            share = min(1.0, INHERITED_DOF / inherited) if inherited else 1.0
            self._known[step] = local_noise((weight * share if weight < 1.0 else 1.0, runs) for weight, runs in groups)
        return self._known[step]

    def _run(self, name: str) -> Repeated:
        self._runs[name] = runs = Repeated.of(self._values[name][-NEAR_VALUES:])
        return runs


def local_noise(groups: Iterable[tuple[float, Repeated]]) -> Noise | None:
    """Estimates σ where the noise changes slowly, and where some of the runs may be spoilt.

    Variances are pooled with weights that fall with the distance: σ² = Σ w SS / Σ w (n - 1), with as many degrees of
    freedom as Σ w (n - 1). That is variance discounting (West and Harrison, Bayesian Forecasting and Dynamic Models,
    1997, section 10.8): a conjugate scaled-inverse-χ² posterior, whose degrees of freedom are multiplied by the
    discount at each step, and with it Student's t. What is far away is the prior of what is near.

    A run during which somebody else worked on the machine is no such noise. Values farther than `FAR` from their
    program's median count as if they were just there (winsorised residuals: Huber, Robust Statistics, 1981); the scale
    for that is the weighted median of |x - y| over pairs of runs of one program, over 0.954 (compare Rousseeuw and
    Croux, JASA 88, 1993).

    Args:
        groups: (weight, values) of each program; a single value tells nothing.

    Returns:
        None without replicates; never less than `LEAST_DOF` degrees of freedom.
    """
    known = [(weight, one) for weight, one in groups if len(one.values) > 1]
    if not known:
        return None
    runs = [one for _, one in known]
    counts = np.array([len(one.values) for one in runs])
    weights = np.array([weight for weight, _ in known])
    apart = np.concatenate([one.apart for one in runs])
    middle = _weighted_median(apart, np.repeat(2 * weights / counts, [len(one.apart) for one in runs]))
    limit = FAR * middle / NORMAL_APART
    beside = np.clip(np.concatenate([one.beside for one in runs]), -limit, limit)
    starts = np.cumsum(counts) - counts
    sums, squares = np.add.reduceat(beside, starts), np.add.reduceat(beside**2, starts)
    dof = float(weights @ (counts - 1))
    return Noise(math.sqrt(float(weights @ np.maximum(squares - sums**2 / counts, 0.0)) / dof), max(dof, LEAST_DOF))


@dataclass(frozen=True)
class Repeated:
    """Values of one program, what they are beside their median, and how far apart each two of them are."""

    values: Sequence[float]
    beside: NDArray[np.float64]
    apart: NDArray[np.float64]

    @staticmethod
    def of(values: Sequence[float]) -> Repeated:
        """Of one value or more."""
        found = np.array(values)
        ours, theirs = _two_of(len(values))
        return Repeated(values, found - median(values), np.abs(found[ours] - found[theirs]))


@functools.cache
def _two_of(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The places of each two of so many."""
    return np.triu_indices(count, 1)


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The least of the values that has half of the weight up to it."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(total, total[-1] / 2 * (1 - 1e-12))]])


CHANGE = 4.0  # standard errors by which a run differs from later ones when something else has changed


def current(values: Sequence[float], sigma: float) -> Sequence[float]:
    """The latest of a program's values, back to where they stop to agree.

    A machine that is throttled, or that somebody else works on too, gives other numbers from then on; a first run is to
    be compared with what the program gives now.

    Args:
        values: Oldest first.
        sigma: Of single runs.
    """
    if len(values) < 2:
        return values
    total, count = values[-1], 1
    for value in reversed(values[:-1]):
        if abs(value - total / count) > CHANGE * sigma * math.sqrt(1 + 1 / count):
            break
        total, count = total + value, count + 1
    return values[-count:]


def backed(values: Sequence[float], sigma: float) -> Sequence[bool]:
    """Which of a program's values another one agrees with; a value that is the only one is believed.

    A single slow run of what candidates are compared with makes all of them look like wins.

    Args:
        values: In any order.
        sigma: Of single runs.
    """
    if len(values) < 2:
        return [True] * len(values)
    limit = CHANGE * math.sqrt(2) * sigma
    ordered = sorted(values)
    gaps = [math.inf, *(after - before for before, after in pairwise(ordered)), math.inf]
    near = {value: min(gaps[place : place + 2]) for place, value in enumerate(ordered)}  # of equal ones too
    return [near[value] <= limit for value in values]


SURE = 1.0  # standard errors from nothing at which a race is judged again: the screening run counts as well
PAIRING_DOF = 3  # the weight of "seeds do not matter" against what the pairs of races show


def pair_noise(noise: Noise, pairs: Noise | None) -> Noise:
    """The standard deviation of the difference in one pair.

    Two runs with one seed may share some of their noise. Without any pairs it is √2 σ; with pairs that were repeated
    within races, their own pooled variance takes over.

    Args:
        noise: Of single runs.
        pairs: Pooled standard deviation of the differences within races, if there are races of several pairs.
    """
    variance, dof = 2 * noise.sigma**2, noise.dof
    if pairs is None:
        return Noise(math.sqrt(variance), dof)
    weight = min(dof, PAIRING_DOF)
    pooled = (weight * variance + pairs.dof * pairs.sigma**2) / (weight + pairs.dof)
    return Noise(math.sqrt(pooled), max(dof, weight + pairs.dof))


# ---- prior and posterior ----

RATIO = 1.6  # of a magnitude to the next
MAGNITUDES = tuple(0.05 * RATIO**step for step in range(24))  # in σ: from next to nothing to 2,500
EFFECTS = (*(-magnitude for magnitude in reversed(MAGNITUDES)), *MAGNITUDES)  # improvements are positive
_WIDTHS = tuple((0.14 * effect) ** 2 for effect in EFFECTS)  # each stands for a range of half its size: /√12
PSEUDO_COUNT = 6.0  # candidates that the first prior counts for
PSEUDO_BETTER = 0.25  # its share of improvements; in the published H100 run 22 of 125 were kept
MOST_DOF = 60  # beyond it t is as good as normal, and a likelihood could become 0
MEMORY = 150.0  # candidates after which an old one counts 1/e: late in a search less helps than early
FADE = math.exp(-1 / MEMORY)


@functools.cache
def _first_counts() -> tuple[float, ...]:
    shape = [1.0 if magnitude < 50 else 0.3 for magnitude in MAGNITUDES]
    total = sum(shape)
    worse = [PSEUDO_COUNT * (1 - PSEUDO_BETTER) * weight / total for weight in reversed(shape)]
    return (*worse, *(PSEUDO_COUNT * PSEUDO_BETTER * weight / total for weight in shape))


@dataclass(frozen=True)
class Prior:
    """What a change is worth before it was run: how many candidates had about each effect.

    Effects belong to the metric, and σ changes in the course of a search: the counts are kept with the unit that they
    are in, and moved along the grid when that is no longer about σ.

    Attributes:
        counts: Candidates by effect, in the order of `EFFECTS`.
        unit: What an effect of 1 is, in units of the metric; None before the first σ is known.
    """

    counts: tuple[float, ...] = field(default_factory=_first_counts)
    unit: float | None = None

    def at(self, sigma: float) -> Prior:
        """The same counts in the unit of the grid that is nearest to σ, within half a step of the grid.

        What was imagined before any candidate stays as it is in units of σ. Whole steps alone: no count is smeared.
        """
        if sigma <= 0.0:
            return self
        if self.unit is None:
            return replace(self, unit=sigma)
        places = round(math.log(self.unit / sigma, RATIO))
        if places == 0:
            return self
        learned = [count - base for count, base in zip(self.counts, _first_counts(), strict=True)]
        most = len(MAGNITUDES)
        counts = list(_first_counts())
        for place, count in enumerate(learned):
            side, rank = (most, place - most) if place >= most else (most - 1, most - 1 - place)
            rank = min(max(rank + places, 0), most - 1)
            counts[side + rank if place >= most else side - rank] += count
        return Prior(tuple(counts), self.unit * RATIO**-places)

    def learned(self, *found: Evidence) -> Prior:
        """The prior after one more candidate: each effect counts as far as the evidence speaks for it (online EM)."""
        posterior = self.posterior(*found)
        faded = zip(_first_counts(), self.counts, posterior, strict=True)
        return Prior(tuple([base + (count - base) * FADE + share for base, count, share in faded]), self.unit)

    def posterior(self, *found: Evidence) -> tuple[float, ...]:
        """The probability of each of `EFFECTS` after what was found; heavy tails keep every likelihood above 0."""
        weights = list(self.counts)
        for one in found:
            weights = [weight * like for weight, like in zip(weights, one.likelihoods(), strict=True)]
            total = sum(weights)
            weights = [weight / total for weight in weights]  # each time: many small likelihoods would come to 0
        return tuple(weights)

    def better(self) -> float:
        """Share of improvements before any run."""
        return sum(self.counts[len(MAGNITUDES) :]) / sum(self.counts)


@dataclass(frozen=True)
class Evidence:
    """What runs say of a change.

    Attributes:
        gain: Measured improvement, in units of the prior, positive is better.
        se: Its standard error, likewise.
        dof: Degrees of freedom of σ.
    """

    gain: float
    se: float
    dof: float

    def likelihoods(self) -> list[float]:
        """Of each of `EFFECTS`, which stands for all effects about as large: Student's t density, up to a factor.

        The variance of what an effect stands for is added to that of the evidence, else an effect between two of the
        grid would be less likely than one of the other sign. More than `MOST_DOF` is as good as normal.
        """
        gain, dof, own = self.gain, min(self.dof, MOST_DOF), self.se * self.se
        power = -(dof + 1) / 2
        return [
            (1 + (gain - effect) ** 2 / (dof * (own + more))) ** power * (own / (own + more)) ** 0.5
            for effect, more in zip(EFFECTS, _WIDTHS, strict=True)
        ]


# ---- verdicts ----


@dataclass(frozen=True)
class Judge:
    """A profile's judge: what is known of its noise and of what changes are worth, and the rules.

    Attributes:
        noise: Of single runs.
        paired: Of the difference in a pair, see `pair_noise`.
    """

    noise: Noise
    paired: Noise
    prior: Prior
    direction: Direction
    rules: Rules

    @property
    def unit(self) -> float:
        """What effects are measured in, in units of the metric."""
        return self.prior.unit or self.noise.sigma

    def screen(self, value: float, base_values: Sequence[float], *, simplifies: bool = False) -> Judgement:
        """Judges a candidate by its first run: worth a race of fresh runs, or not.

        Args:
            value: The screening run's metric.
            base_values: Runs of the program that it was built on, at least one.
            simplifies: Whether it only has to be no worse.

        Returns:
            RETEST when promising, else DISCARD; never KEEP, since the best of many single runs is mostly luck.
        """
        delta = value - fmean(base_values)
        delta_se = self.noise.sigma * math.sqrt(1 + 1 / len(base_values))
        p_better, gain = self._weighed(delta, (self.screened(value, base_values),), simplifies)
        told = _told(delta, delta_se, p_better, simplifies)
        if p_better >= self.rules.screen_probability:
            return Judgement(Verdict.RETEST, f"promising: {told}", delta, delta_se, p_better, gain)
        return Judgement(Verdict.DISCARD, f"not promising: {told}", delta, delta_se, p_better, gain)

    def race(
        self,
        pairs: Sequence[tuple[float, float]],
        *,
        screened: Evidence | None = None,
        simplifies: bool = False,
    ) -> Judgement:
        """Judges a candidate by fresh pairs with equal seeds.

        Args:
            pairs: (candidate's value, value of the program that it was built on), at least one pair.
            screened: What the screening run said. It was chosen for being good, so that it is no part of `delta`;
                P(better) may use it, since the prior knows how rare such effects are.
            simplifies: Whether it only has to be no worse.

        Returns:
            KEEP, DISCARD, or RETEST when another pair is needed.
        """
        delta = fmean(ours - theirs for ours, theirs in pairs)
        delta_se = self.paired.sigma / math.sqrt(len(pairs))
        p_better, gain = self._weighed(delta, (screened, self.raced(pairs)), simplifies)
        told = f"{_told(delta, delta_se, p_better, simplifies)} over {len(pairs)} fresh pair{'s' * (len(pairs) != 1)}"
        word = "no worse" if simplifies else "better"
        if p_better > self.rules.keep_probability:
            return Judgement(Verdict.KEEP, f"{word} beyond the noise: {told}", delta, delta_se, p_better, gain)
        if p_better < self.rules.drop_probability:
            return Judgement(Verdict.DISCARD, f"not {word}: {told}", delta, delta_se, p_better, gain)
        if len(pairs) >= self.rules.max_pairs:
            return Judgement(Verdict.DISCARD, f"not beyond the noise: {told}", delta, delta_se, p_better, gain)
        return Judgement(Verdict.RETEST, f"undecided: {told}", delta, delta_se, p_better, gain)

    def wanted_pairs(self, gain: float | None, done: int) -> int:
        """How many pairs a race should have in all before it is judged again.

        Args:
            gain: What the change seems to be worth so far, see `Judgement`; None when nothing is known.
            done: Pairs that were run.
        """
        least = min(done + 1, self.rules.max_pairs)
        if self.noise.sigma <= 0.0 or gain is None or gain <= 0.0:
            return least
        wanted = min((SURE * self.paired.sigma / gain) ** 2, self.rules.max_pairs)
        return max(least, math.ceil(wanted))

    def screened(self, value: float, base_values: Sequence[float]) -> Evidence | None:
        """What a first run says; None when the profile has no noise at all: then the number is the truth."""
        delta_se = self.noise.sigma * math.sqrt(1 + 1 / len(base_values))
        return self._evidence(value - fmean(base_values), delta_se, self.noise.dof)

    def raced(self, pairs: Sequence[tuple[float, float]]) -> Evidence | None:
        """What the fresh pairs of a race say; None as for `screened`."""
        delta = fmean(ours - theirs for ours, theirs in pairs)
        return self._evidence(delta, self.paired.sigma / math.sqrt(len(pairs)), self.paired.dof)

    def in_metric(self, found: Evidence) -> tuple[float, float, float]:
        """Improvement and standard error of evidence in units of the metric, and its degrees of freedom."""
        return found.gain * self.unit, found.se * self.unit, found.dof

    def _evidence(self, delta: float, delta_se: float, dof: float) -> Evidence | None:
        if self.noise.sigma <= 0.0:
            return None
        gain = gain_of(delta, self.direction) / self.unit
        most = 2 * MAGNITUDES[-1]  # beyond it every effect of the grid is equally unlikely
        return Evidence(min(max(gain, -most), most), delta_se / self.unit, dof)

    def _weighed(self, delta: float, found: Iterable[Evidence | None], simplifies: bool) -> tuple[float, float]:
        """P(better), or P(no worse than by the margin), and the shrunk gain in units of the metric."""
        known = [one for one in found if one is not None]
        if not known:
            raw = gain_of(delta, self.direction)
            return float(raw > 0 or (simplifies and raw == 0)), raw
        least = -self.rules.simplify_margin if simplifies else self.rules.least_effect
        least *= self.noise.sigma / self.unit
        posterior = self.prior.posterior(*known)
        p_better = sum(share for share, effect in zip(posterior, EFFECTS, strict=True) if effect > least)
        mean = sum(share * effect for share, effect in zip(posterior, EFFECTS, strict=True))
        return p_better, mean * self.unit


def greedy(value: float, best: float, noise: Noise, direction: Direction) -> Judgement:
    """The rule of autoresearch: one run that looks better than the champion's is kept.

    Args:
        value: The run's metric.
        best: The run's that the champion was kept for.
        noise: Of the profile, for the standard error that is shown and not looked at.
        direction: Of the metric.
    """
    delta = value - best
    gain = gain_of(delta, direction)
    verdict, word = (Verdict.KEEP, "looks better") if gain > 0 else (Verdict.DISCARD, "does not look better")
    return Judgement(
        verdict, f"{word} in one run: {delta:+.4f}", delta, noise.sigma * math.sqrt(2), float(gain > 0), gain
    )


def gain_of(delta: float, direction: Direction) -> float:
    """A change of the metric as an improvement: positive is better."""
    return -delta if direction is Direction.MINIMIZE else delta


def _told(delta: float, delta_se: float, p_better: float, simplifies: bool) -> str:
    word = "no worse" if simplifies else "better"
    return f"{delta:+.4f} ± {delta_se:.4f}, P({word}) {p_better:.2f}"
