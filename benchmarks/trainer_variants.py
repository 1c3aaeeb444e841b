"""What the benchmark of trainers compares: reads presets, budgets, constants and paths as a person writes them.

It runs nothing.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysearch import knobs
from raysearch.errors import UserError
from raysearch.objective import TRAIN_FILE, base_program, load_presets, trainer_folder


@dataclass(frozen=True)
class Variant:
    """What is compared: one program with one budget.

    Attributes:
        label: As it was asked for.
        program: Its file; None if it is `source`.
        source: Text of a program that is written for the run.
        is_reference: Whether it runs by the adapter instead of the harness.
        budget_s: Seconds of training.
    """

    label: str
    program: Path | None
    source: str | None
    is_reference: bool
    budget_s: float


def read_variants(references: Sequence[str], variants: Sequence[str], *, budget_s: float) -> list[Variant]:
    """The references, then the variants; `budget_s` is for those that name no budget.

    Raises:
        UserError: A name, a value or a path is wrong.
    """
    return [*(reference(text, budget_s) for text in references), *(variant(text, budget_s) for text in variants)]


def reference(text: str, budget_s: float) -> Variant:
    """A reference from `PATH` or `PATH@SECONDS`.

    Raises:
        UserError: There is no program.
    """
    name, budget_s = split_budget(text, budget_s)
    path = Path(name)
    program = path / TRAIN_FILE if path.is_dir() else path
    if not program.is_file():
        raise UserError(f"--reference {text}: {program} is no file; give a folder with an autoresearch-style train.py")
    label = f"{(program.resolve().parent if path.is_dir() else program).name}{text.removeprefix(name)}"
    return Variant(f"{label} (reference)", program, None, True, budget_s)


def variant(text: str, budget_s: float) -> Variant:
    """One of ours from `PRESET[:NAME=VALUE,…][@SECONDS]` or `PATH.py[@SECONDS]`.

    Raises:
        UserError: The preset, the program, a constant or a value is not known.
    """
    name, budget_s = split_budget(text, budget_s)
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"{text}: {name} is no file; give a program that defines train(run), or a preset's name")
        return Variant(text, Path(name), None, False, budget_s)
    preset, _, changes = name.partition(":")
    presets = load_presets()
    if preset not in presets:
        raise UserError(
            f"preset {preset!r} is not known; known: {', '.join(presets)}; give one of them, or a path that ends in .py"
        )
    source = base_program((trainer_folder() / TRAIN_FILE).read_text(), presets[preset])
    return Variant(text, None, changed(source, changes, text) if changes else source, False, budget_s)


def split_budget(text: str, default_s: float) -> tuple[str, float]:
    """What stands before `@SECONDS`, and the seconds; the text as it is if it does not end in such.

    Raises:
        UserError: The seconds are not positive.
    """
    name, _, tail = text.rpartition("@")
    try:
        budget_s = float(tail)
    except ValueError:
        return text, default_s
    if not name or not 0 < budget_s < math.inf:
        raise UserError(f"{text}: budget {tail} has to be positive seconds after a name; write it as h100@150")
    return name, budget_s


def changed(source: str, changes: str, text: str) -> str:
    """The program with other constants, `NAME=VALUE` with commas between.

    Raises:
        UserError: A constant is not in the program, a value is out of its range, or they break one of its rules.
    """
    found = knobs.read_knobs(source)
    values: dict[str, knobs.Value] = {}
    for change in changes.split(","):
        name, is_set, value = (part.strip() for part in change.partition("="))
        if not is_set or not name or not value:
            raise UserError(f"{text}: {change!r} is no NAME=VALUE; write it as h100:DEPTH=9,TOTAL_BATCH_SIZE=262144")
        values[name] = literal(value, like=found[name].value if name in found else None)
        if name in found and not found[name].allows(values[name]):
            raise UserError(
                f"{text}: {name}={value} is not in {range_of(found[name])}; take one that is, or edit a copy of "
                f"{TRAIN_FILE} and give its path"
            )
    try:
        rewritten = knobs.rewrite(source, values)
    except UserError as error:
        raise UserError(f"{text}: {error}; name one of them") from None
    after = {name: knob.value for name, knob in knobs.read_knobs(rewritten).items()}
    if broken := knobs.broken_rule(knobs.read_rules(rewritten), after):
        raise UserError(f"{text}: it breaks the program's rule {broken!r}; change the values until it holds")
    return rewritten


def literal(text: str, *, like: knobs.Value | None) -> knobs.Value:
    """A value as it is written, a word for a text; 1 for a constant that is a float is 1.0."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, bool | int | float | str):
        value = text
    return float(value) if isinstance(like, float) and isinstance(value, int) else value


def range_of(knob: knobs.Knob) -> str:
    """A knob's range in words."""
    return f"{{{', '.join(map(str, knob.choices))}}}" if knob.choices else f"[{knob.low:g}, {knob.high:g}]"
