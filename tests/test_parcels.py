"""Parcels of prepared data: whatever interrupts them, they go on where they stopped, and come whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_kit import contents

from raysearch import data, parcels
from raysearch.errors import UserError
from raysearch.objective import load_presets
from raysearch.parcels import PIECE_BYTES, Parcel, packed, piece, receive, waiting_place

PRESET = load_presets()["cpu"]


class Cut(Exception):
    """The network is gone."""


class Giver:
    """A machine that has a folder; it breaks off after so many pieces, and counts those that it gave."""

    def __init__(self, folder: Path, *, breaks_after: int | None = None) -> None:
        self.folder, self.breaks_after, self.given = folder, breaks_after, 0

    def pieces(self, name: str, offsets: Iterable[int]) -> Iterable[bytes]:
        for offset in offsets:
            if self.given == self.breaks_after:
                raise Cut
            self.given += 1
            yield self.changed(piece(self.folder, name, offset))

    def changed(self, content: bytes) -> bytes:
        return content


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's; the giver's is another one."""
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "giver"))
    return tmp_path / "taker"


def offered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Parcel, Path]:
    found = data.prepare(PRESET, "sotu")
    monkeypatch.setenv("RAYSEARCH_CACHE", str(cache))
    return data.offer(found), Path(found.folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of up to three pieces."""
    folder = tmp_path_factory.mktemp("large")
    for name, size_bytes in {"rows": 2 * PIECE_BYTES + 1, "index": PIECE_BYTES, "empty": 0, "small": 3}.items():
        (folder / name).write_bytes(os.urandom(size_bytes))
    (folder / parcels.MANIFEST).write_text(json.dumps({"files": dict.fromkeys(("rows", "index", "empty", "small"))}))
    return folder


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 4), max_size=4), torn_bytes=st.sampled_from([0, 1, 100]))
def test_no_piece_comes_twice_however_often_the_way_is_cut(large: Path, cuts: list[int], torn_bytes: int) -> None:
    """What is torn off is what a machine that loses its power has not written to its disk yet."""
    parcel = packed(large, dataset="d", manifest_sha256="0123456789abcdef")
    place = large.with_name("taker") / "d"
    given_pieces = torn = 0
    for breaks_after in [*cuts, None]:
        giver = Giver(large, breaks_after=breaks_after)
        try:
            with waiting_place(place, parcel) as arriving:
                receive(parcel, arriving, giver.pieces)
                assert contents(arriving) == contents(large)
        except Cut:
            torn += tear(next(place.parent.glob("d.arriving-*/")), torn_bytes)
        given_pieces += giver.given
        if not list(place.parent.glob("d.arriving-*/")):
            break
    assert 6 <= given_pieces <= 6 + torn
    assert list(place.parent.iterdir()) == [place.with_name("d.arriving.lock")]


def tear(arriving: Path, torn_bytes: int) -> bool:
    for path in arriving.iterdir():
        if torn_bytes and path.stat().st_size > torn_bytes:
            os.truncate(path, path.stat().st_size - torn_bytes)
            return True
    return False


def test_data_that_came_from_another_machine_are_its_data(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parcel, there = offered(cache, monkeypatch)
    assert data.find(PRESET, "sotu") is None
    found = data.fetch(PRESET, parcel, Giver(there).pieces)
    assert found == data.find(PRESET, "sotu")
    assert found.manifest_sha256 == parcel.manifest_sha256
    assert Path(found.folder).is_relative_to(cache)
    assert not list(cache.glob("data/*.arriving-*"))
    assert data.fetch(PRESET, parcel, Giver(there, breaks_after=0).pieces) == found, "nothing is asked for again"


def test_damaged_data_are_refused_and_begun_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parcel, there = offered(cache, monkeypatch)
    giver = Giver(there)
    giver.changed = lambda content: content[:-1] + bytes([content[-1] ^ (len(content) > 10_000)])  # not the manifest
    with pytest.raises(UserError, match=r"what came is damaged: .*sha256 is"):
        data.fetch(PRESET, parcel, giver.pieces)
    assert data.find(PRESET, "sotu") is None
    assert not list(cache.glob("data/*.arriving-*"))
    assert data.fetch(PRESET, parcel, Giver(there).pieces).manifest_sha256 == parcel.manifest_sha256


def test_a_file_that_shrinks_on_its_way_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parcel, there = offered(cache, monkeypatch)
    giver = Giver(there)
    giver.changed = lambda content: content[:-1]
    with pytest.raises(UserError, match="was changed while it was copied"):
        data.fetch(PRESET, parcel, giver.pieces)


def test_rests_of_older_data_do_not_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parcel, there = offered(cache, monkeypatch)
    with pytest.raises(Cut):
        data.fetch(PRESET, Parcel(parcel.dataset, "f" * 64, parcel.files), Giver(there, breaks_after=1).pieces)
    assert len(list(cache.glob("data/*.arriving-*/*"))) > 0
    data.fetch(PRESET, parcel, Giver(there).pieces)
    assert not list(cache.glob("data/*.arriving-*"))


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    parcel = Parcel("d", "0" * 64, {"../evil": 3})
    with pytest.raises(UserError, match="is no name of a file"), waiting_place(tmp_path / "d", parcel) as arriving:
        receive(parcel, arriving, lambda name, offsets: [b"abc"])
    assert not (tmp_path / "evil").exists()


def test_too_small_a_disk_is_told_before_anything_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    parcel = Parcel("d", "0" * 64, {"rows": 2 * free})
    giver = Giver(tmp_path, breaks_after=0)
    with (
        pytest.raises(OSError, match=r"the study's data need .* MB and .* MB are free there; make room"),
        waiting_place(tmp_path / "d", parcel) as arriving,
    ):
        receive(parcel, arriving, giver.pieces)
