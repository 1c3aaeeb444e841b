"""Who has ideas: one protocol, with what a proposer is asked and told. Each module of this package is a proposer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from raysearch.model import Direction, Operator, Outcome


@dataclass(frozen=True)
class Step:
    """A confirmed win of some ratchet.

    Attributes:
        candidate: Its id.
        profile: Slug of the profile whose ratchet it is on.
        hypothesis: Why it was tried.
        delta: Confirmed change of that profile's metric.
        before: The editable files before it, text by path.
        after: The same with it.
    """

    candidate: str
    profile: str
    hypothesis: str
    delta: float
    before: Mapping[str, str]
    after: Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """What a proposer is asked.

    Attributes:
        profile: Slug of the profile that the proposals are for.
        base: The commit to build on: the champion, or a candidate of the frontier.
        files: The editable files of that commit, text by path.
        count: How many proposals are wanted; fewer are fine, none when there is no idea.
        known: Fingerprints of programs that were run or are in flight on the profile.
        direction: Which way the metric gets better.
        origin: The editable files of the profile's first program, where its ratchet starts.
        elsewhere: Steps of the other profiles' ratchets, oldest first.
        unmerged: Wins of this profile, before and after, that could not be merged onto the champion.
        sources: `Idea.source` of all that was proposed on this profile, so that nothing is made twice.
    """

    profile: str
    base: str
    files: Mapping[str, str]
    count: int
    known: Set[str]
    direction: Direction
    origin: Mapping[str, str] = field(default_factory=dict[str, str])
    elsewhere: Sequence[Step] = ()
    unmerged: Sequence[Step] = ()
    sources: Set[str] = frozenset()


@dataclass(frozen=True)
class Idea:
    """A proposal that has no number yet; the attributes are those of `model.Proposal`.

    The patch applies to the base of the request.
    """

    patch: str
    operator: Operator
    hypothesis: str
    proposer: str
    predicted_delta: float | None = None
    cost_usd: float = 0.0
    source: str = ""


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
