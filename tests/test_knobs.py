"""Knobs: what is read from a program, what is written into it, rules and fingerprints."""

from __future__ import annotations

import ast
import math
import re
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch.errors import UserError
from raysearch.knobs import (
    Value,
    broken_rule,
    constant_lines,
    fingerprint,
    format_value,
    read_knobs,
    read_rules,
    rewrite,
    same_value,
    size,
    skeleton,
    source_lines,
    tied,
)

PROGRAM = '''"""A program.

# rule: THIS > 1: not a rule, a docstring
"""
import os

DEPTH = 8             # in [1, 24]: transformer layers
MATRIX_LR = 0.02      # in [0.001, 0.3] log: Muon
SEQ_LEN: int = 2048   # in {64, 128, 2048}: tokens a row
PATTERN = "L"         # in {"L", "SL"}: é × –
BATCH = 2**16         # in [1, 2**20] log
FLAG = True           # in {True, False}
PLAIN = 3             # not a knob
lower = 3             # in [1, 5]: not a knob either
# rule: BATCH % SEQ_LEN == 0
#rule:DEPTH>=1


def train(run):
    INNER = 1  # in [1, 2]: not at module level
    # rule: DEPTH < 25
    return INNER, "# rule: 1 == 2"
'''


# ---- reading ----


def test_every_form_of_range_is_read():
    knobs = read_knobs(PROGRAM)
    assert list(knobs) == ["DEPTH", "MATRIX_LR", "SEQ_LEN", "PATTERN", "BATCH", "FLAG"]
    depth, rate, pattern = knobs["DEPTH"], knobs["MATRIX_LR"], knobs["PATTERN"]
    assert (depth.value, depth.low, depth.high, depth.log, depth.is_int) == (8, 1, 24, False, True)
    assert (depth.help, depth.line) == ("transformer layers", 7)
    assert (rate.value, rate.low, rate.high, rate.log, rate.is_int) == (0.02, 0.001, 0.3, True, False)
    assert knobs["SEQ_LEN"].choices == (64, 128, 2048)
    assert (pattern.choices, pattern.help) == (("L", "SL"), "é × –")
    assert (knobs["BATCH"].value, knobs["BATCH"].high) == (65536, 2**20)
    assert knobs["FLAG"].value is True


