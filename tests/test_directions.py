"""The human's directions: what a text asks for, several texts together, and whether a change breaks them."""

import math
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch import objective, programs
from raysearch.directions import (
    Directions,
    Limits,
    Range,
    described,
    in_force,
    merged,
    parse,
    refusal,
    unknown_names,
)
from raysearch.errors import UserError
from raysearch.knobs import Value, read_knobs, rewrite
from raysearch.model import Operator
from raysearch.programs import Programs

TEXT = """\
# What I want

Small models.

```raysearch
frozen = ["HEADS", "NAMES"]
forbidden = ["simplify", "ablate"]

[ranges]
DEPTH = [4, 8]
LR = [0.01, inf]
MODE = {choices = ["slow", "fast"]}

[budget]
usd = 20
hours = 1.5
trials = 40
```

And no new imports.
"""
PROGRAM = '''\
"""A program."""

LR = 0.02  # in [0.001, 0.3] log: step size
DEPTH = 6  # in [1, 12]: layers
WIDTH = 64  # in {16, 32, 48, 64, 96}: units
HEADS = 4  # in [1, 8]: heads
MODE = "slow"  # in {"slow", "fast", "odd"}: how
BIAS = True  # in {True, False}: whether there is one
NAMES = ("a", "b")  # no knob
SIZE = 2**4


def train(run):
    return LR * DEPTH
'''


def wanted(block: str, *, where: str = "program.md") -> Directions:
    return parse(f"```raysearch\n{block}\n```\n", where=where)


def refused(directions: Directions, after: str, *, before: str = PROGRAM, operator: Operator | None = None) -> str:
    return refusal(directions, before={"a.py": before}, after={"a.py": after}, operator=operator) or ""


# ---- from text ----


def test_a_text_is_prose_and_what_its_block_says():
    found = parse(TEXT, where="program.md")
    assert found == Directions(
        prose="# What I want\n\nSmall models.\n\n\nAnd no new imports.",
        frozen=frozenset({"HEADS", "NAMES"}),
        ranges={"DEPTH": Range(4, 8), "LR": Range(0.01, math.inf), "MODE": Range(choices=("slow", "fast"))},
        forbidden=frozenset({Operator.SIMPLIFY, Operator.ABLATE}),
        budget=Limits(20.0, 1.5, 40),
        where="program.md",
    )
    assert described(found) == (
        "HEADS frozen, NAMES frozen, DEPTH in [4, 8], LR in [0.01, inf], MODE in {'slow', 'fast'}, "
        "no ablate, no simplify, at most 20 USD, at most 1.5 hours, at most 40 trials"
    )


@pytest.mark.parametrize(
    ("text", "prose", "said"),
    [
        ("", "", "none"),
        ("Be bold.\n", "Be bold.", "prose alone"),
        ("Be bold.\r\n\r\n```raysearch\r\nfrozen = []\r\n```\r\n", "Be bold.", "prose alone"),
        ("```raysearch\n# nothing yet\n```", "", "none"),
        ("~~~ raysearch\nbudget.usd = 0\n~~~~\n", "", "at most 0 USD"),
        ("```python\nDEPTH = 4\n```\n", "```python\nDEPTH = 4\n```", "prose alone"),
        (
            "````text\n```raysearch\nfrozen = 1\n```\n````",
            "````text\n```raysearch\nfrozen = 1\n```\n````",
            "prose alone",
        ),
        ("Write ```raysearch``` to open it.", "Write ```raysearch``` to open it.", "prose alone"),
    ],
)
def test_a_block_is_optional_and_other_blocks_are_prose(text: str, prose: str, said: str):
    found = parse(text, where="program.md")
    assert (found.prose, described(found)) == (prose, said)


