"""The program under search: its arithmetic against plain versions, its knobs, and short real trainings."""

import ast
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainer_kit import (
    ROW_TOKENS,
    TINY,
    TRAINER,
    VOCAB,
    make_data,
    module_from,
    module_of,
    preset_knobs,
    program,
    run_harness,
)

CPU = torch.device("cpu")
PRESETS = ("cpu", "rtx3060", "h100")
SOURCE = (TRAINER / "train.py").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("train") / "data")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return module_of(tmp_path_factory.mktemp("tiny"), **TINY)


# ---- attention ----


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    T = q.size(2)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    seen = torch.tensor([[0 <= i - j < window for j in range(T)] for i in range(T)])
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [1, 5, 16, 47, 48, 100])
def test_a_window_is_the_masked_dense_attention(window: int, tiny: ModuleType):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 48, 3, 16) for _ in range(3))
    got = tiny.attention(q, k, v, window)
    torch.testing.assert_close(got.double(), plain_attention(q, k, v, window), rtol=1e-4, atol=1e-5)


def test_a_short_training_row_bounds_what_the_evaluation_sees(tmp_path: Path):
    """One layer that looks back 8 tokens, asked about a row of 32."""
    module = module_of(tmp_path, **TINY | {"DEPTH": 1, "SEQ_LEN": 8})
    torch.manual_seed(0)
    model = module.GPT(VOCAB, ROW_TOKENS, CPU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, VOCAB, (1, ROW_TOKENS))
    before = model(tokens)
    for place, seen in [(20 - 8, False), (20 - 7, True), (20, True), (21, False)]:
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCAB
        assert bool((model(changed)[0, 20] - before[0, 20]).abs().max() > 1e-4) is seen


def test_an_x_layer_looks_back_an_eighth(tmp_path: Path):
    module = module_of(tmp_path, **TINY | {"DEPTH": 5, "WINDOW_PATTERN": "XS"})
    assert module.GPT(VOCAB, ROW_TOKENS, CPU).windows == [4, 16, 4, 16, 32]


def test_rotation_depends_on_distances_alone(tiny: ModuleType):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    model = tiny.GPT(VOCAB, ROW_TOKENS, CPU)
    cos, sin = (t.float() for t in model.rotary(64, CPU))

    def product(i: int, j: int) -> float:
        return float((tiny.rotate(q, cos[i], sin[i]) * tiny.rotate(k, cos[j], sin[j])).sum())

    assert product(40, 37) == pytest.approx(product(5, 2), abs=0.05)  # the tables may be bfloat16
    assert product(40, 37) != pytest.approx(product(40, 20), abs=0.05)


# ---- embeddings of the last few tokens ----


def test_a_hashed_embedding_sees_the_last_few_tokens_and_no_other(tmp_path: Path):
    module = module_of(tmp_path, **TINY | {"NGRAM_ROWS": 4096})
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (1, 24))
    before = module.ngram_rows(tokens, 4096)
    assert before.shape == (1, 24, len(module.NGRAMS))
    assert before.min() >= 0
    assert before.max() < 4096
    place = 20
    for back in range(8):
        changed = tokens.clone()
        changed[0, place - back] = (changed[0, place - back] + 1) % VOCAB
        differs = module.ngram_rows(changed, 4096)[0, place] != before[0, place]
        assert differs.tolist() == [back < n for n in module.NGRAMS]
    assert torch.equal(module.ngram_rows(tokens[:, :9], 4096), before[:, :9])


def test_hashed_embeddings_spread_evenly(tmp_path: Path):
    """Against a χ² distribution; pairs of few tokens are far from random numbers."""
    module = module_of(tmp_path, **TINY)
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], dim=-1)
    rows, expected = 1024, 256 * 256 / 1024
    counts = torch.bincount(module.ngram_rows(pairs, rows)[:, 1, 0], minlength=rows)
    assert float(((counts - expected) ** 2 / expected).sum()) < rows + 5 * math.sqrt(2 * rows)


def test_each_length_has_its_own_channels_of_a_hashed_embedding(tmp_path: Path):
    module = module_of(tmp_path, **TINY | {"NGRAM_ROWS": 64})
    parts = len(module.NGRAMS)
    table = torch.zeros(64, parts * 2)
    table[:, 2:4] = 1.0  # those of NGRAMS[1] in every row
    got = module.embed(torch.randint(0, VOCAB, (2, 9)), torch.zeros(VOCAB, parts * 2), table, torch.float32)
    assert (got[..., 2:4] > 0).all()
    assert not got[..., :2].any()
    assert not got[..., 4:].any()


