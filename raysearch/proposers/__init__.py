"""Who has ideas: one protocol, with what a proposer is asked and told. Each module of this package is a proposer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from raysearch.model import Direction, Operator, Outcome


@dataclass(frozen=True)
class Request:
    """What a proposer is asked.

    Attributes:
        profile: Slug of the profile that the proposals are for.
        base: The champion's commit, to build on.
        files: The champion's editable files, text by path.
        count: How many proposals are wanted; fewer are fine, none when there is no idea.
        known: Fingerprints of programs that were run or are in flight on the profile.
        direction: Which way the metric gets better.
    """

    profile: str
    base: str
    files: Mapping[str, str]
    count: int
    known: Set[str]
    direction: Direction


@dataclass(frozen=True)
class Idea:
    """A proposal that has no number yet; the attributes are those of `model.Proposal`."""

    patch: str
    operator: Operator
    hypothesis: str
    proposer: str
    predicted_delta: float | None = None
    cost_usd: float = 0.0


@dataclass(frozen=True)
class Told:
    """How a program did on a profile, whoever proposed it.

    Attributes:
        value: The metric, None unless measured.
    """

    profile: str
    files: Mapping[str, str]
    outcome: Outcome
    value: float | None


class Proposer(Protocol):
    """Has ideas. `ask` and `tell` are called from one thread of the proposer's own, and may take their time."""

    name: str

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` ideas."""
        ...

    def tell(self, told: Told) -> None:
        """Learns from a finished run; called again for the whole study after a restart."""
        ...