@pytest.mark.parametrize(
    ("text", "value", "rule", "remedy"),
    [
        ("```raysearch\nfrozen = []\n", "program.md:1", "no end", "close it"),
        ("a\n```python\nx\n", "program.md:2", "no end", "close it"),
        ("```raysearch\n```\n\n```raysearch\n```\n", "program.md:4", "first is on line 1", "make them one"),
        ("```python\nx = 1\n\n```raysearch\n```\n", "program.md:4", "inside of what line 1 opened", "close that first"),
        ("a\n\n```raysearch\nfrozen = =\n```", "line 4", "must be TOML", "mend that line"),
        ("```raysearch\n" + "a = " + "[" * 5000 + "\n```", "program.md", "must be TOML", "mend"),
        ("```raysearch\nfrozn = []\n```", "'frozn'", "known: budget, forbidden, frozen, ranges", "mend it"),
        ('```raysearch\nfrozen = "LR"\n```', "'LR'", "list of names", "write frozen = ["),
        ('```raysearch\nfrozen = ["a b"]\n```', "'a b'", "list of names", "write frozen = ["),
        ('```raysearch\nforbidden = ["simplfy"]\n```', "'simplfy'", "known: draft, tune, ablate", "mend it"),
        ("```raysearch\nranges = [1, 2]\n```", "[1, 2]", "must be a table", "`[ranges]`"),
        ("```raysearch\nranges.LR = [2, 1]\n```", "[2, 1]", "must not exceed high", "write [1, 2]"),
        ("```raysearch\nranges.LR = [1]\n```", "[1]", "two numbers", "write [low, high]"),
        ("```raysearch\nranges.LR = [nan, 1]\n```", "nan", "two numbers", "write [low, high]"),
        ("```raysearch\nranges.BIAS = [false, true]\n```", "[False, True]", "two numbers", "{choices"),
        ("```raysearch\nranges.LR = 3\n```", "ranges.LR = 3", "two numbers", "{choices"),
        ("```raysearch\nranges.LR = {choices = []}\n```", "[]", "one value or more", "{choices"),
        ("```raysearch\nranges.LR = {choices = [1979-05-27]}\n```", "1979", "one value or more", "{choices"),
        ("```raysearch\nranges.LR = {choices = [1], low = 1}\n```", "'low'", "one value or more", "{choices"),
        (f"```raysearch\nranges.LR = [1, 1{'0' * 400}]\n```", "ranges.LR", "two numbers", "write"),
        ("```raysearch\nbudget.eur = 1\n```", "budget.eur", "known: usd, hours, trials", "remove it"),
        ("```raysearch\nbudget.hours = 0\n```", "0", "above 0", "leave it out"),
        ("```raysearch\nbudget.usd = -1\n```", "-1", "above 0", "leave it out"),
        ("```raysearch\nbudget.usd = inf\n```", "inf", "above 0", "leave it out"),
        ("```raysearch\nbudget.trials = 2.5\n```", "2.5", "whole number", "round it"),
        ("```raysearch\nbudget.trials = true\n```", "True", "above 0", "leave it out"),
    ],
)
def test_what_is_wrong_is_one_line_with_value_rule_and_remedy(text: str, value: str, rule: str, remedy: str):
    with pytest.raises(UserError) as error:
        parse(text, where="program.md")
    said = str(error.value)
    assert said.startswith("program.md")
    assert "\n" not in said
    for part in (value, rule, remedy):
        assert part in said


# ---- several texts ----


def test_together_bans_add_up_ranges_meet_and_the_smaller_limits_hold():
    one = parse("All.\n" + TEXT, where="program.md")
    other = parse(
        "Here.\n```raysearch\nfrozen = ['BIAS']\nforbidden = ['tune']\nbudget = {usd = 30, hours = 1}\n"
        "[ranges]\nDEPTH = [6, 99]\nMODE = {choices = ['fast', 'odd']}\nWIDTH = [16, 48]\n```",
        where="program-cpu.md",
    )
    found = merged(one, other)
    assert found.prose == f"{one.prose}\n\nHere."
    assert found.frozen == {"HEADS", "NAMES", "BIAS"}
    assert found.forbidden == {Operator.SIMPLIFY, Operator.ABLATE, Operator.TUNE}
    assert found.ranges["DEPTH"] == Range(6, 8)
    assert found.ranges["MODE"] == Range(choices=("fast",))
    assert found.ranges["WIDTH"] == Range(16, 48)
    assert found.budget == Limits(20.0, 1.0, 40)
    assert found.where == "program.md and program-cpu.md"
    assert merged() == Directions()
    assert merged(one) == one


def test_ranges_with_nothing_in_common_name_both_files():
    one, other = wanted("ranges.DEPTH = [1, 4]"), wanted("ranges.DEPTH = {choices = [5, 6]}", where="program-cpu.md")
    with pytest.raises(UserError) as error:
        merged(one, other)
    assert str(error.value) == (
        "DEPTH is to be in [1, 4] by program.md and in {5, 6} by program-cpu.md; "
        "they must have a value in common: change one of the two"
    )


