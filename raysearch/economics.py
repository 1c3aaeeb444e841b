"""What ideas cost and whether they were worth it, in the words and figures of status and report. Pure.

It counts nothing: the figures are `tally`'s and `yields`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from raysearch import tally, yields
from raysearch.study import Study
from raysearch.tally import ProposerTally
from raysearch.wording import clean, number, places, plural, spelled
from raysearch.yields import Author, Worth, Yield

GAIN_PLACES = 5  # of a gain an hour or a dollar
SAID = {
    Worth.PAYS: "pays for itself against tuning",
    Worth.DOES_NOT_PAY: "does not pay for itself against tuning",
    Worth.TOO_EARLY: "too early to say whether it pays for itself against tuning",
}


class YieldStatus(TypedDict):
    """What ideas cost and gave: a proposer's (`model` and `operator` are null), or those of one model and operator.

    `dropped` are answers that were no proposal (of no operator), `usable` the share of all answers that became
    candidates, `tried` ideas whose fate runs have decided; `gain` is in the metric's units, positive is better;
    `seconds` are of slots, for the ideas' own runs.
    """

    proposer: str
    model: str | None
    operator: str | None
    proposals: int
    refused: int
    dropped: int
    usable: float | None
    tried: int
    screened: int
    confirmed: int
    gain: float
    seconds: float
    cost_usd: float
    tokens_in: int
    tokens_out: int
    gain_per_hour: float | None
    gain_per_usd: float | None
    mean_proposal_s: float | None


class ProposerStatus(TypedDict):
    """A proposer: all of its ideas, and the same by model and operator."""

    total: YieldStatus
    parts: list[YieldStatus]


class WorthStatus(TypedDict):
    """A model against `tune` and `additive` on one profile, by gain per hour of a slot; `se` is of the difference.

    `worth` is `pays`, `does_not_pay` or `too_early`; the rule is in `raysearch.yields.compare`.
    """

    profile: str
    author: str
    worth: str
    gain_per_hour: float
    tune_gain_per_hour: float
    se: float | None
    tried: int
    tune_tried: int
    cost_usd: float
    hour: str


def proposers(study: Study) -> list[ProposerStatus]:
    """What each proposer's ideas cost and gave, ready for JSON, the busiest first."""
    return [_proposer_status(one) for one in tally.proposers(study)]


def worths(study: Study) -> list[WorthStatus]:
    """Whether each model pays for itself, ready for JSON."""
    return [
        WorthStatus(
            profile=one.profile,
            author=clean(one.author),
            worth=one.found.worth.value,
            gain_per_hour=one.found.ours,
            tune_gain_per_hour=one.found.theirs,
            se=one.found.se,
            tried=one.ours.tried,
            tune_tried=one.theirs.tried,
            cost_usd=one.ours.cost_usd,
            hour="GPU-hour" if study.lane(one.profile).profile.device == "cuda" else "slot-hour",
        )
        for one in tally.models(study)
    ]


def _proposer_status(one: ProposerTally) -> ProposerStatus:
    return ProposerStatus(
        total=_yield_status(one.total, one.proposer, model=None, operator=None),
        parts=[
            _yield_status(part, one.proposer, model=clean(author.model), operator=_kind(author) or None)
            for author, part in one.parts
        ],
    )


def _yield_status(one: Yield, proposer: str, *, model: str | None, operator: str | None) -> YieldStatus:
    return YieldStatus(
        proposer=clean(proposer),
        model=model,
        operator=operator,
        proposals=one.proposals,
        refused=one.refused,
        dropped=one.dropped,
        usable=one.usable,
        tried=one.tried,
        screened=one.screened,
        confirmed=one.confirmed,
        gain=one.gain,
        seconds=round(one.seconds, 1),
        cost_usd=one.cost_usd,
        tokens_in=one.tokens_in,
        tokens_out=one.tokens_out,
        gain_per_hour=one.gain_per_hour,
        gain_per_usd=one.gain_per_usd,
        mean_proposal_s=one.mean_proposal_s,
    )


# ---- in words ----


def lines(found: Sequence[ProposerStatus], worth: Sequence[WorthStatus], spent_usd: float) -> list[str]:
    """Each proposer in a line, its models and operators below it where there are several, and whether models pay."""
    text: list[str] = []
    for one in found:
        text.append(_yield_line(one["total"], one["total"]["proposer"]))
        if len(one["parts"]) > 1:
            names = [" ".join(filter(None, (part["model"], part["operator"]))) for part in one["parts"]]
            text += [f"  {_yield_line(part, name or '–')}" for part, name in zip(one["parts"], names, strict=True)]
    if spent_usd:
        text.append(f"spent on models: {spent_usd:.2f} USD")
    return text + worth_lines(worth)