def test_a_constant_assigned_twice_counts_as_it_was_assigned_last():
    ranged_last = "N = 1  # in [1, 9]\nN = 2  # in [1, 5]\n"
    assert read_knobs(ranged_last)["N"].value == 2
    assert read_knobs(rewrite(ranged_last, {"N": 4}))["N"].value == 4
    assert read_knobs("N = 1  # in [1, 9]\nN = 2\n") == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("N = 0  # in [1, 9]", "N = 0 is not in its own range"),
        ("N = 3  # in [9, 1]", "low must not exceed high"),
        ("N = 3  # in [0, 9] log", "be > 0 for log"),
        ("N = 3  # in [a, 9]", "write `# in [low, high]`"),
        ("N = 3  # in [1+, 9]", "write `# in [low, high]`"),
        ("N = 3  # in {}", "write `# in [low, high]`"),
        ("N = 3  # in {None}", "write `# in [low, high]`"),
        ("N = 1.5  # in {1, 2}", "N = 1.5 is not in its own range"),
        ('N = "a"  # in [1, 2]', "N = 'a' is not in its own range"),
        ("N = (", "never closed"),
        ("N = 1\0", "null bytes"),
        ("N = " + "-" * 5000 + "1", "nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_knob_is_said_with_file_and_line_in_one_line(line: str, said: str):
    with pytest.raises(UserError) as error:
        read_knobs(f"# one\n{line}\n", path="a/train.py")
    message = str(error.value)
    assert said in message
    assert message.startswith("a/train.py")
    assert "\n" not in message


def test_a_constant_that_would_take_gigabytes_is_none():
    began = time.monotonic()
    for expression in ("9**9**9**9", "1 << 10**9", "'a' * 10**10", "(((2**64)**64)**64)**64", "2.0**9999", "1 / 0"):
        assert read_knobs(f"N = {expression}  # in [1, 2]\n") == {}
    assert time.monotonic() - began < 1


def test_where_a_value_lies_in_its_range():
    knobs = read_knobs(PROGRAM)
    assert knobs["DEPTH"].unit(1) == 0
    assert knobs["DEPTH"].unit(24) == 1
    assert knobs["MATRIX_LR"].unit(math.sqrt(0.001 * 0.3)) == pytest.approx(0.5)
    assert knobs["SEQ_LEN"].unit(128) == 0.5
    assert knobs["DEPTH"].allows(24)
    assert not knobs["DEPTH"].allows(25)
    assert not knobs["DEPTH"].allows(1.5)
    assert not knobs["DEPTH"].allows("1")
    assert not knobs["SEQ_LEN"].allows(100)


# ---- rewriting ----


def test_only_the_value_changes_and_comments_stay_in_their_column():
    new = rewrite(PROGRAM, {"DEPTH": 12, "MATRIX_LR": 0.12345678, "PATTERN": "SL", "SEQ_LEN": 64, "FLAG": False})
    assert new.splitlines()[6:12] == [
        "DEPTH = 12            # in [1, 24]: transformer layers",
        "MATRIX_LR = 0.1235    # in [0.001, 0.3] log: Muon",
        "SEQ_LEN: int = 64     # in {64, 128, 2048}: tokens a row",
        'PATTERN = "SL"        # in {"L", "SL"}: é × –',
        "BATCH = 2**16         # in [1, 2**20] log",
        "FLAG = False          # in {True, False}",
    ]
    assert rewrite(new, {name: knob.value for name, knob in read_knobs(PROGRAM).items()}) == PROGRAM


def test_an_equal_value_leaves_its_text_alone():
    assert rewrite(PROGRAM, {"BATCH": 65536}) == PROGRAM
    assert rewrite("N = 1\n", {"N": 1.0}) == "N = 1.0\n"
    assert rewrite("N = 1\n", {"N": True}) == "N = True\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("N = 1", "N = 22"),
        ("N=1;M = 2\n", "N=22;M = 2\n"),
        ("N = (1)  # c\n", "N = (22)  # c\n"),
        ("N = (1 +\n  2)  # c\nM = 1\n", "N = (22)  # c\nM = 1\n"),
        ('N = """a\nb"""  # c\nM = 1\n', "N = 22  # c\nM = 1\n"),
        ("N = \\\n  1\nM = 1\n", "N = \\\n  22\nM = 1\n"),
        ("# a\x0cb\u2028c\x85d\x1ce\nN = 1\n", "# a\x0cb\u2028c\x85d\x1ce\nN = 22\n"),
        ("\x0c\nN = 1  # é\n", "\x0c\nN = 22  # é\n"),
        ("X = 'é–'; N = 1 # é\r\nM = 1\r\n", "X = 'é–'; N = 22 # é\r\nM = 1\r\n"),
        ("M = 1\rN = 1\rL = 1\r", "M = 1\rN = 22\rL = 1\r"),
        ("N = -1\n", "N = 22\n"),
        ("N = 100    # c\n", "N = 22     # c\n"),
        ("N = 1  # c\n", "N = 22  # c\n"),
        ("N = 1 # c\n", "N = 22 # c\n"),
    ],
)
def test_the_place_of_a_value_is_found_in_any_layout(before: str, after: str):
    assert rewrite(before, {"N": 22}) == after


def test_several_values_of_several_lines_are_rewritten_at_once():
    source = "A = (1 +\n  1)\nB = (2 +\n  2)\nC = 3\n"
    assert rewrite(source, {"C": 9, "A": 7, "B": 8}) == "A = (7)\nB = (8)\nC = 9\n"


def test_a_name_that_the_program_lacks_is_refused_with_those_it_has():
    with pytest.raises(UserError, match=r"DEPHT is no UPPERCASE constant of the program; it has N, M"):
        rewrite("N = 1\nM = 2\n", {"DEPHT": 3})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_without_a_literal_is_refused(value: float):
    with pytest.raises(UserError, match="must be finite"):
        format_value(value)


@given(
    st.one_of(
        st.text(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)
    )
)
def test_a_written_value_reads_back(value: Value):
    written = format_value(value)
    assert "\n" not in written
    # a lone surrogate has no UTF-8: `rewrite` writes it as an escape
    found = ast.literal_eval(written.encode("utf-8", "backslashreplace").decode())
    assert same_value(found, float(f"{value:.4g}") if isinstance(value, float) else value)


@dataclass(frozen=True)
class Line:
    text: str
    name: str = ""
    values: tuple[Value, ...] = ()


COMMENTS = st.text(st.characters(blacklist_characters="\r\n\0", blacklist_categories=["Cs"]), max_size=12)