# ---- optimizer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (128, 32), (32, 128)])
def test_polar_express_brings_singular_values_near_1(dtype: torch.dtype, shape: tuple[int, int], tiny: ModuleType):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    values = torch.logspace(0, -2.5, min(shape)).expand(3, -1)
    G = 7.0 * u @ torch.diag_embed(values) @ v
    got = tiny.orthogonalise(G, dtype)
    assert got.dtype == dtype
    got = got.float()
    singular = torch.linalg.svdvals(got)
    assert singular.max() < 1.2
    assert singular.min() > 0.7
    cosine = F.cosine_similarity(got.flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.99


def plain_muon_step(
    W: np.ndarray, G: np.ndarray, means: tuple[np.ndarray, np.ndarray], module: ModuleType, rates: dict[str, float]
) -> np.ndarray:
    """One matrix in float64: the polynomials act on the singular values."""
    m, (mean, square), (rows, columns) = rates["momentum"], means, W.shape
    mean[:] = m * mean + (1 - m) * G
    u, s, v = np.linalg.svd((1 - m) * G + m * mean, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) * 1.02 + 1e-6)
    for a, b, c in module.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    update = u @ np.diag(s) @ v
    axis = 1 if rows >= columns else 0
    square[:] = module.MUON_BETA2 * square + (1 - module.MUON_BETA2) * (update**2).mean(axis, keepdims=True)
    even = update / np.sqrt(square)
    even *= np.linalg.norm(update) / np.linalg.norm(even)
    return W - rates["lr"] * (even + rates["decay"] * W * (even * W > 0))


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_is_the_plain_float64_version(shape: tuple[int, int], tiny: ModuleType):
    torch.manual_seed(0)
    rows, columns = shape
    neurons = (2, rows, 1) if rows >= columns else (2, 1, columns)
    W, mean, square = torch.randn(2, *shape), torch.zeros(2, *shape), torch.zeros(neurons)
    plain = [W[i].double().numpy() for i in range(2)]
    means = [(np.zeros(shape), np.zeros(neurons[1:])) for _ in range(2)]
    rates = {"lr": 0.02, "momentum": 0.9, "decay": 0.1}
    for _ in range(3):
        G = torch.randn(2, *shape)
        tiny.muon_update(W, G, mean, square, **rates, dtype=torch.float32)
        plain = [plain_muon_step(plain[i], G[i].double().numpy(), means[i], tiny, rates) for i in range(2)]
    np.testing.assert_allclose(W.numpy(), plain, rtol=1e-3, atol=1e-4)


def test_what_is_no_matrix_of_a_layer_is_trained_by_adamw(tiny: ModuleType):
    torch.manual_seed(0)
    model = tiny.GPT(VOCAB, ROW_TOKENS, CPU)
    optimizer = tiny.Optimizer(model, CPU)
    copies, groups = {}, []
    for lr, decay, beta1, parameters in optimizer.adam:
        copies |= {p: torch.nn.Parameter(p.detach().clone()) for p in parameters}
        own = {"params": [copies[p] for p in parameters], "lr": lr, "weight_decay": decay}
        groups.append(own | {"betas": (beta1, tiny.ADAM_BETA2)})
    reference = torch.optim.AdamW(groups, eps=1e-10)
    for progress in (0.1, 0.2, 0.9):
        for ours, theirs in copies.items():
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for group, (lr, *_) in zip(reference.param_groups, optimizer.adam, strict=True):
            group["lr"] = lr * tiny.lr_scale(progress)
        optimizer.step(progress)
        reference.step()
    for ours, theirs in copies.items():
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_every_parameter_is_trained_by_one_optimizer(tiny: ModuleType):
    torch.manual_seed(0)
    model = tiny.GPT(VOCAB, ROW_TOKENS, CPU)
    optimizer = tiny.Optimizer(model, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):  # what writes into the residual stream starts at 0, and holds up the others for two steps
        model(*torch.randint(0, VOCAB, (2, 4, ROW_TOKENS))).backward()
        optimizer.step(0.2)
    assert [name for name, p in model.named_parameters() if torch.equal(before[name], p)] == []
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    banks = sum(len(bank.weights) for bank in optimizer.muon)
    assert banks == tiny.DEPTH * 6 + 1  # q, k, v, out, up, down of each layer, and one gate


