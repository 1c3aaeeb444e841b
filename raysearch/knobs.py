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
import math
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raysearch.errors import UserError

Value = int | float | str | bool
Values = dict[str, Value]

_RANGE = re.compile(
    r"#\s*in\s+(?:\[\s*(?P<low>[^,\]]+),\s*(?P<high>[^\]]+)\](?P<log>\s+log)?|\{(?P<choices>[^}]*)\})\s*(?::\s*(?P<help>.*))?$"
)
_RULE = re.compile(r"^\s*#\s*rule:\s*(?P<rule>.+?)\s*$", re.MULTILINE)
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
_LOGIC = (*_ARITHMETIC, ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.Name, ast.expr_context)


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


def syntax_tree(source: str, *, path: str = "train.py") -> ast.Module:
    """Parses a program.

    Raises:
        UserError: A syntax error, with its line.
    """
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else path
        message = getattr(error, "msg", None) or str(error)
        raise UserError(f"{place}: {message}; the program must be valid Python: mend that line") from None


def read_knobs(source: str, *, path: str = "train.py") -> dict[str, Knob]:
    """Finds the knobs of a program, in its order.

    Args:
        source: Text of the program.
        path: For messages.

    Raises:
        UserError: The program does not parse, or a range is malformed or does not hold the constant's value.
    """
    comments = _comments(source)
    knobs: dict[str, Knob] = {}
    for node in syntax_tree(source, path=path).body:
        found = _constant(node)
        if found is None:
            continue
        name, value_node = found
        match = _RANGE.search(comments.get(value_node.end_lineno or value_node.lineno, ""))
        if match is None:
            continue
        knobs[name] = _knob(name, value_node, match, where=f"{path}:{node.lineno}")
    return knobs


def read_rules(source: str) -> tuple[str, ...]:
    """The constraints between knobs that the program states, as expressions."""
    return tuple(match["rule"] for match in _RULE.finditer(source))


def broken_rule(rules: Iterable[str], values: Mapping[str, Value]) -> str | None:
    """The first rule that the values break, or None.

    A rule that names something else than the given values says nothing about them and holds.

    Raises:
        UserError: A rule is not an expression of arithmetic, comparisons and logic.
    """
    for rule in rules:
        try:
            tree = ast.parse(rule, mode="eval")
        except SyntaxError:
            tree = None
        if tree is None or not all(isinstance(node, _LOGIC) for node in ast.walk(tree)):
            raise UserError(f"rule {rule!r}: only arithmetic, comparisons, and/or/not on knobs are allowed; rewrite it")
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if not names <= set(values):
            continue
        try:
            holds = bool(eval(compile(tree, "<rule>", "eval"), {"__builtins__": {}}, dict(values)))
        except ZeroDivisionError:
            holds = False
        if not holds:
            return rule
    return None


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
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # ast counts columns in UTF-8 bytes
    for name, value in values.items():
        node = nodes[name]
        if _literal(node) == value and type(_literal(node)) is type(value):
            continue
        line = lines[node.lineno - 1]
        end_column = node.end_col_offset if node.end_lineno == node.lineno else len(line.rstrip(b"\n"))
        before, after = line[: node.col_offset], line[end_column or len(line) :]
        text = format_value(value).encode()
        spare = (end_column or 0) - node.col_offset - len(text)
        if spare and re.match(rb" {2,}#", after):  # keep the comments aligned while there is room
            after = b" " * max(2, len(after) - len(after.lstrip(b" ")) + spare) + after.lstrip(b" ")
        lines[node.lineno - 1] = before + text + after
    return b"".join(lines).decode()


def format_value(value: Value) -> str:
    """A value as Python source, floats to 4 significant digits."""
    if isinstance(value, float):
        text = f"{value:.4g}"
        return text if any(mark in text for mark in ".en") else f"{text}.0"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def fingerprint(sources: Mapping[str, str]) -> str:
    """Hash of programs that does not see comments, layout or docstrings.

    Args:
        sources: Text by path; a file that is no Python counts as it is.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path, source in sorted(sources.items()):
        try:
            tree = ast.parse(source) if path.endswith(".py") else None
        except (SyntaxError, ValueError):
            tree = None
        digest.update(f"{path}\0{source if tree is None else _normalised(tree)}\0".encode())
    return digest.hexdigest()[:32]


def _normalised(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Assign):
            value = _literal(node.value)
            if value is not None:  # 2**16 and 65536 are one program
                node.value = ast.Constant(value)
    return ast.dump(tree)


def _comments(source: str) -> dict[int, str]:
    """The comment on each line."""
    comments: dict[int, str] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
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
    if not all(isinstance(part, _ARITHMETIC) for part in ast.walk(ast.Expression(node))):
        return None
    powers = [
        part for part in ast.walk(node) if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow | ast.LShift)
    ]
    if any(not isinstance(part.right, ast.Constant) or not _small(part.right.value) for part in powers):
        return None  # a power that takes minutes or gigabytes is nobody's constant
    try:
        value = eval(compile(ast.Expression(node), "<constant>", "eval"), {"__builtins__": {}})
    except (ArithmeticError, TypeError, ValueError):
        return None
    return value if isinstance(value, int | float | str | bool) else None


def _small(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= 64


def _knob(name: str, node: ast.expr, match: re.Match[str], *, where: str) -> Knob:
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
    if not knob.allows(value):
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