@st.composite
def knob_lines(draw: st.DrawFn, name: str) -> Line:
    padding = draw(st.sampled_from([" ", "  ", "          ", "\t", ""]))
    kind = draw(st.sampled_from(["int", "float", "choice"]))
    if kind == "choice":
        values = draw(st.lists(st.sampled_from(["L", "é", 'a"b', "\\", 3, 2.5, -7]), min_size=1, unique=True))
        bounds = "{" + ", ".join(map(repr, values)) + "}"
    elif kind == "int":
        values = sorted(draw(st.lists(st.integers(-1000, 10**6), min_size=2, max_size=4)))
        bounds = f"[{values[0]}, {values[-1]}]"
    else:
        numbers = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.4g}"))
        values = sorted(draw(st.lists(numbers, min_size=2, max_size=4)))
        bounds = f"[{values[0]!r}, {values[-1]!r}]"
    comment = f"# in {bounds}: {draw(COMMENTS)}"
    return Line(f"{name} = {format_value(values[0])}{padding}{comment}", name, tuple(values))


FILLERS = st.one_of(
    st.sampled_from(["", "import os", 'TEXT = """x\x0c\n# in [1, 2]: y"""', "def f():\n    return 1", "\x0c"]),
    COMMENTS.map(lambda text: f"# {text}"),
).map(Line)


@st.composite
def programs(draw: st.DrawFn) -> list[Line]:
    lines: list[Line] = []
    for number in range(draw(st.integers(1, 5))):
        lines += draw(st.lists(FILLERS, max_size=2))
        lines.append(draw(knob_lines(f"KNOB_{number}")))
    return lines


@settings(deadline=None)
@given(lines=programs(), end=st.sampled_from(["\n", "\r\n"]), data=st.data())
def test_rewritten_values_read_back_and_nothing_else_changes(lines: list[Line], end: str, data: st.DataObject):
    source = "".join(line.text.replace("\n", end) + end for line in lines)
    values = {
        line.name: data.draw(st.sampled_from(line.values))
        for line in lines
        if line.values and data.draw(st.booleans(), label=f"change {line.name}")
    }
    before, new = read_knobs(source), rewrite(source, values)
    after = read_knobs(new)
    assert list(before) == list(after) == [line.name for line in lines if line.name]
    for name, knob in after.items():
        assert same_value(knob.value, values.get(name, before[name].value))
        assert (knob.low, knob.high, knob.choices) == (before[name].low, before[name].high, before[name].choices)
        assert (knob.help, knob.line) == (before[name].help, before[name].line)
    for old_line, new_line in zip(source_lines(source), source_lines(new), strict=True):
        name = old_line.split(" ")[0]
        if name not in values or same_value(values[name], before[name].value):
            assert new_line == old_line
        else:
            written = re.escape(format_value(values[name]))
            comment = re.escape(old_line[old_line.index("# in ") :])
            assert re.fullmatch(f"{name} = {written}[ \\t]*{comment}", new_line)
    assert (fingerprint({"t.py": new}) == fingerprint({"t.py": source})) == all(
        same_value(knob.value, before[name].value) for name, knob in after.items()
    )


def test_constants_with_a_line_to_themselves_are_found():
    source = "A = 1  # c\nB = 2; C = 3\nD = (4 +\n 1)\nE = 5\nE = 6\nF: int = (7)\r\ng = 1\n"
    found = constant_lines(source)
    assert list(found) == ["A", "F"]
    lines = source_lines(source)
    for constant in found.values():
        assert lines[constant.index].rstrip() == constant.head + constant.text + constant.tail
    assert found["F"].with_text("8") == "F: int = (8)"


# ---- rules ----


def test_rules_are_comments_on_lines_of_their_own():
    assert read_rules(PROGRAM) == ("BATCH % SEQ_LEN == 0", "DEPTH>=1", "DEPTH < 25")
    assert read_rules("N = 1  # rule: N == 2\n") == ()


def test_the_first_broken_rule_is_named():
    rules = ["A % B == 0", "A < 10 or B == 0", "not C == 'x'"]
    assert broken_rule(rules, {"A": 4, "B": 2, "C": "y"}) is None
    assert broken_rule(rules, {"A": 4, "B": 3, "C": "y"}) == rules[0]
    assert broken_rule(rules, {"A": 12, "B": 2, "C": "y"}) == rules[1]
    assert broken_rule(rules, {"A": 4, "B": 2, "C": "x"}) == rules[2]
    assert broken_rule(rules, {"A": 4, "B": 0, "C": "y"}) == rules[0]  # nothing divides by zero
    assert broken_rule(rules, {"A": 5}) is None  # says nothing about what it does not know
    assert broken_rule(["0 < A <= B < 9", "B == 0 or A // B == 2 and ~A != 0"], {"A": 4, "B": 2}) is not None
    assert broken_rule(["B == 0 or A % B == 0"], {"A": 4, "B": 0}) is None