def test_the_learning_rate_is_a_trapezoid(tmp_path: Path):
    knobs = {"LR_SCALE": 2.0, "WARMUP_RATIO": 0.2, "WARMDOWN_RATIO": 0.4, "FINAL_LR_FRAC": 0.1}
    module = module_of(tmp_path, **TINY | knobs)
    got = [module.lr_scale(progress) for progress in (0.0, 0.1, 0.2, 0.6, 0.8, 1.0)]
    assert got == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.1, 0.2])


# ---- knobs ----


def knobs_of(source: str) -> dict[str, tuple[Any, str]]:
    """Values and ranges of the knobs, by a second and simpler reader than raysearch's."""
    found = re.findall(r"(?m)^([A-Z][A-Z0-9_]*) = (.+?)  # in ([\[{][^\]}]*[\]}](?: log)?): \S.*$", source)
    return {name: (eval(value, {}), range_) for name, value, range_ in found}


def in_range(value: Any, range_: str) -> bool:
    bare = range_.removesuffix(" log")
    if bare.startswith("{"):
        return value in ast.literal_eval(bare)
    low, high = ast.literal_eval(bare)
    return low <= value <= high and (low > 0 or not range_.endswith("log"))


def test_every_range_holds_its_value():
    knobs = knobs_of(SOURCE)
    assert 15 <= len(knobs) <= 24
    assert len(re.findall(r"(?m)^[A-Z].*# in ", SOURCE)) == len(knobs)
    assert [name for name, (value, range_) in knobs.items() if not in_range(value, range_)] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_knobs_of_a_preset_are_in_range_and_keep_the_rules(preset: str):
    knobs, changed = knobs_of(SOURCE), preset_knobs(preset)
    assert set(changed) <= set(knobs)
    for name, value in changed.items():
        assert type(value) is type(knobs[name][0]), name
        assert in_range(value, knobs[name][1]), name
    rules = re.findall(r"(?m)^# rule: (.+)$", SOURCE)
    assert rules
    values = {"DEVICE_BATCH_SIZE": 0} | {name: value for name, (value, _) in knobs.items()} | changed
    assert [rule for rule in rules if not eval(rule, {}, values)] == []


@pytest.mark.parametrize(("preset", "parameters"), [("cpu", 1.3e6), ("rtx3060", 80.7e6), ("h100", 248.7e6)])
def test_a_preset_is_a_model_of_the_intended_size(preset: str, parameters: float, tmp_path: Path):
    facts = tomllib.loads((TRAINER / "presets" / f"{preset}.toml").read_text())["data"]
    module = module_of(tmp_path, **preset_knobs(preset))
    model = module.GPT(facts["vocab_size"], facts["row_tokens"], CPU)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


def test_the_program_knows_nothing_of_the_harness():
    modules = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in modules for alias in node.names]
    names += [node.module for node in modules if isinstance(node, ast.ImportFrom) and node.module]
    assert not [name for name in names if name.startswith(("trainer", "raysearch"))]


# ---- trainings ----


def test_it_learns_and_repeats_itself_bit_by_bit(data: Path, tmp_path: Path):
    runs = [run_harness(program(**TINY), data, tmp_path / name, "--budget-tokens", "32768") for name in "ab"]
    assert runs[0].result["outcome"] == "measured", runs[0].result["reason"]
    assert runs[0].result["val_bpb"] == runs[1].result["val_bpb"]
    # the language has three successors a token, log2(3) bits, and about 1.4 bytes a token
    assert runs[0].result["val_bpb"] < 2.2
    assert runs[0].result["depth"] == 2


def test_it_is_scored_half_way_and_trains_on_bit_by_bit(data: Path, tmp_path: Path):
    plain = run_harness(program(**TINY), data, tmp_path / "a")
    scored = run_harness(program(**TINY), data, tmp_path / "b", "--slice-tokens", "256")
    assert scored.result["halfway_bpb"] > scored.result["val_bpb"] == plain.result["val_bpb"]


def test_gradient_accumulation_changes_no_more_than_rounding(data: Path, tmp_path: Path):
    scores = []
    for rows in (16, 4):
        source = program(**TINY, DEVICE_BATCH_SIZE=rows)
        ran = run_harness(source, data, tmp_path / str(rows), "--budget-tokens", "8192")
        assert ran.result["micro_batch_rows"] == rows
        scores.append(ran.result["val_bpb"])
    assert scores[0] == pytest.approx(scores[1], rel=2e-3)


