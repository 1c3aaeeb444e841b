"""What the operators without a model share: changes taken apart and carried onto other programs, and what may be said.

It works on texts alone, runs no git, and has no idea of its own.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from raysearch.directions import Directions, refusal
from raysearch.errors import UserError
from raysearch.knobs import (
    ConstantLine,
    Knob,
    Value,
    Values,
    broken_rule,
    constant_lines,
    fingerprint,
    read_knobs,
    read_rules,
    rewrite,
    same_value,
    skeleton,
    source_lines,
    syntax_tree,
)
from raysearch.model import Operator
from raysearch.patches import Conflict, align_constants, unified_diff
from raysearch.proposers import Idea, Request

HUNK_GAP = 2  # equal lines between two changes that still make them one hunk
TITLE_CHARS = 60  # of a changed line or value, as people read it
_BUILTINS = frozenset({*dir(builtins), "__file__"})

Travel = Callable[[Knob, Value, Value], "Value | None"]
"""The new value of a knob here when elsewhere it went from one value to another; None: that cannot be said."""


# ---- what is proposed ----


@dataclass(frozen=True)
class Change:
    """A program as it could be.

    Attributes:
        files: The changed files, text by path.
        hypothesis: Why it is worth a run.
    """

    files: Mapping[str, str]
    hypothesis: str
    predicted_delta: float | None = None


@dataclass(frozen=True)
class Attempt:
    """Something to propose, not yet worked out: `make` gives None when it cannot be done to the program."""

    source: str
    make: Callable[[], Change | None]


class Sieve:
    """Makes ideas of attempts: those that give a valid program as directed, new on the profile, each source once."""

    def __init__(self, proposer: str, operator: Operator) -> None:
        self._proposer = proposer
        self._operator = operator
        self._given: dict[str, set[str]] = {}
        self._useless: dict[str, tuple[str, Directions, set[str]]] = {}  # by profile: on this base, so directed

    def was_tried(self, request: Request, source: str) -> bool:
        """Whether that was proposed on the profile, or came to a program that was."""
        return source in request.sources or source in self._given.get(request.profile, ())

    def is_done(self, request: Request, source: str) -> bool:
        """Whether it was tried, or cannot be made to the program."""
        return self.was_tried(request, source) or source in self._useless_now(request)

    def ideas(self, request: Request, attempts: Iterable[Attempt]) -> list[Idea]:
        """Up to `request.count` ideas, worked out one by one in their order."""
        if self._operator in request.directions.forbidden:
            return []
        given, useless = self._given.setdefault(request.profile, set()), self._useless_now(request)
        known = {*request.known, fingerprint(request.files)}
        ideas: list[Idea] = []
        for attempt in attempts:
            if len(ideas) >= request.count:
                break
            if self.was_tried(request, attempt.source) or attempt.source in useless:
                continue
            change = attempt.make()
            if change is None or not is_valid(request.files, change.files) or self._is_refused(request, change):
                useless.add(attempt.source)
                continue
            given.add(attempt.source)
            print_ = fingerprint({**request.files, **change.files})
            if print_ not in known:
                known.add(print_)
                ideas.append(self._idea(request, attempt, change))
        return ideas

    def _useless_now(self, request: Request) -> set[str]:
        """Sources that give nothing on this base, as the directions are."""
        base, directions, useless = self._useless.get(request.profile, ("", request.directions, set[str]()))
        if base != request.base or directions != request.directions:
            useless = set[str]()
        self._useless[request.profile] = (request.base, request.directions, useless)
        return useless

    def _is_refused(self, request: Request, change: Change) -> bool:
        after = {**request.files, **change.files}
        return refusal(request.directions, before=request.files, after=after, operator=self._operator) is not None

    def _idea(self, request: Request, attempt: Attempt, change: Change) -> Idea:
        patch = "".join(unified_diff(path, request.files.get(path), text) for path, text in change.files.items())
        return Idea(
            patch,
            self._operator,
            change.hypothesis,
            self._proposer,
            predicted_delta=change.predicted_delta,
            source=attempt.source,
        )


def is_valid(files: Mapping[str, str], changed: Mapping[str, str]) -> bool:
    """Whether changed files are programs still, as far as can be seen without running them.

    They parse, every knob is in its range, no rule breaks that held, `train` is there if it was, and no name is used
    that is bound nowhere, unless it was so before.
    """
    for path, text in changed.items():
        if path.endswith(".py") and not _is_program(path, files.get(path, ""), text):
            return False
    return True


def _is_program(path: str, old: str, new: str) -> bool:
    try:
        if skeleton({path: old}, path)[0] != skeleton({path: new}, path)[0]:
            before, after = syntax_tree(old), syntax_tree(new)
            if "train" in _functions(before) - _functions(after):
                return False
            if _unbound(after) - _unbound(before):
                return False
        broken = _broken(old)
        return _broken(new) in (None, broken)
    except UserError:
        return False


def _broken(source: str) -> str | None:
    knobs = {name: knob.value for name, knob in read_knobs(source).items()}
    rules = read_rules(source)
    if not rules:
        return None
    return broken_rule(rules, {name: line.value for name, line in constant_lines(source).items()} | knobs)


def _functions(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _unbound(tree: ast.AST) -> set[str]:
    """Names that are read and bound in no scope of the program."""
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = set(bindings(tree))
    return set() if "*" in bound else loaded - bound - _BUILTINS


def bindings(tree: ast.AST) -> Iterator[str]:
    """Every name that is bound, in whatever scope, as often as it is; "*" where an import may bind any."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name.partition(".")[0]
            case _:
                pass


