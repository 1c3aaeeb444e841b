"""The benchmark of trainers: its adapter against the trainer's own evaluation, and its table by real runs on a CPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoresearch_kit import PROGRAM
from trainer_kit import make_data

from benchmarks import flash_attention, reference
from benchmarks.gpu_data import tile_val
from benchmarks.trainer_table import Row, table
from benchmarks.trainer_variants import read_variants
from raysearch.errors import UserError
from raysearch.knobs import read_knobs
from trainer.common import DataError
from trainer.evaluation import Score, evaluate
from trainer.manifest import verify
from trainer.reporter import Reporter
from trainer.rows import Data, TokenStream, load_data

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ROW_TOKENS = 64
# A program of ours that sees the last token alone; it does what its name in braces says before it trains.
OURS = """
import os, pathlib, time
import torch
import torch.nn.functional as F
from torch import nn

def train(run):
    {before}
    model = nn.Embedding(run.vocab_size, run.vocab_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    while not run.done:
        x, y = run.batch(8, 64)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss)
    return model
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the embedded corpus."""
    folder = tmp_path_factory.mktemp("benchmark") / "data"
    options = ["--dataset", "sotu", "--vocab-size", "320", "--row-tokens", str(ROW_TOKENS), "--data", str(folder)]
    subprocess.run([sys.executable, "-m", "trainer.prepare", *options], check=True, capture_output=True)
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder that holds an autoresearch-style train.py."""
    folder = tmp_path / "autoresearch"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    return folder


@pytest.fixture
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the stand-ins away again."""
    for name in ("kernels", "prepare"):
        monkeypatch.setitem(sys.modules, name, sys)


def command(script: str, *options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def compared(data: Path, out: Path, *options: Any) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Runs the benchmark with small evaluations; returns the rows of its table, and how it ended."""
    fixed = ("--data", data, "--out", out, "--cache", out / "cache", "--eval-tokens", "2048")
    if "--cold" in options:
        fixed = fixed[:4] + fixed[6:]
    done = command("trainer.py", *fixed, *options)
    assert (out / "table.json").exists(), done.stderr
    return json.loads((out / "table.json").read_text())["rows"], done


def ours(folder: Path, name: str, before: str = "pass") -> Path:
    path = folder / f"{name}.py"
    path.write_text(OURS.replace("{before}", before))
    return path


def evaluated(model: torch.nn.Module, data: Data, folder: Path, *, tokens: int | None = None) -> Score:
    """What the trainer's own evaluation says."""
    reporter = Reporter(folder)
    try:
        return evaluate(model, data.splits["val"], data, tokens=tokens, device=CPU, reporter=reporter, phase="eval")
    finally:
        reporter.close_curve()


# ---- attention ----


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> torch.Tensor:
    """FlashAttention's meaning of a causal window, in double precision on (B, T, H, D)."""
    group = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    T = q.size(2)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    seen = torch.tensor([[j <= i and (left < 0 or i - left <= j) for j in range(T)] for i in range(T)])
    return (scores.masked_fill(~seen.to(q.device), -math.inf).softmax(-1) @ v).transpose(1, 2)


def tensors(T: int, *, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, T, 4, 16), torch.randn(2, T, kv_heads, 16), torch.randn(2, T, kv_heads, 16)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("left", [-1, 0, 5, 46, 47, 48])
def test_a_window_means_what_it_means_to_flash_attention(left: int, kv_heads: int):
    q, k, v = tensors(48, kv_heads=kv_heads)
    kernel = flash_attention.get_kernel("any/name").flash_attn_interface
    y = kernel.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    torch.testing.assert_close(y.double(), plain(q, k, v, left), atol=1e-5, rtol=1e-4)


def test_attention_that_is_not_causal_is_refused():
    with pytest.raises(ValueError, match="causal=True"):
        flash_attention.flash_attn_func(*tensors(8))


