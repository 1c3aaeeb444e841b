"""Makes the program smaller where the result should be the same: such a candidate wins by being no worse.

It looks at the syntax tree and cuts lines of text, so that the rest stays as it was written. It knows nothing of what
other files do with the program's names beyond those that it is shown.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raysearch.errors import UserError
from raysearch.knobs import (
    Knob,
    Value,
    Values,
    broken_rule,
    constant_lines,
    format_value,
    read_knobs,
    rewrite,
    size,
    source_lines,
    syntax_tree,
)
from raysearch.model import Operator
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.moves import Attempt, Change, Sieve, bindings

NEAR = 0.03  # of a knob's range: a move that a run could hardly show
NEAR_FIRST = 0.06  # the same for the way back to the first value, which has more to be said for it
KEPT_NAMES = frozenset({"train"})  # used from outside: the harness calls it

_BLOCKS = ("body", "orelse", "finalbody")
_ENDS = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_PURE = (
    *(ast.Constant, ast.Name, ast.expr_context, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop),
    *(ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop, ast.IfExp, ast.Tuple, ast.List),
)


class SimplifyProposer(Proposer):
    """Proposes the program with fewer digits, without what it does not use, or with a knob as it was at first.

    Args:
        seed: Of the order in which simplifications are tried.
    """

    name = "simplify"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._sieve = Sieve(self.name, Operator.SIMPLIFY)

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are smaller than `request.files`, as `knobs.size` counts."""
        return self._sieve.ideas(request, self._attempts(request))

    def tell(self, told: Told) -> None:
        """Learns nothing: what can be simplified is seen from the program."""

    def _attempts(self, request: Request) -> Iterator[Attempt]:
        attempts: list[Attempt] = []
        for path, source in request.files.items():
            if not path.endswith(".py"):
                continue
            others = "\n".join(text for other, text in request.files.items() if other != path)
            try:
                rounded = _rounded(source, request.origin.get(path, ""))
                cuts = find_cuts(source, others)
            except UserError:  # not a program: nothing is known of it
                continue
            for name, value, why in rounded:
                attempts.append(_of_value(request.files, path, name, value, why))
            attempts += [_of_cut(request.files, path, cut) for cut in cuts]
        random.Random(f"{self._seed} {request.base}").shuffle(attempts)
        yield from attempts


def _of_value(files: Mapping[str, str], path: str, name: str, value: Value, why: str) -> Attempt:
    old = read_knobs(files[path])[name].value
    said = f"{name} {format_value(old)} → {format_value(value)}"

    def make() -> Change | None:
        return _if_smaller(files, path, rewrite(files[path], {name: value}), f"{said}: {why}")

    return Attempt(f"simplify {path} {said}", make)


def _of_cut(files: Mapping[str, str], path: str, cut: Cut) -> Attempt:
    def make() -> Change | None:
        said = f"{path}:{cut.start + 1} without {cut.what}; the result should be the same"
        return _if_smaller(files, path, cut.applied(files[path]), said)

    lines = "".join(source_lines(files[path])[cut.start : cut.end])
    digest = hashlib.sha256(f"{lines}\0{''.join(cut.lines)}".encode("utf-8", "replace")).hexdigest()[:12]
    return Attempt(f"simplify {path} {digest}", make)


def _if_smaller(files: Mapping[str, str], path: str, text: str, hypothesis: str) -> Change | None:
    return Change({path: text}, hypothesis) if size({path: text}) < size({path: files[path]}) else None


# ---- values ----


def _rounded(source: str, origin: str) -> list[tuple[str, Value, str]]:
    """(knob, value, why) of shorter values that lie near."""
    try:
        first: Values = {name: knob.value for name, knob in read_knobs(origin).items()}
    except UserError:
        first = {}
    found: list[tuple[str, Value, str]] = []
    for name, knob in read_knobs(source).items():
        short = _shorter(knob)
        if short is not None:
            found.append((name, short, "fewer digits"))
        back = first.get(name, knob.value)
        if back not in (knob.value, short) and knob.allows(back) and knob.is_ordered:
            near = NEAR_FIRST if not knob.choices else 0.0
            if abs(knob.unit(back) - knob.unit(knob.value)) <= near:
                found.append((name, back, "the first value, which is near"))
    return found


def _shorter(knob: Knob) -> float | None:
    """The value with the fewest digits that lies near a real number's."""
    if knob.choices or not isinstance(knob.value, float):
        return None
    for digits in range(4):
        # no digit at all is 0, where a range has it
        value = float(f"{knob.value:.{digits - 1}e}") if digits else 0.0
        if value == knob.value:
            return None
        if knob.allows(value) and abs(knob.unit(value) - knob.unit(knob.value)) <= NEAR:
            return value
    return None


