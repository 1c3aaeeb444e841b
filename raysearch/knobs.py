"""Reads and rewrites the knobs of a program: module-level UPPERCASE constants with a range in their comment.

    DEPTH = 8          # in [1, 24]: transformer layers
    MATRIX_LR = 0.02   # in [0.001, 0.3] log: Muon learning rate of the matrices
    SEQ_LEN = 2048     # in {64, 128, 256, 512, 1024, 2048}: tokens a training row
    # rule: TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * SEQ_LEN) == 0

It works on text and syntax trees and never executes the program.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import operator
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from raysearch.errors import UserError

Value = int | float | str | bool
Values = dict[str, Value]

_RANGE = re.compile(
    r"#\s*in\s+(?:\[\s*(?P<low>[^,\]]+),\s*(?P<high>[^\]]+)\](?P<log>\s+log)?|\{(?P<choices>[^}]*)\})\s*(?::\s*(?P<help>.*))?$"
)
_RULE = re.compile(r"#\s*rule:\s*(?P<rule>.+?)\s*$")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # as Python counts lines: str.splitlines knows more line ends
# A knob that is written as most are. Programs that differ in such values alone are parsed once.
_PLAIN_KNOB = re.compile(
    r"^(?P<head>(?P<name>[A-Z][A-Z0-9_]*)(?:[ \t]*:[ \t]*\w+)?[ \t]*=[ \t]*)"
    r"(?P<text>-?\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?(?:\*\*\d+)?|True|False|\"[^\"\\\r\n]*\"|'[^'\\\r\n]*')"
    r"(?=[ \t]*#[ \t]*in\b)",
    re.MULTILINE | re.ASCII,
)
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse makes of a hostile program
_MAX_BITS = 4096  # of a number: a program must not keep its reader busy with 9**9**9**9
_LOGIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop),
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.Name, ast.expr_context),
)
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Knob:
    """One constant that may be changed.

    Attributes:
        value: As the program has it.
        low: Least value, both ends included; None for choices.
        high: Greatest value; None for choices.
        log: Whether equal ratios matter rather than equal differences.
        choices: Allowed values; empty for a range.
        help: What it is.
        line: Its line in the source, from 1.
    """

    name: str
    value: Value
    low: float | None
    high: float | None
    log: bool
    choices: tuple[Value, ...]
    help: str
    line: int

    @property
    def is_int(self) -> bool:
        """Whether a range holds whole numbers only."""
        return not self.choices and isinstance(self.value, int) and not isinstance(self.value, bool)

    def allows(self, value: Value) -> bool:
        """Whether the value is in the knob's range."""
        if self.choices:
            return value in self.choices
        if isinstance(value, str | bool) or self.low is None or self.high is None:
            return False
        return self.low <= value <= self.high and (not self.is_int or float(value).is_integer())

    def unit(self, value: Value) -> float:
        """Where the value lies in its range, 0 to 1; a choice by its place among the choices."""
        if self.choices:
            place = self.choices.index(value) if value in self.choices else 0
            return place / max(1, len(self.choices) - 1)
        assert self.low is not None
        assert self.high is not None
        assert not isinstance(value, str)
        if self.high == self.low:
            return 0.0
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def at(self, unit: float) -> float:
        """Inverse of `unit` for a range."""
        assert self.low is not None
        assert self.high is not None
        if self.log:
            return self.low * math.exp(unit * math.log(self.high / self.low))
        return self.low + unit * (self.high - self.low)

    @property
    def is_number(self) -> bool:
        """Whether all of its values are numbers; True and False are none."""
        return not self.choices or all(
            isinstance(choice, int | float) and not isinstance(choice, bool) for choice in self.choices
        )

    @property
    def is_ordered(self) -> bool:
        """Whether neighbours are alike: a range, or choices that are numbers in order."""
        if not self.is_number:
            return False
        steps = [float(later) > float(earlier) for earlier, later in pairwise(self.choices)]
        return all(steps) or not any(steps)

    @property
    def is_ratio(self) -> bool:
        """Whether a change of it means a ratio: all of its values are positive numbers."""
        if not self.choices:
            return self.low is not None and self.low > 0
        return self.is_number and all(float(choice) > 0 for choice in self.choices)

    def nearest(self, number: float) -> Value:
        """The allowed value that lies nearest to a number: a choice, a whole number, or 4 digits inside the range."""
        if self.choices:
            assert self.is_number
            return min(self.choices, key=lambda choice: self._distance(float(choice), number))
        assert self.low is not None
        assert self.high is not None
        inside = min(max(float(number), self.low), self.high)
        if self.is_int:
            # a range may end between whole numbers
            return min(max(round(inside), math.ceil(self.low)), math.floor(self.high))
        short = float(format_value(inside))
        if not self.low <= short <= self.high:  # rounded over an end with more digits than are written
            unit = 10.0 ** (math.floor(math.log10(abs(inside))) - 3)
            short = float(format_value(inside - unit if short > inside else inside + unit))
        return short if self.low <= short <= self.high else self.value

    def _distance(self, one: float, other: float) -> float:
        return abs(math.log(one / other)) if self.is_ratio and other > 0 else abs(one - other)


