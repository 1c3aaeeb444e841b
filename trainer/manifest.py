"""The manifest of a data folder: what is in it, whether it is whole, and how to repair it.

It does not make the data (`trainer.prepare` does), and does not look into rows: a file with the right hash is whole.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.common import DataError, reason, repair_by_preset
from trainer.datasets import SPLITS
from trainer.tokenizer import TOKENIZER_FILE

FORMAT = 1
MANIFEST_FILE = "manifest.json"
# Rises whenever a score could come out differently for the same model and text: the way documents are split, packed and
# ordered, and what is counted as a byte. Two scores with different versions are never compared.
EVALUATION_VERSION = "1"
INDEXED_SPLITS = ("val", "holdout")


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds: `tokens` with BOS, `bytes` of text as UTF-8, `documents` that have a place in a row."""

    rows: int
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a data folder holds; its file is written last, so a folder without one is not prepared.

    Attributes:
        shards: shards of climbmix; 0 for other datasets.
        directory: the folder. Not in the file.
        sha256: of the manifest's file, which names the data as a whole. Not in the file.
    """

    evaluation_version: str
    dataset: str
    vocab_size: int
    row_tokens: int
    bos_id: int
    tokenizer_sha256: str
    splits: Mapping[str, SplitFacts]
    files: Mapping[str, FileFacts]
    source: str
    shards: int
    directory: Path
    sha256: str

    @classmethod
    def parse(cls, content: bytes, directory: Path) -> "Manifest":
        """Reads the file's content; raises ValueError, KeyError or TypeError if it is no manifest of this format."""
        fields = json.loads(content)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        fields["splits"] = {name: SplitFacts(**fields["splits"][name]) for name in SPLITS}
        fields["files"] = {name: FileFacts(**fields["files"][name]) for name in file_names()}
        return cls(**fields, directory=directory, sha256=hashlib.sha256(content).hexdigest())

    def to_json(self) -> bytes:
        """The content of manifest.json; the same for the same data, wherever it lies."""
        fields = dataclasses.asdict(self)
        del fields["directory"], fields["sha256"]
        return (json.dumps({"format": FORMAT, **fields}, indent=1) + "\n").encode()

    def path(self, name: str) -> Path:
        """Where a file of the manifest lies."""
        return self.directory / name

    def repair(self) -> str:
        """The remedy when a file is broken: the command that makes the same data again."""
        command = [
            *("python", "-m", "trainer.prepare", "--dataset", self.dataset),
            *("--vocab-size", str(self.vocab_size), "--row-tokens", str(self.row_tokens)),
            *(("--shards", str(self.shards)) if self.shards else ()),
            *("--data", str(self.directory), "--force"),
        ]
        return f"repair it with: {shlex.join(command)}"


def file_names() -> list[str]:
    """The files of a data folder, the manifest aside."""
    rows = [f"{split}.rows.npy" for split in SPLITS]
    return [TOKENIZER_FILE, "token_bytes.npy", *rows, *(f"{split}.index.npy" for split in INDEXED_SPLITS)]


def load_manifest(directory: Path | str) -> Manifest:
    """Reads the manifest of a prepared folder, and checks that every file is there with its exact size.

    Raises:
        DataError: the folder is not prepared, or something in it is broken or of another evaluation version; the
            message is one line, and ends with the command that repairs it.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    try:
        manifest = Manifest.parse(path.read_bytes(), directory)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so {directory} is not prepared; {repair_by_preset(directory)}") from None
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}; {repair_by_preset(directory)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({reason(error)}); {repair_by_preset(directory)}") from None
    if manifest.evaluation_version != EVALUATION_VERSION:
        raise DataError(
            f"{path}: evaluation version {manifest.evaluation_version}, but this program measures version "
            f"{EVALUATION_VERSION}; {manifest.repair()}"
        )
    for name, facts in manifest.files.items():
        try:
            size_bytes = manifest.path(name).stat().st_size
        except OSError as error:
            raise DataError(f"{manifest.path(name)}: {reason(error)}; {manifest.repair()}") from None
        if size_bytes != facts.bytes:
            raise DataError(
                f"{manifest.path(name)}: has {size_bytes} bytes, but {facts.bytes} were written; {manifest.repair()}"
            )
    return manifest


def verify(directory: Path | str) -> Manifest:
    """Reads every file of a prepared folder and compares its sha256 with the manifest's.

    Raises:
        DataError: as `load_manifest`, or a file's content has changed.
    """
    manifest = load_manifest(directory)
    for name, facts in manifest.files.items():
        digest = sha256_of(manifest.path(name))
        if digest != facts.sha256:
            raise DataError(
                f"{manifest.path(name)}: sha256 is {digest[:12]}…, but {facts.sha256[:12]}… was written; "
                f"{manifest.repair()}"
            )
    return manifest


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
