"""A program in fewer lines: bodies are left out, the longest first, and every line that is shown is as it was. Pure.

It changes no program; what it gives is to be read, and the lines that it shows can be searched for in the original.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raysearch.errors import UserError
from raysearch.knobs import source_lines, syntax_tree

WHOLE = ("train",)  # functions of the module that are shown in full
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_NOTE = re.compile(r"# \[\d+ lines are left out here\]")


@dataclass(frozen=True)
class _Body:
    """The lines of a function or a block behind its head and docstring, from 0; `last` is one past the end."""

    path: str
    first: int
    last: int
    note: str
    saved: int
    is_block: bool

    def holds(self, other: _Body) -> bool:
        """Whether the other one is a part of it."""
        return self.path == other.path and self.first <= other.first < self.last


def shorter(files: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The files as they are, then with the longest function body left out, then with the two longest, and so on.

    When no function's body is left, blocks of the module follow: classes, and what stands under a condition. A body is
    replaced by a comment that says how many lines are missing. Constants, heads, docstrings and `train` stay; a file
    that is no Python stays whole.
    """
    shown = dict(files)
    yield shown
    left_out: list[_Body] = []
    bodies = [body for path, source in files.items() for body in _bodies(path, source)]
    for body in sorted(bodies, key=lambda body: (body.is_block, -body.saved, body.path, body.first)):
        if any(other.holds(body) for other in left_out):
            continue  # a function within one that is left out already: that one is longer
        left_out = [*(other for other in left_out if not body.holds(other)), body]
        here = [other for other in left_out if other.path == body.path]
        shown = {**shown, body.path: _without(files[body.path], here)}
        yield shown


def note(lines: int) -> str:
    """The comment that stands for lines which are not shown."""
    return f"# [{lines} lines are left out here]"


def notes(text: str) -> list[str]:
    """The comments in a text that stand for lines which were not shown."""
    return _NOTE.findall(text)


def _bodies(path: str, source: str) -> Iterator[_Body]:
    if not path.endswith(".py"):
        return
    try:
        tree = syntax_tree(source, path=path)
    except UserError:
        return
    lines = source_lines(source)
    for node in (*_functions(tree), *_blocks(tree)):
        has_docstring = not isinstance(node, ast.If) and ast.get_docstring(node, clean=False) is not None
        statements = node.body[1:] if has_docstring else node.body
        if not statements:
            continue
        first, last = _start(statements[0]) - 1, statements[-1].end_lineno or node.lineno
        head = lines[first].encode()[: statements[0].col_offset] if first + 1 == statements[0].lineno else b""
        if head.strip() or first < node.lineno:
            continue  # on the line of something that is shown
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        end = lines[last - 1][len(lines[last - 1].rstrip("\r\n")) :]
        text = f"{indent}{note(last - first)}{end}"
        saved = sum(len(line.encode("utf-8", "surrogatepass")) for line in lines[first:last]) - len(text)
        if saved > 0:
            yield _Body(path, first, last, text, saved, is_block=not isinstance(node, _FUNCTION))


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, without those that are shown whole and what is in them."""
    waiting: list[ast.AST] = [node for node in tree.body if getattr(node, "name", None) not in WHOLE]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _FUNCTION):
            yield node
        waiting += ast.iter_child_nodes(node)


def _blocks(tree: ast.Module) -> Iterator[ast.ClassDef | ast.If]:
    """Classes and conditions of the module; not those with an `else`, which is a part of what they say."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.If) and not node.orelse):
            yield node


def _start(node: ast.stmt) -> int:
    """The first line of a statement, decorators included."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(one.lineno for one in decorators)])


def _without(source: str, bodies: list[_Body]) -> str:
    lines = source_lines(source)
    for body in sorted(bodies, key=lambda body: -body.first):
        lines[body.first : body.last] = [body.note]
    return "".join(lines)