def syntax_tree(source: str, *, path: str = "train.py") -> ast.Module:
    """Parses a program; the tree is shared and not to be changed.

    Raises:
        UserError: A syntax error, with its line.
    """
    try:
        return _parsed(source)
    except _UNREADABLE as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else path
        nested = isinstance(error, RecursionError | MemoryError)
        message = "nested too deeply" if nested else getattr(error, "msg", None) or str(error)
        raise UserError(f"{place}: {message}; the program must be valid Python: mend that line") from None


@lru_cache(maxsize=16)  # a merge and a check look at each of their texts several times
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def read_knobs(source: str, *, path: str = "train.py") -> dict[str, Knob]:
    """Finds the knobs of a program, in its order.

    Args:
        source: Text of the program.
        path: For messages.

    Raises:
        UserError: The program does not parse, or a range is malformed or does not hold the constant's value.
    """
    quick = _quick(source)
    if quick is not None:
        outline, values = quick
        knobs = {
            name: replace(knob, value=values[name]) if name in values else knob for name, knob in outline.knobs.items()
        }
        if all(knob.allows(knob.value) for knob in knobs.values()):
            return knobs
    return _read(source, path=path, check=True)


def _read(source: str, *, path: str, check: bool) -> dict[str, Knob]:
    """The knobs, seen to be in their ranges if `check`."""
    comments = _comments(source)
    knobs: dict[str, Knob] = {}
    for node in syntax_tree(source, path=path).body:
        found = _constant(node)
        if found is None:
            continue
        name, value_node = found
        knobs.pop(name, None)  # the last assignment is the one that counts, and the one that `rewrite` changes
        match = _RANGE.search(comments.get(value_node.end_lineno or value_node.lineno, ""))
        if match is None:
            continue
        knobs[name] = _knob(name, value_node, match, where=f"{path}:{node.lineno}", check=check)
    return knobs


def read_rules(source: str) -> tuple[str, ...]:
    """The constraints between knobs that the program states, as expressions."""
    quick = _quick(source)
    return _rules(source) if quick is None else quick[0].rules


def _rules(source: str) -> tuple[str, ...]:
    lines = source_lines(source)
    alone = (text for line, text in _comments(source).items() if lines[line - 1].lstrip().startswith("#"))
    return tuple(match["rule"] for text in alone if (match := _RULE.match(text)) is not None)


