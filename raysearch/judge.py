"""Noise, screening, races, verdicts: pure statistics on numbers. It knows no trials, no slots and no git.

The model: a program's metric on one profile is its true value plus normal noise of one standard deviation σ, the same
for all programs of the profile. σ is not known, but estimated with some degrees of freedom, so that every probability
here is Student's t and not the normal distribution: with three baselines the difference is a factor of 1.8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from raysearch.model import Direction, Verdict


@dataclass(frozen=True)
class Noise:
    """Run-to-run noise of a profile: standard deviation in units of the metric, and its degrees of freedom."""

    sigma: float
    dof: int


@dataclass(frozen=True)
class Rules:
    """When a difference is believed.

    Attributes:
        screen_probability: P(better) after the screening run from which a candidate gets its pairs.
        keep_probability: P(better) after a pair from which the candidate wins.
        drop_probability: P(better) after a pair under which it loses; in between another pair is run.
        max_pairs: After that many pairs an undecided candidate loses.
    """

    screen_probability: float = 0.9
    keep_probability: float = 0.95
    drop_probability: float = 0.25
    max_pairs: int = 1


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on; `delta` is in the metric's own sign (negative: the number went down)."""

    verdict: Verdict
    reason: str
    delta: float
    delta_se: float
    p_better: float


def pooled_noise(groups: Iterable[Sequence[float]]) -> Noise | None:
    """Estimates σ from replicates: the pooled variance of groups that each repeat one program.

    Args:
        groups: Values by program; a group of one tells nothing and is skipped.

    Returns:
        sqrt(Σ (x - mean_group)² / Σ (n_group - 1)) with Σ (n_group - 1) degrees of freedom; None without replicates.
    """
    squares, dof = 0.0, 0
    for group in groups:
        if len(group) < 2:
            continue
        mean = fmean(group)
        squares += sum((value - mean) ** 2 for value in group)
        dof += len(group) - 1
    return Noise(sigma=math.sqrt(squares / dof), dof=dof) if dof else None


def probability_better(delta: float, delta_se: float, dof: int, direction: Direction) -> float:
    """P(the true difference is an improvement), with a flat prior: Student's t with `dof` degrees of freedom."""
    gain = -delta if direction is Direction.MINIMIZE else delta
    if delta_se == 0.0:
        return 0.5 if gain == 0.0 else float(gain > 0.0)
    return float(student_t()(dof, gain / delta_se))


@functools.cache
def student_t() -> Callable[..., Any]:
    """Student's t distribution, (degrees of freedom, t) -> P; loaded late, `raysearch status` judges nothing."""
    from scipy.special import stdtr  # noqa: PLC0415 - half a second

    return stdtr


def screen(value: float, base_values: Sequence[float], noise: Noise, direction: Direction, rules: Rules) -> Judgement:
    """Judges a candidate by its first run: worth a pair of fresh runs, or not.

    Args:
        value: The screening run's metric.
        base_values: Runs of the program that it was built on, at least one.
        noise: Of the profile.
        direction: Of the metric.
        rules: Thresholds.

    Returns:
        RETEST when promising, else DISCARD; never KEEP, since the best of many single runs is mostly luck.
    """
    delta = value - fmean(base_values)
    delta_se = noise.sigma * math.sqrt(1 + 1 / len(base_values))
    p_better = probability_better(delta, delta_se, noise.dof, direction)
    if p_better >= rules.screen_probability:
        return Judgement(Verdict.RETEST, f"promising: {_told(delta, delta_se, p_better)}", delta, delta_se, p_better)
    return Judgement(Verdict.DISCARD, f"not promising: {_told(delta, delta_se, p_better)}", delta, delta_se, p_better)


def race(pairs: Sequence[tuple[float, float]], noise: Noise, direction: Direction, rules: Rules) -> Judgement:
    """Judges a candidate by fresh pairs with equal seeds; the screening run is no part of it.

    Args:
        pairs: (candidate's value, value of the program that it was built on), at least one pair.
        noise: Of the profile.
        direction: Of the metric.
        rules: Thresholds and the cap on pairs.

    Returns:
        KEEP, DISCARD, or RETEST when another pair is needed.
    """
    delta = fmean(ours - theirs for ours, theirs in pairs)
    delta_se = noise.sigma * math.sqrt(2 / len(pairs))
    p_better = probability_better(delta, delta_se, noise.dof, direction)
    told = f"{_told(delta, delta_se, p_better)} over {len(pairs)} fresh pair{'s' * (len(pairs) != 1)}"
    if p_better > rules.keep_probability:
        return Judgement(Verdict.KEEP, f"better beyond the noise: {told}", delta, delta_se, p_better)
    if p_better < rules.drop_probability:
        return Judgement(Verdict.DISCARD, f"not better: {told}", delta, delta_se, p_better)
    if len(pairs) >= rules.max_pairs:
        return Judgement(Verdict.DISCARD, f"not beyond the noise: {told}", delta, delta_se, p_better)
    return Judgement(Verdict.RETEST, f"undecided: {told}", delta, delta_se, p_better)


def _told(delta: float, delta_se: float, p_better: float) -> str:
    return f"{delta:+.4f} ± {delta_se:.4f}, P(better) {p_better:.2f}"