def worth_lines(found: Sequence[WorthStatus]) -> list[str]:
    """Whether each model is worth its slots, a sentence each."""
    return [_worth_line(one) for one in found]


def _yield_line(one: YieldStatus, name: str) -> str:
    """One line: counts; what was gained, and in how many hours; what was paid; seconds an answer."""
    counts = [plural(one["proposals"], "proposal")]
    if one["refused"]:
        counts.append(f"{one['refused']} refused")
    if one["dropped"]:
        counts.append(f"{plural(one['dropped'], 'answer')} without a proposal")
    if one["usable"] is not None and one["usable"] < 1 and one["proposals"]:
        counts.append(f"{100 * one['usable']:.0f} % usable")
    counts += [f"{one['screened']} promising", f"{one['confirmed']} confirmed"]
    worth: list[str] = []
    if one["gain_per_hour"] is not None:
        hours = f"{one['seconds'] / 3600:.2f} h of slots"
        gained = f"gain {one['gain']:.4f} in {hours}, {one['gain_per_hour']:.{GAIN_PLACES}f} an hour"
        worth.append(gained if one["confirmed"] else f"no gain in {hours}")
    if one["tokens_in"] or one["tokens_out"] or one["cost_usd"]:
        paid = f"{one['cost_usd']:.2f} USD"
        paid += f", {one['gain_per_usd']:.{GAIN_PLACES}f} a USD" if one["gain_per_usd"] is not None else ""
        worth.append(f"{paid}, {one['tokens_in']} tokens in, {one['tokens_out']} out")
    if one["mean_proposal_s"]:
        worth.append(f"{spelled(one['mean_proposal_s'])} an answer")
    return f"{name}: {'; '.join([', '.join(counts), *worth])}"


def _worth_line(one: WorthStatus) -> str:
    """Whether a model is worth its slots, in one sentence."""
    tries = f"{one['tried']} and {plural(one['tune_tried'], 'idea')} judged"
    rates = f"{one['gain_per_hour']:.{GAIN_PLACES}f} confirmed gain a {one['hour']} against "
    rates += f"{one['tune_gain_per_hour']:.{GAIN_PLACES}f}"
    margin = f", difference ± {yields.SURE * one['se']:.{GAIN_PLACES}f} (90 %)" if one["se"] is not None else ""
    cost = f", {one['cost_usd']:.2f} USD" if one["cost_usd"] else ""
    said = SAID[Worth(one["worth"])]
    return f"{one['profile']}: {one['author']}: {said}: {rates}{margin}; {tries}{cost}"


# ---- as a table ----


def table(study: Study) -> list[list[str]]:
    """A head and rows: each proposer, and below it its models and operators where there are several."""
    hour = _hour(study)
    head = ["proposer", "operator", "proposals", "refused", "no proposal", "usable", "promising", "confirmed", "gain"]
    head += [f"{hour}s", f"gain a {hour}", "USD", "gain a USD", "tokens in", "tokens out", "s an answer"]
    rows = [head]
    for one in tally.proposers(study):
        rows.append([one.proposer, "", *_yield_cells(one.total)])
        if len(one.parts) > 1:
            rows += [[f"– {author.name}", _kind(author), *_yield_cells(part)] for author, part in one.parts]
    return rows


def legend(study: Study) -> str:
    """What the columns of the table are, and what was spent in all."""
    return (
        "Promising: at the first run. Gain: what the confirmed wins are worth together, positive is better. "
        f"The {_hour(study)}s are those of the ideas' own runs. Spent on models in all: {study.spent_usd:.2f} USD."
    )


def _hour(study: Study) -> str:
    """What an hour of a slot is called: of a GPU, where every slot is one."""
    return "GPU-hour" if all(lane.profile.device == "cuda" for lane in study.lanes.values()) else "slot-hour"


def _kind(author: Author) -> str:
    return author.operator.value if author.operator else ""


def _yield_cells(one: Yield) -> list[str]:
    paid = one.tokens_in or one.tokens_out or one.cost_usd
    return [
        *map(str, (one.proposals, one.refused, one.dropped)),
        "–" if one.usable is None else f"{100 * one.usable:.0f} %",
        *map(str, (one.screened, one.confirmed)),
        number(one.gain, places(one.gain)) if one.confirmed else "–",
        number(one.seconds / 3600, 2),
        number(one.gain_per_hour, GAIN_PLACES),
        f"{one.cost_usd:.2f}" if paid else "–",
        number(one.gain_per_usd, GAIN_PLACES),
        *(str(tokens) if paid else "–" for tokens in (one.tokens_in, one.tokens_out)),
        number(one.mean_proposal_s, 1),
    ]