def test_a_window_made_beforehand_breaks_no_compiled_graph_and_another_one_is_made_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(flash_attention, "_BLOCK_MASKS", {})
    flash_attention.make_block_masks(256, CPU)
    q, k, v = tensors(256)

    def attend(left: int) -> torch.Tensor:
        y = flash_attention.windowed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), left)
        return y.transpose(1, 2)

    whole = torch.compile(attend, backend="aot_eager", dynamic=False, fullgraph=True)
    torch.testing.assert_close(whole(64).double(), plain(q, k, v, 64), atol=1e-5, rtol=1e-4)
    broken = torch.compile(attend, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(broken(100).double(), plain(q, k, v, 100), atol=1e-5, rtol=1e-4)
    assert 100 in flash_attention._BLOCK_MASKS[256]


@pytest.mark.gpu
@pytest.mark.parametrize("left", [-1, 128, 100, 511])
def test_compiled_attention_on_a_gpu_is_the_plain_one_forward_and_backward(left: int):
    mine = [x.cuda().bfloat16().requires_grad_() for x in tensors(512)]
    flash_attention.make_block_masks(512, torch.device("cuda"))

    @torch.compile(dynamic=False)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attention.flash_attn_func(q, k, v, causal=True, window_size=(left, 0))

    exact = [x.detach().double().requires_grad_() for x in mine]
    want, got = plain(exact[0], exact[1], exact[2], left), attend(*mine)
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=3e-2)
    want.square().sum().backward()
    got.float().square().sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad.double() - b.grad).norm() < 0.03 * b.grad.norm()


# ---- the adapter ----


@pytest.mark.usefixtures("_own_modules")
def test_a_reference_is_scored_as_the_trainers_evaluation_scores_its_model(data: Path, program: Path, tmp_path: Path):
    loaded = load_data(data, holdout=False)
    tokens = 37 * ROW_TOKENS + 5  # whole rows, and the last batch of 8 is not full
    feed = reference.Feed(loaded, seed=0, eval_tokens=tokens, device=CPU)
    reference.stand_in(feed, data, budget_s=0.2)
    ended = reference.execute(program / "train.py")
    assert (ended.outcome, ended.reason) == ("measured", "")
    score = evaluated(ended.names["model"], loaded, tmp_path, tokens=tokens)
    assert feed.score is not None
    assert feed.score.tokens == score.tokens == 37 * ROW_TOKENS
    np.testing.assert_array_equal(feed.score.doc, score.doc)
    np.testing.assert_array_equal(feed.score.bytes, score.bytes)
    np.testing.assert_allclose(feed.score.nats, score.nats, rtol=1e-6)
    assert ended.names["val_bpb"] == feed.score.bpb == pytest.approx(score.bpb, rel=1e-7)


def test_a_reference_gets_the_rows_in_the_order_of_the_seed_and_none_is_overwritten(data: Path):
    loaded = load_data(data, holdout=False)
    rows = loaded.splits["train"].rows
    stream = TokenStream(rows, seed=5)
    feed = reference.Feed(loaded, seed=5, eval_tokens=None, device=CPU)
    batches = feed.batches(None, 6, 2 * ROW_TOKENS, "train")
    got = [next(batches) for _ in range(3)]
    for number, (inputs, targets, epoch) in enumerate(got):
        x, y = stream.pairs(number * 12 * ROW_TOKENS, 12 * ROW_TOKENS)
        np.testing.assert_array_equal(inputs.numpy(), x.reshape(6, -1))
        np.testing.assert_array_equal(targets.numpy(), y.reshape(6, -1))
        assert epoch == 1
    whole_epochs = feed.batches(None, len(rows), ROW_TOKENS, "train")
    assert [next(whole_epochs)[2] for _ in range(2)] == [1, 2]


