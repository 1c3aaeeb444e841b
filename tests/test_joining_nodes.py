"""Joining for real: Ray nodes on this machine that are not what they should be, each refused or told in one line."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_kit import START_LIMIT_S, Nodes, nodes
from test_executors import Bench
from trainer_kit import contents

from raysearch import joining
from raysearch.executors import Report, SlotFailed
from raysearch.executors.ray import RayExecutor
from raysearch.executors.ray_actors import SlotPlan
from raysearch.joining import Software, installed

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / ".token").write_text("study")
    with nodes(tmp_path) as found:
        found.head()
        yield found


def bench(cluster: Nodes, folder: Path, **options: object) -> Bench:
    plan = SlotPlan("study", "s", str(folder), ".token", **{"preset": "", "dataset": "", "datasets": {}} | options)  # pyright: ignore[reportArgumentType]
    found = Bench(RayExecutor(plan, address=cluster.address, device="cpu"), folder, "s")
    found.limit_s = START_LIMIT_S
    return found


def failures(reports: list[Report]) -> list[str]:
    return [report.reason for report in reports if isinstance(report, SlotFailed)]


def test_a_node_with_another_version_is_refused_and_a_wrong_label_is_told(cluster: Nodes, tmp_path: Path):
    cluster.worker("--num-cpus=1", "--labels=raysearch/profile=rtx3060-12gb")
    old = bench(cluster, tmp_path, software=Software("0.0.1", installed().torch))
    try:
        (reason,) = old.until(lambda: failures(old.reports))
        assert "the head has 0.0.1; all nodes need the same: install the head's wheel on that node" in reason
        assert old.executor.starting() == 0
    finally:
        old.executor.close()
    now = bench(cluster, tmp_path)
    try:
        now.until(lambda: now.slots)
        (slot,) = now.slots.values()
        assert "its label raysearch/profile says rtx3060-12gb; what it has counts" in (joining.mislabelled(slot) or "")
    finally:
        now.executor.close()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: -path.stat().st_size)
    for path in sources[:60]:
        shutil.copy(path, folder / f"{path.stem}.txt")
    return folder


def test_a_node_that_prepared_other_data_is_refused(cluster: Nodes, tmp_path: Path, texts: Path):
    cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(tmp_path / "one")})
    found = bench(cluster, tmp_path, preset="cpu", dataset=f"files:{texts}")
    try:
        found.until(lambda: found.slots or failures(found.reports))
        assert failures(found.reports) == []
        first = next(texts.iterdir())
        first.write_text("What was copied to the second node is not the same.\n" * 1000)
        other = {"RAYSEARCH_CACHE": str(tmp_path / "two")}
        prepare = [sys.executable, "-m", "trainer.prepare", "--preset", "cpu", "--dataset", f"files:{texts}"]
        subprocess.run(prepare, env=os.environ | other, check=True, capture_output=True)
        cluster.worker("--num-cpus=1", env=other)
        (reason,) = found.until(lambda: failures(found.reports))
        assert str(tmp_path / "two") in reason
        assert "one study has one set of data: move that folder away, and the node gets the study's" in reason
        cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(tmp_path / "one")})
        found.until(lambda: len(found.slots) == 2)
    finally:
        found.executor.close()


def test_data_are_made_once_and_then_copied_from_node_to_node(cluster: Nodes, tmp_path: Path, texts: Path):
    """The texts are gone when the third node joins."""
    homes = [tmp_path / name for name in ("one", "two", "three")]
    for home in homes[:2]:
        cluster.worker("--num-cpus=2", env={"RAYSEARCH_CACHE": str(home)})
    found = bench(cluster, tmp_path, preset="cpu", dataset=f"files:{texts}")
    try:
        found.until(lambda: len(found.slots) == 4)
        assert failures(found.reports) == []
        shutil.rmtree(texts)
        cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(homes[2])})
        found.until(lambda: len(found.slots) == 5)
        slots = found.slots.values()
        assert len({slot.data.manifest_sha256 for slot in slots if slot.data}) == 1
        assert {slot.data.folder for slot in slots if slot.data} == {str(folder) for folder in prepared(homes)}
        assert [slot.data_from for slot in slots][-1]
        assert "data copied from" in joining.described(list(slots)[-1])
        for folder in prepared(homes):
            assert contents(folder) == contents(prepared(homes)[0])
            assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder], "nothing is left beside it"
    finally:
        found.executor.close()


def prepared(homes: list[Path]) -> list[Path]:
    return [path.parent for home in homes for path in home.glob("data/*/manifest.json")]


def test_texts_of_a_folder_are_prepared_on_the_coordinator_s_machine_for_all(
    cluster: Nodes, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "head"))
    cluster.worker("--num-cpus=2", env={"RAYSEARCH_CACHE": str(tmp_path / "one")})
    found = bench(cluster, tmp_path, preset="cpu", dataset=f"files:{texts}")
    try:
        found.until(lambda: len(found.slots) == 2)
        head, node = prepared([tmp_path / "head"]), prepared([tmp_path / "one"])
        assert len(head) == len(node) == 1
        assert contents(head[0]) == contents(node[0])
        assert any(slot.data_from for slot in found.slots.values())
    finally:
        found.executor.close()
