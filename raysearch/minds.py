"""Who proposes in a study: its proposers, made of its configuration and checked before anything runs.

It asks nobody. What a model or an agent is told, and what its answers may do, is for its own module to say.
"""

from __future__ import annotations

import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from raysearch import directions, objective
from raysearch.config import CHAT, StudyConfig
from raysearch.errors import UserError
from raysearch.knobs import broken_rule, read_knobs, read_rules
from raysearch.model import Operator
from raysearch.objective import Objective
from raysearch.proposers import Proposer, Request
from raysearch.proposers.ablate import AblateProposer
from raysearch.proposers.additive import AdditiveProposer
from raysearch.proposers.agent import AgentProposer, Surroundings
from raysearch.proposers.agent_commands import parse_agent
from raysearch.proposers.chat import ChatProposer
from raysearch.proposers.combine import CombineProposer
from raysearch.proposers.context import Teller
from raysearch.proposers.endpoints import ChatModel
from raysearch.proposers.prices import Price, Purse, load_prices
from raysearch.proposers.simplify import SimplifyProposer
from raysearch.proposers.tables import convert
from raysearch.proposers.transfer import TransferProposer
from raysearch.proposers.tune import TuneProposer

LIMIT_S = 600.0  # of an ask of a chat model, or twice as long as its slowest call may take
READABLE = ("harness.py", "run.py", "evaluation.py", "prepare.py")  # of the trainer
_FORMS = {  # of what a file may hold: the type, of what, and the words for it
    "models": (list, dict, "tables, [[models]]"),
    "agents": (dict, dict, "tables, [agents.NAME]"),
    "prices": (str, str, "the path of a file"),
}
_NO_NAME = re.compile(r"[\s*]|://|:$|@[^@/]+:\d+(/|$)|@localhost\b")  # what is left of an option that went wrong
_SPEC = re.compile(r"(?:(?P<weight>[0-9.]+)\*)?(?:(?P<api>openai|anthropic):)?(?P<name>.+?)(?:@(?P<url>https?://\S+))?")


@dataclass(frozen=True)
class Place:
    """What a study gives its models and agents.

    Attributes:
        scratch: Folder for the agents' scratch folders.
        protected: Text of the files that an agent may read and not change, by path.
        purse: Of all that costs money.
        note: Gets a line for the console.
    """

    scratch: Path
    protected: Mapping[str, str]
    purse: Purse
    note: Callable[[str], None]


# ---- what the options say ----


def chosen(*, models: Sequence[str], agents: Sequence[str], file: Path | None, prices: Path | None) -> dict[str, Any]:
    """What `study.toml` gets of the options; empty where none was given.

    Args:
        models: `[WEIGHT*][API:]NAME[@URL]` each.
        agents: `NAME[=MODEL]` each.
        file: TOML with [[models]], [agents.NAME] and prices.
        prices: File of the user's prices.

    Raises:
        UserError: The file cannot be read or holds something else, or an option is none.
    """
    table = _read(file) if file else {}
    if models:
        table["models"] = [*table.get("models", []), *map(model_table, models)]
    for option in agents:
        name, _, model = option.partition("=")
        table["agents"] = {**table.get("agents", {}), name: {"model": model} if model else {}}
    if prices:
        table["prices"] = str(prices.resolve())
    return table


def model_table(option: str) -> dict[str, Any]:
    """The table of a chat model from its short form.

    Raises:
        UserError: It is none.
    """
    found = _SPEC.fullmatch(option)
    try:
        weight = float((found and found["weight"]) or 1)
    except ValueError:
        found, weight = None, 0.0
    if found is None or _NO_NAME.search(found["name"]):
        raise UserError(
            f"--model {option!r}: it must be [WEIGHT*][API:]NAME[@URL], such as gpt-5-mini, anthropic:NAME or "
            "NAME@http://127.0.0.1:8080/v1; all else about a model goes into a file, see --minds"
        )
    table: dict[str, Any] = {"name": found["name"]}
    if found["api"]:
        table["api"] = found["api"]
    if found["url"]:
        table["base_url"] = found["url"]
    return table if weight == 1 else {**table, "weight": weight}


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}; --minds takes a readable TOML file") from None
    for key, value in table.items():
        if key not in _FORMS:
            raise UserError(f"{path}: key {key!r} is not known; known here: {', '.join(_FORMS)}; remove it")
        whole, part, words = _FORMS[key]
        parts: Any = cast("dict[str, Any]", value).values() if isinstance(value, dict) else value
        if not isinstance(value, whole) or not all(isinstance(one, part) for one in parts):
            raise UserError(f"{path}: {key} = {value!r}: it must be {words}; correct it")
    if "prices" in table:
        table["prices"] = str((path.parent / table["prices"]).resolve())
    return table