def test_a_reference_runs_as_it_is_and_its_result_has_our_names(data: Path, program: Path, tmp_path: Path):
    options = ("--data", data, "--budget-s", "0.5", "--eval-tokens", "2048", "--seed", "3", "--out", tmp_path / "out")
    done = command("reference.py", "--reference", program, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["outcome"] == "measured"
    assert result["val_bpb"] == pytest.approx(result["printed"]["val_bpb"], abs=1e-6)
    assert result["total_tokens"] == result["num_steps"] * 16 * ROW_TOKENS
    assert (result["micro_batch_rows"], result["depth"], result["seed"]) == (8, 2, 3)
    assert result["flops_per_token"] == 6 * result["num_params"]
    assert result["evaluation"] == "1-2048"
    # the budget is over at the end of a step; the first 11 are not on the program's clock
    assert result["training_seconds"] >= 0.5
    timed_tokens = (result["num_steps"] - 11) * 16 * ROW_TOKENS
    assert result["tokens_per_s"] == pytest.approx(timed_tokens / result["training_seconds"], rel=0.01)
    seconds = result["seconds"]
    assert set(seconds) == {"start", "import", "data", "build", "first_step", "train", "eval"}
    assert seconds["train"] == result["training_seconds"]
    assert all(value > 0 for name, value in seconds.items() if name not in ("start", "data"))
    assert sum(seconds.values()) <= result["total_seconds"]
    curve = [json.loads(line) for line in (tmp_path / "out" / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == result["num_steps"] - 1
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.usefixtures("_own_modules")
@pytest.mark.parametrize(
    ("old", "new", "end"),
    [
        ("loss_f > 100", "loss_f > 0", "crashed: it ended itself with exit code 1: FAIL"),
        ("import gc", "raise ValueError('no luck')", "crashed: ValueError: no luck"),
        ("import gc", "import torch; raise torch.OutOfMemoryError('full')", "out_of_memory: OutOfMemoryError: full"),
        ("evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE)", "0.5", "invalid: it never called prepare.evaluate_bpb"),
        ('print("---")', "exit(0)", "invalid: it neither has nor prints total_tokens"),
        ("loss = model(x, y)", "loss = model(x[:, :9], y)", "crashed: ValueError: Expected input batch_size"),
    ],
)
def test_a_reference_that_fails_says_why(data: Path, tmp_path: Path, old: str, new: str, end: str):
    assert PROGRAM.count(old) == 1
    (tmp_path / "train.py").write_text(PROGRAM.replace(old, new))
    options = ["--data", str(data), "--budget-s", "0.05", "--eval-tokens", "64", "--out", str(tmp_path / "out")]
    outcome = reference.perform(reference.parse(["--reference", str(tmp_path), *options]))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert outcome == result["outcome"]
    assert f"{outcome}: {result['reason']}".startswith(end)
    assert result["val_bpb"] is None


def test_a_program_whose_variables_are_gone_is_counted_by_what_it_printed():
    printed = """Time budget: 300s
\rstep 00000 (0.0%) | loss: 9.011111 | lrm: 1.00 \rstep 00952 (100.0%) | loss: 2.700000 | lrm: 0.00
---
val_bpb:          0.997900
training_seconds: 300.1
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
"""
    counted = reference.counts(reference.Ended({}, printed, "measured", ""))
    assert counted["total_tokens"] == 499_600_000
    assert counted["tokens_per_s"] == pytest.approx(499.6e6 * 942 / 953 / 300.1, abs=0.1)
    assert (counted["num_steps"], counted["num_params"], counted["depth"]) == (953, 50_300_000, 8)
    assert (counted["mfu_percent"], counted["flops_per_token"]) == (None, None)  # not by its own card and count
    assert [point["step"] for point in reference.curve(printed)] == [0, 952]


# ---- the table ----


def test_ours_and_a_reference_stand_in_one_table_with_a_run_at_the_references_tokens(
    data: Path, program: Path, tmp_path: Path
):
    small = "cpu:DEPTH=1,MODEL_DIM=32,TOTAL_BATCH_SIZE=512,SEQ_LEN=64@0.5"
    rows, done = compared(
        *(data, tmp_path / "out", "--reference", f"{program}@0.3", "--budget-s", "0.4"),
        *(small, ours(tmp_path, "bigram"), "--same-tokens"),
    )
    assert done.returncode == 0, done.stderr
    first, preset, bigram = rows
    assert [row["label"] for row in rows] == ["autoresearch@0.3 (reference)", small, str(tmp_path / "bigram.py")]
    assert [row["budget_s"] for row in rows] == [0.3, 0.5, 0.4]
    tokens = first["result"]["total_tokens"]
    for row in (preset, bigram):
        (folder,) = (tmp_path / "out").glob(f"*{Path(row['label']).stem.split(':')[0]}*/same-tokens")
        again = json.loads((folder / "result.json").read_text())
        assert tokens <= again["total_tokens"] < tokens + 512
        assert row["same_tokens_bpb"] == again["val_bpb"] != row["result"]["val_bpb"]
    for row in rows:
        assert row["reason"] == ""
        assert row["seconds"]["total"] == row["wall_s"]
        assert row["seconds"]["rest"] >= 0
        assert f"{row['result']['val_bpb']:.6f}" in done.stdout
    assert f"{preset['result']['tokens_per_s'] / first['result']['tokens_per_s']:.3f}" in done.stdout
    assert "evaluation 1-2048 (version, tokens)" in done.stdout
    assert done.stdout == (tmp_path / "out" / "table.md").read_text()
    (written,) = (tmp_path / "out").glob("*cpu*/train.py")
    assert read_knobs(written.read_text())["TOTAL_BATCH_SIZE"].value == 512


@pytest.mark.slow
def test_a_variant_that_fails_or_hangs_is_a_row_with_its_reason_and_the_others_go_on(data: Path, tmp_path: Path):
    broken = ours(tmp_path, "broken", "raise ValueError('no luck')")
    hanging = ours(tmp_path, "hanging", "time.sleep(600)")
    options = ("--budget-s", "0.2", "--limit-s", "12", "--repeat", "2", "--gpus", "cpu,cpu")
    rows, done = compared(data, tmp_path / "out", broken, hanging, ours(tmp_path, "good"), *options)
    assert done.returncode == 1
    assert [row["seed"] for row in rows] == [0, 0, 0, 1, 1, 1]
    for one, two, three in (rows[:3], rows[3:]):
        assert one["reason"] == "crashed: ValueError: no luck"
        assert two["reason"] == "no end after 12 s; give it more with --limit-s"
        assert three["reason"] == ""
    assert "crashed: ValueError: no luck" in done.stdout
    scores = [rows[2]["result"]["val_bpb"], rows[5]["result"]["val_bpb"]]
    assert scores[0] != scores[1]
    assert f"{sum(scores) / 2:.6f}" in done.stdout


ALONE = """place = pathlib.Path({place!r}); place.touch(exist_ok=False); time.sleep(0.5); place.unlink()"""
TOGETHER = """mine, other = map(pathlib.Path, {names!r}); mine.touch()
    waited_until = time.time() + 60
    while not other.exists():
        assert time.time() < waited_until
        time.sleep(0.02)"""


@pytest.mark.slow
def test_runs_share_no_gpu_and_run_side_by_side_on_several(data: Path, tmp_path: Path):
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    alone = ours(tmp_path, "alone", ALONE.format(place=here))
    rows, done = compared(data, tmp_path / "one", alone, alone, "--budget-s", "0.1", "--gpus", "cpu")
    assert [row["reason"] for row in rows] == ["", ""], done.stdout
    left = ours(tmp_path, "left", TOGETHER.format(names=(here, there)))
    right = ours(tmp_path, "right", TOGETHER.format(names=(there, here)))
    rows, done = compared(data, tmp_path / "two", left, right, "--budget-s", "0.1", "--gpus", "cpu,cpu")
    assert [row["reason"] for row in rows] == ["", ""], done.stdout


COUNT = """folder = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]); folder.mkdir(parents=True, exist_ok=True)
    assert pathlib.Path(os.environ["TRITON_CACHE_DIR"]).parent == folder.parent
    assert not list(folder.iterdir()), "there is something in it"
    (folder / "compiled").touch()"""


@pytest.mark.slow
def test_a_cold_run_has_empty_caches_and_others_share_them(data: Path, tmp_path: Path):
    counting = ours(tmp_path, "counting", COUNT)
    rows, done = compared(data, tmp_path / "cold", counting, counting, "--budget-s", "0.1", "--cold")
    assert [row["reason"] for row in rows] == ["", ""], done.stdout
    rows, done = compared(data, tmp_path / "shared", counting, counting, "--budget-s", "0.1")
    assert [row["reason"] for row in rows] == ["", "crashed: AssertionError: there is something in it"]


WAIT = """pathlib.Path({place!r}).write_text(str(os.getpid())); time.sleep(600)"""


def test_a_benchmark_that_is_stopped_leaves_no_run_behind(data: Path, tmp_path: Path):
    place = tmp_path / "pid"
    options = ["--data", data, "--out", tmp_path / "out", ours(tmp_path, "waiting", WAIT.format(place=str(place)))]
    benchmark = [sys.executable, str(ROOT / "benchmarks" / "trainer.py"), *map(str, options)]
    with subprocess.Popen(benchmark, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        while not (place.exists() and place.read_text()):
            assert running.poll() is None
            time.sleep(0.05)
        running.terminate()
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said == "trainer benchmark: stopped; the table so far is in --out\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def row(label: str, result: dict[str, Any], *, is_reference: bool = False, reason: str = "") -> Row:
    seconds = {"start": 0.5, "import": 3.0, "data": 0.1, "build": 2.0, "first_step": 9.0, "train": 300.0, "eval": 6.0}
    return Row(label, 0, is_reference, 300.0, "0", 322.0, {"seconds": seconds, **result}, reason)


def columns(text: str) -> list[dict[str, str]]:
    """The cells of a Markdown table, by the names of its columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_shows_what_the_runs_know_and_leaves_out_what_none_knows():
    slow: dict[str, Any] = {
        "tokens_per_s": 1e6,
        "val_bpb": 1.0,
        "num_steps": 570,
        "total_tokens": 3e8,
        "num_params": 5.03e7,
    }
    runs = [
        row("theirs", {}, is_reference=True, reason="crashed: no luck"),
        row("other", slow, is_reference=True),
        row("h100", slow | {"mfu_percent": 41.23, "reserved_mb": 45060.2, "energy_j": 201234.0}),
    ]
    # the first reference has no speed: there is nothing to compare with, least of all the second one
    bare, _, full = columns(table(runs, "H100"))
    assert "× reference" not in bare
    assert "seed" not in bare
    assert (bare["val_bpb"], bare["tokens/s"], bare["energy kJ"], bare["total"]) == ("failed", "–", "–", "322.0")
    assert (full["MFU %"], full["reserved MB"], full["energy kJ"]) == ("41.2", "45,060", "201.2")
    assert (full["steps"], full["tokens M"], full["params M"], full["val_bpb"]) == ("570", "300.0", "50.3", "1.000000")
    assert (full["first step"], full["rest"]) == ("9.0", "1.4")
    first, ours_now = columns(table([runs[1], row("h100", slow | {"tokens_per_s": 1.25e6})], "H100"))
    assert (first["× reference"], ours_now["× reference"]) == ("1.000", "1.250")
    assert "energy kJ" not in first
    assert "MFU %" not in first


def test_a_variant_names_a_preset_with_constants_and_a_budget():
    plain_one, other, both = read_variants([], ["h100", "h100@150", "h100:DEPTH=9,LR_SCALE=1@20.5"], budget_s=300)
    assert [one.budget_s for one in (plain_one, other, both)] == [300, 150, 20.5]
    assert plain_one.source == other.source
    values = {name: knob.value for name, knob in read_knobs(both.source or "").items()}
    before = {name: knob.value for name, knob in read_knobs(plain_one.source or "").items()}
    assert values == before | {"DEPTH": 9, "LR_SCALE": 1.0}
    (text,) = read_variants([], ["h100:WINDOW_PATTERN=SL,VALUE_EMBEDS=False,SOFT_CAP=30"], budget_s=1)
    assert 'WINDOW_PATTERN = "SL"' in (text.source or "")
    assert "VALUE_EMBEDS = False" in (text.source or "")
    assert "SOFT_CAP = 30" in (text.source or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200", r"preset 'h200' is not known; known: cpu, h100.*; give one of them"),
        ("h100:DEPHT=9", r"h100:DEPHT=9: DEPHT is no UPPERCASE constant of the program; it has .*DEPTH.*; name one"),
        ("h100:DEPTH=99", r"h100:DEPTH=99: DEPTH=99 is not in \[1, 24\]; take one that is, or edit a copy"),
        ("h100:WINDOW_PATTERN=SS", r"WINDOW_PATTERN=SS is not in \{L, SL, .*\}; take one"),
        ("h100:DEPTH", r"'DEPTH' is no NAME=VALUE; write it as"),
        ("h100:TOTAL_BATCH_SIZE=512", r"breaks the program's rule 'TOTAL_BATCH_SIZE % SEQ_LEN == 0'; change"),
        ("h100@0", r"h100@0: budget 0 has to be positive seconds"),
        ("gone/train.py", r"gone/train.py is no file; give a program"),
    ],
)
def test_a_variant_that_is_none_is_refused_in_one_line(text: str, message: str):
    with pytest.raises(UserError, match=message) as refused:
        read_variants([], [text], budget_s=300)
    assert "\n" not in str(refused.value)


def test_a_reference_that_is_none_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"train.py is no file; give a folder with an autoresearch-style train.py"):
        read_variants([str(tmp_path)], [], budget_s=300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no variant: nothing to compare; give a preset (cpu, "),
        (["cpu", "--same-tokens"], "--same-tokens without --reference: there are no tokens to go by; give one"),
        (["cpu", "--cold", "--cache", "x"], "--cold with --cache: a cold run has a cache of its own; leave"),
        (["cpu", "--repeat", "0"], "--repeat and --eval-tokens have to be 1 or more"),
        (["cpu", "--data", "gone"], "--data gone has no manifest.json; run: python -m trainer.prepare --data gone"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(
    data: Path, tmp_path: Path, options: list[str], message: str
):
    done = command("trainer.py", "--data", data, "--out", tmp_path / "out", *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trainer benchmark: {message}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- a long val split ----


def test_a_tiled_split_is_whole_and_scores_as_the_rows_that_it_repeats(tmp_path: Path):
    data = make_data(tmp_path / "data")
    with_shards = json.loads((data / "manifest.json").read_text()) | {"shards": 0}
    (data / "manifest.json").write_text(json.dumps(with_shards))
    before = load_data(data, holdout=True)
    rows = len(before.splits["val"].rows)
    made = tile_val(data, tmp_path / "long", tokens=3 * rows * before.row_tokens - 1)
    assert verify(tmp_path / "long") == made
    assert "tiled: the same rows 3 times" in made.source
    after = load_data(tmp_path / "long", holdout=True)
    np.testing.assert_array_equal(after.splits["train"].rows, before.splits["train"].rows)
    np.testing.assert_array_equal(after.splits["holdout"].rows, before.splits["holdout"].rows)
    torch.manual_seed(0)
    model = torch.nn.Embedding(before.vocab_size, before.vocab_size)
    once, thrice = (evaluated(model, one, tmp_path) for one in (before, after))
    assert thrice.tokens == 3 * once.tokens
    assert len(thrice.doc) == 3 * len(once.doc) == len(set(thrice.doc))
    assert made.splits["val"].documents == 3 * verify(data).splits["val"].documents
    assert thrice.bytes.sum() == made.splits["val"].bytes - sum(
        int(after.token_bytes[row[0]]) for row in after.splits["val"].rows
    )
    assert thrice.bpb == pytest.approx(once.bpb, rel=1e-9)
    with pytest.raises(DataError, match="exists; a data folder is never changed"):
        tile_val(data, tmp_path / "long", tokens=1)
