"""What failed programs failed by, as far as their knobs tell; it says nothing of the metric.

A failed run is laid to one of the knobs that are not where the champion has them: to each the more, the more of the
programs failed that had it as far off (a mixture over causes, fitted by EM: Dempster, Laird and Rubin, JRSS B 39,
1977). docs/adr/0034 says what it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raysearch.knobs import Knob, Values
from raysearch.proposers.reach import places_of

FAILED, SUCCEEDED = 60, 400  # runs that are looked at, the latest ones of either kind
DOUBT = 0.5  # runs that end well, which each move is granted before any
OTHERWISE = 0.03  # what a run counts for each choice that differs, beside runs without
ITERATIONS = 10
TINY = 1e-9

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Failures:
    """Causes of the failed runs of one profile, seen from one champion.

    Args:
        knobs: Of the champion, with its values.
        places: Where the runs lie in the knobs' ranges, (runs, knobs); NaN where that cannot be said.
        failed: Which of them failed, (runs,).
    """

    def __init__(self, knobs: Mapping[str, Knob], places: Sequence[Sequence[float]], failed: Sequence[bool]) -> None:
        self._knobs = knobs
        self._champion = np.array(places_of(knobs, {name: knob.value for name, knob in knobs.items()}))
        self._is_range = np.array([not knob.choices for knob in knobs.values()])
        self._failed = self._some(places, [number for number, is_bad in enumerate(failed) if is_bad][-FAILED:])
        self._good = self._some(places, [number for number, is_bad in enumerate(failed) if not is_bad][-SUCCEEDED:])
        self._blame = self._blamed() if len(self._failed) else self._failed

    def _some(self, places: Sequence[Sequence[float]], numbers: Sequence[int]) -> Floats:
        found = [places[number] for number in numbers]
        return np.array(found, dtype=float).reshape(len(numbers), len(self._knobs))

    def odds(self, values: Values) -> float:
        """The probability that a program runs to its end, by that of its knobs which others failed by most.

        Runs with the same choices count most: what one width allows, another does not.
        """
        if not len(self._failed):
            return 1.0
        here = np.array(places_of(self._knobs, values))
        moved = np.abs(here - self._champion) > TINY
        if not moved.any():
            return 1.0
        bad, good = self._as_far(here, self._failed, moved), self._as_far(self._good, here, moved)
        apart = np.concatenate([self._differing(self._failed, here), self._differing(self._good, here)])
        nearest = np.where(np.concatenate([bad, good]), apart[:, None], np.inf).min(axis=0)
        weights = OTHERWISE ** (apart[:, None] - np.where(np.isfinite(nearest), nearest, 0.0))
        count = len(bad)
        failing = (weights[:count] * bad * self._blame[:, moved]).sum(axis=0)
        return float((1 - failing / (failing + (weights[count:] * good).sum(axis=0) + DOUBT)).min())

    def _differing(self, places: Floats, here: Floats) -> Floats:
        """How many choices differ, (runs,)."""
        return (~self._is_range & (np.abs(places - here) > TINY)).sum(axis=1).astype(float)

    def _as_far(self, places: Floats, others: Floats, which: Bools | slice = slice(None)) -> Bools:
        """Whether places are as far from the champion as others, knob by knob of some.

        A choice is as far if it is the same, a number of a range if it is the same or lies beyond.
        """
        places, others = places[..., which], others[..., which]
        way, beyond = np.sign(others - self._champion[which]), places - others
        return np.where(self._is_range[which], beyond * way >= -TINY, np.abs(beyond) <= TINY) & (way != 0)

    def _blamed(self) -> Floats:
        """To which knobs each failed run is laid, (failed, knobs), each row 1 in all if any is moved."""
        moved = np.abs(self._failed - self._champion) > TINY
        alike = self._as_far(self._failed[:, None], self._failed[None]).astype(float)
        good = self._as_far(self._good[None], self._failed[:, None]).sum(axis=1)
        blame = moved / np.maximum(moved.sum(axis=1, keepdims=True), 1)
        for _ in range(ITERATIONS):
            bad = np.einsum("fgk,gk->fk", alike, blame)
            share = moved * bad / (bad + good + DOUBT)
            blame = share / np.maximum(share.sum(axis=1, keepdims=True), TINY)
        return blame
