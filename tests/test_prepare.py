"""The data preparation: what it writes, that it can be trusted, and what it says when something is wrong."""

import contextlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import datasets, packing
from trainer.common import require_space
from trainer.manifest import file_names
from trainer.prepare import (
    DataError,
    Manifest,
    Tokenizer,
    choose_dataset,
    load_manifest,
    main,
    parse,
    prepare,
    resolve,
    verify,
)

REPOSITORY = Path(__file__).parents[1]
PREPARE = (sys.executable, "-m", "trainer.prepare")
VOCAB_SIZE, ROW_TOKENS = 320, 32
SMALL = ("--vocab-size", str(VOCAB_SIZE), "--row-tokens", str(ROW_TOKENS))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def sotu_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus as the cpu preset has it, prepared once for all tests. Not to be changed."""
    directory = tmp_path_factory.mktemp("data") / "sotu"
    subprocess.run([*PREPARE, "--preset", "cpu", "--data", directory], check=True, cwd=REPOSITORY, capture_output=True)
    return directory


@pytest.fixture
def texts() -> list[str]:
    """Some hundred documents of a few to a few hundred words, with characters of one to four bytes."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyzäßé€你🙂", k=chance.randint(1, 9))) for _ in range(400)]
    return [" ".join(chance.choices(words, k=round(chance.paretovariate(0.9)) + 3))[:4000] for _ in range(300)]