def broken_rule(rules: Iterable[str], values: Mapping[str, Value]) -> str | None:
    """The first rule that the values break, or None.

    A rule that names something else than the given values says nothing about them and holds.

    Raises:
        UserError: A rule is not an expression of arithmetic, comparisons and logic, or mixes text and numbers.
    """
    for rule in rules:
        expression, names = _rule(rule)
        if not names <= values.keys():
            continue
        try:
            holds = bool(_evaluate(expression, values))
        except ArithmeticError:  # nothing divides by zero in a valid program
            holds = False
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"rule {rule!r} cannot be computed: {error}; rewrite it") from None
        if not holds:
            return rule
    return None


def tied(rules: Iterable[str]) -> dict[str, set[str]]:
    """For each name in a rule the others that stand in a rule with it.

    Raises:
        UserError: As from `broken_rule`.
    """
    found: dict[str, set[str]] = {}
    for rule in rules:
        _, names = _rule(rule)
        for name in names:
            found.setdefault(name, set()).update(names - {name})
    return found


@lru_cache(maxsize=256)  # the same few rules are asked about every proposal
def _rule(rule: str) -> tuple[ast.expr, frozenset[str]]:
    """A rule's expression, and the names in it."""
    try:
        tree = ast.parse(rule, mode="eval")
    except _UNREADABLE:
        tree = None
    if tree is None or not all(isinstance(node, _LOGIC) for node in ast.walk(tree)):
        raise UserError(f"rule {rule!r}: only arithmetic, comparisons, and/or/not on knobs are allowed; rewrite it")
    return tree.body, frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def rewrite(source: str, values: Mapping[str, Value]) -> str:
    """Writes new values into a program, leaving every other character as it is.

    Args:
        source: Text of the program.
        values: New values by knob name; a value equal to the old one leaves its text alone.

    Returns:
        The new text.

    Raises:
        UserError: A name is no constant of the program.
    """
    nodes = dict(found for node in syntax_tree(source).body if (found := _constant(node)) is not None)
    unknown = [name for name in values if name not in nodes]
    if unknown:
        raise UserError(f"{unknown[0]} is no UPPERCASE constant of the program; it has {', '.join(nodes) or 'none'}")
    lines = [line.encode() for line in source_lines(source)]  # ast counts columns in UTF-8 bytes
    for name, value in values.items():
        node = nodes[name]
        if same_value(_literal(node), value):
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        text = format_value(value).encode("utf-8", "backslashreplace")
        if first == last:
            after = _aligned(after, spare=len(lines[first]) - len(before) - len(after) - len(text))
        lines[first : last + 1] = [before + text + after, *[b""] * (last - first)]  # keep the other lines' numbers
    return b"".join(lines).decode()


@dataclass(frozen=True)
class ConstantLine:
    """A constant that has a physical line to itself, which is `head + text + tail`.

    Attributes:
        index: Of the line in `source_lines`, from 0.
        text: The value as it is written.
        tail: What follows the value, without the line's end.
    """

    index: int
    value: Value
    head: str
    text: str
    tail: str

    def with_text(self, text: str) -> str:
        """The line with another value written in it, its comment where it was while there is room."""
        spare = len(self.text.encode()) - len(text.encode())
        return self.head + text + _aligned(self.tail.encode(), spare=spare).decode()


def constant_lines(source: str) -> dict[str, ConstantLine]:
    """The UPPERCASE constants (knobs or not) that are assigned once, each alone on one line.

    Raises:
        UserError: The program does not parse.
    """
    lines = source_lines(source)
    body = syntax_tree(source).body
    used = Counter(line for node in body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))
    names = Counter(found[0] for node in body if (found := _constant(node)) is not None)
    constants: dict[str, ConstantLine] = {}
    for node in body:
        found = _constant(node)
        alone = node.lineno == node.end_lineno and used[node.lineno] == 1
        if found is None or not alone or names[found[0]] > 1:
            continue
        name, value_node = found
        line = lines[node.lineno - 1].rstrip("\r\n").encode()
        value = _literal(value_node)
        assert value is not None
        start, end = value_node.col_offset, value_node.end_col_offset
        head, text, tail = (part.decode() for part in (line[:start], line[start:end], line[end:]))
        constants[name] = ConstantLine(node.lineno - 1, value, head, text, tail)
    return constants


