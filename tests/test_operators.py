"""The operators without a model: what each takes up, how a change travels, and that nothing invalid comes of it."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ideas_of

from raysearch.knobs import Value, broken_rule, fingerprint, read_knobs, read_rules, rewrite, same_value, size
from raysearch.model import Direction, Operator
from raysearch.objective import load_presets
from raysearch.proposers import Idea, Proposer, Request, Step
from raysearch.proposers.ablate import AblateProposer
from raysearch.proposers.combine import CombineProposer
from raysearch.proposers.moves import carry, middle, parts, travelled
from raysearch.proposers.simplify import SimplifyProposer, find_cuts
from raysearch.proposers.transfer import TransferProposer, by_promise, halved
from raysearch.ratchet import Ratchet

PROGRAM = '''\
"""A program."""

import math

LR = 0.02  # in [0.001, 0.3] log: step size
DEPTH = 6  # in [1, 12]: layers
WIDTH = 64  # in {16, 32, 64, 128, 256}: units
MODE = "slow"  # in {"slow", "fast", "odd"}: how
DECAY = 0.1  # in [0.0, 0.5]: of the weights
CAP = 15.0
# rule: WIDTH * DEPTH <= 1024


def scaled(x):
    # how much
    return x * LR


def train(run):
    first = math.sqrt(CAP)
    second = scaled(first)
    third = second + DECAY
    fourth = third + DEPTH
    fifth = fourth + WIDTH
    return fifth, MODE
'''


TRAINER = (Path(__file__).parent.parent / "trainer" / "train.py").read_text()


def request(files: str, count: int = 50, **others: Any) -> Request:
    given: dict[str, Any] = {"known": frozenset(), "direction": Direction.MINIMIZE, **others}
    return Request("cpu", fingerprint({"train.py": files}), {"train.py": files}, count, **given)


def step(before: str, after: str, *, id: str = "s1", delta: float = -0.01) -> Step:
    return Step(id, "gpu", f"why {id}", delta, {"train.py": before}, {"train.py": after})


def applied(files: str, patch: str, folder: Path) -> str:
    """What git makes of a patch."""
    repo = Ratchet.create(folder, {"train.py": files}, message="base", at=0.0)
    commit = repo.commit_patch(repo.resolve("main"), patch, editable=("train.py",), message="idea", at=0.0)
    return str(repo.read(commit, "train.py"))


def programs(proposer: Proposer, asked: Request, folder: Path) -> dict[str, str]:
    """The programs of an ask by their source."""
    source = asked.files["train.py"]
    ideas = ideas_of(proposer, asked)
    return {idea.source: applied(source, idea.patch, folder / str(n)) for n, idea in enumerate(ideas)}


def values_of(program: str) -> dict[str, Value]:
    return {name: knob.value for name, knob in read_knobs(program).items()}


# ---- ablate ----


def test_ablate_takes_back_each_knob_and_each_hunk_by_itself(tmp_path: Path):
    grown = rewrite(PROGRAM, {"LR": 0.05, "MODE": "fast", "CAP": 20.0})
    grown = grown.replace("first = math.sqrt(CAP)", "first = math.sqrt(CAP) + 1").replace(
        "return fifth", "return -fifth"
    )
    asked = request(grown, origin={"train.py": PROGRAM})
    found = programs(AblateProposer(), asked, tmp_path)
    assert set(found.values()) == {
        rewrite(grown, {"LR": 0.02}),
        rewrite(grown, {"MODE": "slow"}),
        rewrite(grown, {"CAP": 15.0}),
        grown.replace("math.sqrt(CAP) + 1", "math.sqrt(CAP)"),
        grown.replace("return -fifth", "return fifth"),
    }


def test_ablate_says_what_is_taken_back():
    (idea,) = AblateProposer().ask(request(rewrite(PROGRAM, {"DEPTH": 8}), origin={"train.py": PROGRAM}))
    assert idea.operator is Operator.ABLATE
    assert "DEPTH 8 → 6" in idea.hypothesis


def test_ablate_leaves_what_the_rest_needs():
    """Neither a function that is called, nor a value without which a rule breaks, nor train itself goes."""
    grown = PROGRAM.replace("def train", "def more(x):\n    return x\n\n\ndef train").replace(
        "return fifth", "return more(fifth)"
    )
    grown = rewrite(grown, {"DEPTH": 12})
    origin = rewrite(PROGRAM, {"WIDTH": 128})  # 12 * 128 > 1024
    hypotheses = [idea.hypothesis for idea in AblateProposer().ask(request(grown, origin={"train.py": origin}))]
    assert len(hypotheses) == 2
    assert any("DEPTH 12 → 6" in text for text in hypotheses)
    assert any("more(fifth)" in text for text in hypotheses)
    other = PROGRAM.replace("def train(run)", "def trained(run)")
    assert AblateProposer().ask(request(PROGRAM, origin={"train.py": other})) == []


@pytest.mark.parametrize(("first", "now"), [("2**4", "5"), ("12345.678", "3.0"), ("1e999", "2.0"), ("'a'", "'b\\n'")])
def test_ablate_writes_a_first_value_as_it_was_written(tmp_path: Path, first: str, now: str):
    """Neither with four digits, nor without the power."""
    origin, grown = (PROGRAM.replace("CAP = 15.0", f"CAP = {value}  # why") for value in (first, now))
    asked = request(grown, origin={"train.py": origin})
    assert fingerprint({"train.py": next(iter(programs(AblateProposer(), asked, tmp_path).values()))}) == fingerprint(
        {"train.py": origin}
    )
    (idea,) = AblateProposer().ask(asked)
    assert f"CAP {now} → {first}" in idea.hypothesis
    assert f"+CAP = {first}  " in idea.patch


def test_ablate_makes_nothing_of_comments_and_layout():
    origin = PROGRAM.replace("step size", "another word").replace("LR = 0.02  #", "LR = 0.02      #") + "\n\n# an end\n"
    assert AblateProposer().ask(request(PROGRAM, origin={"train.py": origin})) == []


def test_files_that_only_one_side_has_stay():
    asked = Request(
        *("cpu", "b", {"train.py": PROGRAM, "new.txt": "x\n", "old.txt": "b\n"}, 9, frozenset(), Direction.MINIMIZE),
        origin={"train.py": PROGRAM, "gone.txt": "y\n", "old.txt": "a\n"},
    )
    (idea,) = AblateProposer().ask(asked)
    assert idea.patch.startswith("diff --git a/old.txt b/old.txt")


# ---- simplify ----


@pytest.mark.parametrize(
    ("knob", "shorter"),
    [
        ("LR = 0.04137  # in [0.01, 0.3] log", 0.04),
        ("LR = 0.1512  # in [0.1, 0.2]", 0.15),
        ("LR = 0.1512  # in [0.0, 20.0]", 0.0),
        ("LR = 0.0003  # in [0.0001, 0.3] log", None),
        ("LR = 0.5  # in [0.0, 1.0]", None),
        ("LR = 51  # in [0, 1000]", None),
        ("LR = 0.52  # in {0.5, 0.52}", None),
    ],
)
def test_a_value_gets_as_few_digits_as_make_no_difference_in_its_range(
    tmp_path: Path, knob: str, shorter: float | None
):
    source = f"{knob}: a\n\n\ndef train(run):\n    return LR\n"
    found = list(programs(SimplifyProposer(), request(source), tmp_path).values())
    assert [values_of(program)["LR"] for program in found] == ([] if shorter is None else [shorter])


def test_a_knob_that_differs_little_goes_back_to_its_first_value_if_that_is_shorter(tmp_path: Path):
    grown = rewrite(PROGRAM, {"LR": 0.0226, "DECAY": 0.28, "DEPTH": 7})
    found = programs(SimplifyProposer(), request(grown, origin={"train.py": PROGRAM}), tmp_path)
    assert rewrite(grown, {"LR": 0.02}) in found.values()
    assert all(values_of(program)["DEPTH"] == 7 for program in found.values())
    assert all(values_of(program)["DECAY"] != 0.1 for program in found.values())


CLUTTERED = '''\
import math
import os  # for nothing

USED = 1  # is read
UNUSED = 2

# About the next one.
LIMIT = 3


def helper(x):
    return helper(x - 1)


def train(run):
    """What it does."""
    idle = 1
    pass
    total = run.value() + math.pi  # kept
    if USED == 1:
        # why

        total += USED
        print("two",
              total)
    else:
        total = 0
    if LIMIT > 5:
        total = 1
    if USED == 2:
        total = 3
    # otherwise
    else:
        # twice
        total *= 2
    for _ in range(2):
        total += 1
        continue
        total = 7
    run.value()
    return total
'''


def test_what_has_no_effect_is_cut_and_the_rest_stays_as_it_was_written(tmp_path: Path):
    found = set(programs(SimplifyProposer(), request(CLUTTERED), tmp_path).values())
    assert found == {
        CLUTTERED.replace("import os  # for nothing\n", ""),
        CLUTTERED.replace("UNUSED = 2\n", ""),
        CLUTTERED.replace("def helper(x):\n    return helper(x - 1)\n\n\n", ""),
        CLUTTERED.replace("    idle = 1\n", ""),
        CLUTTERED.replace("    pass\n", ""),
        CLUTTERED.replace(
            '    if USED == 1:\n        # why\n\n        total += USED\n        print("two",\n              total)\n'
            "    else:\n        total = 0\n",
            '    # why\n\n    total += USED\n    print("two",\n          total)\n',
        ),
        CLUTTERED.replace("    if LIMIT > 5:\n        total = 1\n", ""),
        CLUTTERED.replace(
            "    if USED == 2:\n        total = 3\n    # otherwise\n    else:\n        # twice\n        total *= 2\n",
            "    # twice\n    total *= 2\n",
        ),
        CLUTTERED.replace("        total = 7\n", ""),
    }
    assert all(size({"train.py": program}) < size({"train.py": CLUTTERED}) for program in found)


@pytest.mark.parametrize(
    "body",
    [
        "    x = run()\n    return 1",
        "    x: int = run.a\n    return locals()",
        "    x = 1\n    return locals()",
        "    global G\n    G = 1\n    return 1",
        "    x = 1\n    def inner():\n        return x\n    return inner",
        "    x = 1; y = run(2)\n    return y",
        "    if K: return 1\n    return 2",
        "    if run: return 1\n    return 2",
        '    return """\n  x\n"""',
        "    return 1\n    yield 2",
        "    if False:\n        yield 1\n    return run()",
    ],
)
def test_what_may_have_an_effect_is_left(body: str):
    source = f"K = 1  # in [0, 2]: a knob, and no constant\n\n\ndef train(run):\n{body}\n\n\nprint(K)\n"
    assert SimplifyProposer().ask(request(source)) == []


def test_a_name_that_another_file_mentions_is_used():
    source = "A = 1\nB = 2\n\n\ndef train(run):\n    return 1\n"
    files = {"train.py": source, "more.py": "import train\n\nprint(train.A)\n"}
    asked = Request("cpu", "b", files, 9, frozenset(), Direction.MINIMIZE)
    assert [("-B = 2" in idea.patch, "-A = 1" in idea.patch) for idea in SimplifyProposer().ask(asked)] == [
        (True, False)
    ]


@pytest.mark.parametrize(
    "other",
    [
        "def pick():\n    global FAST\n    FAST = True",
        "if run:\n    FAST = True",
        "for FAST in (1,):\n    pass",
        "def two(FAST):\n    return FAST",
        "from run import *",
    ],
)
def test_a_constant_that_something_else_may_set_decides_no_test(other: str):
    source = f"FAST = False\n{other}\n\n\ndef train(run):\n    if FAST:\n        return 1\n    return 2\n"
    assert not [cut for cut in find_cuts(source) if "FAST" in cut.what]


def test_a_comment_goes_with_what_it_is_about_and_stays_with_what_is_left():
    source = (
        "# First.\nA = 1\n\n# A group.\nB = 2\nC = 3\n\n# Of D,\n# and no more.\nD = 4\n\n"
        "# rule: C > 1\nE = 5\n\n\ndef train(run):\n    return C\n"
    )
    cuts = {cut.what.partition(",")[0]: cut.applied(source) for cut in find_cuts(source)}
    assert cuts == {
        "A": source.replace("A = 1\n", ""),
        "B": source.replace("B = 2\n", ""),
        "D": source.replace("# Of D,\n# and no more.\nD = 4\n\n", ""),
        "E": source.replace("E = 5\n", ""),
    }


def test_an_import_for_what_it_does_stays():
    assert find_cuts("import a.b\nimport c.d as e\n\n\ndef train(run):\n    return 1\n")[0].what.startswith("e,")


def test_the_bundled_trainer_has_nothing_that_can_be_cut():
    assert find_cuts(TRAINER) == []


def test_the_bundled_trainer_as_a_day_of_search_leaves_it_is_simplified_and_ablated(tmp_path: Path):
    base = rewrite(TRAINER, load_presets()["cpu"].knobs)
    grown = rewrite(base, {"LR_SCALE": 0.7213, "WARMUP_RATIO": 0.0123, "DEPTH": 3, "TOTAL_BATCH_SIZE": 4096})
    grown = grown.replace("import math\n", "import math\nimport os\n").replace(
        "        optimizer.step(run.progress)\n",
        "        if SOFT_CAP < 0:\n            break\n        optimizer.step(run.progress)\n",
    )
    asked = request(grown, origin={"train.py": base})
    simpler = programs(SimplifyProposer(), asked, tmp_path / "simplify").values()
    assert set(simpler) == {
        rewrite(grown, {"LR_SCALE": 0.7}),
        rewrite(grown, {"WARMUP_RATIO": 0.0}),
        grown.replace("import os\n", ""),
        grown.replace("        if SOFT_CAP < 0:\n            break\n", ""),
    }
    without = programs(AblateProposer(), asked, tmp_path / "ablate").values()
    assert len(without) == 6
    for program in (*simpler, *without):
        assert "def train(run)" in program
        compile(program, "train.py", "exec")


# ---- transfer ----


def transferred(before: str, after: str, here: str, folder: Path) -> str | None:
    found = programs(TransferProposer(), request(here, elsewhere=(step(before, after),)), folder)
    return found.get("transfer s1")


@pytest.mark.parametrize(
    ("here", "moved", "expected"),
    [
        ({}, {"LR": 0.03}, {"LR": 0.03}),
        ({"LR": 0.1}, {"LR": 0.03}, {"LR": 0.15}),
        ({"LR": 0.25}, {"LR": 0.03}, {"LR": 0.3}),
        ({"DECAY": 0.3}, {"DECAY": 0.05}, {"DECAY": 0.25}),
        ({"DECAY": 0.02}, {"DECAY": 0.05}, {"DECAY": 0.0}),
        ({"DEPTH": 4}, {"DEPTH": 9}, {"DEPTH": 6}),
        ({"WIDTH": 32}, {"WIDTH": 128}, {"WIDTH": 64}),
        ({"WIDTH": 16}, {"WIDTH": 32}, None),
        ({"MODE": "odd"}, {"MODE": "fast"}, {"MODE": "fast"}),
        ({"MODE": "fast"}, {"MODE": "fast"}, None),
        ({"LR": 0.03}, {"LR": 0.03}, {"LR": 0.045}),
        ({"DEPTH": 1, "LR": 0.1}, {"DEPTH": 3, "LR": 0.01}, {"DEPTH": 1, "LR": 0.05}),
        ({"CAP": 15.0}, {"CAP": 10.0}, {"CAP": 10.0}),
        ({"CAP": 20.0}, {"CAP": 10.0}, None),
        ({"DEPTH": 12}, {"WIDTH": 128}, None),
    ],
)
def test_knobs_travel_as_ratio_difference_or_as_they_are(
    tmp_path: Path, here: dict[str, Value], moved: dict[str, Value], expected: dict[str, Value] | None
):
    ours = rewrite(PROGRAM, here)
    found = transferred(PROGRAM, rewrite(PROGRAM, moved), ours, tmp_path)
    assert found == (None if expected is None else rewrite(ours, expected))


def test_code_travels_beside_other_values_and_other_code(tmp_path: Path):
    ours = rewrite(PROGRAM, {"LR": 0.1, "DECAY": 0.3}).replace("return fifth, MODE", "return -fifth, MODE")
    after = rewrite(PROGRAM, {"DECAY": 0.2}).replace("second = scaled(first)", "second = scaled(first) * 2")
    assert transferred(PROGRAM, after, ours, tmp_path) == rewrite(ours, {"DECAY": 0.4}).replace(
        "second = scaled(first)", "second = scaled(first) * 2"
    )


def test_a_new_knob_travels_with_the_code_that_reads_it(tmp_path: Path):
    ours = rewrite(PROGRAM, {"LR": 0.1})
    after = PROGRAM.replace("CAP = 15.0\n", "CAP = 15.0\nGAIN = 2.0  # in [1.0, 4.0]: new\n").replace(
        "x * LR", "GAIN * x * LR"
    )
    found = transferred(PROGRAM, after, ours, tmp_path)
    assert found is not None
    assert values_of(found)["GAIN"] == 2.0
    assert values_of(found)["LR"] == 0.1


@pytest.mark.parametrize(
    ("old", "new"),
    [("second = scaled(first)", "second = scaled(first + 1)"), ("    first = math.sqrt(CAP)\n", "    first = 1\n")],
)
def test_code_that_reads_otherwise_here_is_left_alone(tmp_path: Path, old: str, new: str):
    ours = PROGRAM.replace(old, new).replace("    third = second + DECAY\n", "    third = second\n")
    after = PROGRAM.replace("second = scaled(first)", "second = scaled(first) * 2").replace("third =", "third = 1 +")
    assert transferred(PROGRAM, after, ours, tmp_path) is None


def test_a_step_that_is_here_already_gives_nothing(tmp_path: Path):
    after = PROGRAM.replace("return fifth", "return -fifth")
    assert transferred(PROGRAM, after, after.replace("first =", "first = 1 *"), tmp_path) is None


def test_a_file_that_a_step_added_comes_along():
    elsewhere = Step("s1", "gpu", "why", -0.1, {"train.py": PROGRAM}, {"train.py": PROGRAM, "new.py": "A = 1\n"})
    (idea,) = TransferProposer().ask(request(PROGRAM, elsewhere=(elsewhere,)))
    assert "new file mode" in idea.patch


def test_parts_of_a_step_come_after_the_whole_was_tried(tmp_path: Path):
    after = rewrite(PROGRAM, {"LR": 0.03, "DEPTH": 7}).replace("return fifth", "return -fifth")
    asked = request(PROGRAM, elsewhere=(step(PROGRAM, after),))
    proposer = TransferProposer()
    assert list(programs(proposer, asked, tmp_path / "whole").values()) == [after]
    later = programs(
        TransferProposer(), request(PROGRAM, elsewhere=(step(PROGRAM, after),), sources={"transfer s1"}), tmp_path
    )
    assert list(later.values()) == [
        rewrite(PROGRAM, {"LR": 0.03}),
        rewrite(PROGRAM, {"DEPTH": 7}).replace("return fifth", "return -fifth"),
        rewrite(PROGRAM, {"DEPTH": 7}),
        PROGRAM.replace("return fifth", "return -fifth"),
    ]
    assert {idea.source for idea in proposer.ask(asked)} == set(later)
    assert proposer.ask(asked) == []


def test_a_large_step_is_tried_by_halves_before_single_changes():
    assert ["".join(some) for some in halved("abcde")] == ["ab", "cde", "a", "b", "c", "de", "d", "e"]
    assert list(halved("a")) == []
    assert list(halved("")) == []


def test_parts_come_at_once_where_the_whole_cannot_be_made(tmp_path: Path):
    ours = rewrite(PROGRAM, {"DEPTH": 12})
    turned = PROGRAM.replace("return fifth", "return -fifth")
    asked = request(ours, elsewhere=(step(PROGRAM, rewrite(turned, {"WIDTH": 128})),))  # 12 * 128 > 1024
    proposer = TransferProposer()
    assert proposer.ask(asked) == []
    assert list(programs(proposer, asked, tmp_path).values()) == [rewrite(turned, {"DEPTH": 12})]


def test_a_part_that_needs_another_is_left_out(tmp_path: Path):
    """A call is no change without the function that it calls; the function alone changes nothing, but is a program."""
    helper = "def more(x):\n    return x + 1\n\n\n"
    after = PROGRAM.replace("def scaled", f"{helper}def scaled").replace("return fifth", "return more(fifth)")
    asked = request(PROGRAM, elsewhere=(step(PROGRAM, after),), sources={"transfer s1"})
    found = programs(TransferProposer(), asked, tmp_path)
    assert list(found.values()) == [PROGRAM.replace("def scaled", f"{helper}def scaled")]


@pytest.mark.parametrize(
    "after", [PROGRAM.replace("return fifth", "return -fifth"), rewrite(PROGRAM, {"LR": 0.03, "DEPTH": 7})]
)
def test_a_step_of_one_change_or_of_values_alone_is_not_taken_apart(after: str):
    asked = request(PROGRAM, elsewhere=(step(PROGRAM, after),), sources={"transfer s1"})
    assert TransferProposer().ask(asked) == []


def test_new_steps_and_large_gains_come_first():
    deltas = {"a": -0.09, "b": -0.01, "c": -0.02, "d": -0.03}
    steps = [step("", "", id=id, delta=delta) for id, delta in deltas.items()]
    assert [found.candidate for found in by_promise(steps, Direction.MINIMIZE)] == ["d", "c", "a", "b"]
    assert by_promise(steps, Direction.MAXIMIZE)[-1].candidate in "ad"


# ---- combine ----


def test_a_win_on_a_knob_that_the_champion_moved_comes_on_top_and_halfway(tmp_path: Path):
    ours = rewrite(PROGRAM, {"LR": 0.04, "DECAY": 0.3, "MODE": "fast"})
    win = step(PROGRAM, rewrite(PROGRAM, {"LR": 0.01, "DECAY": 0.2, "DEPTH": 9}))
    found = programs(CombineProposer(), request(ours, unmerged=(win,)), tmp_path)
    assert found == {
        "combine s1 on top": rewrite(ours, {"LR": 0.02, "DECAY": 0.4, "DEPTH": 9}),
        "combine s1 middle": rewrite(ours, {"LR": 0.02, "DECAY": 0.25, "DEPTH": 9}),
    }


def test_words_have_no_middle(tmp_path: Path):
    ours = rewrite(PROGRAM, {"MODE": "fast"})
    win = step(PROGRAM, rewrite(PROGRAM, {"MODE": "odd"}))
    found = programs(CombineProposer(), request(ours, unmerged=(win,)), tmp_path)
    assert found == {"combine s1 on top": rewrite(ours, {"MODE": "odd"})}


def test_code_that_fits_comes_along_and_a_conflict_of_code_is_left_alone(tmp_path: Path):
    ours = rewrite(PROGRAM, {"LR": 0.04}).replace("return fifth", "return -fifth")
    fits = rewrite(PROGRAM, {"LR": 0.01}).replace("first = math", "first = 2 * math")
    found = programs(CombineProposer(), request(ours, unmerged=(step(PROGRAM, fits),)), tmp_path)
    assert rewrite(ours, {"LR": 0.02}).replace("first = math", "first = 2 * math") in found.values()
    clashes = rewrite(PROGRAM, {"LR": 0.01}).replace("return fifth", "return 2 * fifth")
    assert CombineProposer().ask(request(ours, unmerged=(step(PROGRAM, clashes),))) == []


def test_a_win_that_shares_no_knob_with_the_champion_is_no_work_for_combine():
    ours = rewrite(PROGRAM, {"LR": 0.04})
    for moved in ({"DEPTH": 9}, {"LR": 0.04}):
        assert CombineProposer().ask(request(ours, unmerged=(step(PROGRAM, rewrite(PROGRAM, moved)),))) == []


# ---- properties ----


@settings(max_examples=300)
@given(start=st.floats(0.01, 0.1), ratio=st.floats(0.5, 2.0), other=st.floats(0.01, 0.1))
def test_a_ratio_there_and_back_is_no_change(start: float, ratio: float, other: float):
    knob = read_knobs(rewrite(PROGRAM, {"LR": start}))["LR"]
    there = travelled(knob, other, other * ratio)
    back = travelled(read_knobs(rewrite(PROGRAM, {"LR": there}))["LR"], other * ratio, other)
    assert math.isclose(float(back), float(knob.value), rel_tol=2e-3)  # each is written with 4 digits


@given(one=st.integers(1, 12), other=st.integers(1, 12))
def test_the_middle_lies_between(one: int, other: int):
    between = middle(read_knobs(rewrite(PROGRAM, {"DEPTH": one}))["DEPTH"], other)
    assert min(one, other) <= float(str(between)) <= max(one, other)


LINES = ("    first = math.sqrt(CAP)\n", "    third = second + DECAY\n", "    # how much\n", "    return x * LR\n")


def edited(source: str, chance: random.Random) -> str:
    """A program with some of its knobs and lines changed, as a history of wins would leave it."""
    for name, knob in read_knobs(source).items():
        if chance.random() < 0.4:
            unit = chance.random()
            value = chance.choice(knob.choices) if knob.choices else knob.nearest(knob.at(unit))
            source = rewrite(source, {name: value})
    for line in LINES:
        if chance.random() < 0.3:
            new = chance.choice(
                ["    pass\n", f"    # {chance.random()}\n{line}", line.rstrip() + " + 0.5\n", f"{line}    pass\n"]
            )
            source = source.replace(line, new)
    if chance.random() < 0.3:
        source = rewrite(source, {"CAP": round(chance.uniform(1, 30), 2)})
    return source


def all_ideas(asked: Request, seed: int) -> list[Idea]:
    proposers: Sequence[Proposer] = (
        AblateProposer(seed=seed),
        SimplifyProposer(seed=seed),
        TransferProposer(),
        CombineProposer(),
    )
    return [idea for proposer in proposers for idea in proposer.ask(asked)]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_was_changed_ideas_apply_and_are_valid_new_programs(
    tmp_path_factory: pytest.TempPathFactory, seed: int
):
    chance = random.Random(seed)
    ours, there, win = (edited(PROGRAM, chance) for _ in range(3))
    asked = request(
        *(ours, 3),
        origin={"train.py": PROGRAM},
        elsewhere=(step(PROGRAM, there, id="a"), step(there, edited(there, chance), id="b")),
        unmerged=(step(PROGRAM, win),),
        sources={"transfer a"},
    )
    folder = tmp_path_factory.mktemp("repo")
    held = broken_rule(read_rules(ours), values_of(ours))
    for number, idea in enumerate(all_ideas(asked, seed)):
        program = applied(ours, idea.patch, folder / str(number))
        assert fingerprint({"train.py": program}) != fingerprint({"train.py": ours})
        assert broken_rule(read_rules(program), values_of(program)) in (None, held)
        compile(program, "train.py", "exec")
        if idea.operator is Operator.SIMPLIFY:
            assert size({"train.py": program}) < size({"train.py": ours})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_parts_of_a_change_are_the_change(seed: int):
    """One by one they are made to the program; that order and place do not matter is what makes them parts."""
    chance = random.Random(seed)
    old, new = edited(PROGRAM, chance), edited(PROGRAM, chance)
    files: Mapping[str, str] = {"train.py": old}
    for part in parts({"train.py": old}, {"train.py": new}):
        changed = carry({"train.py": old}, {part.path: part.text}, files, lambda here, before, after: after)
        assert changed is not None
        files = {**files, **changed}
    assert fingerprint(files) == fingerprint({"train.py": new})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_change_carried_to_where_it_was_made_is_the_change(seed: int):
    chance = random.Random(seed)
    old, new = edited(PROGRAM, chance), edited(PROGRAM, chance)
    changed = carry({"train.py": old}, {"train.py": new}, {"train.py": old}, travelled)
    assert changed is not None
    result = {"train.py": old, **changed}["train.py"]
    assert fingerprint({"train.py": result}) == fingerprint({"train.py": new})
    assert all(same_value(value, values_of(new)[name]) for name, value in values_of(result).items())
