"""What the trainer's tests share: a tiny prepared data directory, programs with other knobs, one call of the harness.

It holds no test.
"""

import base64
import gc
import hashlib
import importlib.util
import json
import re
import signal
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from trainer import harness

TRAINER = Path(harness.__file__).parent
VOCAB, ROW_TOKENS, BOS = 64, 32, 63

# train.py so small that a step takes milliseconds
TINY = {
    "DEPTH": 2,
    "MODEL_DIM": 32,
    "HEAD_DIM": 16,
    "SEQ_LEN": 32,
    "WINDOW_PATTERN": "L",
    "TOTAL_BATCH_SIZE": 512,
    "WARMDOWN_RATIO": 0.0,
}


def make_data(folder: Path) -> Path:
    """Writes a data directory in the format of `python -m trainer.prepare`: documents of a simple random language."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(7)
    follows = chance.integers(0, VOCAB - 1, (VOCAB, 3))  # each token has three successors

    def document(length: int) -> list[int]:
        tokens = [int(chance.integers(0, VOCAB - 1))]
        while len(tokens) < length:
            tokens.append(int(follows[tokens[-1], chance.integers(0, 3)]))
        return [BOS, *tokens]

    # one byte for most tokens, several for some, none for the special one
    token_bytes = np.where(np.arange(VOCAB) % 5 == 0, 3, 1).astype(np.int32)
    token_bytes[BOS] = 0
    np.save(folder / "token_bytes.npy", token_bytes)
    ranks = {base64.b64encode(bytes([65 + i]) * int(n)).decode(): i for i, n in enumerate(token_bytes) if n}
    tokenizer = {"format": 1, "pattern": ".", "special_tokens": {"<|bos|>": BOS}, "ranks": ranks}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    splits = {}
    for split, count in {"train": 200, "val": 24, "holdout": 16}.items():
        rows, index, documents = [], [], 0
        for row in range(count):
            tokens: list[int] = []
            while len(tokens) < ROW_TOKENS + 1:
                piece = document(int(chance.integers(3, 20)))[: ROW_TOKENS + 1 - len(tokens)]
                index.append((row, len(tokens), len(tokens) + len(piece), documents))
                tokens += piece
                documents += 1
            rows.append(tokens)
        packed = np.array(rows, np.uint16)
        np.save(folder / f"{split}.rows.npy", packed)
        if split != "train":
            np.save(folder / f"{split}.index.npy", np.array(index, np.int32))
        facts = {"rows": count, "tokens": packed.size, "documents": documents, "bytes": int(token_bytes[packed].sum())}
        splits[split] = facts
    files = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        files[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {
        "format": 1,
        "evaluation_version": "1",
        "dataset": "synthetic",
        "vocab_size": VOCAB,
        "row_tokens": ROW_TOKENS,
        "bos_id": BOS,
        "tokenizer_sha256": files["tokenizer.json"]["sha256"],
        "splits": splits,
        "files": files,
        "source": "tests",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def program(**knobs: Any) -> str:
    """train.py with other values."""
    source = (TRAINER / "train.py").read_text()
    for name, value in knobs.items():
        source, count = re.subn(rf"(?m)^{name} = [^#\n]*?(?=  #|$)", f"{name} = {value!r}", source)
        assert count == 1, name
    return source


def module_of(folder: Path, **knobs: Any) -> ModuleType:
    """train.py with other values, executed."""
    return module_from(program(**knobs), folder)


def module_from(source: str, folder: Path) -> ModuleType:
    """A program, written into the folder and executed."""
    path = folder / "train_module.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("train_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preset_knobs(name: str) -> dict[str, Any]:
    """The knobs of a preset."""
    return tomllib.loads((TRAINER / "presets" / f"{name}.toml").read_text())["knobs"]


@dataclass(frozen=True)
class Ran:
    """How a trial ended."""

    exit_code: int
    out: Path
    result: dict[str, Any]


def run_harness(source: str, data: Path, folder: Path, *options: str) -> Ran:
    """Runs the harness in this process on a program; the budget is 2048 tokens unless the options name another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(source)
    budget = () if any(option.startswith("--budget") for option in options) else ("--budget-tokens", "2048")
    paths = ("--train-file", str(folder / "train.py"), "--data", str(data), "--out", str(folder / "out"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    search_path, threads = list(sys.path), torch.get_num_threads()
    try:
        code = harness.main(harness.parse([*paths, *budget, "--device", "cpu", "--threads", "1", *options]))
    finally:  # what the harness does to its process for good
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.path[:] = search_path
        torch.set_num_threads(threads)
        sys.modules.pop("candidate", None)
        gc.enable()
        gc.unfreeze()
    return Ran(code, folder / "out", json.loads((folder / "out" / "result.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a data folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