# ---- lines that do nothing ----


@dataclass(frozen=True)
class Cut:
    """Lines of a program, from `start` (from 0) to before `end`, that can give way to others or to none."""

    start: int
    end: int
    what: str
    lines: tuple[str, ...] = ()

    def applied(self, source: str) -> str:
        """The program without them."""
        lines = source_lines(source)
        return "".join([*lines[: self.start], *self.lines, *lines[self.end :]])


def find_cuts(source: str, others: str = "") -> list[Cut]:
    """What a program does not need: names that nothing uses, statements without effect, tests that are constant.

    Args:
        source: The program.
        others: Text of the other files, whose mention of a name is a use of it.

    Raises:
        UserError: It does not parse.
    """
    tree, lines = syntax_tree(source), source_lines(source)
    cuts = _unused(tree, lines, others)
    knobs = read_knobs(source)
    bound = Counter(bindings(tree))
    fixed = {
        name: line.value
        for name, line in constant_lines(source).items()
        if name not in knobs and bound[name] == 1 and not bound["*"]  # no `global`, no local of that name
    }
    outermost = [node for top in tree.body for node in _functions(top)]
    for function in outermost:
        read = Counter(_reads(function))
        for block in _blocks(function):
            cuts += _idle(block, lines, read, is_function=block is function.body)
            cuts += [cut for node in block if (cut := _decided(node, block, lines, fixed)) is not None]
    return cuts


def _unused(tree: ast.Module, lines: list[str], others: str) -> list[Cut]:
    """Definitions of the module that nothing but themselves reads."""
    bound = Counter(name for node in tree.body for name in _defined(node))
    read = Counter(_reads(tree))
    cuts: list[Cut] = []
    for node in tree.body:
        names = _defined(node)
        own = Counter(_reads(node)) if isinstance(node, ast.FunctionDef | ast.ClassDef) else Counter[str]()
        idle = names and all(
            read[name] == own[name] and bound[name] == 1 and name not in others and not _is_kept(name) for name in names
        )
        if idle and _owns_lines(node, lines):
            start, end = _with_comment(node, lines)
            cuts.append(Cut(start, end, f"{', '.join(names)}, which nothing uses"))
    return cuts


def _with_comment(node: ast.stmt, lines: list[str]) -> tuple[int, int]:
    """The extent of a definition that stands alone, with the blank lines after it and the comment above.

    One among others has neither: the comment is about the group, and the blank lines end it.
    """
    start, after = _extent(node)
    end = next((i for i in range(after, len(lines)) if lines[i].strip()), len(lines))
    top = start
    while top > 0 and lines[top - 1].startswith("#"):
        top -= 1
    if end == after or (top > 0 and lines[top - 1].strip()):
        return start, after
    if top == 0 or any(line.startswith(("# rule:", "# --", "# ==")) for line in lines[top:start]):
        return start, end if top == start else after
    return top, end


def _is_kept(name: str) -> bool:
    return name in KEPT_NAMES or name.startswith("__")


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines and does nothing else; none for any other statement."""
    match node:
        case ast.FunctionDef(name=name, decorator_list=[]) | ast.ClassDef(name=name, decorator_list=[], keywords=[]):
            return [name]
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_pure(value):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if _is_pure(value):
            return [name]
        # `import a.b` that nothing reads is there for what it does
        case ast.Import(names=aliases) if all(alias.asname or "." not in alias.name for alias in aliases):
            return [alias.asname or alias.name for alias in aliases]
        case ast.ImportFrom(module=module, names=aliases) if module != "__future__":
            return [alias.asname or alias.name for alias in aliases]
        case _:
            return []


def _is_pure(node: ast.expr) -> bool:
    """Whether computing it does nothing else: no call, and nothing that could be one."""
    return all(isinstance(part, _PURE) for part in ast.walk(node))


def _reads(node: ast.AST) -> Iterator[str]:
    """Every name that is read, changed, or mentioned as text."""
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name, ctx=ast.Load() | ast.Del()):
                yield name
            case ast.AugAssign(target=ast.Name(id=name)):
                yield name
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                yield from names
            case ast.Constant(value=str(text)) if text.isidentifier():
                yield text
            case _:
                pass


def _functions(node: ast.stmt) -> list[ast.FunctionDef]:
    """The functions of a statement of the module that lie in no other."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    return [found for part in node.body for found in _functions(part)] if isinstance(node, ast.ClassDef) else []


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        if not isinstance(node, ast.ClassDef):  # what a class assigns is read by others
            for field in _BLOCKS:
                block: object = getattr(node, field, None)
                if isinstance(block, list) and block:
                    yield block