def _aligned(after: bytes, *, spare: int) -> bytes:
    """What follows a value, its comment kept in its column while there is room (`spare`: bytes that got free)."""
    if not spare or not re.match(rb" {2,}#", after):
        return after
    comment = after.lstrip(b" ")
    return b" " * max(2, len(after) - len(comment) + spare) + comment


def source_lines(source: str) -> list[str]:
    """The lines of a program with their ends, split where Python's parser counts a line."""
    return _LINE.findall(source)


def same_value(one: Value | None, other: Value | None) -> bool:
    """Whether two constants are equal and of one type: 1, 1.0 and True are three values."""
    return type(one) is type(other) and one == other


def format_value(value: Value) -> str:
    """A value as Python source, floats to 4 significant digits.

    Raises:
        UserError: An infinity or no number at all, which has no literal.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{value} cannot be written as a constant; a knob's value must be finite")
        text = f"{value:.4g}"
        return text if any(mark in text for mark in ".e") else f"{text}.0"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # every escape that JSON has means the same in Python
    return repr(value)


def fingerprint(sources: Mapping[str, str]) -> str:
    """Hash of programs that does not see comments, layout or docstrings.

    Args:
        sources: Text by path; a file that is no Python counts as it is.

    Returns:
        32 hexadecimal digits.
    """
    return _digest((path, _text(path, source)) for path, source in sources.items())


def size(sources: Mapping[str, str]) -> int:
    """How large programs are: characters of what `fingerprint` sees of them.

    A digit or a statement less is smaller; a comment, a docstring or a blank line less is not. The numbers compare
    programs under one version of Python and mean nothing else.
    """
    return sum(len(_text(path, source)) for path, source in sources.items())


def skeleton(sources: Mapping[str, str], path: str) -> tuple[str, dict[str, Knob]]:
    """Fingerprint of programs with the values of one file's knobs left out, and these knobs.

    Programs of one skeleton differ in the values of their knobs alone, and have the same knobs with the same ranges.
    Where the knobs of the file cannot be told from the rest (they are laid out oddly), all of it is the skeleton.
    """
    texts = {name: _text(name, source) for name, source in sources.items() if name != path}
    quick = _quick(sources[path]) if path.endswith(".py") else None
    if quick is None:
        return fingerprint(sources), {}
    outline, values = quick
    knobs = {name: replace(outline.knobs[name], value=value) for name, value in values.items()}
    ranges = [(knob.name, knob.low, knob.high, knob.log, knob.choices, knob.is_int) for knob in knobs.values()]
    return _digest([*texts.items(), (path, "\0".join(outline.parts)), ("", repr(ranges))]), knobs


def _digest(texts: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for path, text in sorted(texts):
        digest.update(f"{path}\0{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _text(path: str, source: str) -> str:
    """A program without comments, layout and docstrings; what is no Python as it is."""
    quick = _quick(source) if path.endswith(".py") else None
    if quick is not None:
        return quick[0].with_values(quick[1])
    try:
        tree = ast.parse(source) if path.endswith(".py") else None
        return source if tree is None else _normalised(tree)
    except _UNREADABLE:
        return source


@dataclass(frozen=True)
class _Outline:
    """What programs have in common that differ in the plainly written values of their knobs alone.

    Attributes:
        knobs: All of them, in order; the values of those in `names` mean nothing.
        names: The knobs whose values are left out, in order.
        parts: The normalised text around those values.
        rules: As `read_rules` gives them.
    """

    knobs: Mapping[str, Knob]
    names: tuple[str, ...]
    parts: tuple[str, ...]
    rules: tuple[str, ...]

    def with_values(self, values: Mapping[str, Value]) -> str:
        """The normalised text of the program that has these values."""
        written = [
            ast.dump(ast.Constant(values[name])) + part for name, part in zip(self.names, self.parts[1:], strict=True)
        ]
        return self.parts[0] + "".join(written)


def _quick(source: str) -> tuple[_Outline, Values] | None:
    """The outline and the values that fill it, or None for a program that has to be read the long way.

    A value is a literal of one token (or a power of two), before and after: putting a 0 in its place leaves the rest
    of the program as it was, so that the zeroed text stands for all programs that differ in values.
    """
    texts: list[str] = []

    def zeroed(match: re.Match[str]) -> str:
        texts.append(match["text"])
        return f"{match['head']}0"

    outline = _outline(_PLAIN_KNOB.sub(zeroed, source))
    if outline is None:
        return None
    values: Values = {}
    for name, text in zip(outline.names, texts, strict=True):
        value = _written(text)
        if value is None:
            return None
        values[name] = value
    return outline, values


@lru_cache(maxsize=4096)
def _written(text: str) -> Value | None:
    try:
        return _literal(ast.parse(text, mode="eval").body)
    except _UNREADABLE:
        return None


@lru_cache(maxsize=32)
def _outline(zeroed: str) -> _Outline | None:
    """The outline of a program whose plain knobs are all 0; None when one is no knob or the program is invalid."""
    try:
        tree = ast.parse(zeroed)
        knobs = _read(zeroed, path="", check=False)
    except (*_UNREADABLE, UserError):
        return None
    lines = [(match["name"], len(source_lines(zeroed[: match.start()])) + 1) for match in _PLAIN_KNOB.finditer(zeroed)]
    names = [found[0] for node in tree.body if (found := _constant(node)) is not None]
    # A line that looks like a knob may stand in a docstring, or be one of two for that name.
    if any(names.count(name) != 1 or name not in knobs or knobs[name].line != line for name, line in lines):
        return None
    places = dict(lines)
    if any(name not in places and not knob.allows(knob.value) for name, knob in knobs.items()):
        return None
    marks = {name: f"\0{number}\0" for number, name in enumerate(places)}
    text = _normalised(tree, marks=marks)
    parts: list[str] = []
    for mark in marks.values():
        part, found, text = text.partition(ast.dump(ast.Constant(mark)))
        if not found:
            return None
        parts.append(part)
    return _Outline(knobs, tuple(places), (*parts, text), _rules(zeroed))


def _normalised(tree: ast.Module, *, marks: Mapping[str, str] | None = None) -> str:
    """The text of a tree, which this changes; `marks` stand in for the values of these knobs."""
    named = [found for node in tree.body if (found := _constant(node)) is not None] if marks else []
    marked = {id(value): marks[name] for name, value in named if marks and name in marks}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = _literal(node.value)
            if value is not None:  # 2**16 and 65536 are one program
                node.value = ast.Constant(marked.get(id(node.value), value))
    return ast.dump(tree)


@lru_cache(maxsize=16)  # tokenizing is what takes the time, and knobs and rules are both read from it
def _comments(source: str) -> Mapping[int, str]:
    """The comment on each line."""
    comments: dict[int, str] = {}
    try:
        # newline=None: a lone carriage return ends a line here too, as it does for the parser
        for token in tokenize.generate_tokens(io.StringIO(source, newline=None).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string
    except (tokenize.TokenError, SyntaxError):
        pass  # the parser says what is wrong, with its line
    return comments


def _constant(node: ast.stmt) -> tuple[str, ast.expr] | None:
    """(name, value) of `NAME = literal` or `NAME: type = literal`."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            pass
        case _:
            return None
    return (name, value) if name.isupper() and _literal(value) is not None else None


