"""Unified diffs and three-way merges as text: what proposers write and what the ratchet merges.

It runs no git and touches no file: `ratchet` applies what is made here.
"""

from __future__ import annotations

import difflib
import re

from raysearch.errors import UserError
from raysearch.knobs import (
    ConstantLine,
    broken_rule,
    constant_lines,
    read_knobs,
    read_rules,
    same_value,
    source_lines,
)

_CRLF_HEADER = re.compile(r"^\+\+\+ [^\n]*\r\n@@ -", re.MULTILINE)
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_UNSAFE = re.compile(r'[\x00-\x1f\x7f"\\]')  # in a path of a patch's header: git wants it quoted as in C


class PatchError(Exception):
    """A patch does not apply or touches what it may not; the message is one line."""


class Empty(PatchError):
    """A patch or a merge that changes nothing."""


class Conflict(Exception):
    """Two changes of one thing; the message names the knob with its values, or the file and the line."""


def unified_diff(path: str, old: str | None, new: str) -> str:
    """The patch that makes `new` of `old`, as `git apply` takes it; empty when they are equal.

    Args:
        path: Of the file, relative to the repository's root.
        old: The text before; None when the file is new.
        new: The text after. A last line without a newline stays one.
    """
    if old == new:
        return ""
    names = [_quoted(f"{side}/{path}") for side in "ab"]
    lines = [f"diff --git {names[0]} {names[1]}\n"]
    if old is None:
        lines.append("new file mode 100644\n")
        names[0] = "/dev/null"
    hunks = difflib.unified_diff(_lines(old or ""), _lines(new), names[0], names[1])
    lines += (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in hunks)
    return "".join(lines)


def _lines(text: str) -> list[str]:
    """Lines with their ends, split at newlines alone, as git does."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _quoted(path: str) -> str:
    if not _UNSAFE.search(path):
        return path
    return '"' + _UNSAFE.sub(lambda match: f"\\{ord(match[0]):03o}", path) + '"'


def is_converted(patch: str) -> bool:
    """Whether the patch's own header lines end in CRLF: some program converted the file as a whole."""
    return _CRLF_HEADER.search(patch) is not None


def with_line_ends(patch: str, *, crlf: bool) -> str:
    """The patch with plain headers and with the lines of its hunks ending in CRLF, or in LF."""
    result: list[str] = []
    old = new = 0  # lines that the hunk still has on either side
    for line in patch.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        end = "\n"
        if line.startswith("\\"):
            if result:  # the line before has no end at all
                result[-1] = result[-1].removesuffix("\r\n").removesuffix("\n") + "\n"
        elif old > 0 or new > 0:
            old -= not line.startswith("+")
            new -= not line.startswith("-")
            end = "\r\n" if crlf else "\n"
        elif (match := _HUNK.match(line)) is not None:
            old, new = (int(count or 1) for count in match.groups())
        result.append(line + end)
    return "".join(result)


def align_constants(base: str, candidate: str, onto: str, *, path: str) -> tuple[str, str, str]:
    """Merges the constants of a program by name, so that a textual merge has only the rest to do.

    Two changes of different constants in neighbouring lines are no conflict: each constant that all three texts have
    on a line of its own gets its merged line in all three.

    Args:
        base: The program that both sides come from.
        candidate: The one side.
        onto: The other side, whose layout is preferred.
        path: For messages.

    Returns:
        `base`, `candidate` and `onto` with equal values; unchanged when one of them is no valid Python.

    Raises:
        Conflict: Both sides gave a constant different values.
    """
    texts = (base, candidate, onto)
    try:
        of_base, of_candidate, of_onto = (constant_lines(text) for text in texts)
    except UserError:
        return texts
    lines = [source_lines(text) for text in texts]
    clashes: list[str] = []
    for name in (name for name in of_candidate if name in of_onto):
        ours, theirs = of_candidate[name], of_onto[name]
        origin = of_base.get(name)
        if origin is None:
            if not same_value(ours.value, theirs.value):
                clashes.append(f"{name} is new on both sides, {ours.text} in the candidate and {theirs.text}")
            continue
        merged = _merged_lines(origin, ours, theirs)
        if merged is None:
            clashes.append(f"{name} was {origin.text}, is {ours.text} in the candidate and {theirs.text}")
            continue
        for side, constant, text in zip(lines, (origin, ours, theirs), merged, strict=True):
            end = side[constant.index].removeprefix(constant.head + constant.text + constant.tail)
            side[constant.index] = text + end
    if clashes:
        raise Conflict(f"{path}: {'; '.join(f'{clash} in what it is merged onto' for clash in clashes)}")
    return "".join(lines[0]), "".join(lines[1]), "".join(lines[2])


def _merged_lines(base: ConstantLine, ours: ConstantLine, theirs: ConstantLine) -> tuple[str, str, str] | None:
    """The line of a constant for each of the three texts, or None when both sides changed its value."""
    if same_value(ours.value, base.value) or same_value(ours.value, theirs.value):
        text = theirs.text
    elif same_value(theirs.value, base.value):
        text = ours.text
    else:
        return None
    if _around(ours) in (_around(base), _around(theirs)):
        line = theirs.with_text(text)
    elif _around(theirs) == _around(base):
        line = ours.with_text(text)
    else:  # both wrote another comment: that is for the textual merge to say
        return base.with_text(text), ours.with_text(text), theirs.with_text(text)
    return line, line, line


def _around(line: ConstantLine) -> tuple[str, str]:
    """What stands around a constant's value, without the padding."""
    return " ".join(line.head.split()), line.tail.strip()


def check_merge(path: str, merged: str, *, candidate: str, onto: str) -> None:
    """Sees that two valid programs were merged to a valid one.

    Raises:
        Conflict: The merged text is no Python any more, a knob left its range, or a rule between knobs broke.
    """
    if not path.endswith(".py"):
        return
    try:
        before = {_broken(text, path) for text in (candidate, onto)}
    except UserError:
        return
    try:
        broken = _broken(merged, path)
    except UserError as error:
        raise Conflict(f"the merge is not valid: {error}") from None
    if broken is not None and broken not in before:
        raise Conflict(f"{path}: the merged knobs break the rule {broken}")


def _broken(source: str, path: str) -> str | None:
    knobs = read_knobs(source, path=path)
    return broken_rule(read_rules(source), {name: knob.value for name, knob in knobs.items()})


def first_conflict(path: str, merged: str, *, onto: str, marker_size: int) -> str:
    """Says where a merge with conflict markers failed first: file, line of `onto`, and the text there."""
    lines = merged.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("<" * marker_size)), 0)
    middle = next((i for i, line in enumerate(lines) if line.startswith("=" * marker_size)), start + 1)
    block, own = lines[start + 1 : middle], onto.split("\n")
    # The lines above the marker are merged ones: the nearest place in `onto` that reads the same is the one.
    places = [i for i in range(len(own) - len(block) + 1) if own[i : i + len(block)] == block] if block else []
    place = min(places, key=lambda i: abs(i - start), default=min(start, len(own) - 1))
    text = next((line.strip() for line in (*block, *lines[middle + 1 :]) if line.strip()), "")
    return f"{path}:{place + 1}: both sides changed {text[:60]!r}"
