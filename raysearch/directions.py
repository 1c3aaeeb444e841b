"""The human's directions, `program.md`: prose for those who read, and a block in TOML for those who do not. Pure.

    ```raysearch
    frozen = ["SEQ_LEN"]                         # constants that may not change
    forbidden = ["simplify"]                     # operators that nobody may propose
    ranges.DEPTH = [4, 12]                       # numbers from and to, both included
    ranges.WINDOW_PATTERN = {choices = ["L", "SL"]}
    budget = {usd = 20.0, hours = 8.0, trials = 200}
    ```

It reads no file and moves no knob: it says what the text asks for, and whether a change breaks it.
"""

from __future__ import annotations

import ast
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

from raysearch.errors import UserError
from raysearch.knobs import Knob, Value, constant_lines, same_value, syntax_tree
from raysearch.model import Operator

GENERAL = "program.md"  # the file that is for all profiles
WORD = "raysearch"  # that opens the block
SAID_CHARS = 60  # of a value, as people read it

_KEYS = ("budget", "forbidden", "frozen", "ranges")
_LIMITS = ("usd", "hours", "trials")
_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}(?=[^`]*$)|~{3,})[ \t]*(?P<word>\S*)")


def file_for(preset: str) -> str:
    """Name of the file that is for the profiles of one preset."""
    return f"program-{preset}.md"


@dataclass(frozen=True)
class Range:
    """Values that a constant may be given: numbers from `low` to `high`, both included, or any of `choices`."""

    low: float = -math.inf
    high: float = math.inf
    choices: tuple[Value, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return f"{{{', '.join(map(repr, self.choices))}}}"
        return f"[{self.low:g}, {self.high:g}]"

    def allows(self, value: Value) -> bool:
        """Whether a constant may be given the value; 1 and 1.0 are one, True is none of them."""
        if self.choices:
            return any(_same(value, choice) for choice in self.choices)
        return _is_number(value) and self.low <= float(value) <= self.high

    def both(self, other: Range) -> Range | None:
        """What both allow; None where that is nothing."""
        if self.choices or other.choices:
            some, rest = (self, other) if self.choices else (other, self)
            choices = tuple(choice for choice in some.choices if rest.allows(choice))
            return Range(choices=choices) if choices else None
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Range(low, high) if low <= high else None

    def narrowed(self, knob: Knob) -> Knob | None:
        """The knob with what this leaves of its range; None where that is nothing. Its value stays as it is."""
        if knob.choices or self.choices:
            choices = knob.choices or tuple(_typed(choice, knob) for choice in self.choices)
            left = tuple(choice for choice in choices if self.allows(choice) and knob.allows(choice))
            if not knob.choices:
                left = tuple(sorted(left, key=float))
            return replace(knob, low=None, high=None, log=False, choices=left) if left else None
        assert knob.low is not None
        assert knob.high is not None
        low, high = max(knob.low, self.low), min(knob.high, self.high)
        some = math.ceil(low) <= math.floor(high) if knob.is_int and low <= high else low <= high
        return replace(knob, low=low, high=high) if some else None


@dataclass(frozen=True)
class Limits:
    """What a study may use; None for no limit.

    Attributes:
        usd: Dollars for proposals, over the whole study.
        hours: From the start of a session, after which nothing new is proposed.
        trials: First runs of each profile, over the whole study.
    """

    usd: float | None = None
    hours: float | None = None
    trials: int | None = None


@dataclass(frozen=True)
class Directions:
    """What the human wants of every proposer.

    Attributes:
        prose: The text without its block, for models and coding agents.
        frozen: Constants of the program that may not change.
        ranges: Values that constants may be given, by name; one that lies outside may stay as it is.
        forbidden: Operators that may not be proposed.
        budget: Limits of the study.
        where: Files that they come from, for messages.
    """

    prose: str = ""
    frozen: frozenset[str] = frozenset()
    ranges: Mapping[str, Range] = field(default_factory=dict[str, Range])
    forbidden: frozenset[Operator] = frozenset()
    budget: Limits = field(default_factory=Limits)
    where: str = "the directions"

    @property
    def bars(self) -> bool:
        """Whether there is any change that is refused."""
        return bool(self.frozen or self.ranges or self.forbidden)

    def narrowed(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The knobs that may be moved, each with the part of its range that it may be moved to.

        The own value of such a knob may lie outside of that part.
        """
        found: dict[str, Knob] = {}
        for name, knob in knobs.items():
            allowed = self.ranges.get(name)
            left = knob if allowed is None else allowed.narrowed(knob)
            if name not in self.frozen and left is not None:
                found[name] = left
        return found


# ---- from text ----


@lru_cache(maxsize=64)  # the directions of a study are asked for before every command
def parse(text: str, *, where: str) -> Directions:
    """Reads a file of directions strictly.

    Args:
        text: All of the file.
        where: Its name, for messages.

    Raises:
        UserError: Two blocks, a fence that is not closed, bad TOML, a key or an operator that is not known, or a value
            against its rule.
    """
    prose, block = _split(text, where)
    try:
        table = tomllib.loads(block)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where}: {error or 'nested too deeply'}; the block must be TOML: mend that line") from None
    for key in table:
        if key not in _KEYS:
            raise UserError(f"{where}: key {key!r} is not known; known: {', '.join(_KEYS)}; remove it or mend it")
    ranges = _table(table, "ranges", where)
    return Directions(
        prose=prose,
        frozen=frozenset(_names(table, "frozen", where)),
        ranges={name: _range(name, value, where) for name, value in ranges.items()},
        forbidden=frozenset(_operator(name, where) for name in _names(table, "forbidden", where)),
        budget=_limits(_table(table, "budget", where), where),
        where=where,
    )


def _split(text: str, where: str) -> tuple[str, str]:
    """The prose, and the block with as many empty lines before it as give its lines their numbers in the file."""
    prose: list[str] = []
    block: list[str] = []
    opened = found = 0  # lines on which the open fence and the block began
    marks, ours = "", False
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        fence = _FENCE.match(line)
        word = fence["word"] if fence is not None and fence["marks"].startswith(marks) else None
        opens, closes = word == WORD, word == "" and marks != ""
        if opens and marks:
            raise UserError(f"{where}:{number}: the block opens inside of what line {opened} opened; close that first")
        if opens and found:
            raise UserError(f"{where}:{number}: a second block, the first is on line {found}; make them one")
        if not (opens or ours):
            prose.append(line)
        elif ours and not closes:
            block.append(line)
        if closes:
            marks, ours = "", False
        elif fence is not None and not marks:
            marks, ours, opened, found = fence["marks"], opens, number, number if opens else found
    if marks:
        raise UserError(f"{where}:{opened}: {marks} opens a block that has no end; close it with a line of {marks}")
    return "\n".join(prose).strip(), "\n" * found + "\n".join(block)


def _table(table: Mapping[str, Any], key: str, where: str) -> dict[str, object]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} = {value!r}: it must be a table; write `[{key}]` and its entries below")
    return cast("dict[str, object]", value)


def _names(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    value: object = table.get(key, [])
    names = _list(value)
    if not isinstance(value, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise UserError(f'{where}: {key} = {value!r}: it must be a list of names; write {key} = ["ONE", "OTHER"]')
    return cast("list[str]", names)


def _operator(name: str, where: str) -> Operator:
    known = {operator.value: operator for operator in Operator}
    if name not in known:
        raise UserError(f"{where}: operator {name!r} is not known; known: {', '.join(known)}; mend it in forbidden")
    return known[name]


def _range(name: str, value: object, where: str) -> Range:
    said = f"{where}: ranges.{name} = {value!r}"
    match [_number(end) for end in _list(value)]:
        case [float(low), float(high)]:
            if low > high:
                raise UserError(f"{said}: low must not exceed high; write [{high:g}, {low:g}]")
            return Range(low, high)
        case _:
            pass
    table = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    choices = _list(table.get("choices"))
    if not choices or len(table) > 1 or not all(map(_is_value, choices)):
        raise UserError(f"{said}: write [low, high] with two numbers, or {{choices = [...]}} with one value or more")
    return Range(choices=tuple(cast("list[Value]", choices)))


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _limits(table: Mapping[str, object], where: str) -> Limits:
    for key, value in table.items():
        said = f"{where}: budget.{key} = {value!r}"
        if key not in _LIMITS:
            raise UserError(f"{said}: the key is not known; known: {', '.join(_LIMITS)}; remove it or mend it")
        number = _number(value)
        if number is None or not math.isfinite(number) or number < 0 or (number == 0 and key != "usd"):
            raise UserError(f"{said}: it must be a number above 0; leave it out for no limit")
        if key == "trials" and not isinstance(value, int):
            raise UserError(f"{said}: it must be a whole number; round it")
    usd, hours, trials = (table.get(key) for key in _LIMITS)
    return Limits(_number(usd), _number(hours), trials if isinstance(trials, int) else None)


def _number(value: object) -> float | None:
    """A finite number or an infinity as a float; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:
        return None


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_value(value: object) -> bool:
    return isinstance(value, bool | str) or _number(value) is not None


def _same(one: Value, other: Value) -> bool:
    return one == other and _is_number(one) == _is_number(other)


def _typed(choice: Value, knob: Knob) -> Value:
    """TOML's 1 for a knob that is a float is 1.0, and the other way round."""
    if not _is_number(choice):
        return choice
    if isinstance(knob.value, float):
        return float(choice)
    return int(choice) if float(choice).is_integer() else choice


# ---- several files ----


def merged(*directions: Directions) -> Directions:
    """What holds where all of them do: every ban, what all ranges allow, the smaller limits, the prose in its order.

    Raises:
        UserError: Two ranges of one name have nothing in common.
    """
    result = directions[0] if directions else Directions()
    for other in directions[1:]:
        result = _merged(result, other)
    return result


def _merged(one: Directions, other: Directions) -> Directions:
    ranges = dict(one.ranges)
    for name, allowed in other.ranges.items():
        both = ranges[name].both(allowed) if name in ranges else allowed
        if both is None:
            raise UserError(
                f"{name} is to be in {ranges[name]} by {one.where} and in {allowed} by {other.where}; "
                "they must have a value in common: change one of the two"
            )
        ranges[name] = both
    limits = [(getattr(one.budget, key), getattr(other.budget, key)) for key in _LIMITS]
    usd, hours, trials = (min((limit for limit in pair if limit is not None), default=None) for pair in limits)
    return Directions(
        prose="\n\n".join(filter(None, (one.prose, other.prose))),
        frozen=one.frozen | other.frozen,
        ranges=ranges,
        forbidden=one.forbidden | other.forbidden,
        budget=Limits(usd, hours, trials),
        where=f"{one.where} and {other.where}",
    )


def in_force(texts: Mapping[str, str], preset: str) -> Directions:
    """The directions of the profiles of a preset.

    Args:
        texts: Of the files, by name.
        preset: Of the profile; empty for objectives without presets.

    Raises:
        UserError: A text is not valid, or the two contradict one another.
    """
    names = (GENERAL, file_for(preset)) if preset else (GENERAL,)
    return _in_force(*((name, texts[name]) for name in names if name in texts))


def check(texts: Mapping[str, str]) -> None:
    """Sees that files of directions are valid, and that none contradicts the one for all profiles.

    Args:
        texts: By file name.

    Raises:
        UserError: One is not.
    """
    general = [(GENERAL, texts[GENERAL])] if GENERAL in texts else []
    for name, text in texts.items():
        _in_force(*general, *([] if name == GENERAL else [(name, text)]))


@lru_cache(maxsize=64)
def _in_force(*texts: tuple[str, str]) -> Directions:
    return merged(*(parse(text, where=name) for name, text in texts))


def described(directions: Directions) -> str:
    """What the block says, in one line."""
    budget = directions.budget
    limits = {"USD": budget.usd, "hours": budget.hours, "trials": budget.trials}
    said = [
        *(f"{name} frozen" for name in sorted(directions.frozen)),
        *(f"{name} in {allowed}" for name, allowed in directions.ranges.items()),
        *(f"no {name}" for name in sorted(operator.value for operator in directions.forbidden)),
        *(f"at most {limit:g} {unit}" for unit, limit in limits.items() if limit is not None),
    ]
    return ", ".join(said) or ("prose alone" if directions.prose else "none")


# ---- a change against them ----


def refusal(
    directions: Directions, *, before: Mapping[str, str], after: Mapping[str, str], operator: Operator | None
) -> str | None:
    """Which of the directions a change breaks, in one line; None if it breaks none.

    A name counts wherever the program sets it, so that a second assignment, or one in a function, is a change as well.

    Args:
        directions: Of the profile.
        before: The editable files that the change is made to, text by path.
        after: The same with it.
        operator: Of the proposal; None for a person's own, which no ban on operators is meant for.

    Raises:
        UserError: A program does not parse.
    """
    if operator in directions.forbidden:
        return f"against {directions.where}: {operator.value} is forbidden"
    names = directions.frozen | directions.ranges.keys()
    for path in sorted({*before, *after}) if names else ():
        old, new = before.get(path, ""), after.get(path, "")
        if path.endswith(".py") and old != new:
            broken = _broken(directions, _settings(old, names), _settings(new, names))
            if broken is not None:
                return f"against {directions.where}: {broken}"
    return None


@dataclass(frozen=True)
class _Setting:
    """How a program sets a name: its value where that is one constant, else the statements that do it."""

    value: Value | None
    statements: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = "; ".join(self.statements) if self.value is None else repr(self.value)
        said = " ".join(said.split())
        return said if len(said) <= SAID_CHARS else f"{said[: SAID_CHARS - 1]}…"


def _broken(directions: Directions, before: Mapping[str, _Setting], after: Mapping[str, _Setting]) -> str | None:
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if _unchanged(old, new):
            continue
        said = f"{old} became {new}" if old and new else f"{old} was removed" if old else f"{new} is new"
        if name in directions.frozen:
            return f"{name} is frozen, and {said}"
        allowed = directions.ranges[name]
        if new is None or new.value is None:
            return f"{name} has the range {allowed} and must stay one constant, and {said}"
        if not allowed.allows(new.value):
            return f"{name} has the range {allowed}, and {said}"
    return None


def _unchanged(old: _Setting | None, new: _Setting | None) -> bool:
    if old is None or new is None:
        return old is new
    return same_value(old.value, new.value) and old.statements == new.statements


def _settings(source: str, names: Set[str]) -> dict[str, _Setting]:
    """How a program sets these names, those that it does set."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(syntax_tree(source)):
        if isinstance(node, ast.stmt):
            for name in names & set(_targets(node)):
                found.setdefault(name, []).append(ast.unparse(node) if not hasattr(node, "body") else _head(node))
    constants = constant_lines(source)
    return {
        name: _Setting(constants[name].value)
        if name in constants and len(statements) == 1
        else _Setting(None, tuple(statements))
        for name, statements in found.items()
    }


def _head(node: ast.stmt) -> str:
    return ast.unparse(node).partition("\n")[0]


def _targets(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement sets by itself, without the statements inside of it."""
    queue = list(ast.iter_child_nodes(statement))
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, ast.stmt):
            queue += ast.iter_child_nodes(node)


def unknown_names(directions: Directions, files: Mapping[str, str]) -> list[str]:
    """Frozen names and names with a range that the program does not set at all.

    Raises:
        UserError: A program does not parse.
    """
    names = directions.frozen | directions.ranges.keys()
    programs = [source for path, source in files.items() if path.endswith(".py")] if names else []
    known = {name for source in programs for name in _settings(source, names)}
    return sorted(names - known)