def test_a_profile_follows_the_general_file_and_its_presets():
    texts = {
        "program.md": "All.",
        "program-cpu.md": "```raysearch\nfrozen = ['LR']\n```",
        "program-h100.md": "```raysearch\nfrozen = ['DEPTH']\n```",
    }
    assert in_force(texts, "cpu").frozen == {"LR"}
    assert in_force(texts, "h100").frozen == {"DEPTH"}
    assert in_force(texts, "rtx3060").prose == in_force(texts, "").prose == "All."
    assert in_force({}, "cpu") == Directions()


RANGES = st.one_of(
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(lambda ends: Range(min(ends), max(ends))),
    st.lists(st.sampled_from([-3, 0, 1, 2.5, 8, "a", "b", True, False]), min_size=1).map(
        lambda choices: Range(choices=tuple(choices))
    ),
)
VALUES = st.one_of(st.integers(-10, 10), st.sampled_from([0.5, 2.5, True, False, "a", "b", "c"]))


@given(RANGES, RANGES, VALUES)
def test_what_both_ranges_allow_is_what_each_of_them_does(one: Range, other: Range, value: Value):
    both = one.both(other)
    assert (both is not None and both.allows(value)) == (one.allows(value) and other.allows(value))


# ---- a change against them ----


@pytest.mark.parametrize(
    ("block", "change", "reason"),
    [
        ("frozen = ['DEPTH']", ("DEPTH = 6", "DEPTH = 7"), "DEPTH is frozen, and 6 became 7"),
        ("frozen = ['NAMES']", ('"a", "b"', '"a",'), "NAMES is frozen, and NAMES = ('a', 'b') became NAMES = ('a',)"),
        ("frozen = ['SIZE']", ("SIZE = 2**4\n", ""), "SIZE is frozen, and 16 was removed"),
        ("frozen = ['GAIN']", ("SIZE", "GAIN = 2\nSIZE"), "GAIN is frozen, and 2 is new"),
        ("frozen = ['SIZE']", ("2**4", "2**4\nSIZE += 1"), "and 16 became SIZE = 2 ** 4; SIZE += 1"),
        ("frozen = ['SIZE']", ("    return", "    global SIZE\n    SIZE = 9\n    return"), "SIZE is frozen"),
        ("frozen = ['SIZE']", ("2**4", "16.0"), "16 became 16.0"),
        ("ranges.DEPTH = [4, 8]", ("DEPTH = 6", "DEPTH = 9"), "DEPTH has the range [4, 8], and 6 became 9"),
        ("ranges.SIZE = [4, 20]", ("2**4", "2**5"), "16 became 32"),
        ("ranges.DEPTH = [4, 8]", ("DEPTH = 6", "DEPTH = len(NAMES)"), "must stay one constant"),
        ("ranges.SIZE = [4, 20]", ("SIZE = 2**4\n", ""), "must stay one constant, and 16 was removed"),
        ("ranges.MODE = {choices = ['slow', 'fast']}", ('"slow"  ', '"odd"  '), "'slow' became 'odd'"),
        ("ranges.BIAS = {choices = [1]}", ("BIAS = True", "BIAS = False"), "True became False"),
        ("ranges.GAIN = [1, 2]", ("SIZE", "GAIN = 3\nSIZE"), "GAIN has the range [1, 2], and 3 is new"),
    ],
)
def test_a_change_against_the_directions_is_refused_with_what_it_changed(
    block: str, change: tuple[str, str], reason: str
):
    after = PROGRAM.replace(*change)
    assert after != PROGRAM
    said = refused(wanted(block), after)
    assert said.startswith("against program.md: ")
    assert reason in said
    assert "\n" not in said
    assert refused(wanted(""), after) == ""


@pytest.mark.parametrize(
    ("block", "change"),
    [
        ("frozen = ['DEPTH', 'NAMES']", ("HEADS = 4", "HEADS = 2")),
        ("frozen = ['SIZE']", ("2**4", "16")),
        ("frozen = ['DEPTH']", ("# in [1, 12]: layers", "# in [1, 24]: layers of the model")),
        ("frozen = ['NAMES']", ('("a", "b")', "('a', 'b')")),
        ("ranges.DEPTH = [4, 8]", ("DEPTH = 6", "DEPTH = 8")),
        ("ranges.DEPTH = [8, 10]", ("HEADS = 4", "HEADS = 2")),  # it was outside before, and stays
        ("ranges.NAMES = [8, 10]", ("HEADS = 4", "HEADS = 2")),
        ("ranges.LR = {choices = [1, 2]}", ("LR = 0.02", "LR = 1.0")),
    ],
)
def test_other_changes_pass(block: str, change: tuple[str, str]):
    assert refused(wanted(block), PROGRAM.replace(*change)) == ""


