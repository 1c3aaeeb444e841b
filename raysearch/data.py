"""Sees to the trainer's prepared data on this machine, through the trainer's own command. It reads no data itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from raysearch.errors import UserError
from raysearch.objective import Preset


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
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        last = ""
        for line in process.stderr:  # the last line is held back: when the preparation fails, it is the error
            if show and last:
                sys.stderr.write(last)
            last = line
        output = process.stdout.read()
    if process.returncode != 0:
        said = last.strip().removeprefix("error: ")
        raise UserError(said or f"the data of preset {preset.name!r} could not be prepared: exit {process.returncode}")
    if show and last:
        sys.stderr.write(last)
    found = json.loads(output.strip().splitlines()[-1])
    return PreparedData(
        folder=found["data"],
        dataset=found["dataset"],
        why=found["why"],
        manifest_sha256=found["manifest_sha256"],
        evaluation_version=found["evaluation_version"],
    )
