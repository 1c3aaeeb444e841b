"""`study.toml`: everything that was chosen for a study, resolved and strict. It reads and writes that one file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raysearch import judge
from raysearch.errors import UserError
from raysearch.model import Direction
from raysearch.objective import TRAINER, Objective
from raysearch.study import Settings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ObjectiveSection(_Section):
    """The task: the bundled trainer, or any command that prints `metric: number`."""

    kind: Literal["trainer", "command"] = "trainer"
    editable: list[str] = Field(default=["train.py"], min_length=1)
    protected: list[str] = []
    command: list[str] = []
    metric: str = "val_bpb"
    direction: Direction = Direction.MINIMIZE
    timeout_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _fits_kind(self) -> ObjectiveSection:
        if self.kind == "command" and not self.command:
            raise ValueError('kind = "command" needs `command`, e.g. ["{python}", "score.py", "--seed", "{seed}"]')
        if self.kind == "trainer":
            default = ObjectiveSection.model_construct()
            changed = [key for key in type(self).model_fields if getattr(self, key) != getattr(default, key)]
            if changed:
                raise ValueError(f'{changed[0]} is for kind = "command"; the trainer has its own')
        return self

    @model_validator(mode="after")
    def _has_files_of_its_own(self) -> ObjectiveSection:
        paths = [*self.editable, *self.protected]
        for path in paths:
            parts = PurePosixPath(path).parts
            if not parts or path.startswith("/") or ".." in parts:
                raise ValueError(f"{path!r} must be a path inside the program's folder, such as train.py")
            if paths.count(path) > 1:
                raise ValueError(f"{path!r} is there twice; a file is either editable or protected")
        return self


class BudgetSection(_Section):
    """Overrides the presets' budgets; at most one of the two."""

    seconds: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> BudgetSection:
        if self.seconds is not None and self.tokens is not None:
            raise ValueError("a budget is in seconds or in tokens, not in both; drop one")
        return self


PROPOSERS = ("tune", "additive", "ablate", "simplify", "transfer", "combine")  # those that compute their ideas
CHAT = "chat"  # the one that asks models
MOST_RUNS = 100  # of one program that a study may ask for


class SearchSection(_Section):
    """Who proposes, and how far ahead of what is confirmed."""

    searcher: str = "optuna"
    seed: int = 0
    proposers: list[str] | None = Field(default=None, min_length=1)  # None: all there are, models and agents in front
    parallel: int = Field(default=4, ge=1)  # asks at once of the chat models, and of each agent
    frontier: bool = True  # build on candidates that are still raced
    futility: bool = True  # stop runs that are far behind at half of their budget


class JudgeSection(_Section):
    """When a difference is believed; see `judge.Rules`. `greedy` keeps whatever looks better once, for comparison."""

    rule: Literal["race", "greedy"] = "race"
    baseline_runs: int = Field(default=3, ge=2, lt=MOST_RUNS)
    noise_share: float = Field(default=0.05, ge=0, lt=0.5)
    screen_probability: float = Field(default=judge.Rules.screen_probability, ge=0, lt=1)
    frontier_probability: float = Field(default=judge.Rules.frontier_probability, ge=0, le=1)
    keep_probability: float = Field(default=judge.Rules.keep_probability, ge=0.5, lt=1)
    drop_probability: float = Field(default=judge.Rules.drop_probability, ge=0, le=0.5)
    max_pairs: int = Field(default=judge.Rules.max_pairs, ge=1, lt=MOST_RUNS)
    least_effect: float = Field(default=judge.Rules.least_effect, ge=0)
    simplify_margin: float = Field(default=judge.Rules.simplify_margin, ge=0)