def test_a_forbidden_operator_is_refused_whatever_it_changes_but_a_persons_change_has_none():
    directions = wanted("forbidden = ['draft']")
    assert refused(directions, PROGRAM, operator=Operator.DRAFT) == "against program.md: draft is forbidden"
    assert refused(directions, PROGRAM, operator=Operator.TUNE) == ""
    assert refused(directions, PROGRAM, operator=None) == ""


def test_every_program_of_the_change_is_looked_at():
    directions = wanted("frozen = ['LR']")
    before = {"a.py": "X = 1\n", "b.py": "LR = 1\n", "c.md": "LR = 1"}
    same = {**before, "c.md": "LR = 2"}
    assert refusal(directions, before=before, after=same, operator=None) is None
    assert refusal(directions, before=before, after={**before, "b.py": "LR = 2\n"}, operator=None)
    assert refusal(directions, before=before, after={"a.py": "X = 1\n"}, operator=None)
    assert refusal(directions, before=before, after={**before, "d.py": "LR = 3\n"}, operator=None)


def test_names_that_the_program_does_not_have_are_found():
    directions = wanted("frozen = ['LR', 'GAIN', 'NAMES']\nranges.DROPOUT = [0, 1]")
    assert unknown_names(directions, {"a.py": PROGRAM, "b.txt": "GAIN = 1"}) == ["DROPOUT", "GAIN"]
    assert unknown_names(directions, {"a.py": PROGRAM, "b.py": "GAIN = 1"}) == ["DROPOUT"]
    assert unknown_names(Directions(), {"a.py": "(no program"}) == []


# ---- knobs ----

MOVES: Mapping[str, st.SearchStrategy[Value]] = {
    "LR": st.floats(0.001, 0.3),
    "DEPTH": st.integers(1, 12),
    "WIDTH": st.sampled_from([16, 32, 48, 64, 96]),
    "HEADS": st.integers(1, 8),
    "MODE": st.sampled_from(["slow", "fast", "odd"]),
    "BIAS": st.booleans(),
}


@st.composite
def some_directions(draw: st.DrawFn) -> Directions:
    names = st.sampled_from(sorted(MOVES))
    ranges: dict[str, Range] = {}
    for name in draw(st.sets(names, max_size=4)):
        values = draw(st.lists(MOVES[name], min_size=1, max_size=2))
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        by_ends = numbers and draw(st.booleans())
        ranges[name] = Range(min(numbers), max(numbers)) if by_ends else Range(choices=tuple(values))
    return Directions(frozen=draw(st.frozensets(names, max_size=2)), ranges=ranges)


@given(some_directions(), st.fixed_dictionaries({}, optional=dict(MOVES)))
def test_a_move_of_knobs_is_refused_exactly_if_it_leaves_what_they_were_narrowed_to(
    directions: Directions, moves: dict[str, Value]
):
    knobs = read_knobs(PROGRAM)
    after = rewrite(PROGRAM, moves)
    moved = {name: knob.value for name, knob in read_knobs(after).items() if knob.value != knobs[name].value}
    allowed = directions.narrowed(knobs)
    fits = all(name in allowed and allowed[name].allows(value) for name, value in moved.items())
    assert (refused(directions, after) == "") == fits


def test_a_knob_is_narrowed_and_keeps_its_kind():
    block = (
        "ranges = {LR = {choices = [0.05, 0.01, 1]}, DEPTH = [6.5, 99], WIDTH = [30, 64], MODE = {choices = ['odd']}}"
    )
    found = wanted(block).narrowed(read_knobs(PROGRAM))
    assert found["LR"].choices == (0.01, 0.05)
    assert (found["DEPTH"].low, found["DEPTH"].high, found["DEPTH"].value) == (6.5, 12, 6)
    assert found["WIDTH"].choices == (32, 48, 64)
    assert found["MODE"].choices == ("odd",)
    assert found["HEADS"] == read_knobs(PROGRAM)["HEADS"]