# ---- a knob's move ----


def travelled(here: Knob, before: Value, after: Value) -> Value:
    """What a change of a knob elsewhere comes to here.

    With the same value here, or where it is no number, the new value itself. Otherwise its ratio, or its difference
    where the knob's range holds zero, from the value here; inside the range here.
    """
    if not (here.is_number and _is_number(before) and _is_number(after)):
        return after
    if here.value == before:
        return here.nearest(float(after))
    if here.is_ratio and float(before) > 0 and float(after) > 0:
        return here.nearest(float(here.value) * float(after) / float(before))
    return here.nearest(float(here.value) + float(after) - float(before))


def middle(here: Knob, other: Value) -> Value | None:
    """The value between a knob's own and another: geometric where ratios matter; None where there is none."""
    if not (here.is_number and here.is_ordered and _is_number(other)):
        return None
    if here.is_ratio and float(other) > 0:
        return here.nearest(math.sqrt(float(here.value) * float(other)))
    return here.nearest((float(here.value) + float(other)) / 2)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def described(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The knobs that differ, as `NAME old → new`."""
    moves: list[str] = []
    for path, text in new.items():
        before = _constants(path, old.get(path, ""))
        moves += [
            _move(name, before[name], line)
            for name, line in _constants(path, text).items()
            if name in before and not same_value(before[name].value, line.value)
        ]
    return ", ".join(moves)


def _move(name: str, before: ConstantLine, after: ConstantLine) -> str:
    return f"{name} {before.text[:TITLE_CHARS]} → {after.text[:TITLE_CHARS]}"


def _constants(path: str, source: str) -> dict[str, ConstantLine]:
    try:
        return constant_lines(source) if path.endswith(".py") else {}
    except UserError:
        return {}


# ---- a change taken apart ----


@dataclass(frozen=True)
class Part:
    """One of the changes that lead from one text to another: a constant's value, or a hunk of lines.

    Attributes:
        key: Names it by what it changes, the same wherever it stands.
        title: For people.
        text: The first text with this change alone.
        is_value: Whether it is a constant's value.
    """

    key: str
    path: str
    title: str
    text: str
    is_value: bool = False


def parts(before: Mapping[str, str], after: Mapping[str, str]) -> list[Part]:
    """The changes of all files that both have, constants first; comments alone count as a hunk."""
    found: list[Part] = []
    for path, old in before.items():
        if path in after and after[path] != old:
            found += _parts(path, old, after[path])
    return found


def _parts(path: str, old: str, new: str) -> list[Part]:
    before, after = _constants(path, old), _constants(path, new)
    lines, others = source_lines(old), source_lines(new)
    found: list[Part] = []
    for name, line in before.items():
        if name not in after or same_value(line.value, after[name].value):
            continue
        title = _move(name, line, after[name])
        # as it is written there: `rewrite` has four digits, and no 2**19
        text = _with_line(lines, line, after[name].text)
        found.append(Part(f"{path} {title}", path, title, "".join(text), is_value=True))
        others = _with_line(others, after[name], line.text)
    aligned, new = old, "".join(others)
    if before and after:  # both are programs: constants that they share read alike, whatever their comments
        aligned, _, new = align_constants(old, old, new, path=path)
    own, theirs = source_lines(aligned), source_lines(new)
    for start, end, added in _hunks(own, theirs):
        removed = lines[start:end]
        digest = hashlib.sha256("\0".join([*removed, "\1", *added]).encode("utf-8", "replace")).hexdigest()[:12]
        said = next((line.strip() for line in (*removed, *added) if line.strip()), "blank lines")
        text = "".join([*lines[:start], *added, *lines[end:]])
        found.append(Part(f"{path} {digest}", path, f"{path}:{start + 1} {said[:TITLE_CHARS]}", text))
    return found


def _with_line(lines: list[str], line: ConstantLine, text: str) -> list[str]:
    """The lines with another value written in one of them."""
    old = lines[line.index]
    end = old.removeprefix(line.head + line.text + line.tail)
    return [*lines[: line.index], line.with_text(text) + end, *lines[line.index + 1 :]]


def _hunks(old: list[str], new: list[str]) -> list[tuple[int, int, list[str]]]:
    """(start, end, lines that take their place) of each run of changed lines."""
    hunks: list[list[int]] = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if hunks and i1 - hunks[-1][1] <= HUNK_GAP:
            hunks[-1][1], hunks[-1][3] = i2, j2
        else:
            hunks.append([i1, i2, j1, j2])
    return [(i1, i2, new[j1:j2]) for i1, i2, j1, j2 in hunks]


# ---- a change carried elsewhere ----


def carry(
    before: Mapping[str, str], after: Mapping[str, str], files: Mapping[str, str], travel: Travel
) -> dict[str, str] | None:
    """Makes the change from `before` to `after` to other files.

    Knobs that it moves get the value that `travel` says, other knobs stay as they are in `files`, and lines of text
    are changed where they and their neighbours read the same.

    Returns:
        The files that differ from `files`, or None when the change cannot be made to them.
    """
    changed: dict[str, str] = {}
    for path, new in after.items():
        old, ours = before.get(path), files.get(path)
        if old == new:
            continue
        if old is None and ours is None:
            changed[path] = new
            continue
        merged = None if old is None or ours is None else _carried(path, old, new, ours, travel)
        if merged is None:
            return None
        if merged != ours:
            changed[path] = merged
    return changed if before.keys() <= after.keys() else None


def _carried(path: str, before: str, after: str, ours: str, travel: Travel) -> str | None:
    if path.endswith(".py"):
        try:
            before, after, ours = _aligned(path, before, after, ours, travel)
        except (Conflict, UserError):
            return None
    lines = _merged(source_lines(before), source_lines(after), source_lines(ours))
    return None if lines is None else "".join(lines)


def _aligned(path: str, before: str, after: str, ours: str, travel: Travel) -> tuple[str, str, str]:
    """The texts with knobs as they are to become, so that only other lines are left to merge."""
    here, old, new = (read_knobs(text, path=path) for text in (ours, before, after))
    own: Values = {}
    moved: Values = {}
    for name, knob in here.items():
        if name not in old or name not in new:
            continue
        own[name] = moved[name] = knob.value
        if not same_value(old[name].value, new[name].value):
            value = travel(knob, old[name].value, new[name].value)
            if value is None:
                raise Conflict(f"{path}: {name} has no value here that means the same")
            moved[name] = value
    return align_constants(rewrite(before, own), rewrite(after, moved), ours, path=path)


def _merged(before: list[str], after: list[str], ours: list[str]) -> list[str] | None:
    """Ours with the change from before to after, or None where ours reads otherwise there."""
    places: dict[int, int] = {}
    for i, j, length in SequenceMatcher(None, before, ours, autojunk=False).get_matching_blocks():
        places.update((i + k, j + k) for k in range(length))
    result: list[str] = []
    done = 0
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        start = places.get(i1 - 1, -2) + 1 if i1 else 0
        end = places.get(i2, -1) if i2 < len(before) else len(ours)
        if start < done or end < start:
            return None
        if ours[start:end] not in (before[i1:i2], after[j1:j2]):
            return None
        result += [*ours[done:start], *after[j1:j2]]
        done = end
    return [*result, *ours[done:]]
