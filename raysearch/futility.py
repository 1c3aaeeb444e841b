"""Which value at half of the budget is hopeless, learned from a profile's own runs. Pure; it stops nothing itself.

Only runs that ended near their parent's value or better are asked, since they alone say how far behind a win can be at
half-time: docs/adr/0010-futility.md.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from dataclasses import dataclass, field

from raysearch.model import Direction

LOST_WINS = 1 / 200  # of the true wins, at most: what the margin is made for
RECENT = 200  # hopeful runs that are looked at: the next of their kind is beyond the farthest in one case of 201
REMEMBERED = 1000  # runs among which they are looked for
FEWEST = 30  # hopeful runs before anything is stopped
SPREADS = 10.0  # beyond the farthest: kinds of changes that are rare, and the time when few runs are known
SIGMAS = 4.0  # of a difference between two runs: a run that ended within that may be a win
NORMAL_QUARTILES = 1.349  # standard deviations between the quartiles of a normal distribution
SPARED_IN = 10  # one candidate in so many always runs to its end, so that the margin sees what it would cut off


@dataclass
class Futility:
    """What a profile's finished runs say about how far behind a win may be at half of the budget.

    Attributes:
        direction: Of the metric.
    """

    direction: Direction
    _pairs: deque[tuple[float, float]] = field(default_factory=lambda: deque[tuple[float, float]](maxlen=REMEMBERED))
    _known: tuple[float, float | None] | None = field(default=None, compare=False, repr=False)  # by noise, until `add`

    def add(self, half_delta: float, final_delta: float) -> None:
        """Takes in a run that went to its end; constant time.

        Args:
            half_delta: Its half-way value minus the mean of its parent's half-way values.
            final_delta: Its final value minus the mean of its parent's.
        """
        if math.isfinite(half_delta) and math.isfinite(final_delta):
            self._pairs.append((self._sign * half_delta, self._sign * final_delta))
            self._known = None

    def bound(self, parent_half: float | None, noise_sigma: float) -> float | None:
        """The half-way value beyond which (for a metric that is minimised: above which) a run is given up.

        Args:
            parent_half: Mean of the parent's half-way values; None if it has none.
            noise_sigma: Standard deviation of the profile's final values between seeds.

        Returns:
            None while too few runs are known to say.
        """
        margin = self.margin(noise_sigma)
        return None if margin is None or parent_half is None else parent_half + self._sign * margin

    def margin(self, noise_sigma: float) -> float | None:
        """How far behind its parent a run may be at half of the budget; None while too few runs are known to say.

        The farthest behind of the hopeful runs, and ten of their spreads more. Of n + 1 runs of one kind, whatever
        their distribution, the last is the farthest in one case of n + 1 (Vovk, Gammerman and Shafer, Algorithmic
        Learning in a Random World, 2005). The spread is the interquartile range, as a normal distribution's standard
        deviation: one run far out moves the margin past itself, and little farther.
        """
        if self._known is None or self._known[0] != noise_sigma:
            self._known = noise_sigma, self._learned(SIGMAS * math.sqrt(2) * noise_sigma)
        return self._known[1]

    def _learned(self, limit: float) -> float | None:
        hopeful = sorted([half for half, final in self._pairs if final <= limit][-RECENT:])
        count = len(hopeful)
        if count < FEWEST:
            return None
        spread = (hopeful[3 * count // 4] - hopeful[count // 4]) / NORMAL_QUARTILES
        return max(limit, hopeful[-1] + SPREADS * spread)

    @property
    def _sign(self) -> float:
        return 1.0 if self.direction is Direction.MINIMIZE else -1.0


def spared(candidate: str) -> bool:
    """Whether a candidate runs to its end whatever its half-way value is: one in ten, the same ones at every replay."""
    return zlib.crc32(candidate.encode()) % SPARED_IN == 0
