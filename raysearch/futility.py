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
RECENT = 200  # hopeful runs that are looked at: one far out among them is enough to widen the margin past it
REMEMBERED = 1000  # runs among which they are looked for
FEWEST = 30  # hopeful runs before anything is stopped
SIGMAS = 4.0  # of a difference between two runs: a run that ended within that may be a win
SPARED_IN = 10  # one candidate in so many always runs to its end, so that the margin sees what it would cut off


@dataclass
class Futility:
    """What a profile's finished runs say about how far behind a win may be at half of the budget.

    Attributes:
        direction: Of the metric.
    """

    direction: Direction
    _pairs: deque[tuple[float, float]] = field(default_factory=lambda: deque[tuple[float, float]](maxlen=REMEMBERED))

    def add(self, half_delta: float, final_delta: float) -> None:
        """Takes in a run that went to its end; constant time.

        Args:
            half_delta: Its half-way value minus the mean of its parent's half-way values.
            final_delta: Its final value minus the mean of its parent's.
        """
        if math.isfinite(half_delta) and math.isfinite(final_delta):
            self._pairs.append((self._sign * half_delta, self._sign * final_delta))

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

        By Cantelli's inequality a value exceeds its mean by k standard deviations in at most 1 / (1 + k²) of all cases,
        whatever its distribution (Cantelli 1928; Ghosh, Statistics & Probability Letters 60, 2002). With k² = 199 that
        is one win in 200, as far as mean and standard deviation of the hopeful runs are those of the wins.
        """
        limit = SIGMAS * math.sqrt(2) * noise_sigma
        hopeful = [half for half, final in self._pairs if final <= limit][-RECENT:]
        count = len(hopeful)
        if count < FEWEST:
            return None
        mean = math.fsum(hopeful) / count
        variance = math.fsum((half - mean) ** 2 for half in hopeful) / (count - 1)
        # the next value's distance from the mean of `count` others varies a little more than the values themselves
        spread = math.sqrt(variance * (1 + 1 / count))
        return max(limit, mean + math.sqrt(1 / LOST_WINS - 1) * spread)

    @property
    def _sign(self) -> float:
        return 1.0 if self.direction is Direction.MINIMIZE else -1.0


def spared(candidate: str) -> bool:
    """Whether a candidate runs to its end whatever its half-way value is: one in ten, the same ones at every replay."""
    return zlib.crc32(candidate.encode()) % SPARED_IN == 0