def _literal(node: ast.expr) -> Value | None:
    """The value of a literal or of arithmetic on literals (`2**16`), else None."""
    if not isinstance(node, ast.Constant | ast.UnaryOp | ast.BinOp):
        return None
    try:
        return _evaluate(node, {})
    except (ArithmeticError, TypeError, ValueError, RecursionError):
        return None


def _evaluate(node: ast.expr, names: Mapping[str, Value]) -> Value:
    """Computes arithmetic, comparisons and logic; raises what Python raises, and ValueError for anything else."""
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BoolOp() | ast.Compare():
            return _logic(node, names)
        case ast.UnaryOp(op=op, operand=operand):
            return _unary(op, _evaluate(operand, names))
        case ast.BinOp(left=left, op=op, right=right):
            return _compute(op, _number(_evaluate(left, names)), _number(_evaluate(right, names)))
        case _:
            raise ValueError(f"{type(node).__name__} is neither arithmetic nor logic")


def _logic(node: ast.BoolOp | ast.Compare, names: Mapping[str, Value]) -> Value:
    if isinstance(node, ast.Compare):
        terms = [_evaluate(term, names) for term in (node.left, *node.comparators)]
        return all(_COMPARE[type(op)](*pair) for op, pair in zip(node.ops, pairwise(terms), strict=True))
    value: Value = True
    for part in node.values:
        value = _evaluate(part, names)
        if bool(value) is isinstance(node.op, ast.Or):  # decided: `N == 0 or M % N == 0` must not divide by 0
            break
    return value


