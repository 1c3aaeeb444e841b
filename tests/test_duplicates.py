"""Near duplicates: what counts as one program, and that looking up agrees with comparing one by one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch.duplicates import FEW, TOLERANCE, Known, Signature, signature
from raysearch.knobs import Value, rewrite

PROGRAM = '''\
"""A program."""

LR = 0.02  # in [0.001, 0.3] log: step size
DECAY = 0.1  # in [0.0, 0.5]: of the weights
DEPTH = 6  # in [1, 12]: layers
STEPS = 5000  # in [1, 100000]: of the optimizer
WIDTH = 64  # in {16, 32, 64, 128}: units
MODE = "slow"  # in {"slow", "fast", "odd"}: how
PLAIN = 3


def train(run):
    return LR * DEPTH
'''


def near(one: str, other: str) -> bool:
    known = Known()
    known.add("one", signature({"train.py": one}, "train.py"))
    return known.near(signature({"train.py": other}, "train.py")) == "one"


@pytest.mark.parametrize(
    ("values", "alike"),
    [
        ({}, True),
        ({"LR": 0.0205}, True),
        ({"LR": 0.02 * 300 ** (0.9 * TOLERANCE)}, True),
        ({"LR": 0.022}, False),
        ({"DECAY": 0.105}, True),
        ({"DECAY": 0.106}, False),
        ({"DECAY": 0.104, "LR": 0.0195}, True),
        ({"DECAY": 0.104, "LR": 0.0150}, False),
        ({"DEPTH": 7}, False),
        ({"STEPS": 5900}, True),
        ({"STEPS": 6100}, False),
        ({"WIDTH": 128}, False),
        ({"MODE": "fast"}, False),
    ],
)
def test_programs_are_near_when_each_knob_is(values: dict[str, Value], alike: bool):
    assert near(PROGRAM, rewrite(PROGRAM, values)) == alike
    assert near(rewrite(PROGRAM, values), PROGRAM) == alike


def test_other_code_other_ranges_and_other_files_make_another_program():
    for old, new in (("return LR", "return 2 * LR"), ("PLAIN = 3", "PLAIN = 4"), ("0.5]", "0.6]"), ("6  #", "6.0  #")):
        assert old in PROGRAM
        assert not near(PROGRAM, PROGRAM.replace(old, new))
    one = signature({"train.py": PROGRAM, "b.txt": "x"}, "train.py")
    assert one.skeleton != signature({"train.py": PROGRAM, "b.txt": "y"}, "train.py").skeleton


def test_comments_and_layout_make_no_other_program():
    assert near(PROGRAM, PROGRAM.replace("step size", "how far").replace("PLAIN = 3\n\n\n", "PLAIN = (3)  # plain\n"))


@pytest.mark.parametrize("source", ["A = (\n", "", "A = 1\n", '"""\nA = 1  # in [0, 9]\n"""\nA = 2  # in [0, 9]\n'])
def test_a_program_whose_knobs_cannot_be_told_is_compared_as_a_whole(source: str):
    assert near(source, source)
    assert not near(source, source.replace("1", "3") + "\nB = 1\n")
    assert signature({"t.toml": "a = 1"}, "t.toml") == signature({"t.toml": "a = 1"}, "t.toml")


def test_few_whole_numbers_are_told_apart_and_many_are_not():
    few = f"A = 50  # in [0, {FEW}]: a\n"
    many = f"A = 500  # in [0, {10 * FEW}]: a\n"
    assert not near(few, rewrite(few, {"A": 51}))
    assert near(many, rewrite(many, {"A": 510}))
    assert not near(many, rewrite(many, {"A": 511}))


TOLERANCES = (0.0, TOLERANCE, TOLERANCE, 0.0)


def test_nothing_is_near_nothing():
    assert Known().near(signature({"train.py": PROGRAM}, "train.py")) is None


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.003, 0.02, 0.2]))
def test_looking_up_finds_the_first_that_comparing_one_by_one_finds(seed: int, spread: float):
    chance = random.Random(seed)

    def drawn() -> Signature:
        reals = [min(1.0, max(0.0, 0.5 + chance.uniform(-spread, spread))) for _ in range(2)]
        return Signature("one", (chance.choice([0.0, 0.5]), *reals, chance.choice([0.0, 1 / 3, 1.0])), TOLERANCES)

    known, added = Known(), list[Signature]()
    known.add("other", Signature("another", (0.5,), (0.1,)))
    for number in range(200):
        new = drawn()
        alike = (
            str(i)
            for i, old in enumerate(added)
            if all(abs(a - b) <= t + 1e-9 for a, b, t in zip(old.vector, new.vector, TOLERANCES, strict=True))
        )
        assert known.near(new) == next(alike, None)
        known.add(str(number), new)
        added.append(new)