@pytest.mark.parametrize(
    "block",
    [
        "frozen = ['DEPTH']",
        "ranges.DEPTH = [20, 30]",
        "ranges.DEPTH = [4.2, 4.8]",
        "ranges.DEPTH = {choices = [2.5, 'a']}",
    ],
)
def test_a_knob_that_may_have_no_value_is_not_moved(block: str):
    assert "DEPTH" not in wanted(block).narrowed(read_knobs(PROGRAM))


# ---- the files that come along ----

ROOT = Path(__file__).parent.parent
TRAIN = (ROOT / "trainer" / "train.py").read_text()


def test_the_general_file_asks_for_nothing_by_its_block_and_shows_one_that_is_valid():
    found = parse(programs.general(), where="program.md")
    assert described(found) == "prose alone"
    assert "# Directions" in found.prose
    shown = "\n".join(line.removeprefix("# ") for line in programs.general().partition("```raysearch\n")[2].split("\n"))
    assert unknown_names(parse(f"```raysearch\n{shown}", where="program.md"), {"train.py": TRAIN}) == []
    assert (ROOT / "program.md").read_text() == programs.general()


@pytest.mark.parametrize("preset", sorted(objective.load_presets()))
def test_every_preset_has_directions_that_name_knobs_and_leave_its_start_room(preset: str):
    text = objective.preset_directions(preset)
    assert text is not None
    found = in_force({"program.md": programs.general(), f"program-{preset}.md": text}, preset)
    assert len(found.prose.splitlines()) > 60
    start = read_knobs(objective.base_program(TRAIN, objective.load_presets()[preset]))
    assert found.frozen | found.ranges.keys() <= start.keys()
    for name, knob in found.narrowed(start).items():
        assert knob.allows(start[name].value), name
        assert knob.choices or (knob.low or 0) < (knob.high or 0)
    assert found.narrowed(start).keys() == start.keys() - found.frozen


def test_the_files_are_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(fnmatch("program.md", pattern) for pattern in data["raysearch"])
    assert any(fnmatch("presets/cpu.md", pattern) for pattern in data["trainer"])


# ---- the files of a study ----


def block(text: str) -> str:
    return f"```raysearch\n{text}\n```\n"


def test_two_files_that_are_valid_only_together_are_taken_together(tmp_path: Path):
    files = Programs(tmp_path, ["cpu"])
    known = {"program.md": block("ranges.DEPTH = [1, 4]"), "program-cpu.md": block("ranges.DEPTH = [2, 4]")}
    for name, text in known.items():
        programs.put(tmp_path / name, text.replace("4]", "9]").replace("[1", "[6").replace("[2", "[7"))
    taken, notes = files.news(known)
    assert (sorted(taken), notes) == (["program-cpu.md", "program.md"], [])
    programs.put(tmp_path / "program-cpu.md", block("frozn = 1"))
    taken, notes = files.news(known)
    assert (taken, len(notes)) == ({}, 2)  # the other one alone contradicts what is in force
    assert files.news(known) == ({}, [])
    programs.put(tmp_path / "program.md", block("ranges.DEPTH = [3, 5]"))
    taken, notes = files.news(known)
    assert (list(taken), notes) == (["program.md"], [])


def test_a_file_that_is_gone_or_no_text_changes_nothing_and_is_said_once(tmp_path: Path):
    files, known = Programs(tmp_path, ["cpu"]), {"program.md": "Be bold."}
    assert files.news({}) == ({}, [])
    (taken, (note,)) = files.news(known)
    assert taken == {}
    assert note.startswith("program.md is gone; empty it")
    assert files.news(known) == ({}, [])
    (tmp_path / "program.md").write_bytes(b"\xff\xfe")
    (taken, (note,)) = files.news(known)
    assert "must be a text file in UTF-8" in note
    assert files.news(known) == ({}, [])
    with pytest.raises(UserError, match="must be a text file in UTF-8"):
        files.begin(known)
    programs.put(tmp_path / "program.md", "")
    assert files.news(known) == ({"program.md": ""}, [])


def test_the_file_of_a_preset_is_written_once_and_a_persons_own_is_left(tmp_path: Path):
    files = Programs(tmp_path, ["cpu", "h100"])
    (tmp_path / "program-cpu.md").write_text("Mine.")
    (tmp_path / "program-other.md").write_text(block("frozn = 1"))  # of no preset
    files.add("cpu", "Theirs.")
    files.add("h100", None)
    assert files.news({})[0] == {"program-cpu.md": "Mine."}
    files.add("h100", "Theirs.")
    assert files.begin({}) == {"program-cpu.md": "Mine.", "program-h100.md": "Theirs."}
