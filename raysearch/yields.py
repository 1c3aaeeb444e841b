"""What ideas cost and what came of them, by who had them: counted as events come, so that asking takes no time. Pure.

It knows no study: `study` counts with it, `tally` and `brief` read it. Who is asked next is `bandit`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum

from raysearch.model import Dropped, Operator, Proposal

LEAST_TRIED = 8  # judged ideas on either side, before the two are compared
SURE = 1.645  # standard errors to either side: an interval of 90%


@dataclass(frozen=True)
class Author:
    """Who has ideas of a kind.

    Attributes:
        model: Language model or coding agent; empty for proposers that compute theirs.
        operator: None for answers that were no proposal, and of no kind.
    """

    proposer: str
    model: str
    operator: Operator | None

    @property
    def name(self) -> str:
        """Proposer and model, as people read them."""
        return named(self.proposer, self.model)


@dataclass(slots=True)
class Yield:
    """What ideas cost and what came of them; a change that is carried onto a newer champion is still the same idea.

    Attributes:
        refused: Proposals that never became a candidate.
        dropped: Answers that were no proposal; they are not among `proposals`.
        tried: Ideas whose fate was decided by runs.
        screened: Ideas whose first run was promising.
        confirmed: Ideas on the ratchet.
        gain: Sum of what these are worth, in units of the metric, positive is better; a union's is shared equally.
        gain_squares: Sum of the squares, each idea's by itself.
        seconds: Of slots, that all runs of the ideas took; runs of what they were compared with are not counted.
        cost_usd, tokens_in, tokens_out, proposal_s: Of proposals and dropped answers together.
    """

    proposals: int = 0
    refused: int = 0
    dropped: int = 0
    tried: int = 0
    screened: int = 0
    confirmed: int = 0
    gain: float = 0.0
    gain_squares: float = 0.0
    seconds: float = 0.0
    cost_usd: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    proposal_s: float = 0.0

    def spend(self, of: Proposal | Dropped) -> None:
        """Counts what an answer cost."""
        self.cost_usd += of.cost_usd
        self.tokens_in += of.tokens_in
        self.tokens_out += of.tokens_out
        self.proposal_s += of.proposal_s

    def win(self, gain: float) -> None:
        """Counts an idea that came onto the ratchet."""
        self.confirmed += 1
        self.gain += gain
        self.gain_squares += gain**2

    @property
    def gain_per_hour(self) -> float | None:
        """Confirmed gain per hour of a slot; None before there were runs."""
        return 3600 * self.gain / self.seconds if self.seconds > 0 else None

    @property
    def gain_per_usd(self) -> float | None:
        """Confirmed gain per US dollar; None where nothing was paid."""
        return self.gain / self.cost_usd if self.cost_usd > 0 else None

    @property
    def usable(self) -> float | None:
        """Share of the answers that became candidates; None before there were answers."""
        answers = self.proposals + self.dropped
        return (self.proposals - self.refused) / answers if answers else None

    @property
    def mean_proposal_s(self) -> float | None:
        """Seconds that an answer took."""
        answers = self.proposals + self.dropped
        return self.proposal_s / answers if answers else None


def author_of(proposal: Proposal) -> Author:
    """Who had an idea."""
    return Author(proposal.proposer, proposal.model, proposal.operator)


def named(proposer: str, model: str) -> str:
    """Proposer and model, as people read them: `chat (some-model)`."""
    return f"{proposer} ({model})" if model else proposer


def total(some: Iterable[Yield]) -> Yield:
    """All of them together."""
    found = Yield()
    for one in some:
        for part in fields(Yield):
            setattr(found, part.name, getattr(found, part.name) + getattr(one, part.name))
    return found


# ---- whether a model pays for itself ----


class Worth(Enum):
    """Whether somebody's ideas are a better use of slots than another's."""

    PAYS = "pays"
    DOES_NOT_PAY = "does_not_pay"
    TOO_EARLY = "too_early"


@dataclass(frozen=True)
class Comparison:
    """Two authors' confirmed gain per hour of a slot, and what that says.

    Attributes:
        ours, theirs: Gain per hour.
        se: Standard error of the difference; None before anybody had a win.
    """

    worth: Worth
    ours: float
    theirs: float
    se: float | None


def compare(ours: Yield, theirs: Yield) -> Comparison:
    """Compares two authors by the gain per hour of a slot.

    Wins come at random times and are of random size: the gain is a compound Poisson sum, whose variance is estimated by
    the sum of the squares of what was summed. One win more, of the mean size of both sides' wins, is in each variance:
    who has had no win yet is not known to be useless. It is no longer too early when both have `LEAST_TRIED` judged
    ideas and the 90% interval of the difference leaves 0 out.
    """
    rate, other = ours.gain_per_hour or 0.0, theirs.gain_per_hour or 0.0
    wins = ours.confirmed + theirs.confirmed
    if not wins or min(ours.seconds, theirs.seconds) <= 0:
        return Comparison(Worth.TOO_EARLY, rate, other, None)
    usual = (ours.gain + theirs.gain) / wins
    se = math.hypot(*(3600 * math.sqrt(one.gain_squares + usual**2) / one.seconds for one in (ours, theirs)))
    apart = rate - other
    if min(ours.tried, theirs.tried) < LEAST_TRIED or abs(apart) <= SURE * se:
        return Comparison(Worth.TOO_EARLY, rate, other, se)
    return Comparison(Worth.PAYS if apart > 0 else Worth.DOES_NOT_PAY, rate, other, se)