def readable(task: Objective, files: Mapping[str, str]) -> dict[str, str]:
    """What an agent may read beside the editable files: the protected ones; of the bundled trainer, what runs train.py.

    Args:
        task: The objective.
        files: Text by path, the protected ones among them.
    """
    if not task.has_presets:
        return {path: files[path] for path in task.protected}
    home = objective.trainer_folder()
    return {f"{home.name}/{name}": (home / name).read_text(encoding="utf-8") for name in READABLE}


# ---- the proposers ----


def make(config: StudyConfig, place: Place) -> list[Proposer]:
    """The proposers of a study, in the order in which they share the line.

    Raises:
        UserError: One of them cannot work: no key, no program, a package that is missing, a value against its rule.
    """
    task, seed = config.to_objective(), config.search.seed
    tuned = objective.tuned_file(task.editable)
    prices = load_prices(Path(config.prices) if config.prices else None)
    makers: dict[str, Callable[[], Proposer]] = {
        "tune": lambda: tuner(config),
        "additive": lambda: AdditiveProposer(seed=seed, path=tuned),
        "ablate": lambda: AblateProposer(seed=seed),
        "simplify": lambda: SimplifyProposer(seed=seed),
        "transfer": TransferProposer,
        "combine": CombineProposer,
        CHAT: lambda: _chat(config, task, place, prices),
    }
    return [
        makers[name]() if name in makers else _agent(name, config, task, place, prices) for name in config.proposers
    ]


def tuner(config: StudyConfig) -> TuneProposer:
    """The proposer that moves knobs."""
    path = objective.tuned_file(config.to_objective().editable)
    return TuneProposer(searcher=config.search.searcher, seed=config.search.seed, path=path)


def _chat(config: StudyConfig, task: Objective, place: Place, prices: Mapping[str, Price]) -> Proposer:
    models = [convert(table, ChatModel, where=f"[[models]] {table.get('name', '?')}") for table in config.models]
    teller = Teller()
    return ChatProposer(
        models,
        context=teller,
        learn=teller.tell,
        check=_checks(task),
        refusal=_against,
        purse=place.purse,
        prices=prices,
        seed=config.search.seed,
        parallel=config.search.parallel,
        limit_s=max(LIMIT_S, *(2.2 * model.timeout_s for model in models)),
        note=place.note,
    )


def _agent(name: str, config: StudyConfig, task: Objective, place: Place, prices: Mapping[str, Price]) -> Proposer:
    teller = Teller()

    def price(model: str, tokens_in: int, tokens_out: int) -> float | None:
        known = prices.get(model)
        return known.cost_usd(tokens_in=tokens_in, tokens_out=tokens_out) if known else None

    around = Surroundings(
        base=place.scratch,
        context=teller,
        learn=teller.tell,
        check=_checks(task),
        refusal=_against,
        purse=place.purse,
        protected=place.protected,
        environ=os.environ,
        clock=time.monotonic,
        price=price,
    )
    agent = parse_agent(name, config.agents[name])
    if place.purse.limit_usd is not None and not agent.max_usd:
        place.note(
            f"agent {name}: without a max_usd of its own one run may pass the cap, since its cost is known when it "
            "has ended; give it one in the file of --minds"
        )
    return AgentProposer(agent, around, parallel=config.search.parallel)


def _checks(task: Objective) -> Callable[[Mapping[str, str]], None]:
    def check(files: Mapping[str, str]) -> None:
        objective.check_program(files, task)
        for path in (path for path in files if path.endswith(".py")):
            values = {name: knob.value for name, knob in read_knobs(files[path], path=path).items()}
            broken = broken_rule(read_rules(files[path]), values)
            if broken:
                raise UserError(f"{path}: the rule {broken!r} does not hold; choose values for which it does")

    return check


def _against(request: Request, files: Mapping[str, str], operator: Operator) -> str | None:
    return directions.refusal(request.directions, before=request.files, after=files, operator=operator)
