"""The command lines of coding agents: templates that are known, their places filled, the environment that they get.

It starts none of them and reads nothing that they say.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from raysearch.errors import UserError
from raysearch.proposers.tables import check_keys, convert, field_names
from raysearch.secrecy import SECRET_CHARS, is_secret

# What every agent gets of the environment: where things are, what language, and the way to the network. No key.
PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TERM", "TMPDIR", "TZ"),
    *("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"),
)
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # whatever an agent runs, it takes no GPU from a trial
PLACES = ("prompt", "workdir", "last_message", "model", "max_usd", "files")
_PLACE = re.compile(r"\{([a-z_]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Output(Enum):
    """How an agent says what it did and what it cost."""

    TEXT = "text"  # anything; it costs nothing that is known
    CLAUDE = "claude"  # one JSON object: `--output-format json`
    CODEX = "codex"  # a JSON object a line: `exec --json`
    GEMINI = "gemini"  # one JSON object: `--output-format json`
    OPENCODE = "opencode"  # a JSON object a line: `run --format json`
    AIDER = "aider"  # text with a line of tokens and cost


@dataclass(frozen=True)
class CodingAgent:
    """A coding agent, as a command line.

    Attributes:
        name: As in `--proposers`, and in every proposal.
        command: Argument vector with the places {prompt}, {workdir} (the folder that it works in), {last_message} (a
            file for its last message), {model}, {max_usd} and {files} (the editable files, an argument each). A tuple
            within it is left out when a place in it is empty.
        timeout_s: After this it is ended, and what it did until then is dropped.
        max_usd: What one run may cost; 0 sets no limit of its own.
        model: What {model} stands for; empty leaves it to the agent.
        env: Names of variables that are let through beside `PASSED`, or NAME=value, which is set.
        output: How it says what it did.
        prompt: What it is told, with the place {files}; empty for the prompt that all are given.
    """

    name: str
    command: tuple[str | tuple[str, ...], ...]
    timeout_s: float = 600.0
    max_usd: float = 0.0
    model: str = ""
    env: tuple[str, ...] = ()
    output: Output = Output.TEXT
    prompt: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"agent {self.name!r}: a name has letters, digits and . _ - only; rename it")
        if not self.command or not isinstance(self.command[0], str) or not self.command[0]:
            raise UserError(f"agent {self.name!r}: `command` must begin with the program; give an argument vector")
        if not 0 < self.timeout_s < float("inf"):
            raise UserError(f"agent {self.name!r}: timeout_s = {self.timeout_s} must be above 0; give seconds")
        if not 0 <= self.max_usd < float("inf"):
            raise UserError(f"agent {self.name!r}: max_usd = {self.max_usd} must be 0 or more; give dollars a run")
        said = [entry.partition("=")[0] for entry in self.env if _holds_secret(entry)]
        if said:
            raise UserError(
                f"agent {self.name!r}: env sets {said[0]}, a secret that the study's files would hold; export it, and "
                "give its name alone"
            )
        unknown = {place for part in _flat(self.command) for place in _PLACE.findall(part)} - {*PLACES}
        if unknown:
            known = ", ".join(f"{{{place}}}" for place in PLACES)
            raise UserError(f"agent {self.name!r}: no place is called {{{min(unknown)}}}; known: {known}; correct it")


def templates() -> dict[str, CodingAgent]:
    """The agents that raysearch knows, by name."""
    text = resources.files("raysearch.proposers").joinpath("agents.toml").read_text(encoding="utf-8")
    return {name: _converted(name, table) for name, table in tomllib.loads(text).items()}


def template(name: str) -> CodingAgent:
    """A known agent.

    Raises:
        UserError: It is not known.
    """
    known = templates()
    if name not in known:
        raise UserError(
            f"the coding agent {name!r} is not known; known: {', '.join(known)}; "
            f"take one of these, or give its `command` in [agents.{name}] of the study's configuration"
        )
    return known[name]


def parse_agent(name: str, table: Mapping[str, Any]) -> CodingAgent:
    """An agent from a user's table: the fields of `CodingAgent`, and `like`, a known agent to begin from.

    A table named like a known agent begins from that one unless it gives a command.

    Raises:
        UserError: A key is not known, a value has the wrong type, or there is no command.
    """
    keys = ["like", *(field for field in field_names(CodingAgent) if field != "name")]
    check_keys(table, keys, where=f"[agents.{name}]")
    own = {key: value for key, value in table.items() if key != "like"}
    if "like" not in table and "command" in table:
        return _converted(name, own)
    like = template(str(table.get("like", name)))
    begun = msgspec.to_builtins(like)
    return _converted(name, {**begun, **own})


def _converted(name: str, table: Mapping[str, Any]) -> CodingAgent:
    return convert({**table, "name": name}, CodingAgent, where=f"[agents.{name}]")


def program(agent: CodingAgent, environ: Mapping[str, str]) -> str:
    """Path of an agent's program.

    Raises:
        UserError: It is not there.
    """
    name = _flat(agent.command)[0]
    found = shutil.which(name, path=environ.get("PATH"))
    if found is None:
        raise UserError(
            f"agent {agent.name!r}: {name!r} is not on PATH; a coding agent runs on the machine of the coordinator; "
            f"install it there, or give its path in `command`"
        )
    return str(Path(found).absolute())  # the agent starts in another folder


def arguments(agent: CodingAgent, *, prompt: str, workdir: Path, last_message: Path, files: Sequence[str]) -> list[str]:
    """The argument vector of one run; the first is the program as the template names it."""
    values = {
        "prompt": prompt,
        "workdir": str(workdir),
        "last_message": str(last_message),
        "model": agent.model,
        "max_usd": f"{agent.max_usd:.4f}" if agent.max_usd else "",
    }
    filled: list[str] = []
    for part in agent.command:
        if part == "{files}":
            filled += files
        elif isinstance(part, str):
            filled.append(_filled(part, values))
        elif all(values.get(place) for argument in part for place in _PLACE.findall(argument)):
            filled += (_filled(argument, values) for argument in part)
    return filled


def _filled(argument: str, values: Mapping[str, str]) -> str:
    """In one pass, so that a brace in a value is no place."""
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), argument)


def environment(agent: CodingAgent, environ: Mapping[str, str]) -> dict[str, str]:
    """What an agent gets of the environment: keys of other agents, and whatever else is there, stay out of it."""
    passed = {name: environ[name] for name in (*PASSED, *agent.env) if name in environ}
    return HIDDEN | passed | dict(entry.split("=", 1) for entry in agent.env if "=" in entry)


def _holds_secret(entry: str) -> bool:
    name, _, value = entry.partition("=")
    return len(value) >= SECRET_CHARS and is_secret(name, value)


def _flat(command: Sequence[str | Sequence[str]]) -> list[str]:
    return [word for part in command for word in ([part] if isinstance(part, str) else part)]
