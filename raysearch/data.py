"""Sees to the trainer's prepared data on this machine, through the trainer's own command. It reads no data itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from raysearch.errors import UserError
from raysearch.objective import Preset

PREPARE_LIMIT_S = 24 * 3600  # a slow line may take hours for the first shards


@dataclass(frozen=True)
class PreparedData:
    """Prepared data, as `trainer.prepare` reported it.

    Attributes:
        folder: On this machine.
        why: Why this dataset was taken, in a sentence.
    """

    folder: str
    dataset: str
    why: str
    manifest_sha256: str
    evaluation_version: str


def prepare(preset: Preset, dataset: str | None, *, show: bool = False) -> PreparedData:
    """Makes a preset's data on this machine, or finds it made.

    Args:
        preset: Whose vocabulary and row length.
        dataset: Its name, or None for the trainer's choice.
        show: Whether the progress goes to this process's stderr.

    Raises:
        UserError: What the preparation said in its last line.
    """
    command = [sys.executable, "-m", "trainer.prepare", "--preset", preset.name]
    if dataset:
        command += ["--dataset", dataset]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        check=False,
        timeout=PREPARE_LIMIT_S,
    )
    if done.returncode != 0:
        said = (done.stderr or "").strip().splitlines()
        raise UserError(said[-1] if said else f"the data of preset {preset.name!r} could not be prepared; see above")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return PreparedData(
        folder=found["data"],
        dataset=found["dataset"],
        why=found["why"],
        manifest_sha256=found["manifest_sha256"],
        evaluation_version=found["evaluation_version"],
    )
