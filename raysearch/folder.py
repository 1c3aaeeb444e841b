"""Where everything of a study lies on the disk: made, opened, and checked before anything runs."""

from __future__ import annotations

import gc
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch.config import StudyConfig, load_config, parse_config, with_minds, write_config
from raysearch.errors import UserError
from raysearch.journal import Journal
from raysearch.ratchet import Ratchet
from raysearch.study import InvalidTransition, Study

LEAST_FREE_BYTES = 500 * 2**20
CHANGEABLE = ("models", "agents", "prices", "mirrors")  # what may be others later, beside search.proposers
RAY_PACKAGES = "runtime_resources"  # Ray's folder for what `ray job submit --working-dir` sends
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Folder:
    """A study's folder."""

    path: Path

    @property
    def name(self) -> str:
        """The study's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """What was chosen for the study."""
        return self.path / "study.toml"

    @property
    def journal(self) -> Path:
        """What happened in it."""
        return self.path / "journal.db"

    @property
    def repo(self) -> Path:
        """Its programs, a bare git repository."""
        return self.path / "repo"

    @property
    def trials(self) -> Path:
        """What its runs left, a folder each."""
        return self.path / "trials"

    def run(self, trial_id: str, attempt: int) -> Path:
        """What one attempt left. Each has a folder of its own: a lost one may still write, out of everybody's reach."""
        return self.trials / (trial_id if attempt == 1 else f"{trial_id}.{attempt}")

    @property
    def inbox(self) -> Path:
        """Patches dropped by people."""
        return self.path / "inbox"

    @property
    def scratch(self) -> Path:
        """Folders in which coding agents work."""
        return self.path / "scratch"

    @property
    def token(self) -> Path:
        """The study's id, in a file by which a slot finds out whether it sees this disk."""
        return self.path / ".token"


def named_folder(name: str, studies: Path) -> Folder:
    """The folder of a study by its name, or by its path.

    Raises:
        UserError: The name is no name of a folder.
    """
    if "/" in name:
        return Folder(Path(name).resolve())
    if not _NAME.fullmatch(name):
        raise UserError(f"study {name!r}: a name has letters, digits, '.', '_' and '-', and at most 64; take another")
    return Folder((studies / name).resolve())


def existing_folder(name: str, studies: Path) -> Folder:
    """The folder of a study that is there.

    Raises:
        UserError: It is not.
    """
    folder = named_folder(name, studies)
    if not folder.config.exists():
        known = sorted(path.parent.name for path in studies.glob("*/study.toml"))
        there = f"in {studies} are: {', '.join(known)}" if known else f"{studies} has none"
        raise UserError(f"study {name!r} is not there; {there}; start one with `raysearch --study NAME`")
    return folder


def only_folder(studies: Path) -> Folder:
    """The one study of a folder of studies; the one that is being driven, when there are several.

    Raises:
        UserError: There is none, or it is not clear which one is meant.
    """
    folders = [Folder(path.parent.resolve()) for path in sorted(studies.glob("*/study.toml"))]
    driven = [folder for folder in folders if Journal.is_driven(folder.journal)]
    chosen = folders if len(folders) == 1 else driven
    if len(chosen) != 1:
        names = ", ".join(folder.name for folder in folders) or "none"
        raise UserError(f"which study is meant is not clear, {studies} has {names}; name it with --study")
    return chosen[0]


def configure(folder: Folder, chosen: Mapping[str, Any]) -> tuple[StudyConfig, bool]:
    """The configuration of a study: a new one of what was chosen, or its own if what was chosen does not contradict it.

    A study may go on with other models, agents, prices and proposers: a server moves, a model is replaced, and what was
    measured stays what it is. Nothing is written here, since what was chosen may yet turn out not to work.

    Returns:
        The configuration, and whether the study is new.

    Raises:
        UserError: A value against its rule, a folder that is no study, or a choice against an earlier one.
    """
    if folder.config.exists():
        config = load_config(folder.config)
        fixed = {key: value for key, value in chosen.items() if key not in CHANGEABLE}
        if "search" in fixed:
            fixed["search"] = {key: value for key, value in fixed["search"].items() if key != "proposers"}
        _check_same(config, fixed, folder)
        minds = {key: value for key, value in chosen.items() if key in CHANGEABLE}
        return with_minds(config, minds, chosen.get("search", {}).get("proposers")), False
    if folder.path.exists() and any(folder.path.iterdir()):
        inside = ", ".join(sorted(path.name for path in folder.path.iterdir())[:5])
        raise UserError(
            f"{folder.path} holds {inside}, but no study.toml; a study needs a folder of its own: take another"
        )
    return parse_config({"name": folder.name, **chosen}, where="options"), True


