"""Packs documents into rows of one length: which tokens of which document stand where in which row.

It decides on lengths alone: it reads no token, opens no file and knows no tokenizer.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

# Pieces that wait for a place. More of them fit better; fewer need less memory. Part of the evaluation version.
WINDOW_PIECES = 16_384

ROW, START, STOP, DOC, OFFSET = range(5)  # the columns of a plan


class _Piles:
    """Waiting pieces of documents, piled by length; a bit for each pile that is not empty finds the best in one step.

    Args:
        longest: the greatest length of a piece.
    """

    def __init__(self, longest: int):
        self._piles: list[deque[tuple[int, int]]] = [deque() for _ in range(longest + 1)]
        self._bits = 0
        self.count = 0

    def add(self, length: int, doc: int, offset: int, *, first: bool = False) -> None:
        pile = self._piles[length]
        if first:
            pile.appendleft((doc, offset))
        else:
            pile.append((doc, offset))
        self._bits |= 1 << length
        self.count += 1

    def take(self, space: int) -> tuple[int, int, int]:
        """Removes the longest piece that fits in `space`, else the shortest: (its length, document, offset)."""
        fitting = self._bits & ((2 << space) - 1)
        length = (fitting.bit_length() if fitting else (self._bits & -self._bits).bit_length()) - 1
        pile = self._piles[length]
        doc, offset = pile.popleft()
        if not pile:
            self._bits ^= 1 << length
        self.count -= 1
        return length, doc, offset


def pack(lengths: Iterable[int], *, capacity: int, window_pieces: int = WINDOW_PIECES) -> np.ndarray:
    """Plans rows of exactly `capacity` tokens, without padding, each piece of text led by a BOS token.

    Best fit: into the space left in a row goes the longest waiting piece that fits; when none fits, the shortest one
    is cut. This is the rule by which karpathy/autoresearch's loader fills its rows while it trains. Unlike there, what
    is cut off is not thrown away: it waits, with a BOS of its own, for another row, and so does every row's worth of a
    document that is longer than a row. So each token of each document is placed once; only the last row, which cannot
    be filled, is dropped with what is in it.

    Args:
        lengths: tokens of each document, BOS not counted; empty documents take no place.
        capacity: tokens of a row, BOS counted; at least 2.
        window_pieces: how many pieces wait at most.

    Returns:
        int32 (S, 5), sorted by row and start: row, start, stop, document, offset. Position `start` of the row holds
        BOS; `start + 1` to `stop` hold the document's tokens from `offset` on (none when stop is start + 1).
    """
    room = capacity - 1
    plan = array("i")
    piles = _Piles(room)
    documents = iter(enumerate(lengths))
    row, position, row_begins_at = 0, 0, 0
    while True:
        if piles.count < window_pieces:
            _refill(piles, documents, room=room, window_pieces=window_pieces)
        if not piles.count:
            break
        space = room - position  # beside the BOS; 0 when nothing but a BOS fits, which then ends the row
        length, doc, offset = piles.take(space)
        placed = min(length, space)
        plan.extend((row, position, position + 1 + placed, doc, offset))
        if placed < length:
            piles.add(length - placed, doc, offset + placed, first=True)
        position += 1 + placed
        if position == capacity:
            row, position, row_begins_at = row + 1, 0, len(plan)
    del plan[row_begins_at:]
    return np.frombuffer(plan, dtype=np.int32).reshape(-1, 5).copy() if plan else np.zeros((0, 5), np.int32)


def _refill(piles: _Piles, documents: Iterator[tuple[int, int]], *, room: int, window_pieces: int) -> None:
    """Takes documents in until the window is full; one that is longer than a row comes in pieces."""
    while piles.count < window_pieces:
        doc, length = next(documents, (-1, 0))
        if doc < 0:
            return
        for offset in range(0, length, room):
            piles.add(min(room, length - offset), doc, offset)


def shuffle_rows(plan: np.ndarray, *, seed: int) -> np.ndarray:
    """Puts the rows of a plan in a random order that is the same everywhere, sorted by the new (row, start).

    Packing leaves neighbouring rows alike (those of one long document, then the fillers); in this order the first N
    rows are a fair sample of all, which is what an evaluation on a part of the rows needs.
    """
    if not len(plan):
        return plan
    # RandomState and not Generator: NumPy promises that its stream never changes between versions.
    order = np.random.RandomState(seed).permutation(int(plan[:, ROW].max()) + 1).astype(np.int32)
    shuffled = plan.copy()
    shuffled[:, ROW] = order[plan[:, ROW]]
    return shuffled[np.lexsort((shuffled[:, START], shuffled[:, ROW]))]
