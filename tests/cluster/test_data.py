"""Data on their way from the head to a machine that has neither texts nor internet, over a slow and faulty cable."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import LIMIT_S, Cluster, wait
from hosts import Host, bed
from session_kit import until
from trainer_kit import contents

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TEXT_BYTES = 30_000_000  # some four pieces of rows
CABLE = "60mbit"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with bed() as machines:
        own = machines.path / "own"  # each machine sees its own disk there
        monkeypatch.setenv("RAYSEARCH_CACHE", str(own / "cache"))
        (own / "texts").mkdir()
        taken = 0
        for path in sorted(Path(sysconfig.get_path("purelib"), "torch").rglob("*.py")):
            if taken < TEXT_BYTES:
                text = path.read_bytes()
                taken += (own / "texts" / f"{taken}.txt").write_bytes(text)
        found = Cluster(machines.path / "shared", [], bed=machines)
        yield found
        found.kill_sessions()


def arriving(host: Host) -> int:
    """Bytes on a host that wait until they are all there."""
    try:
        return sum(path.stat().st_size for path in (host.disk / "cache/data").glob("*.arriving-*/*"))
    except FileNotFoundError:
        return 0


def prepared(data: Path) -> dict[str, bytes]:
    (manifest,) = data.glob("*/manifest.json")
    return contents(manifest.parent)


def test_data_that_were_cut_off_twice_on_their_way_go_on_where_they_stopped(cluster: Cluster):
    beta = cluster.bed.add("beta", cpu="Toy Beta", sees_study=False, slots=1)
    try:
        cluster.bed.run(
            "tc", "qdisc", "add", "dev", beta.cable, "root", *f"tbf rate {CABLE} burst 1mb latency 1s".split()
        )
    except AssertionError as error:
        pytest.skip(f"cables cannot be made slow here: {error}")
    wait(lambda: beta.ip in (cluster.bed.nodes() or {}))
    texts = cluster.bed.path / "own/texts"
    task = ("--preset", "cpu", "--dataset", f"files:{texts}", "--budget-tokens", "8192", "--baseline-runs", "2")
    session = cluster.start("--study", "quick", *task, "--device", "cpu", "--address", cluster.bed.address)
    until(lambda: arriving(beta), session, LIMIT_S)
    cluster.bed.unplug(beta)
    time.sleep(2)  # Ray's connections live on
    cut_at = arriving(beta)
    cluster.bed.plug(beta)
    until(lambda: arriving(beta) > cut_at, session, LIMIT_S)
    killed_at = arriving(beta)
    beta.named("ray::Slot")[0].kill()

    def taken_in() -> bool:
        there = arriving(beta)
        taken = bool(list((beta.disk / "cache/data").glob("*/manifest.json")))
        assert taken or there >= killed_at, "what had come was thrown away"
        return taken

    until(taken_in, session, LIMIT_S)
    until(lambda: "joined as" in session.said(), session, LIMIT_S)
    assert "data copied from head" in session.said()
    assert prepared(beta.disk / "cache/data") == prepared(cluster.bed.path / "own/cache/data")
    until(cluster.outcomes, session, LIMIT_S)
    session.process.terminate()
    assert session.ends(LIMIT_S) == 130, session.said()
    wait(lambda: not cluster.processes())
