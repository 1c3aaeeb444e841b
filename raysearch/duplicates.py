"""Near duplicates: programs that differ only in knobs, and there by less than a run could show. It is pure.

Equal programs are found by `knobs.fingerprint`; here one value is a little off. Code is compared as it is, whatever it
does: two ways to write one thing are two programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysearch.knobs import Knob, skeleton

TOLERANCE = 0.01  # of a knob's range: two real numbers that are closer count as one
FEW = 100  # whole numbers of a range that are all told apart: one of them is 1% of the range or more
_CELLS = 10_000  # per range, in which places are first compared: 16 bits hold them
_ROUNDING = 1e-9  # of floating point: 0.51 is one hundredth from 0.5


@dataclass(frozen=True)
class Signature:
    """What near duplicates have in common.

    Attributes:
        skeleton: Of the program, without the values of its knobs; with their ranges.
        vector: The knobs' places in units of their ranges.
        tolerance: How far apart two places may be, knob by knob; 0 where only equal values are alike.
    """

    skeleton: str
    vector: tuple[float, ...]
    tolerance: tuple[float, ...]


def signature(sources: Mapping[str, str], path: str) -> Signature:
    """The signature of a program.

    Args:
        sources: Its editable files, text by path.
        path: The one whose knobs are compared; all else has to be equal.
    """
    outline, knobs = skeleton(sources, path)
    return Signature(
        skeleton=outline,
        vector=tuple(knob.unit(knob.value) for knob in knobs.values()),
        tolerance=tuple(_tolerance(knob) for knob in knobs.values()),
    )


def _tolerance(knob: Knob) -> float:
    if knob.choices:
        return 0.0
    assert knob.low is not None
    assert knob.high is not None
    return 0.0 if knob.is_int and knob.high - knob.low <= FEW else TOLERANCE


class Known:
    """The programs of one profile that were run or are in flight, by signature.

    Looking one up takes time in proportion to the programs of its skeleton: a few 16-bit operations for each knob of
    each of them.
    """

    def __init__(self) -> None:
        self._shelves: dict[str, _Shelf] = {}

    def add(self, id: str, signature: Signature) -> None:
        """Remembers a program."""
        shelf = self._shelves.get(signature.skeleton)
        if shelf is None:
            shelf = self._shelves[signature.skeleton] = _Shelf(signature.tolerance)
        shelf.add(id, signature.vector)

    def near(self, signature: Signature) -> str | None:
        """The first program that was added and is a near duplicate of this one, or None."""
        shelf = self._shelves.get(signature.skeleton)
        return None if shelf is None else shelf.near(signature.vector)


class _Shelf:
    """Programs of one skeleton: their places as a column of cells for each knob, to be compared column by column."""

    def __init__(self, tolerance: tuple[float, ...]) -> None:
        self._tolerance = np.array(tolerance)
        # A cell more on either side: a place is rounded to a cell
        self._reach = np.ceil(self._tolerance * _CELLS).astype(np.int16) + 1
        self._ids: list[str] = []
        self._vectors: list[tuple[float, ...]] = []
        self._cells: NDArray[np.int16] = np.empty((len(tolerance), 64), dtype=np.int16)

    def add(self, id: str, vector: tuple[float, ...]) -> None:
        count = len(self._ids)
        if count == self._cells.shape[1]:
            self._cells = np.concatenate([self._cells, np.empty_like(self._cells)], axis=1)
        self._cells[:, count] = _cells(vector)
        self._ids.append(id)
        self._vectors.append(vector)

    def near(self, vector: tuple[float, ...]) -> str | None:
        count = len(self._ids)
        wanted = _cells(vector)
        alike = np.ones(count, dtype=np.bool_)
        for column, cell, reach in zip(self._cells, wanted, self._reach, strict=True):
            # One comparison for both sides: what is below becomes a large number without a sign
            above = np.subtract(column[:count], cell - reach).view(np.uint16)
            alike &= above <= 2 * int(reach)
        for place in np.flatnonzero(alike):
            if (np.abs(np.array(self._vectors[place]) - vector) <= self._tolerance + _ROUNDING).all():
                return self._ids[place]
        return None


def _cells(vector: tuple[float, ...]) -> NDArray[np.int16]:
    return np.round(np.array(vector) * _CELLS).astype(np.int16)
