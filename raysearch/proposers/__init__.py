"""Who has ideas: one protocol, with what a proposer is asked and told. Each module of this package is a proposer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from raysearch.brief import Brief
from raysearch.directions import Directions
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
        directions: What the human wants of every proposer; what breaks them is refused.
        brief: What is known of the study, for proposers that set `wants_brief`; else None.
        task: What the program has to do and what it gets, for those who write programs.
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
    directions: Directions = field(default_factory=Directions)
    brief: Brief | None = None
    task: str = ""


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
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class NoIdea:
    """An answer that came to nothing; the attributes are those of `model.Dropped`."""

    reason: str
    proposer: str
    model: str = ""
    cost_usd: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Told:
    """How a program did on a profile, whoever proposed it.

    Attributes:
        value: The metric, None unless measured.
        trial: Id of the run; one that is told again replaces what was told before.
        is_replicate: Whether it is a run of a race, on either side: of programs that were chosen, again and again.
    """

    profile: str
    files: Mapping[str, str]
    outcome: Outcome
    value: float | None
    trial: str = ""
    is_replicate: bool = False


class SpentUp(Exception):
    """A proposer may spend no more; the message is one line that says the sum and the remedy."""


class Proposer(Protocol):
    """Has ideas. What it is called with may take its time: none of it is called in the coordinator's loop.

    Attributes:
        name: As in `--proposers`, and in every proposal.
        parallel: Asks that it works on at once; several only where one answer takes long.
        one_by_one: Whether each ask is for one proposal, as it always is where several are worked on at once: of one
            that takes minutes for each, the first is not to wait for the others. `ask` and `tell` of all other
            proposers are called from one thread, of these from several, at the same time.
        limit_s: Seconds after which an ask is given up: it may go on beside those that come after it, and of what it
            still gives only the cost counts. A proposer that can end its own work does so before that.
        wants_brief: Whether requests carry a brief.
    """

    name: str
    parallel: int = 1
    one_by_one: bool = False
    limit_s: float = 600.0
    wants_brief: bool = False

    def ask(self, request: Request) -> Sequence[Idea | NoIdea]:
        """Up to `request.count` ideas, and what came to none.

        Raises:
            SpentUp: It costs money, and there is none left: it is not asked again in this session.
            UserError: It can do nothing with what it is given, now and later.
            Exception: It failed; it is asked again after a pause, after several in a row one of minutes.
        """
        ...

    def tell(self, told: Told) -> None:
        """Learns from a finished run; called again for the whole study after a restart."""
        ...

    def close(self) -> None:
        """Ends what is in flight, soon: whatever still asks raises or returns nothing. Called once, at the end."""
