"""Noise, prior, screening, races, verdicts: pure statistics on numbers. It knows no trials, no slots and no git.

The model: a program's metric on one profile is its true value plus normal noise of one standard deviation σ, the same
for all programs of the profile. σ is estimated from replicates with some degrees of freedom, so that every likelihood
here is Student's t. What a change is worth before it was run is no flat prior: most changes make a program worse, and
the later in a search, the fewer help. The prior over effects is learned from the profile's own candidates (empirical
Bayes, docs/adr/0011), which is what keeps false wins rare when there is little left to find.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from raysearch.model import Direction, Verdict


@dataclass(frozen=True)
class Noise:
    """Run-to-run noise of a profile: standard deviation in units of the metric, and its degrees of freedom."""

    sigma: float
    dof: int


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
    keep_probability: float = 0.9
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


def pooled_noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Estimates σ from replicates: the pooled variance of groups that each repeat one program.

    Args:
        groups: Values by program; a group of one tells nothing and is skipped.

    Returns:
        sqrt(Σ (x - mean_group)² / Σ (n_group - 1)) with Σ (n_group - 1) degrees of freedom; None without replicates.
    """
    replicates = Replicates()
    for place, group in enumerate(groups):
        for value in group:
            replicates.add(str(place), value)
    return replicates.noise()


@dataclass
class Replicates:
    """Values by program, with their pooled variance kept up to date: every question takes constant time."""

    _values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    _means: dict[str, float] = field(default_factory=dict[str, float])
    _squares: float = 0.0
    _dof: int = 0

    def add(self, name: str, value: float) -> None:
        """Takes in one value."""
        values = self._values.setdefault(name, [])
        mean = self._means.get(name, 0.0)
        # Welford's update: the sum of squares grows by n/(n+1) (x - mean)²
        self._squares += len(values) / (len(values) + 1) * (value - mean) ** 2
        self._dof += bool(values)
        values.append(value)
        self._means[name] = mean + (value - mean) / len(values)

    def remove(self, name: str, value: float) -> None:
        """Takes one value out again."""
        values = self._values[name]
        values.remove(value)
        self._squares -= len(values) / (len(values) + 1) * (value - fmean(values)) ** 2 if values else 0.0
        self._squares = max(0.0, self._squares)
        self._dof -= bool(values)
        self._means[name] = fmean(values) if values else 0.0

    def values(self, name: str) -> Sequence[float]:
        """All values of a program, oldest first."""
        return self._values.get(name, ())

    def mean(self, name: str) -> float | None:
        """Mean of a program's values."""
        return self._means[name] if self._values.get(name) else None

    def noise(self) -> Noise | None:
        """σ, see `pooled_noise`."""
        return Noise(math.sqrt(self._squares / self._dof), self._dof) if self._dof else None


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


SURE = 1.0  # standard errors from nothing at which a race is judged again: the screening run counts as well
PAIRING_DOF = 10  # the weight of "seeds do not matter" against what the pairs of races show


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

MAGNITUDES = tuple(0.05 * 1.6**step for step in range(24))  # in σ: from next to nothing to 2,500
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

    Attributes:
        counts: Candidates by effect, in the order of `EFFECTS`.
    """

    counts: tuple[float, ...] = field(default_factory=_first_counts)

    def learned(self, *found: Evidence) -> Prior:
        """The prior after one more candidate: each effect counts as far as the evidence speaks for it (online EM)."""
        posterior = self.posterior(*found)
        faded = zip(_first_counts(), self.counts, posterior, strict=True)
        return Prior(tuple([base + (count - base) * FADE + share for base, count, share in faded]))

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
        gain: Measured improvement, in σ, positive is better.
        se: Its standard error, in σ.
        dof: Degrees of freedom of σ.
    """

    gain: float
    se: float
    dof: int

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

    def _evidence(self, delta: float, delta_se: float, dof: int) -> Evidence | None:
        if self.noise.sigma <= 0.0:
            return None
        gain = gain_of(delta, self.direction) / self.noise.sigma
        most = 2 * MAGNITUDES[-1]  # beyond it every effect of the grid is equally unlikely
        return Evidence(min(max(gain, -most), most), delta_se / self.noise.sigma, dof)

    def _weighed(self, delta: float, found: Iterable[Evidence | None], simplifies: bool) -> tuple[float, float]:
        """P(better), or P(no worse than by the margin), and the shrunk gain in units of the metric."""
        known = [one for one in found if one is not None]
        if not known:
            raw = gain_of(delta, self.direction)
            return float(raw > 0 or (simplifies and raw == 0)), raw
        least = -self.rules.simplify_margin if simplifies else self.rules.least_effect
        posterior = self.prior.posterior(*known)
        p_better = sum(share for share, effect in zip(posterior, EFFECTS, strict=True) if effect > least)
        mean = sum(share * effect for share, effect in zip(posterior, EFFECTS, strict=True))
        return p_better, mean * self.noise.sigma


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
