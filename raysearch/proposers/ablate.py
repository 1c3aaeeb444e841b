"""Takes one change back: the ratchet's wins are undone one by one, since later ones may have made them useless.

Each knob that has another value than in the profile's first program is a change, and so is each hunk of other lines.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from raysearch.model import Operator
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.moves import Attempt, Change, Part, Sieve, parts


class AblateProposer(Proposer):
    """Proposes the program without one of the changes that made it.

    Args:
        seed: Of the order in which changes are taken back.
    """

    name = "ablate"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._sieve = Sieve(self.name, Operator.ABLATE)

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are `request.files` with one change taken back."""
        return self._sieve.ideas(request, self._attempts(request))

    def tell(self, told: Told) -> None:
        """Learns nothing: which changes there are is in the request."""

    def _attempts(self, request: Request) -> Iterator[Attempt]:
        changes = parts(request.files, request.origin)
        random.Random(f"{self._seed} {request.base}").shuffle(changes)
        for part in changes:
            yield Attempt(f"ablate {part.key}", lambda part=part: _taken_back(part))


def _taken_back(part: Part) -> Change:
    return Change({part.path: part.text}, f"Taken back: {part.title}; later changes may have made it useless")
