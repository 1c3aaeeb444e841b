"""From the text of a model's answer to changed files, strictly: what is not exactly right is refused with the reason.

It asks no model and touches no file; whether the changed program is any good is for others to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import msgspec

from raysearch import outline
from raysearch.model import Operator
from raysearch.wording import clean, plural

MAX_CHARS = 1_000_000  # of an answer, looked at before anything else
MAX_HYPOTHESIS = 1_000
MAX_EDITS = 100
MAX_LINE_EDITS = 3  # by the narrower schema
MAX_LINES = 10_000  # of a changed file: comparing longer ones takes minutes
NEAREST_LINES, NEAREST_CHARS, NEAREST_TRIES = 10_000, 120, 8  # what is looked at to find the line that was meant
SHOWN_CHARS = 80  # of a line or a path in a message

OPERATORS = (
    *(Operator.DRAFT, Operator.TUNE, Operator.SIMPLIFY),
    *(Operator.ABLATE, Operator.DEBUG, Operator.COMBINE),
)
"""What a model may call its change; the others are made by the search itself."""


class AnswerError(Exception):
    """An answer that cannot be used; the message is one line that the model can be told."""


@dataclass(frozen=True)
class Edit:
    """A place in a file and what takes its place.

    Attributes:
        path: Of the file; None where there is only one that may be edited.
        search: The text there, which occurs once in the file.
    """

    path: str | None
    search: str
    replace: str


@dataclass(frozen=True)
class Answer:
    """What a model proposes: edits, or a whole file in place of the only one that may be edited.

    Attributes:
        predicted_delta: Expected change of the metric, if one is given.
    """

    hypothesis: str
    operator: Operator
    predicted_delta: float | None
    edits: tuple[Edit, ...] = ()
    file: str | None = None


def _strict(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_HYPOTHESIS = {
    "type": "string",
    "description": "why this change should improve the metric, in one or two sentences",
}
_OPERATOR = {"type": "string", "enum": [operator.value for operator in OPERATORS]}
_DELTA = {"type": ["number", "null"], "description": "expected change of the metric, with its sign"}
_REPLACE = {"type": "string", "description": "text that takes its place"}

SCHEMA: Mapping[str, Any] = _strict(
    hypothesis=_HYPOTHESIS,
    operator=_OPERATOR,
    predicted_delta=_DELTA,
    edits={
        "type": "array",
        "items": _strict(
            path={"type": ["string", "null"], "description": "the file; null where only one is editable"},
            search={"type": "string", "description": "text that occurs exactly once in the file, copied exactly"},
            replace=_REPLACE,
        ),
    },
    file={"type": ["string", "null"], "description": "instead of edits: the whole new text of the file; else null"},
)
"""JSON schema of an answer, as the strict modes of servers want it: every key required, no other key."""


def schema_of_lines(files: Mapping[str, str], shown: str) -> dict[str, Any]:
    """A narrower schema, by which an edit can only name a line that is there once: small models copy badly.

    Args:
        files: All files that may be edited, text by path.
        shown: What the model is told: a line that it does not see cannot be meant.
    """
    seen = frozenset(shown.splitlines())
    places = [
        _strict(path={"type": "string", "enum": [path]}, search={"type": "string", "enum": lines}, replace=_REPLACE)
        for path, text in sorted(files.items())
        if (lines := [line for line in dict.fromkeys(text.splitlines()) if line in seen and _stands_alone(line, text)])
    ]
    if not places:
        return dict(SCHEMA)
    return _strict(
        hypothesis=_HYPOTHESIS,
        operator=_OPERATOR,
        predicted_delta=_DELTA,
        edits={"type": "array", "items": {"anyOf": places}, "minItems": 1, "maxItems": MAX_LINE_EDITS},
        file={"type": "null"},
    )


def _stands_alone(line: str, text: str) -> bool:
    return bool(line.strip()) and text.count(line) == 1


# ---- reading ----


class _Edit(msgspec.Struct, forbid_unknown_fields=True):
    search: str
    replace: str
    path: str | None = None


class _Answer(msgspec.Struct, forbid_unknown_fields=True):
    hypothesis: str
    operator: str
    predicted_delta: float | None = None
    edits: list[_Edit] | None = None
    file: str | None = None


def parse(text: str) -> Answer:
    """Reads an answer: a JSON object, or the only one in the text that stands in a fenced block.

    Keys that may be null may also be left out.

    Raises:
        AnswerError: It is too long, no such object, or says what it may not.
    """
    if len(text) > MAX_CHARS:
        raise AnswerError(f"the answer has {len(text)} characters; at most {MAX_CHARS} are read: answer shorter")
    source = _object_text(text)
    try:
        found = json.loads(source, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
        answer = msgspec.convert(found, _Answer)
    except json.JSONDecodeError as error:
        near = source[max(0, error.pos - 20) : error.pos + 20]
        raise AnswerError(f"the answer is no valid JSON: {error}, near {_shown(near)}") from None
    except msgspec.ValidationError as error:
        raise AnswerError(f"the answer does not fit its schema: {clean(str(error))}") from None
    except ValueError as error:  # a number of thousands of digits
        raise AnswerError(f"the answer is no valid JSON: {clean(str(error))}") from None
    except RecursionError:
        raise AnswerError("the answer is nested too deeply; its schema has three levels") from None
    return _checked(answer)


def _object_text(text: str) -> str:
    if text.lstrip().startswith("{"):
        return text
    blocks = [block for block in _fenced(text) if block.lstrip().startswith("{")]
    if len(blocks) != 1:
        said = "the answer is empty" if not text.strip() else f"the answer holds {plural(len(blocks), 'JSON object')}"
        raise AnswerError(f"{said}; answer with exactly one, alone or in a fenced block")
    return blocks[0]


def _fenced(text: str) -> list[str]:
    """What stands between lines of three backticks."""
    blocks: list[str] = []
    inside: list[str] | None = None
    for line in text.split("\n"):
        mark = line.strip()
        if inside is None:
            inside = [] if mark.startswith("```") else None
        elif mark == "```":
            blocks.append("\n".join(inside))
            inside = None
        else:
            inside.append(line)
    return blocks


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise AnswerError(f"the answer has the key {_shown(double)} twice; give it once")
    return found


def _refuse_constant(name: str) -> None:
    raise AnswerError(f"the answer holds {name}, which is no JSON; give a finite number or null")


def _checked(answer: _Answer) -> Answer:
    edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in answer.edits or ())
    texts = {"hypothesis": answer.hypothesis, "file": answer.file or ""}
    if len(edits) > MAX_EDITS:
        raise AnswerError(f"the answer has {len(edits)} edits; at most {MAX_EDITS} are allowed: give a whole file")
    for number, edit in enumerate(edits, 1):
        texts[f"edit {number}"] = f"{edit.path or ''}{edit.search}{edit.replace}"
    for name, text in texts.items():
        _check_text(name, text)
    if not answer.hypothesis.strip():
        raise AnswerError("hypothesis is empty; say in a sentence why the change should help")
    if len(answer.hypothesis) > MAX_HYPOTHESIS:
        length = len(answer.hypothesis)
        raise AnswerError(f"hypothesis has {length} characters; at most {MAX_HYPOTHESIS} are allowed: shorten it")
    delta = answer.predicted_delta
    if delta is not None and not math.isfinite(delta):
        raise AnswerError(f"predicted_delta is {delta}; give a finite number or null")
    operator = next((operator for operator in OPERATORS if operator.value == answer.operator), None)
    if operator is None:
        known = ", ".join(operator.value for operator in OPERATORS)
        raise AnswerError(f"operator {_shown(answer.operator)} is not allowed; take one of {known}")
    return Answer(answer.hypothesis, operator, delta, edits, answer.file)


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise AnswerError(f"{name} holds a NUL character; a program is text: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AnswerError(f"{name} holds half a character (a lone surrogate); write the character itself") from None


# ---- applying ----


def apply(answer: Answer, files: Mapping[str, str]) -> dict[str, str]:
    """Makes the change.

    Each edit is looked for in the file as it is, not as the edits before leave it. Nothing is normalised, but a whole
    file gets the line ends of the one that it replaces.

    Args:
        answer: What was proposed.
        files: All files that may be edited, text by path.

    Returns:
        The files that differ, text by path.

    Raises:
        AnswerError: It does not apply, names another file, or changes nothing.
    """
    if answer.file is not None and answer.edits:
        raise AnswerError("the answer has both edits and a file; give one of them, and null or [] for the other")
    if answer.file is not None:
        results = _whole(answer.file, files)
    elif answer.edits:
        results = _edited(tuple(dict.fromkeys(answer.edits)), files)  # said twice is said once
    else:
        raise AnswerError("the answer has neither edits nor a file; give one of them")
    changed = {path: text for path, text in results.items() if text != files[path]}
    if not changed:
        same = bool(answer.edits) and all(edit.search == edit.replace for edit in answer.edits)
        what = "in each edit REPLACE is the same as SEARCH; write it as it shall be" if same else "change something"
        raise AnswerError(f"the result is the program as it is; {what}")
    for path, text in changed.items():
        lines = text.count("\n")
        if lines > MAX_LINES:
            raise AnswerError(f"{path} would have {lines} lines; at most {MAX_LINES} are allowed")
        notes = outline.notes(text)
        if len(notes) > len(outline.notes(files[path])):
            raise AnswerError(f"{path} would hold {notes[0]!r}, which stands for lines that were not shown; give edits")
    return changed


def _whole(new: str, files: Mapping[str, str]) -> dict[str, str]:
    if len(files) != 1:
        raise AnswerError(
            f"a whole file is for one editable file, there are {len(files)}: {_listed(files)}; give edits"
        )
    ((path, old),) = files.items()
    if not new.strip():
        raise AnswerError(f"the new {path} is empty; give all of its text")
    end = _line_end(old)
    return {path: new if end is None else new.replace("\r\n", "\n").replace("\n", end)}


def _edited(edits: Sequence[Edit], files: Mapping[str, str]) -> dict[str, str]:
    places: list[tuple[str, int, int, Edit]] = []  # path, start, number, edit
    errors: list[str] = []
    for number, edit in enumerate(edits, 1):
        try:
            path = _path(edit, files)
            places.append((path, _place(edit, path, files[path]), number, edit))
        except AnswerError as error:
            errors.append(f"edit {number}: {error}")
    if errors:  # several at once: there is one retry
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise AnswerError("; ".join(errors[:3]) + more)
    results: dict[str, str] = {}
    kept: dict[str, list[str]] = {}
    end: dict[str, tuple[int, int]] = {}  # by path: where the last edit ended, and its number
    for path, start, number, edit in sorted(places, key=lambda place: place[:3]):
        done, before = end.get(path, (0, 0))
        if start < done:
            raise AnswerError(f"edits {before} and {number} overlap in {path}; make them one")
        kept.setdefault(path, []).extend((files[path][done:start], edit.replace))
        end[path] = (start + len(edit.search), number)
    for path, parts in kept.items():
        results[path] = "".join(parts) + files[path][end[path][0] :]
    return results


def _path(edit: Edit, files: Mapping[str, str]) -> str:
    if edit.path is None and len(files) == 1:
        return next(iter(files))
    if edit.path is None:
        raise AnswerError(f"names no path; editable are {_listed(files)}")
    if edit.path not in files:
        raise AnswerError(f"{_shown(edit.path)} may not be edited; editable: {_listed(files)}")
    return edit.path


def _place(edit: Edit, path: str, text: str) -> int:
    """Where the edit starts in the text."""
    if not edit.search:
        raise AnswerError("SEARCH is empty; copy the lines that are to change")
    _check_line_ends(edit, path, text)
    start = text.find(edit.search)
    if start < 0:
        raise AnswerError(f"SEARCH does not occur in {path}; {_nearest(edit.search, text)}")
    again = text.find(edit.search, start + 1)
    if again >= 0:
        times = max(2, text.count(edit.search))
        lines = f"first in lines {text.count(chr(10), 0, start) + 1} and {text.count(chr(10), 0, again) + 1}"
        raise AnswerError(f"SEARCH occurs {times} times in {path}, {lines}; copy more lines around it")
    return start


def _check_line_ends(edit: Edit, path: str, text: str) -> None:
    end = _line_end(text)
    for name, part in (("SEARCH", edit.search), ("REPLACE", edit.replace)):
        other = part.replace("\r\n", "").count("\n") if end == "\r\n" else part.count("\r") if end else 0
        if other:
            written = {"\n": "\\n alone", "\r\n": "\\r\\n"}
            raise AnswerError(f"the lines of {path} end in {written[end or '']}, those of {name} do not; write them so")


def _line_end(text: str) -> str | None:
    """How all lines of a text end; None where there is none, or several ways."""
    if "\r" not in text:
        return "\n" if "\n" in text else None
    plain = text.replace("\r\n", "")
    return None if "\n" in plain or "\r" in plain else "\r\n"


def _nearest(search: str, text: str) -> str:
    """Says which line was probably meant by the first of the searched ones that is not there."""
    lines = text.splitlines()[:NEAREST_LINES]
    there = set(lines)
    wanted = next((line for line in search.splitlines() if line.strip() and line not in there), None)
    if wanted is None:
        return "each of its lines does, but not one after the other like that: copy them exactly"
    start = wanted.strip()[:NEAREST_CHARS]
    matcher = SequenceMatcher(b=start, autojunk=False)
    length = len(start) * 3 // 2  # of a line that goes on, a comment perhaps, only the start was searched
    rough: list[tuple[float, int]] = []
    for index, line in enumerate(lines):
        matcher.set_seq1(line.strip()[:length])
        rough.append((matcher.quick_ratio(), -index))
    best = (0.0, 0)
    for _, place in sorted(rough, reverse=True)[:NEAREST_TRIES]:  # the exact ratio takes long: only of a few
        matcher.set_seq1(lines[-place].strip()[:length])
        best = max(best, (matcher.ratio(), place))
    if best[0] < 0.5:
        return f"no line is like {_shown(wanted)}: copy it exactly"
    return f"not {_shown(wanted)} but, in line {1 - best[1]}, {_shown(lines[-best[1]])}"


def _listed(files: Mapping[str, str]) -> str:
    return ", ".join(sorted(files))


def _shown(text: str) -> str:
    short = text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"
    return repr(short).encode("utf-8", "backslashreplace").decode()