class SlotsSection(_Section):
    """Where trials run. `auto`: GPUs if there is any in the cluster, else CPU slots of `threads` threads each."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    cpu_slots: int = Field(default=0, ge=0)  # 0: as many as a machine has cores
    threads: int = Field(default=1, ge=1)
    niceness: int = Field(default=5, ge=0, le=19)


class StudyConfig(_Section):
    """A study's whole configuration.

    Attributes:
        preset: `auto`: by the slot's hardware.
        datasets: The dataset of each preset, written when its data was first prepared.
        manifests: Hash of those data, by preset: a node with others is refused.
        dataset: Named by the user, else empty.
        models: Chat models; the keys of each are those of `proposers.endpoints.ChatModel`.
        agents: Coding agents by name; the keys of each are those of `proposers.agent_commands.CodingAgent`.
        prices: File of a user's own prices of models, else empty.
        mirrors: Where copies of the study are kept: git remotes and fsspec URLs; see `mirrors`.
    """

    name: str
    preset: str = "auto"
    dataset: str = ""
    datasets: dict[str, str] = {}
    manifests: dict[str, str] = {}
    objective: ObjectiveSection = ObjectiveSection()
    budget: BudgetSection = BudgetSection()
    search: SearchSection = SearchSection()
    judge: JudgeSection = JudgeSection()
    slots: SlotsSection = SlotsSection()
    models: list[dict[str, Any]] = []
    agents: dict[str, dict[str, Any]] = {}
    prices: str = ""
    mirrors: list[str] = []

    @model_validator(mode="after")
    def _knows_who_is_asked(self) -> StudyConfig:
        known = self.minds + PROPOSERS
        asked = self.search.proposers or []
        for name in asked:
            if asked.count(name) > 1:
                raise ValueError(f"search.proposers: {name!r} is there twice; name each proposer once")
            if name not in known:
                more = "; chat needs --model, an agent needs --agent" if name not in PROPOSERS else ""
                raise ValueError(f"search.proposers: {name!r} is not known; known here: {', '.join(known)}{more}")
        taken = [name for name in self.agents if name in (CHAT, *PROPOSERS)]
        if taken:
            raise ValueError(f"agents: {taken[0]!r} is the name of another proposer; give the agent another name")
        return self

    @property
    def minds(self) -> tuple[str, ...]:
        """Proposers that models and agents of the study make."""
        return (*((CHAT,) if self.models else ()), *self.agents)

    @property
    def proposers(self) -> tuple[str, ...]:
        """Who is asked; the first one has most of the line, the quick ones fill in for those that take long."""
        return tuple(self.search.proposers or self.minds + PROPOSERS)

    @property
    def key_names(self) -> tuple[str, ...]:
        """Variables of the environment that the user has named as those that hold a model's key."""
        return tuple(sorted({str(table["key_env"]) for table in self.models if table.get("key_env")}))

    def settings(self, max_trials: int | None) -> Settings:
        """What the study's decisions need of this."""
        return Settings(
            direction=self.objective.direction,
            baseline_runs=self.judge.baseline_runs,
            rules=judge.Rules(
                greedy=self.judge.rule == "greedy",
                screen_probability=self.judge.screen_probability,
                frontier_probability=self.judge.frontier_probability,
                keep_probability=self.judge.keep_probability,
                drop_probability=self.judge.drop_probability,
                max_pairs=self.judge.max_pairs,
                least_effect=self.judge.least_effect,
                simplify_margin=self.judge.simplify_margin,
            ),
            max_trials=max_trials,
            proposers=self.proposers,
            frontier=self.search.frontier,
            futility=self.search.futility,
            noise_share=self.judge.noise_share,
            seed=self.search.seed,
        )

    def to_objective(self) -> Objective:
        """The objective that the section describes."""
        section = self.objective
        if section.kind == "trainer":
            return TRAINER
        return Objective(
            editable=tuple(section.editable),
            protected=tuple(section.protected),
            command=tuple(section.command),
            metric=section.metric,
            direction=section.direction,
            has_presets=False,
            timeout_s=section.timeout_s,
        )


def parse_config(table: dict[str, Any], *, where: str) -> StudyConfig:
    """Reads a configuration strictly.

    Args:
        table: As TOML has it.
        where: For messages.

    Raises:
        UserError: An unknown key, or a value against its rule: one line with the value, the rule and the remedy.
    """
    try:
        return StudyConfig.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{where}: {_told(error, table)}") from None


def with_minds(config: StudyConfig, minds: Mapping[str, Any], proposers: Sequence[str] | None) -> StudyConfig:
    """A configuration with other models, agents or prices, and perhaps with others who are asked.

    Who is named in the configuration one by one stays so: models and agents that are new come in front, those that are
    gone leave.

    Args:
        config: As it was.
        minds: Of `models`, `agents` and `prices` those that change.
        proposers: Who is asked; None leaves it to the rule above.

    Raises:
        UserError: What comes of it is against a rule.
    """
    table = {**config.model_dump(mode="json", exclude_none=True), **minds}
    named = table["search"].pop("proposers", None)
    if proposers is None and named is not None:
        known = parse_config(table, where="options").minds + PROPOSERS
        given = (*((CHAT,) if minds.get("models") else ()), *minds.get("agents", ()))
        new = [name for name in given if name not in named]
        proposers = [*new, *(name for name in named if name in known)] or None
    if proposers is not None:
        table["search"]["proposers"] = list(proposers)
    return parse_config(table, where="options")


def load_config(path: Path) -> StudyConfig:
    """Reads a `study.toml`.

    Raises:
        UserError: It is missing, no TOML, or holds something that it may not.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; start the study with `raysearch --study NAME`") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a file that can be read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; it must be TOML: mend that line") from None
    return parse_config(table, where=str(path))


def write_config(path: Path, config: StudyConfig) -> None:
    """Writes a `study.toml` in one piece."""
    temporary = path.with_suffix(".toml.tmp")
    temporary.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    temporary.replace(path)


def _told(error: ValidationError, table: dict[str, Any]) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        section = StudyConfig if len(place) == 1 else StudyConfig.model_fields[place[0]].annotation
        known = ", ".join(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else ""
        return f"key {key!r} is not known; known here: {known}; remove it or mend its spelling"
    if first["type"] == "missing":
        return f"{key} is missing; add it"
    if first["type"] == "model_type":
        return f"{key} = {first['input']!r}: it must be a table, [{key}]; change it or leave it out"
    message = first["msg"].removeprefix("Value error, ")
    value: object = first.get("input")
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    place = f"{key}{shown}: " if key else ""
    return f"{place}{message[0].lower()}{message[1:]}; change it or leave it out"