def test_a_device_batch_that_does_not_divide_is_refused_with_the_valid_ones(data: Path, tmp_path: Path):
    ran = run_harness(program(**TINY, DEVICE_BATCH_SIZE=3), data, tmp_path)
    assert ran.exit_code == 3
    assert "valid rows: 1, 2, 4, 8, 16" in ran.result["reason"]


VARIANTS: dict[str, dict[str, Any]] = {
    "short rows": {"SEQ_LEN": 8},
    "rows longer than those of the evaluation": {"SEQ_LEN": 64},
    "windows, no value embeddings": {"WINDOW_PATTERN": "XXXL", "VALUE_EMBEDS": False, "DEPTH": 3},
    "one layer, narrow": {"DEPTH": 1, "MODEL_DIM": 16, "MLP_RATIO": 1},
    "embeddings of the last few tokens": {"NGRAM_ROWS": 64},
    "schedule": {"WARMUP_RATIO": 0.5, "WARMDOWN_RATIO": 0.5, "FINAL_LR_FRAC": 0.2},
    "no momentum warm-up": {"MOMENTUM_WARMUP": 0.0, "MUON_MOMENTUM": 0.7},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_knobs_train_as_well(name: str, data: Path, tmp_path: Path):
    ran = run_harness(program(**TINY | VARIANTS[name]), data, tmp_path, "--budget-tokens", "8192")
    assert ran.result["outcome"] == "measured", ran.result["reason"]
    assert ran.result["val_bpb"] < math.log2(VOCAB) * 0.75


def test_bfloat16_passes_the_check_for_leaks(data: Path, tmp_path: Path):
    source = program(**TINY).replace("return torch.bfloat16 if native else torch.float32", "return torch.bfloat16")
    ran = run_harness(source, data, tmp_path, "--budget-tokens", "8192")
    assert ran.result["outcome"] == "measured", ran.result["reason"]


def test_a_trial_that_compiles_nothing_loads_no_compiler(data: Path, tmp_path: Path):
    """It would take a second of every trial that no process in waiting takes."""
    (tmp_path / "train.py").write_text(program(**TINY))
    arguments = ["--train-file", f"{tmp_path}/train.py", "--data", f"{data}", "--out", f"{tmp_path}/out"]
    arguments += ["--budget-tokens", "2048", "--device", "cpu"]
    code = f"import sys; from trainer import harness as h; h.main(h.parse({arguments})); print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"outcome": "measured"' in (tmp_path / "out" / "result.json").read_text()
    assert "'torch.optim.adamw'" in done.stdout
    assert "'torch._dynamo'" not in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what torch's compiler does
def test_what_is_compiled_on_cuda_are_whole_graphs(tmp_path: Path):
    """What torch.compile does on CUDA, as far as it goes without one: tracing, forward and backward."""
    source = program(**TINY | {"SEQ_LEN": 16, "WINDOW_PATTERN": "SL", "DEPTH": 3, "NGRAM_ROWS": 64})
    traced = source.replace("fast() if HAS_TRITON and inputs[0].is_cuda else function", "fast()").replace(
        "torch.compile(function, dynamic", 'torch.compile(function, backend="aot_eager", dynamic'
    )
    assert (traced.count("aot_eager"), traced.count("(fast())(*inputs")) == (1, 1)
    losses = []
    for name, text in [("plain", source), ("traced", traced)]:
        (tmp_path / name).mkdir()
        module = module_from(text, tmp_path / name)
        torch.manual_seed(0)
        model = module.GPT(VOCAB, ROW_TOKENS, CPU)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        optimizer = module.Optimizer(model, CPU)
        x, y = torch.randint(0, VOCAB, (2, 2, 16))
        for step in range(3):
            loss = model(x, y)
            loss.backward()
            losses.append(loss.item())
            optimizer.step(step / 3)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-2)
    assert losses[0] > losses[2]


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of what torch's compiler imports
def test_a_trial_on_a_gpu_is_measured(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    knobs = TINY | {"HEAD_DIM": 32, "MODEL_DIM": 64}
    ran = run_harness(program(**knobs), data, tmp_path, "--budget-tokens", "32768", "--device", "cuda")
    assert ran.result["outcome"] == "measured", ran.result["reason"]
    assert ran.result["val_bpb"] < 2.2
    assert ran.result["peak_vram_mb"] >= ran.result["reserved_mb"] > 0