@pytest.mark.parametrize(
    "rule",
    [
        "__import__('os')",
        "A.real",
        "A if A else B",
        "[A]",
        "A in 'abc'",
        "A ==",
        "A := 1",
        "'a' < A",
        "-'a'",
        "(" * 300,
    ],
)
def test_a_rule_that_is_no_arithmetic_is_refused(rule: str):
    with pytest.raises(UserError, match="rewrite it"):
        broken_rule([rule], {"A": 1, "B": 2})


def test_the_names_of_a_rule_are_tied_to_each_other():
    assert tied(["A % B == 0", "A + C <= 1", "D > 1"]) == {"A": {"B", "C"}, "B": {"A"}, "C": {"A"}, "D": set()}
    with pytest.raises(UserError, match="rewrite it"):
        tied(["A.real"])


def test_a_rule_that_never_ends_is_broken_at_once():
    began = time.monotonic()
    assert broken_rule(["9**9**9**9 > A"], {"A": 1}) is not None
    assert time.monotonic() - began < 1


ARITHMETIC = ["+", "-", "*", "/", "//", "%", ">>", "&", "|", "^"]
LOGIC = ["==", "!=", "<", "<=", ">", ">=", "and", "or"]
EXPRESSIONS = st.recursive(
    st.one_of(st.integers(0, 40).map(str), st.sampled_from(["A", "B", "0.5", "2"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(ARITHMETIC + LOGIC), inner).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(st.sampled_from(["-", "+", "~", "not "]), inner).map(lambda parts: f"({''.join(parts)})"),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(rule=EXPRESSIONS, a=st.integers(-9, 9), b=st.sampled_from([0, 3, 0.25, True]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_rules_mean_what_python_means(rule: str, a: int, b: Value):
    values = {"A": a, "B": b}
    try:
        holds: bool | None = bool(eval(rule, {}, dict(values)))
    except ArithmeticError:
        holds = False
    except (TypeError, ValueError):
        holds = None
    if holds is None:
        with pytest.raises(UserError):
            broken_rule([rule], values)
    else:
        assert (broken_rule([rule], values) is None) == holds


# ---- fingerprints ----


def test_comments_layout_and_docstrings_do_not_show_in_a_fingerprint():
    one = "N = 2**16  # in [1, 2**20]\n\ndef f(a,\n      b):\n    '''Says.'''\n    return a+b\n"
    other = '"""A program."""\nN = 65536\ndef f(a, b):  # adds\n\n    return (a + b)\n'
    assert fingerprint({"t.py": one}) == fingerprint({"t.py": other})
    assert fingerprint({"t.py": one}) != fingerprint({"u.py": one})
    assert fingerprint({"t.py": one, "u.py": other}) == fingerprint({"u.py": other, "t.py": one})


def test_values_and_types_show_in_a_fingerprint():
    prints = {fingerprint({"t.py": f"N = {value}\n"}) for value in ("1", "1.0", "True", "'1'", "2", "f(1)")}
    assert len(prints) == 6
    assert len(fingerprint({"t.py": ""})) == 32


def test_what_is_no_python_counts_as_it_is():
    assert fingerprint({"t.toml": "a = 1 # x"}) != fingerprint({"t.toml": "a = 1 # y"})
    assert fingerprint({"t.py": "a = ("}) != fingerprint({"t.py": "a = [ "})
    for hostile in ("-" * 5000 + "1", "X = " + "1+" * 3000 + "1", "'" + "\ud800" + "'", "# \ud800"):
        assert fingerprint({"t.py": hostile}) == fingerprint({"t.py": hostile})


def test_the_short_way_to_a_fingerprint_agrees_with_the_long_one():
    """Programs that differ in knobs alone are parsed once; without its range in the comment a constant is no knob."""
    for values in ({}, {"DEPTH": 3, "MATRIX_LR": 1e-3, "FLAG": False}, {"SEQ_LEN": 64, "PATTERN": "SL", "BATCH": 8}):
        program = rewrite(PROGRAM, values)
        assert fingerprint({"t.py": program}) == fingerprint({"t.py": program.replace("# in", "# of")})


@settings(deadline=None)
@given(lines=programs(), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_layout_has_the_same_fingerprint_the_short_way(lines: list[Line], end: str):
    source = "".join(line.text.replace("\n", end) + end for line in lines)
    assert fingerprint({"t.py": source}) == fingerprint({"t.py": re.sub(r"(KNOB_\d = .*?)# in", r"\1# of", source)})


TWO_ASSIGNMENTS = "A = (1)\nA = 2  # in [0, 9]\nB = 3  # in [0, 9]\n"


@pytest.mark.parametrize(
    "source",
    [
        'x = """\nA = 1  # in [0, 9]\n"""\nB = 2  # in [0, 9]\n',
        "A = 1  # in [0, 9]\nA = 2  # in [0, 9]\n",
        TWO_ASSIGNMENTS,
        "f(\nA = 1  # in [0, 9]\n)\n",
        "x = \\\nA = 1  # in [0, 9]\n",
        "A = 1__0  # in [0, 9]\n",
        "A = '\0'  # in [0, 9]\n",
    ],
)
def test_a_line_that_only_looks_like_a_knob_is_none(source: str):
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        with pytest.raises(UserError):
            read_knobs(source)
    else:
        assert read_knobs(source).keys() <= {"A", "B"}
        assert read_knobs(source).get("A", None) is None or read_knobs(source)["A"].value == 2
    changed = source.replace("1", "7")
    assert (fingerprint({"t.py": source}) == fingerprint({"t.py": changed})) == (source == changed)


# ---- sizes and skeletons ----


def test_fewer_digits_and_fewer_statements_are_smaller_and_comments_do_not_count():
    assert size({"t.py": rewrite(PROGRAM, {"MATRIX_LR": 0.0212})}) > size({"t.py": PROGRAM})
    assert size({"t.py": PROGRAM.replace("    INNER = 1  # in [1, 2]: not at module level\n", "")}) < size(
        {"t.py": PROGRAM}
    )
    assert size({"t.py": PROGRAM.replace(": not at module level", "")}) == size({"t.py": PROGRAM})
    assert size({"t.py": PROGRAM, "b.txt": "four"}) == size({"t.py": PROGRAM}) + 4
    assert size({"t.py": "a = ("}) == 5


def test_programs_that_differ_in_values_alone_have_one_skeleton():
    outline, knobs = skeleton({"t.py": PROGRAM}, "t.py")
    values: dict[str, Value] = {"DEPTH": 3, "MATRIX_LR": 0.1, "PATTERN": "SL", "FLAG": False}
    other, moved = skeleton({"t.py": rewrite(PROGRAM, values)}, "t.py")
    assert other == outline
    assert list(knobs) == list(moved) == list(read_knobs(PROGRAM))
    assert {name: knob.value for name, knob in moved.items() if knob.value != knobs[name].value} == values
    for old, new in (("PLAIN = 3", "PLAIN = 4"), ("[1, 24]", "[1, 25]"), ("return INNER", "return 2"), ("8 ", "8.0 ")):
        assert old in PROGRAM
        assert skeleton({"t.py": PROGRAM.replace(old, new)}, "t.py")[0] != outline


# ---- moving along a range ----


def test_a_place_in_a_range_and_the_way_back():
    knobs = read_knobs(PROGRAM)
    for name in ("DEPTH", "MATRIX_LR", "BATCH"):
        for unit in (0.0, 0.3, 1.0):
            place = knobs[name].at(unit)
            assert knobs[name].unit(place) == pytest.approx(unit)


@pytest.mark.parametrize(
    ("name", "number", "nearest"),
    [
        ("DEPTH", 7.6, 8),
        ("DEPTH", 99.0, 24),
        ("DEPTH", -1.0, 1),
        ("MATRIX_LR", 0.123456, 0.1235),
        ("MATRIX_LR", 7.0, 0.3),
        ("SEQ_LEN", 500.0, 128),
        ("SEQ_LEN", 600.0, 2048),
        ("SEQ_LEN", 0.0, 64),
    ],
)
def test_the_nearest_allowed_value(name: str, number: float, nearest: Value):
    found = read_knobs(PROGRAM)[name].nearest(number)
    assert same_value(found, nearest)


def test_what_a_change_of_a_knob_means_depends_on_its_values():
    source = (
        "A = 1  # in [0, 9]\nB = 2.0  # in [1, 9]\nC = 4  # in {8, 4, 2}\nD = 4  # in {4, 8, 0}\n"
        'E = "a"  # in {"a", 1}\nF = True  # in {True, False}\n'
    )
    knobs = read_knobs(source)
    assert [name for name, knob in knobs.items() if knob.is_ratio] == ["B", "C"]
    assert [name for name, knob in knobs.items() if knob.is_ordered] == ["A", "B", "C"]
    assert [name for name, knob in knobs.items() if knob.is_number] == ["A", "B", "C", "D"]
