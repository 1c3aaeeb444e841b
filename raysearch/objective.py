"""What a study optimises: which files may change, what is run, which number counts, and the presets to start from.

It describes runs and never starts one. The bundled trainer is one objective of many, and known here by its files and
its command line alone: nothing of it is imported.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysearch import knobs
from raysearch.errors import UserError
from raysearch.model import Direction

TRAIN_FILE = "train.py"
SLICE_SHARE = 1 / 16  # of the evaluation, scored at half of the budget; another share would need another margin
SLICE_ROWS = 8  # at least
SLOWEST_TOKENS_PER_S = 500  # a budget in tokens is not timed, but a trial slower than this is taken for stuck


@dataclass(frozen=True)
class Preset:
    """Where a class of hardware starts: knob values, data, budget and limits.

    Attributes:
        device: `cuda` or `cpu`.
        min_vram_gb: The fitting preset with the largest value is taken.
        dataset: Taken when none is named, and the network is there.
        vocab_size: Tokens in the vocabulary.
        row_tokens: Tokens in a packed row, and the context of the evaluation.
        budget_s: Training seconds of a trial.
        eval_tokens: Validation tokens that every trial is scored on, and that decide.
        whole_tokens: Validation tokens of the whole set, scored beyond those where the second split is measured too.
        startup_limit_s: From the start of the process to the end of the first step.
        evaluation_limit_s: For `eval_tokens` of each split that is evaluated.
        knobs: Values written into the base program.
    """

    name: str
    device: str
    min_vram_gb: float
    dataset: str
    vocab_size: int
    row_tokens: int
    budget_s: float
    eval_tokens: int
    whole_tokens: int
    startup_limit_s: float
    evaluation_limit_s: float
    knobs: dict[str, knobs.Value]


@dataclass(frozen=True)
class Budget:
    """What a trial may use, one of the two: training seconds, or tokens (deterministic, for CI and debugging)."""

    seconds: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.tokens is not None else f"{self.seconds:g} s"


@dataclass(frozen=True)
class Objective:
    """The task of a study.

    Attributes:
        editable: Paths that a proposal may change.
        protected: Paths that are there in every trial and that no proposal may change.
        command: Argument vector with the places {python}, {data}, {out}, {seed}, {budget_s}.
        metric: Name of the number that counts, as the command prints it (`name: value`, the last one counts).
        direction: Which way it gets better.
        has_presets: Whether it is the bundled trainer, with presets by hardware.
        timeout_s: Of a whole trial, for objectives without presets.
    """

    editable: tuple[str, ...]
    protected: tuple[str, ...]
    command: tuple[str, ...]
    metric: str
    direction: Direction
    has_presets: bool
    timeout_s: float = 0.0


@dataclass(frozen=True)
class RunPlan:
    """How one trial is run on a profile: what the worker needs beside the files.

    Attributes:
        command: Argument vector with places left for the worker to fill in.
        startup_limit_s: 0 for none.
        total_limit_s: From the start of the process to its end.
        waiting: Argument vector of a process that waits for such a trial with all loaded; empty where none pays.
    """

    command: tuple[str, ...]
    startup_limit_s: float
    total_limit_s: float
    env: dict[str, str] = field(default_factory=dict[str, str])
    waiting: tuple[str, ...] = ()


_HARNESS = (
    "{python}",
    "-P",  # nothing beside the candidate shadows a module of the harness
    "-m",
    "trainer.harness",
)

TRAINER = Objective(
    editable=(TRAIN_FILE,),
    protected=(),
    command=(
        *_HARNESS,
        "--train-file",
        TRAIN_FILE,
        "--data",
        "{data}",
        "--out",
        "{out}",
        "--seed",
        "{seed}",
    ),
    metric="val_bpb",
    direction=Direction.MINIMIZE,
    has_presets=True,
)


def trainer_folder() -> Path:
    """The installed trainer's folder, found without importing it.

    Raises:
        UserError: It is not installed.
    """
    spec = find_spec("trainer")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / TRAIN_FILE).exists():
        raise UserError(f"trainer: the package with {TRAIN_FILE} is not installed beside raysearch; `pip install -e .`")
    return folder


def load_presets(folder: Path | None = None) -> dict[str, Preset]:
    """The presets of the bundled trainer, by name."""
    folder = folder or trainer_folder() / "presets"
    return {path.stem: _preset(path) for path in sorted(folder.glob("*.toml"))}


def preset_directions(name: str) -> str | None:
    """What is known of a preset's class of hardware, for whoever proposes; None where nothing was written."""
    path = trainer_folder() / "presets" / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _preset(path: Path) -> Preset:
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        match, data, run = table["match"], table["data"], table["run"]
        return Preset(
            name=path.stem,
            device=match["device"],
            min_vram_gb=float(match["min_vram_gb"]),
            dataset=data["dataset"],
            vocab_size=data["vocab_size"],
            row_tokens=data["row_tokens"],
            budget_s=float(run["budget_s"]),
            eval_tokens=run["eval_tokens"],
            whole_tokens=max(run["eval_tokens"], run.get("whole_tokens", 0)),
            startup_limit_s=float(run["startup_limit_s"]),
            evaluation_limit_s=float(run["evaluation_limit_s"]),
            knobs=table.get("knobs", {}),
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error!r} is wrong or missing; compare it with the presets that came along") from None


