"""The tokenizer: byte-pair encoding, learned with rustbpe, kept as plain JSON, run by tiktoken.

It does not know which text it is for, nor how tokens are laid out in rows.
"""

import base64
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.common import DataError, reason, repair_by_preset

FORMAT = 1
TOKENIZER_FILE = "tokenizer.json"
BOS = "<|bos|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and BOS
MAX_VOCAB_SIZE = 65_536  # ids are stored as uint16
# Text is cut into words by the pattern of OpenAI's cl100k (tiktoken, openai_public.py), with numbers in groups of two
# digits instead of three, as karpathy/nanochat does for small vocabularies.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
    r"\s*[\r\n]|\s+(?!\S)|\s"
)
TRAIN_CHARS = 200_000_000
PIECE_CHARS = 10_000  # the regex engines of rustbpe and tiktoken fail on millions of blanks in a row


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding, as numbers and bytes only: any program can rebuild it from tokenizer.json.

    Attributes:
        pattern: regular expression that cuts text into words.
        ranks: id of each ordinary token by its bytes.
        special_tokens: id of each special token; only `<|bos|>`.
    """

    pattern: str
    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learns the merges from texts, of which it reads the first TRAIN_CHARS characters.

        Raises:
            DataError: the texts do not hold enough different words for so many tokens.
        """
        import rustbpe  # noqa: PLC0415 - late: only the machine that prepares needs it

        trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue] - a compiled module without stubs
        trainer.train_from_iterator(_pieces(texts), vocab_size - 1, pattern=PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) < vocab_size - 1:
            raise DataError(
                f"--vocab-size {vocab_size}: the training text is too small, it gives only {len(ranks) + 1} tokens; "
                f"give more text, or --vocab-size {len(ranks) + 1} or less"
            )
        return cls(PATTERN, ranks, {BOS: len(ranks)})

    @classmethod
    def from_dir(cls, directory: Path | str) -> "Tokenizer":
        """Reads tokenizer.json of a data folder.

        Raises:
            DataError: it is missing or not what it should be.
        """
        path = Path(directory) / TOKENIZER_FILE
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']!r}, not {FORMAT}")
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in fields["ranks"].items()}
            tokenizer = cls(fields["pattern"], ranks, dict(fields["special_tokens"]))
            if sorted([*ranks.values(), *tokenizer.special_tokens.values()]) != list(range(tokenizer.vocab_size)):
                raise ValueError("ids are not 0 to the size of the vocabulary")
            _ = tokenizer.bos_id
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: {reason(error)}; {repair_by_preset(Path(directory))}") from None
        return tokenizer

    def to_json(self) -> bytes:
        """The content of tokenizer.json."""
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.ranks.items()}
        fields = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": dict(self.special_tokens),
            "ranks": ranks,
        }
        return json.dumps(fields, indent=0).encode()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.ranks) + len(self.special_tokens)

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a document, and each piece of one."""
        return self.special_tokens[BOS]

    @functools.cached_property
    def encoding(self) -> Any:
        """The tiktoken.Encoding that does the work."""
        import tiktoken  # noqa: PLC0415 - late: reading a prepared folder does not need it

        return tiktoken.Encoding(
            "raysearch",
            pat_str=self.pattern,
            mergeable_ranks=dict(self.ranks),
            special_tokens=dict(self.special_tokens),
        )

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text: uint32 (n,). No BOS is put in front, and what looks like one in the text is text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The regex engine gives up on a run of some hundred thousand blanks. In pieces a few words are cut in two.
            pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens; single ones may be no text, as a character may begin in one and end in the next."""
        return self.encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 show as a replacement character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """How many bytes each token stands for: int32 (V,); 0 for special tokens.

        Counted from the token's bytes. The length of the token's decoded text would be wrong for every token that holds
        a part of a character, which decodes to a replacement character of three bytes.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    left_chars = TRAIN_CHARS
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            if left_chars <= 0:
                return
            piece = text[start : start + min(PIECE_CHARS, left_chars)]
            left_chars -= len(piece)
            yield piece