def _idle(block: list[ast.stmt], lines: list[str], read: Counter[str], *, is_function: bool) -> list[Cut]:
    """Statements that are never reached, or that have no effect."""
    cuts: list[Cut] = []
    end = next((i for i, node in enumerate(block) if isinstance(node, _ENDS)), len(block)) + 1
    if end < len(block) and not _yields(block[end:]) and all(_owns_lines(node, lines) for node in block[end:]):
        cuts.append(Cut(_extent(block[end])[0], _extent(block[-1])[1], "what is never reached"))
    for place, node in enumerate(block[:end]):
        is_docstring = (
            is_function and place == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        if len(block) > 1 and not is_docstring and _is_idle(node, read) and _owns_lines(node, lines):
            start, stop = _extent(node)
            cuts.append(Cut(start, stop, f"`{lines[start].strip()[:50]}`, which has no effect"))
    return cuts


def _is_idle(node: ast.stmt, read: Counter[str]) -> bool:
    match node:
        case ast.Pass():
            return True
        case ast.Expr(value=value):
            return _is_pure(value)
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            same = isinstance(value, ast.Name) and value.id == name
            return same or (_is_pure(value) and not read[name] and not read["locals"])
        case _:
            return False


def _decided(node: ast.stmt, block: list[ast.stmt], lines: list[str], fixed: Values) -> Cut | None:
    """An `if` whose test is the same in every run, replaced by the branch that is taken."""
    if not isinstance(node, ast.If) or not lines[node.lineno - 1].lstrip().startswith("if"):
        return None
    taken = _constant_test(node.test, fixed)
    if taken is None or _yields([node]) or not _owns_lines(node, lines):
        return None
    start, end = _extent(node)
    what = f"`if {ast.unparse(node.test)[:50]}`, which is always {taken}"
    branch = node.body if taken else node.orelse
    if not branch:
        return Cut(start, end, what) if len(block) > 1 else None
    first, last = _extent(branch[0])[0], _extent(branch[-1])[1]
    header = node.test.end_lineno or node.lineno
    if branch is node.orelse:
        after = _extent(node.body[-1])[1]
        header = next((i for i in range(after, first) if lines[i].lstrip().startswith("else")), first) + 1
    if first < header or lines[first].lstrip().startswith("elif") or _has_long_text(branch):
        return None
    indent = " " * (branch[0].col_offset - node.col_offset)
    kept = lines[header:last]  # with the comments above the first statement
    if any(line.strip() and not line.startswith(indent) for line in kept):
        return None
    return Cut(start, end, what, tuple(line.removeprefix(indent) for line in kept))


def _constant_test(test: ast.expr, fixed: Values) -> bool | None:
    """What a test always is, by the constants that are no knobs; None when that cannot be said."""
    if any(isinstance(part, ast.Name) and part.id not in fixed for part in ast.walk(test)):
        return None
    if isinstance(test, ast.Constant) and isinstance(test.value, str):
        return bool(test.value)
    try:
        return broken_rule([ast.unparse(test)], fixed) is None
    except UserError:
        return None


def _yields(block: list[ast.stmt]) -> bool:
    """Whether a function is a generator for its sake, even if it is never reached."""
    return any(isinstance(part, ast.Yield | ast.YieldFrom) for node in block for part in ast.walk(node))


def _has_long_text(block: list[ast.stmt]) -> bool:
    """Whether a text in it spans lines, and would change with their indentation."""
    return any(
        isinstance(part, ast.JoinedStr | ast.Constant) and part.end_lineno != part.lineno
        for node in block
        for part in ast.walk(node)
    )


def _extent(node: ast.stmt) -> tuple[int, int]:
    """Its first line (from 0) and the line after its last, decorators included."""
    first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
    return first - 1, node.end_lineno or node.lineno


def _owns_lines(node: ast.stmt, lines: list[str]) -> bool:
    """Whether nothing else stands on its lines but a comment."""
    start, end = _extent(node)
    before = lines[start].encode()[: node.col_offset]
    after = lines[end - 1].encode()[node.end_col_offset or 0 :].strip()
    return not before.strip() and (not after or after.startswith(b"#"))
