"""Who gets the next free slot: Thompson sampling over (proposer, operator) by confirmed gain per slot-second. Pure.

It counts what its caller tells it and asks nobody; chance is passed in, as numbers that are uniform in [0, 1).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from raysearch.model import Operator

EXPLORE = 0.08  # share of the orders that an arm leads for no merit: each available one for as long
HALF_LIFE_TRIES = 250.0  # of all arms together, after which a try counts half
PRIOR_TRIES = 4.0  # tries of the pooled success rate that every arm starts with
LEAST_WINS = 0.5  # that are in these tries: with less, an arm that was hardly tried draws next to 0, as a useless one
PRIOR_WINS = 2.0  # wins of the pooled gain that every arm starts with
FIRST_RATE = 0.1  # success rate before anything was tried
FIRST_TRIES = 10.0  # tries that this rate weighs as much as
TIDYING = (Operator.SIMPLIFY, Operator.ABLATE)  # win by being no worse: what others gain says nothing of their gain


@dataclass(frozen=True)
class Arm:
    """Something that can fill a slot: one proposer's proposals of one kind."""

    proposer: str
    operator: Operator


@dataclass(frozen=True)
class Tally:
    """What became of an arm's candidates; old ones count less, hence fractions.

    Attributes:
        tries: Candidates that were judged.
        wins: Those that were kept.
        gain: Sum of their confirmed gains, in units of the metric, positive is better.
        seconds: Slot time spent on all of its candidates, races included.
        hopes: Sum of P(better) of the others: late in a search wins are too rare to tell arms apart (docs/adr/0034).
    """

    tries: float = 0.0
    wins: float = 0.0
    gain: float = 0.0
    seconds: float = 0.0
    hopes: float = 0.0


def tried(
    tallies: Mapping[Arm, Tally],
    arm: Arm,
    *,
    seconds: float,
    gain: float | None = None,
    p_better: float = 0.0,
    half_life_tries: float = HALF_LIFE_TRIES,
) -> dict[Arm, Tally]:
    """The tallies after one more candidate was judged; what came before counts a little less, in every arm.

    Args:
        tallies: Before it; an arm that is missing was never tried.
        arm: The candidate's.
        seconds: Slot time that the candidate took in all.
        gain: Confirmed gain of a candidate that was kept; None for any other. A kept one without gain (an equal and
            smaller program) is 0.
        p_better: Posterior probability that a candidate that was not kept is an improvement all the same.
        half_life_tries: After so many tries, of whatever arms, a try counts half.
    """
    aged = {other: discounted(tally, tries=1, half_life_tries=half_life_tries) for other, tally in tallies.items()}
    old = aged.get(arm, Tally())
    aged[arm] = Tally(
        tries=old.tries + 1,
        wins=old.wins + (gain is not None),
        gain=old.gain + (gain or 0.0),
        seconds=old.seconds + seconds,
        hopes=old.hopes + (p_better if gain is None else 0.0),
    )
    return aged


def discounted(tally: Tally, *, tries: float, half_life_tries: float = HALF_LIFE_TRIES) -> Tally:
    """The tally as it counts after so many more tries of whatever arms."""
    kept = 0.5 ** (tries / half_life_tries)
    return Tally(tally.tries * kept, tally.wins * kept, tally.gain * kept, tally.seconds * kept, tally.hopes * kept)


def order(
    tallies: Mapping[Arm, Tally],
    available: Sequence[Arm],
    draw: Callable[[], float],
    *,
    explore: float = EXPLORE,
) -> list[Arm]:
    """The available arms, the one first that is to fill the next free slot; the others if it has no idea.

    An arm's worth is drawn from what is known of it: a success rate from its Beta posterior, wins and hopes being its
    successes, times the mean gain of a win, over the mean seconds of a try (Thompson sampling: Chapelle and Li, NeurIPS
    2011). Rate, gain and seconds of an arm with few tries lean on those of all arms together; the gain of those that
    tidy leans on 0. A share of `explore` of the orders is led for no merit, by an arm as rarely as its tries are long.

    Args:
        tallies: Of all arms, the unavailable ones too; a missing one was never tried.
        available: Arms that may be asked now.
        draw: Gives numbers that are uniform in [0, 1).
        explore: Share of orders that are led for no merit.
    """
    if not available:
        return []
    pooled = _sum(tallies.values())
    known = {arm: tallies.get(arm, Tally()) for arm in available}
    worth = {arm: _worth(arm, tally, pooled, draw) for arm, tally in known.items()}
    arms = sorted(available, key=lambda arm: worth[arm], reverse=True)
    if draw() < explore:
        shares = list(accumulate(1 / _seconds(known[arm], pooled) for arm in arms))
        place = bisect(shares, draw() * shares[-1], hi=len(arms) - 1)
        arms.insert(0, arms.pop(place))
    return arms


def _worth(arm: Arm, tally: Tally, pooled: Tally, draw: Callable[[], float]) -> float:
    """A draw of the confirmed gain per second that the arm will have."""
    # a win may be counted for longer than its try, hence the bound
    rate = min(0.99, (pooled.wins + pooled.hopes + FIRST_RATE * FIRST_TRIES) / (pooled.tries + FIRST_TRIES))
    hits = tally.wins + tally.hopes
    losses = max(0.0, tally.tries - hits)
    prior_wins = max(LEAST_WINS, PRIOR_TRIES * rate)
    success = _beta(hits + prior_wins, losses + PRIOR_TRIES * (1 - rate), draw)
    of_all = 0.0 if arm.operator in TIDYING else _mean(pooled.gain, pooled.wins)
    gain = _shrunk(tally.gain, tally.wins, of_all=of_all, weight=PRIOR_WINS)
    return success * max(0.0, gain) / _seconds(tally, pooled)


def _seconds(tally: Tally, pooled: Tally) -> float:
    """Slot time of one try of an arm."""
    found = _shrunk(tally.seconds, tally.tries, of_all=_mean(pooled.seconds, pooled.tries), weight=PRIOR_TRIES)
    return max(found, 1e-9)


def _shrunk(total: float, count: float, *, of_all: float, weight: float) -> float:
    return (total + weight * of_all) / (count + weight)


def _mean(total: float, count: float) -> float:
    return total / count if count > 0 and total > 0 else 1.0


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total = replace(
            total,
            tries=total.tries + tally.tries,
            wins=total.wins + tally.wins,
            gain=total.gain + tally.gain,
            seconds=total.seconds + tally.seconds,
            hopes=total.hopes + tally.hopes,
        )
    return total


def _beta(a: float, b: float, draw: Callable[[], float]) -> float:
    """A Beta(a, b) variate, as the share of one gamma variate in the sum of two."""
    one, other = _log_gamma_variate(a, draw), _log_gamma_variate(b, draw)
    return 1.0 / (1.0 + math.exp(min(700.0, other - one)))


def _log_gamma_variate(shape: float, draw: Callable[[], float]) -> float:
    """Logarithm of a gamma variate: Marsaglia and Tsang, ACM TOMS 26 (2000) 363, with their boost for shapes below 1.

    As a logarithm, since a variate of a small shape is often too small for a float.
    """
    if shape < 1:
        return _log_gamma_variate(shape + 1, draw) + math.log(1 - draw()) / shape
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        normal = math.sqrt(-2 * math.log(1 - draw())) * math.cos(2 * math.pi * draw())  # Box and Muller
        v = (1 + c * normal) ** 3
        if v > 0 and math.log(1 - draw()) < normal**2 / 2 + d - d * v + d * math.log(v):
            return math.log(d * v)
