"""Whole studies through `python -m raysearch.run` with real coding agents and a real model, where these are to be had.

Agents are those on PATH, in front of a scripted mind. The model is any at RAYSEARCH_LLM_BASE_URL (`http://…/v1`, served
as `local`); what needs it is slow, and says why it is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from agent_stub import NEW, OLD, TOKENS_IN, a_home, configured, file_in, installed, stub_mind
from session_kit import OBJECTIVE, Bench, OnDisk
from toy import audit

from raysearch import economics
from raysearch.economics import YieldStatus
from raysearch.model import Dropped, Outcome
from raysearch.study import Study

PROGRAM = """\
import math, random, sys, time

LR = 0.02  # in [0.0001, 1.0] log: step size
WIDTH = 64  # in {16, 32, 64, 128, 256}: units
DEPTH = 6  # in [1, 12]: layers

time.sleep(0.2)
noise = random.Random(f"{sys.argv} {LR} {WIDTH} {DEPTH}").gauss(0, 0.003)
score = 1 + 0.2 * (math.log10(LR) + 2.5) ** 2 + 0.05 * (math.log2(WIDTH) - 7) ** 2 + 0.02 * (DEPTH - 3) ** 2
print(f"score: {score + noise}")
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with a_home() as folder:
        yield folder


@pytest.fixture
def model_url() -> str:
    url = os.environ.get("RAYSEARCH_LLM_BASE_URL")
    if not url:
        pytest.skip("no model: set RAYSEARCH_LLM_BASE_URL to an OpenAI-compatible endpoint, as http://…/v1")
    return url


def studied(folder: Path, *options: str, environ: dict[str, str], limit_s: float = 240.0) -> Study:
    """A study of the program above, seen to come to its end with nothing but `score.py` changed."""
    (folder / "objective.toml").write_text(OBJECTIVE)
    (folder / "score.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "raysearch.run",
        "--study",
        "s",
        "--objective",
        "objective.toml",
        "--cpu-slots",
        "2",
    ]
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    toy = OnDisk(folder / "studies" / "s")
    audit(toy)
    return toy.replayed()


def total(study: Study, proposer: str) -> YieldStatus:
    (found,) = [one["total"] for one in economics.proposers(study) if one["total"]["proposer"] == proposer]
    return found


@pytest.mark.parametrize("name", ["claude", "codex", "gemini", "opencode"])
def test_a_real_agents_edit_is_run_in_a_study(tmp_path: Path, home: Path, name: str):
    installed(name)
    with stub_mind(partial(file_in, name="score.py")) as url:
        environ, model = configured(name, home, url)
        agent = f"{name}={model}" if model else name
        study = studied(tmp_path, "--agent", agent, "--proposers", name, "--trials", "1", environ=environ)
    mine = study.candidates["c0001"].candidate.proposal
    assert mine.proposer == name
    assert f"-{OLD}" in mine.patch
    assert f"+{NEW}" in mine.patch
    assert mine.tokens_in >= TOKENS_IN
    assert study.trials["c0001-screen"].outcome is Outcome.MEASURED


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_nine_in_ten_answers_of_a_small_model_parse_and_apply(tmp_path: Path, model_url: str):
    model = {"name": "local", "base_url": model_url, "context_tokens": 12_000, "max_output_tokens": 800}
    lines = [f"{key} = {json.dumps(value)}" for key, value in model.items()]
    (tmp_path / "minds.toml").write_text(
        "\n".join(["[[models]]", *lines, "lines_only = true", "temperature = 1.0", "timeout_s = 600"])
    )
    options = ("--minds", "minds.toml", "--proposers", "chat", "--parallel", "1", "--trials", "20")
    chat = total(studied(tmp_path, *options, environ={}, limit_s=2800), "chat")
    reasons = [
        record.event.reason
        for record in Bench(tmp_path, []).events("s")
        if isinstance(record.event, Dropped) and "already tried" not in record.event.reason  # that one did apply
    ]
    print(chat, reasons)
    assert chat["proposals"] >= 10
    assert len(reasons) <= 0.1 * (chat["proposals"] + chat["dropped"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_aiders_edit_with_a_small_model_is_run_in_a_study(tmp_path: Path, home: Path, model_url: str):
    installed("aider")
    environ = {"HOME": str(home), "OPENAI_API_BASE": model_url, "OPENAI_API_KEY": "x"}
    options = ("--agent", "aider=openai/local", "--proposers", "aider", "--parallel", "1", "--trials", "1")
    study = studied(tmp_path, *options, environ=environ, limit_s=2800)
    aider = total(study, "aider")
    print(aider)
    assert aider["proposals"] - aider["refused"] == 1
    assert aider["tokens_in"]
    assert aider["tokens_out"]