def _check_same(config: StudyConfig, chosen: Mapping[str, Any], folder: Folder) -> None:
    stored = config.model_dump(mode="json")
    wanted_all = parse_config({"name": config.name, **chosen}, where="options").model_dump(mode="json")
    for key, value in chosen.items():
        for inner in value if isinstance(value, dict) else [None]:  # pyright: ignore[reportUnknownVariableType]
            name = f"{key}.{inner}" if inner else key
            has, wanted = (table[key].get(inner) if inner else table[key] for table in (stored, wanted_all))
            if has != wanted:
                raise UserError(
                    f"{name} = {wanted!r}: study {folder.name!r} was started with {has!r}; "
                    "leave the option out to go on, or start another --study"
                )


def check_lasting(folder: Folder) -> None:
    """Refuses the folder in which Ray keeps a job's working files: Ray deletes it.

    Raises:
        UserError: The study would lie there.
    """
    if RAY_PACKAGES in folder.path.parts:
        raise UserError(
            f"{folder.path} is in Ray's copy of the job's working folder, which Ray deletes; name a folder of the head "
            "that stays: --studies /absolute/path, or RAYSEARCH_STUDIES where `ray start` was called"
        )


def check_space(folder: Folder) -> None:
    """Refuses to start on a full disk.

    Raises:
        UserError: Less is free than a study needs to go on.
    """
    parent = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < LEAST_FREE_BYTES:
        raise UserError(
            f"{parent}: {free // 2**20} MiB are free; a study needs {LEAST_FREE_BYTES // 2**20}: "
            "free some, or put it elsewhere with --studies"
        )


def make(folder: Folder, config: StudyConfig, files: Mapping[str, str], *, at: float) -> None:
    """Makes a new study; when it was interrupted, a second call completes it.

    Args:
        folder: Of the study.
        config: Written as `study.toml`, last: a folder without it is no study.
        files: The base program, text by path.
        at: Unix time in seconds.
    """
    folder.trials.mkdir(parents=True, exist_ok=True)
    Ratchet.create(folder.repo, files, message="The base program\n", at=at)
    if not folder.token.exists():
        folder.token.write_text(uuid.uuid4().hex)
    write_config(folder.config, config)


def replay(config: StudyConfig, journal: Journal, *, max_trials: int | None = None) -> Study:
    """The state of a study from its journal.

    Raises:
        UserError: An event does not fit those before it: one is missing, or was changed.
    """
    study = Study(config.settings(max_trials))
    was_on = gc.isenabled()
    gc.disable()  # half a million events that all stay: looking for garbage among them takes a fifth of the time
    try:
        for record in journal.read():
            study.apply(record)
    except InvalidTransition as error:
        raise UserError(f"{journal.path}: {error}; it must be a whole study journal: restore it from a copy") from None
    finally:
        if was_on:
            gc.enable()
    return study


def check_ratchets(study: Study, repo: Ratchet, folder: Folder) -> None:
    """Refuses a repository that disagrees with the journal.

    A step that was made, but not journalled before the end, is found by the coordinator and is no disagreement.

    Raises:
        UserError: A ratchet stands where the journal does not have it.
    """
    for slug, lane in study.lanes.items():
        head = repo.head(slug)
        if head == lane.champion_commit or (head and lane.champion_commit in repo.parents(head)):
            continue
        raise UserError(
            f"{folder.repo}: ratchet/{slug} stands at {(head or 'nothing')[:10]}, the journal has it at "
            f"{lane.champion_commit[:10]}; a ratchet is moved by its study alone: "
            f"`git -C {folder.repo} update-ref refs/heads/ratchet/{slug} {lane.champion_commit}`"
        )
