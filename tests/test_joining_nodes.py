"""Joining for real: Ray nodes on this machine that are not what they should be, each refused or told in one line."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_kit import START_LIMIT_S, Nodes, nodes
from test_executors import Bench

from raysearch import joining
from raysearch.executors import Report, SlotFailed
from raysearch.executors.ray import RayExecutor, SlotPlan
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


def test_a_node_that_prepared_other_data_is_refused(cluster: Nodes, tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: -path.stat().st_size)
    for path in sources[:60]:
        shutil.copy(path, texts / f"{path.stem}.txt")
    cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(tmp_path / "one")})
    found = bench(cluster, tmp_path, preset="cpu", dataset=f"files:{texts}")
    try:
        found.until(lambda: found.slots or failures(found.reports))
        assert failures(found.reports) == []
        (texts / f"{sources[0].stem}.txt").write_text("What was copied to the second node is not the same.\n" * 1000)
        cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(tmp_path / "two")})
        (reason,) = found.until(lambda: failures(found.reports))
        assert str(tmp_path / "two") in reason
        assert "one study has one set of data: copy that folder from a node that joined" in reason
        cluster.worker("--num-cpus=1", env={"RAYSEARCH_CACHE": str(tmp_path / "one")})
        found.until(lambda: len(found.slots) == 2)
    finally:
        found.executor.close()