@pytest.fixture
def corpus_dir(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def small_dir(tmp_path: Path, corpus_dir: Path) -> Path:
    """A small prepared folder, which a test may break."""
    prepare(lambda: datasets.files(corpus_dir), tmp_path / "small", vocab_size=VOCAB_SIZE, row_tokens=ROW_TOKENS)
    return tmp_path / "small"


def call(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """The line that a refused call writes, after its notes on what it did so far."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    *notes, line = err.splitlines()
    assert line.startswith("error: ")
    assert not any(note.startswith("error") for note in notes)
    return line


def rows_of(directory: Path, split: str) -> np.ndarray:
    return np.load(directory / f"{split}.rows.npy", mmap_mode="r")


def splits_of(corpus: datasets.Corpus) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {name: [] for name in datasets.SPLITS}
    for split, text in corpus.documents():
        splits[split].append(text)
    return splits


# What is written


def test_the_embedded_corpus_is_enough_for_the_cpu_preset(sotu_dir: Path) -> None:
    manifest = verify(sotu_dir)
    assert (manifest.dataset, manifest.vocab_size, manifest.row_tokens) == ("sotu", 1024, 256)
    assert manifest.splits["val"].rows >= 65_536 // 256
    total_bytes = sum(facts.bytes for facts in manifest.splits.values())
    for split in ("val", "holdout"):
        assert 0.045 < manifest.splits[split].bytes / total_bytes < 0.055
    assert sum(facts.documents for facts in manifest.splits.values()) == 233


@pytest.mark.parametrize("split", datasets.SPLITS)
def test_rows_are_full_begin_with_bos_and_agree_with_the_manifest(sotu_dir: Path, split: str) -> None:
    manifest = load_manifest(sotu_dir)
    rows = rows_of(sotu_dir, split)
    facts = manifest.splits[split]
    assert rows.dtype == np.uint16
    assert rows.shape == (facts.rows, 257)
    assert rows.size == facts.tokens
    assert (rows[:, 0] == manifest.bos_id).all()
    assert rows.max() == manifest.bos_id == 1023
    assert int(np.load(sotu_dir / "token_bytes.npy")[rows].sum()) == facts.bytes


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_the_index_covers_every_row_completely(sotu_dir: Path, split: str) -> None:
    rows = rows_of(sotu_dir, split)
    index = np.load(sotu_dir / f"{split}.index.npy")
    assert index.dtype == np.int32
    expected_row, expected_start = 0, 0
    for row, start, stop, _doc in index.tolist():
        assert (row, start) == (expected_row, expected_start)
        assert rows[row, start] == 1023  # each piece has a BOS of its own
        expected_row, expected_start = (row + 1, 0) if stop == rows.shape[1] else (row, stop)
    assert (expected_row, expected_start) == (len(rows), 0)
    assert len(np.unique(index[:, 3])) == load_manifest(sotu_dir).splits[split].documents


def test_a_documents_tokens_have_as_many_bytes_as_its_text(sotu_dir: Path) -> None:
    token_bytes = np.load(sotu_dir / "token_bytes.npy")
    for split in ("val", "holdout"):
        rows = rows_of(sotu_dir, split)
        packed: dict[int, int] = {}
        for row, start, stop, doc in np.load(sotu_dir / f"{split}.index.npy").tolist():
            packed[doc] = packed.get(doc, 0) + int(token_bytes[rows[row, start:stop]].sum())
        texts = splits_of(datasets.sotu())[split]
        missing = [len(text.encode()) - packed.get(doc, 0) for doc, text in enumerate(texts)]
        assert min(missing) == 0
        assert missing.count(0) >= len(texts) - 1  # the last row was not full: what was in it is dropped
        assert sum(missing) < 257 * token_bytes.max()


def test_the_first_validation_rows_are_a_sample_of_all_documents(sotu_dir: Path) -> None:
    index = np.load(sotu_dir / "val.index.npy")
    assert len(np.unique(index[index[:, 0] < 256][:, 3])) == len(np.unique(index[:, 3]))


def test_preparing_twice_gives_the_same_bytes(sotu_dir: Path, tmp_path: Path) -> None:
    command = [*PREPARE, "--preset", "cpu", "--data", tmp_path / "again"]
    done = subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["manifest_sha256"] == load_manifest(sotu_dir).sha256
    assert answer == {
        "data": str(tmp_path / "again"),
        "dataset": "sotu",
        "why": "it is the dataset of the preset cpu, and needs no network",
        "manifest_sha256": verify(tmp_path / "again").sha256,
        "evaluation_version": "1",
        "vocab_size": 1024,
        "row_tokens": 256,
    }


# Tokenizer


@given(text=st.text())
def test_the_tokenizer_loses_no_byte_of_any_text(sotu_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_dir(sotu_dir)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_bytes_that_are_no_text_alone_are_counted_as_bytes(sotu_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(sotu_dir)
    ids = tokenizer.encode("🙂").tolist()
    assert len(ids) > 1  # no address has it
    assert tokenizer.decode_bytes(ids[:1]) == "🙂".encode()[:1]
    counts = np.load(sotu_dir / "token_bytes.npy")
    assert counts[ids].sum() == 4
    assert counts[tokenizer.bos_id] == 0
    assert counts.tolist() == tokenizer.token_bytes().tolist()
    assert sorted(tokenizer.ranks) == sorted({*(bytes([b]) for b in range(256)), *tokenizer.ranks})


def test_a_bos_written_in_a_text_is_text(sotu_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(sotu_dir)
    assert tokenizer.bos_id not in tokenizer.encode("<|bos|>").tolist()


def test_millions_of_blanks_do_not_stop_the_tokenizer() -> None:
    tokenizer = Tokenizer.train([" " * 3_000_000 + "x", "the theme of the thesis"], vocab_size=262)
    for text in (" " * 3_000_000 + "x", "\n" * 3_000_000 + "x", "x" * 3_000_000):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"{", "Expecting property name"),
        (b'{"format": 2}', "format 2"),
        (b'{"format": 1, "pattern": "x", "special_tokens": {"<|bos|>": 2}, "ranks": {"YQ==": 0}}', "ids are not"),
        (b'{"format": 1, "pattern": "x", "special_tokens": {"<|b|>": 1}, "ranks": {"YQ==": 0}}', "without '<|bos|>'"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.from_dir(tmp_path)
    message = str(caught.value)
    assert says in message
    assert str(tmp_path / "tokenizer.json") in message
    assert "python -m trainer.prepare --preset PRESET" in message


# Packing


@given(
    lengths=st.lists(st.integers(0, 60), max_size=80),
    capacity=st.integers(2, 33),
    window_pieces=st.integers(1, 40),
)
def test_packing_places_each_token_once_in_full_rows(lengths: list[int], capacity: int, window_pieces: int) -> None:
    plan = packing.pack(lengths, capacity=capacity, window_pieces=window_pieces)
    placed = [np.zeros(length, int) for length in lengths]
    row, position = 0, 0
    for r, start, stop, doc, offset in plan.tolist():
        assert (r, start) == (row, position)
        text_tokens = stop - start - 1
        assert text_tokens >= 0
        assert offset + text_tokens <= lengths[doc]
        placed[doc][offset : offset + text_tokens] += 1
        row, position = (row + 1, 0) if stop == capacity else (row, stop)
    assert position == 0
    counts = np.concatenate([*placed, np.zeros(0, int)])
    assert (counts <= 1).all()
    assert (counts == 0).sum() < capacity  # only what stood in the last row, which was not full
    shuffled = packing.shuffle_rows(plan, seed=7)
    assert sorted(map(tuple, shuffled[:, 1:].tolist())) == sorted(map(tuple, plan[:, 1:].tolist()))
    assert shuffled[:, 0].tolist() == sorted(shuffled[:, 0].tolist())


def test_packing_takes_the_longest_that_fits_and_cuts_the_shortest_if_none_does() -> None:
    # rows of 10: BOS + 6 leaves 3, into which BOS + 2 fits best; then BOS + 5 leaves 4, for which BOS + 4 is cut to 3
    plan = packing.pack([6, 1, 2, 5, 4], capacity=10)
    assert plan.tolist() == [[0, 0, 7, 0, 0], [0, 7, 10, 2, 0], [1, 0, 6, 3, 0], [1, 6, 8, 1, 0], [1, 8, 10, 4, 0]]


def test_a_document_longer_than_a_row_becomes_several_pieces() -> None:
    assert packing.pack([20], capacity=10).tolist() == [[0, 0, 10, 0, 0], [1, 0, 10, 0, 9]]
    assert len(packing.pack([500_000], capacity=3)) == 250_000


def test_more_short_documents_than_wait_at_once_fill_a_long_row() -> None:
    assert packing.pack([1] * 100, capacity=150, window_pieces=3)[:, packing.DOC].tolist() == list(range(75))


def test_packing_a_hundred_thousand_documents_takes_about_a_second() -> None:
    lengths = np.random.RandomState(0).geometric(1 / 700, 100_000).tolist()
    started_s = time.process_time()
    plan = packing.pack(lengths, capacity=2049)
    assert time.process_time() - started_s < 5
    pieces = len(plan)
    assert pieces < 1.35 * len(lengths)  # best fit cuts few documents


# Splits


def test_no_document_is_in_two_splits_however_often_it_occurs(tmp_path: Path, texts: list[str]) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet")
    splits = splits_of(datasets.files(tmp_path))
    everywhere = [text for documents in splits.values() for text in documents]
    assert sorted(everywhere) == sorted(set(texts))
    sizes = {split: sum(len(text.encode()) for text in documents) for split, documents in splits.items()}
    for split in ("val", "holdout"):
        assert 0.04 < sizes[split] / sum(sizes.values()) <= 0.05


def test_a_new_document_leaves_the_split_of_the_others_mostly_alone(texts: list[str]) -> None:
    sizes = {f"{number}".encode(): len(text) for number, text in enumerate(texts)}
    before = datasets.assign_splits(sizes)
    after = datasets.assign_splits({**sizes, b"new": 50})
    assert sum(before[key] != after[key] for key in sizes) <= 6


@given(sizes=st.lists(st.integers(1, 10_000), min_size=3, max_size=60))
def test_each_split_gets_a_document_when_there_are_three(sizes: list[int]) -> None:
    if len(set(sizes)) > 1:
        sizes = [size // 100 + 100 for size in sizes]  # of one order of magnitude
    splits = datasets.assign_splits({f"{number}".encode(): size for number, size in enumerate(sizes)})
    assert {"val", "holdout"} <= set(splits.values())


# Sources


def test_files_are_read_by_their_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["from parquet", None, ""], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "from jsonl", "n": 1}\n\n{"text": "half a pair: \\ud83d"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_bytes(b"from txt\r\nwith its line ends\n")
    (tmp_path / "d.md").write_text("not read")
    everything = {text for _split, text in datasets.files(tmp_path).documents()}
    assert everything == {"from parquet", "from jsonl", "half a pair: ?", "from txt\r\nwith its line ends\n"}


@given(text=st.text(alphabet="ab\n", max_size=300), document_chars=st.integers(1, 40))
def test_a_long_text_is_cut_without_losing_a_character(text: str, document_chars: int) -> None:
    documents = list(datasets.cut_text(io.StringIO(text, newline=""), document_chars=document_chars))
    assert "".join(documents) == text
    assert all(document_chars < len(document) <= 2 * document_chars for document in documents[:-1])


def test_a_long_text_is_cut_behind_an_empty_line() -> None:
    text = "x" * 12 + "\n\n" + "y" * 3 + "\n" + "z" * 9
    assert list(datasets.cut_text(io.StringIO(text), document_chars=10)) == ["x" * 12 + "\n\n", "yyy\nzzzzzzzzz"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', "a.jsonl:2: not a line of the form"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8"),
        ("a.parquet", b"PAR1 or not", "a.parquet: not to be read as Parquet"),
        ("a.csv", b"text\n", "no file in it ends in .parquet, .jsonl, .txt"),
        ("a.txt", b"", "fill no row"),
        ("a.txt", b"too small", "the training text is too small"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    vocab_size = 256 if says == "fill no row" else 300
    line = refused("--dataset", f"files:{folder}", "--vocab-size", max(257, vocab_size), "--row-tokens", 8)
    assert says in line
    assert not list((tmp_path / "cache" / "data").glob("files-*[!k]"))  # nothing is left but the lock


def test_a_parquet_file_needs_a_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text' among body, n"):
        datasets.files(tmp_path)
    pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'text' is int64, not string"):
        datasets.files(tmp_path)


def test_python_sources_are_read_once_and_in_one_order(tmp_path: Path) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for path, content in {
        library / "b.py": b"b = 1\n",
        library / "a.py": b"a = 1\n",
        library / "copy.py": b"a = 1\n",
        library / "latin.py": b"# caf\xe9\n",
        library / "__pycache__" / "cached.py": b"cached = 1\n",
        library / "table.py": b"x = 1\n" * 200_000,
        packages / "c.py": b"c = 1\n",
        tmp_path / "other" / "site-packages" / "d.py": b"d = 1\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    corpus = datasets.python_sources([library, packages, tmp_path / "other"])
    assert [text for _split, text in corpus.documents()] == ["a = 1\n", "b = 1\n", "c = 1\n"]


def test_the_python_corpus_prepares(tmp_path: Path) -> None:
    roots = [Path(json.__file__).parent, Path(pytest.__file__).parent, Path(np.__file__).parent / "linalg"]
    corpus = datasets.python_sources(roots)
    manifest = prepare(lambda: corpus, tmp_path / "python", vocab_size=512, row_tokens=64)
    assert manifest.dataset == "python"
    assert all(facts.documents > 0 for facts in manifest.splits.values())


def test_the_embedded_corpus_is_what_was_shipped_with_its_licence() -> None:
    licence = datasets.SOTU_FILE.with_name("LICENSE.sotu").read_text()
    assert "PDDL 1.0" in licence
    assert "CC0 1.0" in licence
    assert sum(len(text.encode()) for _split, text in datasets.sotu().documents()) == 10_761_413


def test_another_embedded_corpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SOTU_FILE", tmp_path / "sotu.parquet")
    with pytest.raises(DataError, match=r"sotu\.parquet: No such file or directory; restore it with: git checkout"):
        datasets.sotu()
    (tmp_path / "sotu.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"sotu\.parquet: sha256 is .* was shipped; restore it with: git checkout"):
        datasets.sotu()


# The command


def test_a_prepared_folder_is_found_without_the_heavy_libraries(sotu_dir: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in sotu_dir.iterdir()}
    program = (
        "import sys; from trainer.prepare import main; status = main(sys.argv[1:]);"
        "heavy = {'pyarrow', 'rustbpe', 'tiktoken', 'httpx', 'torch'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else status)"
    )
    command = [sys.executable, "-c", program, "--preset", "cpu", "--data", str(sotu_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["manifest_sha256"] == load_manifest(sotu_dir).sha256
    assert {path.name: path.stat().st_mtime_ns for path in sotu_dir.iterdir()} == before


def break_nothing(_directory: Path) -> None: ...


def break_rows(directory: Path) -> None:
    with (directory / "train.rows.npy").open("r+b") as file:
        file.truncate(1000)


def break_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def break_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format": 1, "dataset": "sotu"')


def break_manifest_fields(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format": 1, "splits": {}}')


def break_version(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"evaluation_version": "1"', '"evaluation_version": "0"'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_rows, "train.rows.npy: has 1000 bytes, but"),
        (break_tokenizer, "tokenizer.json: No such file or directory"),
        (break_manifest, "manifest.json: not a manifest"),
        (break_manifest_fields, "manifest.json: not a manifest (without 'train')"),
        (break_version, "manifest.json: evaluation version 0, but this program measures version 1"),
    ],
)
def test_broken_data_is_named_with_the_command_that_repairs_it(
    small_dir: Path, corpus_dir: Path, damage: object, says: str
) -> None:
    sha256 = load_manifest(small_dir).sha256
    assert callable(damage)
    damage(small_dir)
    line = refused("--dataset", f"files:{corpus_dir}", *SMALL, "--data", small_dir)
    assert says in line
    with pytest.raises(DataError) as caught:
        load_manifest(small_dir)
    assert str(caught.value) in line
    command = shlex.split(line.split(" with: ")[1].split(" (PRESET")[0])
    assert command[:3] == ["python", "-m", "trainer.prepare"]
    command = [argument.replace("PRESET", "cpu") for argument in command[3:]]
    if "--dataset" not in command:  # the broken file was the one that knew
        command += ["--dataset", f"files:{corpus_dir}", *SMALL]
    assert call(*command)[0] == 0
    assert verify(small_dir).sha256 == sha256


def test_only_verify_sees_a_changed_byte(small_dir: Path, corpus_dir: Path) -> None:
    arguments = ("--dataset", f"files:{corpus_dir}", *SMALL, "--data", small_dir)
    assert call(*arguments, "--verify")[0] == 0
    with (small_dir / "val.rows.npy").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert call(*arguments)[0] == 0
    assert "val.rows.npy: sha256 is " in refused(*arguments, "--verify")
    assert call(*arguments, "--verify", "--force")[0] == 0


def test_verify_does_not_prepare(tmp_path: Path) -> None:
    assert "so " + str(tmp_path / "none") + " is not prepared" in refused(
        "--preset", "cpu", "--data", tmp_path / "none", "--verify"
    )
    assert not (tmp_path / "none").exists()


def test_a_folder_with_other_data_is_not_taken_for_what_was_asked(small_dir: Path, corpus_dir: Path) -> None:
    line = refused("--preset", "cpu", "--data", small_dir)
    assert f"prepared with dataset files:{corpus_dir}, but sotu is asked for" in line
    line = refused("--dataset", f"files:{corpus_dir}", "--vocab-size", 321, "--row-tokens", 32, "--data", small_dir)
    assert "prepared with vocab size 320, but 321 is asked for" in line


# Taken from elsewhere


def takes(small_dir: Path, corpus_dir: Path, *more: object) -> tuple[object, ...]:
    return ("--dataset", f"files:{corpus_dir}", *SMALL, "--take", small_dir, *more)


def test_a_folder_from_elsewhere_is_taken_in_and_left_as_it_is(small_dir: Path, corpus_dir: Path) -> None:
    shutil.rmtree(corpus_dir)
    status, out, _ = call("--dataset", f"files:{corpus_dir}", *SMALL, "--find")
    assert (status, json.loads(out)["manifest_sha256"]) == (0, "")
    before = {path.name: path.read_bytes() for path in small_dir.iterdir()}
    status, out, _ = call(*takes(small_dir, corpus_dir))
    assert status == 0
    place = Path(json.loads(out)["data"])
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert {path.name: path.read_bytes() for path in small_dir.iterdir()} == before
    assert call("--dataset", f"files:{corpus_dir}", *SMALL, "--find")[1] == out
    assert json.loads(out)["manifest_sha256"] == load_manifest(small_dir).sha256


@pytest.mark.parametrize("name", [*file_names(), "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_nothing_of_a_damaged_folder_is_taken_in(small_dir: Path, corpus_dir: Path, name: str, how: str) -> None:
    content = bytearray((small_dir / name).read_bytes())
    content[-5] ^= 64
    if how == "missing":
        (small_dir / name).unlink()
    else:
        (small_dir / name).write_bytes(content[:-1] if how == "cut" else content)
    assert name in refused(*takes(small_dir, corpus_dir))
    assert json.loads(call("--dataset", f"files:{corpus_dir}", *SMALL, "--find")[1])["manifest_sha256"] == ""
    assert [path for path in (Path(os.environ["RAYSEARCH_CACHE"]) / "data").iterdir() if path.is_dir()] == []


def test_other_data_than_was_asked_for_are_not_taken_in(small_dir: Path, corpus_dir: Path) -> None:
    said = refused(*takes(small_dir, corpus_dir), "--row-tokens", 64)
    assert f"{small_dir}: prepared with row tokens {ROW_TOKENS}, but 64 is asked for; take another folder" in said


def test_what_is_prepared_already_is_kept(small_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    prepare(lambda: datasets.files(corpus_dir), place, vocab_size=VOCAB_SIZE, row_tokens=ROW_TOKENS)
    (small_dir / "val.rows.npy").unlink()
    status, out, _ = call(*takes(small_dir, corpus_dir, "--data", place))
    assert (status, json.loads(out)["data"]) == (0, str(place))


def test_a_preparation_that_was_killed_leaves_nothing_that_passes_for_data(tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    command = [*PREPARE, "--preset", "cpu", "--data", str(directory)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob("killed.building/*.tokens")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with pytest.raises(DataError, match="is not prepared; prepare it with: python -m "):
        load_manifest(directory)
    assert call("--preset", "cpu", "--data", directory)[0] == 0
    assert not (tmp_path / "killed.building").exists()


def test_several_calls_at_once_prepare_once(tmp_path: Path, corpus_dir: Path) -> None:
    command = [*PREPARE, "--dataset", f"files:{corpus_dir}", *SMALL, "--data", str(tmp_path / "data")]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            for _ in range(3)
        ]
        ends = [(*process.communicate(), process.returncode) for process in processes]
    assert [status for _out, _err, status in ends] == [0, 0, 0], ends
    assert len({json.loads(out)["manifest_sha256"] for out, _err, _status in ends}) == 1
    assert sum("packed in" in err for _out, err, _status in ends) == 1


def test_a_reader_keeps_its_rows_while_the_folder_is_prepared_anew(small_dir: Path, corpus_dir: Path) -> None:
    rows = rows_of(small_dir, "train")
    before = np.array(rows)
    (corpus_dir / "more.txt").write_text("quite another text " * 50)
    assert call("--dataset", f"files:{corpus_dir}", *SMALL, "--data", small_dir, "--force")[0] == 0
    assert (before == rows).all()


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_no_data(tmp_path: Path) -> None:
    command = [*PREPARE, "--preset", "cpu", "--data", str(tmp_path / "data")]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (2, "", 1)
    assert f"{tmp_path / 'data'}: File too large" in errors[0]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("data")] == ["data.lock"]


def test_too_small_a_disk_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the download needs 1,000,000,000,000 MB and [\d,]+ MB are free; free some"):
        require_space(tmp_path / "not" / "yet", 10**18, "the download")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "File exists" in refused("--preset", "cpu", "--data", tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "rtx306"], "preset 'rtx306' is not known; known: cpu, h100, rtx3060"),
        (
            ["--preset", "cpu", "--dataset", "pile"],
            "dataset 'pile' is not known; known: climbmix, tinystories, files:DIR",
        ),
        (["--preset", "cpu", "--dataset", "files:"], "dataset 'files:' is not known"),
        (["--preset", "cpu", "--dataset", "files:/no/such/folder"], "files:/no/such/folder: no such folder; give one"),
        (["--preset", "cpu", "--dataset", "climbmix", "--shards", "0"], "--shards 0: climbmix has 6542 shards"),
        (["--preset", "cpu", "--dataset", "climbmix", "--shards", "7000"], "give 1 to 6542"),
        (["--preset", "cpu", "--vocab-size", "256"], "--vocab-size 256: not between 257 and 65536; take e.g. 257"),
        (["--preset", "cpu", "--vocab-size", "100000"], "--vocab-size 100000: not between"),
        (["--preset", "cpu", "--row-tokens", "0"], "--row-tokens 0: not between 1 and 65535"),
        (["--preset", "cpu", "--row-tokens", "many"], "argument --row-tokens: invalid int value: 'many'"),
        (["--preset", "cpu", "--shard", "many"], "argument --shards: invalid int value: 'many'"),
        (["--presets", "cpu"], "unrecognized arguments: --presets cpu"),
        ([], "--vocab-size is not given; give it, or --preset with one of cpu, h100, rtx3060"),
        (["--vocab-size", "300", "--row-tokens", "8"], "--dataset is not given"),
    ],
)
def test_bad_input_is_one_line(arguments: Sequence[str], says: str) -> None:
    status, _out, err = call(*arguments)
    assert (status, len(err.splitlines())) == (2, 1)
    assert says in err


@pytest.mark.parametrize(
    ("wanted", "seen", "takes", "why"),
    [
        ("python", set(), "python", "needs no network"),
        ("climbmix", {"prepared"}, "climbmix", "was prepared before"),
        ("climbmix", {"network"}, "sotu", "no NVIDIA GPU was seen"),
        ("climbmix", {"gpu"}, "sotu", "did not answer"),
        ("climbmix", {"gpu", "network"}, "climbmix", "the network has it"),
    ],
)
def test_the_dataset_that_is_taken_has_a_reason(wanted: str, seen: set[str], takes: str, why: str) -> None:
    dataset, reason = choose_dataset(
        "h100",
        wanted,
        prepared="prepared" in seen,
        gpu=lambda: "gpu" in seen,
        online=lambda _dataset: "network" in seen,
    )
    assert dataset == takes
    assert why in reason


def test_without_a_gpu_the_embedded_corpus_is_taken_and_the_reason_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    request = resolve(parse(["--preset", "h100"]))
    assert (request.dataset, request.vocab_size, request.row_tokens, request.shards) == ("sotu", 8192, 2048, 0)
    assert request.why == "no NVIDIA GPU was seen, so the embedded corpus is taken instead of climbmix"
    assert request.directory == tmp_path / "cache" / "data" / "sotu-v8192-t2048"
    prepared = tmp_path / "cache" / "data" / "climbmix-v8192-t2048"
    prepared.mkdir(parents=True)
    (prepared / "manifest.json").touch()
    assert resolve(parse(["--preset", "h100"])).directory == prepared


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['rustbpe'] = None; from trainer.prepare import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--preset", "cpu", "--data", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: rustbpe is not installed; pip install rustbpe, or copy a folder that is prepared elsewhere\n"
    )


def test_the_manifest_has_every_file_and_survives_a_round_trip(sotu_dir: Path) -> None:
    manifest = load_manifest(sotu_dir)
    assert {path.name for path in sotu_dir.iterdir()} == {*file_names(), "manifest.json"}
    assert set(manifest.files) == set(file_names())
    assert Manifest.parse(manifest.to_json(), sotu_dir) == manifest
    assert manifest.tokenizer_sha256 == manifest.files["tokenizer.json"].sha256
    assert str(sotu_dir) not in (sotu_dir / "manifest.json").read_text()