def named_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """A preset by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in presets:
        raise UserError(
            f"preset {name!r} is not known; known: {', '.join(presets)}; leave --preset out to have it chosen"
        )
    return presets[name]


def choose_preset(presets: Mapping[str, Preset], *, device: str, memory_mb: int) -> Preset:
    """The preset of a slot: of those for its device that its memory admits, the one that asks for the most.

    Raises:
        UserError: None fits.
    """
    # A card sold as 40 GB reports a little less: a tenth is forgiven.
    fitting = [p for p in presets.values() if p.device == device and memory_mb / 1024 >= 0.9 * p.min_vram_gb]
    if not fitting:
        raise UserError(
            f"no preset fits {device} with {memory_mb} MB; known: {', '.join(presets)}; name one with --preset"
        )
    return max(fitting, key=lambda preset: preset.min_vram_gb)


def base_program(source: str, preset: Preset) -> str:
    """The first program of a profile: the base program with the preset's knob values.

    A constant of the preset that the program does not have is left out: a program of the user's own need not know it.

    Raises:
        UserError: The program does not parse, or the values break one of its rules.
    """
    known = knobs.read_knobs(source)
    values = {name: _as_written(value, known[name]) for name, value in preset.knobs.items() if name in known}
    rewritten = knobs.rewrite(source, values)
    after = knobs.read_knobs(rewritten)
    broken = knobs.broken_rule(knobs.read_rules(rewritten), {name: knob.value for name, knob in after.items()})
    if broken:
        raise UserError(
            f"preset {preset.name!r} breaks the program's rule {broken!r}; change the preset or the program"
        )
    return rewritten


def _as_written(value: knobs.Value, knob: knobs.Knob) -> knobs.Value:
    """TOML's 1 for a knob that is a float in the program is 1.0."""
    return float(value) if isinstance(value, int) and not knob.choices and not knob.is_int else value


def check_program(files: Mapping[str, str], objective: Objective) -> None:
    """Refuses a program that could not run.

    Args:
        files: Text of the editable files by path.
        objective: Whose program it is.

    Raises:
        UserError: A syntax error, a knob outside its range, or (bundled trainer) no `train(run)`.
    """
    for path, source in files.items():
        if not path.endswith(".py"):
            continue
        tree = knobs.syntax_tree(source, path=path)
        knobs.read_knobs(source, path=path)
        if objective.has_presets and path == TRAIN_FILE and not _defines_train(tree):
            raise UserError(
                f"{path}: it has no `train(run)`; define it at module level: it trains and returns the model"
            )


def tuned_file(editable: Sequence[str]) -> str:
    """The file whose knobs are searched: the first Python program among the editable ones."""
    return next((path for path in editable if path.endswith(".py")), editable[0])


def _defines_train(tree: ast.Module) -> bool:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            return bool(node.args.args or node.args.posonlyargs or node.args.vararg)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "train" for t in node.targets):
            return True
    return False


def evaluation_sizes(preset: Preset) -> str:
    """Tokens that decide, and those of the whole set where it is larger, as the harness writes them (`4096-65536`)."""
    whole = f"-{preset.whole_tokens}" if preset.whole_tokens > preset.eval_tokens else ""
    return f"{preset.eval_tokens}{whole}"


def slice_tokens(preset: Preset) -> int:
    """Tokens that are scored at half of the budget; every trial of a profile is scored on the same."""
    return min(preset.eval_tokens, max(int(SLICE_SHARE * preset.eval_tokens), SLICE_ROWS * preset.row_tokens))


def plan_trial(
    objective: Objective,
    preset: Preset | None,
    budget: Budget,
    *,
    device: str,
    threads: int,
    holdout: bool,
    futile_above: float | None = None,
) -> RunPlan:
    """How to run one trial of the objective.

    Args:
        objective: The study's.
        preset: Of the profile; None for objectives without presets.
        budget: Of the profile.
        device: `cuda` or `cpu`.
        threads: CPU threads of the trial, 0 to leave them alone.
        holdout: Whether the second held-out split is measured as well, and the whole set where it is larger.
        futile_above: Of the metric at half of the budget: where the trial is given up. None: it runs to its end. An
            objective without presets has no half-way value, and always does.
    """
    if preset is None:
        return RunPlan(objective.command, 0.0, objective.timeout_s)
    if budget.tokens is None:
        budget_arguments = ("--budget-s", f"{budget.seconds:g}")
        training_limit_s = 1.5 * (budget.seconds or 0.0) + 30  # the last step may be long
    else:
        budget_arguments = ("--budget-tokens", str(budget.tokens))
        training_limit_s = budget.tokens / SLOWEST_TOKENS_PER_S + 60
    has_whole = preset.whole_tokens > preset.eval_tokens
    command = (
        *objective.command,
        *budget_arguments,
        "--eval-tokens",
        str(preset.eval_tokens),
        *(("--whole-tokens", str(preset.whole_tokens)) if has_whole else ()),
        "--slice-tokens",
        str(slice_tokens(preset)),
        *(("--futile-above", repr(futile_above)) if futile_above is not None else ()),
        "--device",
        device,
        *(("--threads", str(threads)) if threads else ()),
        *(("--holdout",) if holdout else ()),
    )
    evaluations = 1 + slice_tokens(preset) / preset.eval_tokens
    if holdout:
        evaluations += preset.whole_tokens / preset.eval_tokens  # the second split, and what the whole set has more
    total_s = preset.startup_limit_s + training_limit_s + evaluations * preset.evaluation_limit_s
    # On a CPU slot the trial that trains would pay for the import: a tenth of its tokens in 10 s, to save one second.
    waiting = (*_HARNESS, "--wait", "--compiler") if device == "cuda" and command[: len(_HARNESS)] == _HARNESS else ()
    return RunPlan(command, preset.startup_limit_s, total_s, waiting=waiting)
