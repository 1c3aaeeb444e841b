"""Reads what a coding agent printed: its last message, its hypothesis, its tokens and what it cost.

All of it is untrusted text: numbers are bounded, lines cleaned, and nothing here is believed about the edit itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raysearch.model import Operator
from raysearch.proposers.agent_commands import Output
from raysearch.wording import clean, last_line

HYPOTHESIS_CHARS = 300
MESSAGE_CHARS = 20_000  # of a message, the end
MAX_USD = 1e4  # of one run: more is no cost but a mistake
MAX_TOKENS = 10**10
_FAILURES = 50  # lines that look like JSON and are none, before an output is given up
# What an agent may call its change. `transfer` says where a change came from, and `replicate` that there is none.
OPERATORS = (Operator.DRAFT, Operator.TUNE, Operator.ABLATE, Operator.SIMPLIFY, Operator.COMBINE, Operator.DEBUG)
_FIELD = r"^[ \t>*_#`-]*{}[ \t*_`]*:(.*)$"  # no two parts of it can match the same text: a hostile one takes no longer
_FIELDS = {
    name: re.compile(_FIELD.format(name), re.IGNORECASE | re.MULTILINE)
    for name in ("hypothesis", "operator", r"predicted[ _]delta")
}
_NUMBER = re.compile(r"[-+−]?\d{1,12}(?:\.\d{1,12})?(?:[eE][-+]?\d{1,2})?")
_NOTHING: Mapping[str, Any] = {}
_AIDER = re.compile(r"^Tokens: ([\d.,]+)([kM]?) sent, (?:.*?, )?([\d.,]+)([kM]?) received\.(.*)$", re.MULTILINE)
_AIDER_COST = re.compile(r"\$([\d.]+) session")


@dataclass(frozen=True)
class Said:
    """What an agent said of its run.

    Attributes:
        message: Its last message; empty when there is none.
        error: What went wrong, in its own words; empty when it does not say.
        model: The model that did most of it; empty when it does not say.
        cost_usd: None when it does not say.
        tokens_in, tokens_out: 0 when it does not say.
    """

    message: str = ""
    error: str = ""
    model: str = ""
    cost_usd: float | None = None
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Claim:
    """What an agent says of its change; see `model.Proposal`."""

    hypothesis: str
    operator: Operator
    predicted_delta: float | None


def read_claim(message: str) -> Claim:
    """The lines `Hypothesis:`, `Operator:` and `Predicted delta:` of a message, the last of each."""
    message = message[-MESSAGE_CHARS:]
    hypothesis, operator, delta = (_last(pattern, message) for pattern in _FIELDS.values())
    number = _NUMBER.match(delta)
    return Claim(
        clean(hypothesis, HYPOTHESIS_CHARS) or last_line(message, HYPOTHESIS_CHARS) or "(no hypothesis given)",
        next((known for known in OPERATORS if known.value == operator.strip("`*_. ").lower()), Operator.DRAFT),
        float(number[0].replace("−", "-")) if number else None,
    )


def _last(pattern: re.Pattern[str], message: str) -> str:
    found = [match[1].strip("`*_ \t\r") for match in pattern.finditer(message)]
    return found[-1] if found else ""


def read_output(output: Output, log: str, *, last_message: str = "") -> Said:
    """What an agent said.

    Args:
        output: How it says it.
        log: What it printed, or the end of it.
        last_message: What it wrote into the file for its last message.
    """
    said = _READERS[output](log)
    if not last_message.strip():
        return said
    return Said(last_message, said.error, said.model, said.cost_usd, said.tokens_in, said.tokens_out)


def _text(log: str) -> Said:
    return Said(message=log)


def _claude(log: str) -> Said:
    result = next((found for found in reversed(_objects(log)) if found.get("type") == "result"), _NOTHING)
    usage, by_model = _table(result.get("usage")), _table(result.get("modelUsage"))
    message = _string(result.get("result"))
    failed = result.get("is_error") is True or result.get("subtype") != "success"
    tokens_in = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return Said(
        message=message,
        error=(message or _string(result.get("subtype"))) if failed else "",
        model=max(by_model, key=lambda name: _count(_table(by_model[name]).get("outputTokens")), default=""),
        cost_usd=_usd(result.get("total_cost_usd")),
        tokens_in=sum(_count(usage.get(name)) for name in tokens_in),
        tokens_out=_count(usage.get("output_tokens")),
    )


def _codex(log: str) -> Said:
    found = _objects(log)
    items = [_table(event.get("item")) for event in found if event.get("type") == "item.completed"]
    messages = [_string(item.get("text")) for item in items if item.get("type") == "agent_message"]
    turns = [_table(event.get("usage")) for event in found if event.get("type") == "turn.completed"]
    failures = [_table(event.get("error")) for event in found if event.get("type") == "turn.failed"]
    errors = [event for event in found if event.get("type") == "error"]
    return Said(
        message=messages[-1] if messages else "",
        error="" if turns else next((_string(it.get("message")) for it in [*failures[-1:], *errors[-1:]]), ""),
        tokens_in=sum(_count(turn.get("input_tokens")) for turn in turns),
        tokens_out=sum(_count(turn.get("output_tokens")) for turn in turns),
    )


def _gemini(log: str) -> Said:
    result = next((found for found in reversed(_objects(log)) if {"response", "error"} & found.keys()), _NOTHING)
    models = _table(_table(result.get("stats")).get("models"))
    tokens = {name: _table(_table(model).get("tokens")) for name, model in models.items()}
    return Said(
        message=_string(result.get("response")),
        error=_string(_table(result.get("error")).get("message")),
        model=max(tokens, key=lambda name: _count(tokens[name].get("total")), default=""),
        tokens_in=sum(_count(count.get("prompt")) for count in tokens.values()),
        tokens_out=sum(_count(count.get(kind)) for count in tokens.values() for kind in ("candidates", "thoughts")),
    )


def _opencode(log: str) -> Said:
    found = _objects(log)
    parts = [_table(event.get("part")) for event in found]
    texts = [_string(part.get("text")) for part in parts if part.get("type") == "text"]
    steps = [part for part in parts if part.get("type") == "step-finish"]
    tokens = [_table(step.get("tokens")) for step in steps]
    caches = [_table(count.get("cache")) for count in tokens]
    errors = [_table(event.get("error")) for event in found if event.get("type") == "error"]
    costs = [_usd(step.get("cost")) for step in steps]
    return Said(
        message=texts[-1] if texts else "",
        error=_string(_table(errors[-1].get("data")).get("message")) if errors else "",
        cost_usd=sum(cost for cost in costs if cost is not None) if any(costs) else None,  # 0 where it has no price
        tokens_in=_sum(tokens, "input") + _sum(caches, "read") + _sum(caches, "write"),
        tokens_out=_sum(tokens, "output") + _sum(tokens, "reasoning"),
    )


def _aider(log: str) -> Said:
    message = _AIDER.split(log)[0]
    turns = list(_AIDER.finditer(log))
    costs = [match[1] for turn in turns if (match := _AIDER_COST.search(turn[5]))]
    return Said(
        message=message,
        cost_usd=_usd(_decimal(costs[-1])) if costs else None,
        tokens_in=sum(_thousands(turn[1], turn[2]) for turn in turns),
        tokens_out=sum(_thousands(turn[3], turn[4]) for turn in turns),
    )


_READERS: dict[Output, Callable[[str], Said]] = {
    Output.TEXT: _text,
    Output.CLAUDE: _claude,
    Output.CODEX: _codex,
    Output.GEMINI: _gemini,
    Output.OPENCODE: _opencode,
    Output.AIDER: _aider,
}


# ---- untrusted JSON ----


def _objects(log: str) -> list[dict[str, Any]]:
    """The JSON objects that begin at the start of a line, on one line or several, in their order."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    failures = 0
    for match in reversed(list(re.finditer(r"^\{", log, re.MULTILINE))):
        try:
            found.append(decoder.raw_decode(log, match.start())[0])
        except (ValueError, RecursionError):
            failures += 1
            if failures > _FAILURES:  # each may have read all that follows
                break
    return found[::-1]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType] - what JSON gives


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else 0


def _sum(tables: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(_count(table.get(key)) for table in tables)


def _usd(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= MAX_USD else None  # not for NaN


def _decimal(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan


def _thousands(digits: str, unit: str) -> int:
    number = _decimal(digits) * {"": 1, "k": 1e3, "M": 1e6}[unit]
    return round(number) if 0 <= number <= MAX_TOKENS else 0