def _unary(op: ast.unaryop, value: Value) -> Value:
    match op:
        case ast.Not():
            return not value
        case ast.USub():
            return -_number(value)
        case ast.Invert():
            return _compute(ast.BitXor(), _number(value), -1)
        case _:
            return +_number(value)


def _compute(op: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(left, int) and isinstance(right, int) and isinstance(op, ast.Pow | ast.LShift):
        bits = left.bit_length() * right if isinstance(op, ast.Pow) else left.bit_length() + right
        if bits > _MAX_BITS:  # before it is computed: that may take minutes or gigabytes
            raise OverflowError("the number is too large")
    if type(op) not in _BINARY:
        raise ValueError(f"{type(op).__name__} is not for numbers")
    result = _BINARY[type(op)](left, right)
    if isinstance(result, int) and result.bit_length() > _MAX_BITS:
        raise OverflowError("the number is too large")
    return _number(result)


def _number(value: object) -> int | float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a real number")
    return value


def _knob(name: str, node: ast.expr, match: re.Match[str], *, where: str, check: bool) -> Knob:
    value = _literal(node)
    assert value is not None
    try:
        low, high, choices = _bounds(match)
    except (SyntaxError, ValueError, TypeError):
        raise UserError(
            f"{where}: {name} has the range {match[0]!r}; write `# in [low, high]`, `# in [low, high] log` "
            "or `# in {choice, choice}`"
        ) from None
    knob = Knob(name, value, low, high, bool(match["log"]), choices, (match["help"] or "").strip(), node.lineno)
    if low is not None and high is not None and (low > high or (knob.log and low <= 0)):
        raise UserError(f"{where}: {name} has the range [{low}, {high}]; low must not exceed high, and be > 0 for log")
    if check and not knob.allows(value):
        raise UserError(f"{where}: {name} = {value!r} is not in its own range {match[0]!r}; widen the range")
    return knob


def _bounds(match: re.Match[str]) -> tuple[float | None, float | None, tuple[Value, ...]]:
    if match["choices"] is not None:
        choices = ast.literal_eval(f"({match['choices']},)")
        if not choices or not all(isinstance(choice, int | float | str | bool) for choice in choices):
            raise ValueError(match["choices"])
        return None, None, tuple(choices)
    bounds = [_literal(ast.parse(match[end].strip(), mode="eval").body) for end in ("low", "high")]
    low, high = (float(bound) for bound in bounds if isinstance(bound, int | float))
    return low, high, ()
