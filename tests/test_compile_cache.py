"""The compile cache: what torch.compile really leaves, packed, moved and pruned; then between two nodes of Ray."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysearch import profile
from raysearch.compile_cache import PIECE_BYTES, TORCH, TRITON, Archive, CompileCache, cache_key, open_cache
from raysearch.errors import UserError

COMPILES = """
import json, torch
from torch._dynamo.utils import counters

def f(x, y):
    return ((x * 2).sin() @ y).relu().sum()

torch.compile(f)(torch.ones(8, 8, requires_grad=True), torch.ones(8, 8)).backward()
print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
"""


def compiled(cache: CompileCache) -> dict[str, int]:
    """Runs a small program that compiles, in a process of its own; returns torch's counters."""
    env = os.environ | cache.environment()
    done = subprocess.run([sys.executable, "-c", COMPILES], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def age(cache: CompileCache, seconds: float = 3600.0) -> None:
    for path in cache.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds, time.time() - seconds))


def contents(cache: CompileCache) -> dict[str, bytes]:
    """All that is kept, without locks."""
    return {
        str(path.relative_to(cache.folder)): path.read_bytes()
        for path in cache.folder.rglob("*")
        if path.is_file() and "locks" not in path.parts and not path.name.startswith(".")
    }


def pieces(archive: Archive) -> Iterator[bytes]:
    return (archive.piece(offset) for offset in range(0, archive.size_bytes, PIECE_BYTES))


def send(cache: CompileCache, other: CompileCache) -> None:
    archive = cache.pack()
    assert archive is not None
    with archive.file:
        other.receive(pieces(archive), archive.sha256)


def write(cache: CompileCache, name: str, content: bytes = b"x") -> Path:
    path = cache.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "compile", "h100-80gb")


@pytest.fixture
def other(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "elsewhere/compile", "h100-80gb")


@pytest.mark.slow
def test_a_program_that_was_compiled_on_one_worker_is_not_compiled_again_on_another(
    cache: CompileCache, other: CompileCache
):
    first = compiled(cache)
    assert first["fxgraph_cache_miss"] > 0
    assert cache.pack() is None, "what was written a moment ago may not be whole"
    age(cache)
    send(cache, other)
    assert contents(other) == contents(cache)
    objects = {path: path.stat().st_mtime_ns for path in other.folder.rglob("*.so")}
    second = compiled(other)
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]
    assert second["autograd_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second
    assert objects
    assert {path: path.stat().st_mtime_ns for path in objects} == objects, "gcc ran again"


def test_what_was_compiled_meanwhile_stays_and_the_rest_is_moved_in(cache: CompileCache, other: CompileCache):
    for name in ("inductor/ab/one.py", "inductor/ab/two.py", "triton/KERNEL/k.cubin", "triton/SECOND/k.cubin"):
        write(cache, name, b"theirs")
    for name in ("inductor/locks/one.lock", "triton/KERNEL/tmp.pid_7/k.cubin", "inductor/ab/.7.tmp"):
        write(cache, name)
    age(cache)
    for name in ("inductor/ab/one.py", "triton/KERNEL/k.cubin"):
        write(other, name, b"ours")
    send(cache, other)
    assert contents(other) == {
        "inductor/ab/one.py": b"ours",
        "inductor/ab/two.py": b"theirs",
        "triton/KERNEL/k.cubin": b"ours",
        "triton/SECOND/k.cubin": b"theirs",
    }
    assert not list(other.root.glob(".incoming-*"))


def test_triton_s_lists_of_files_name_the_folder_that_they_are_in(cache: CompileCache, other: CompileCache):
    listed = {"child_paths": {"k.cubin": str(write(cache, "triton/KERNEL/k.cubin"))}}
    write(cache, "triton/KERNEL/__grp__k.json", json.dumps(listed).encode())
    age(cache)
    send(cache, other)
    found = json.loads((other.folder / "triton/KERNEL/__grp__k.json").read_text())
    assert found == {"child_paths": {"k.cubin": str(other.folder / "triton/KERNEL/k.cubin")}}
    assert Path(found["child_paths"]["k.cubin"]).exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside", tarfile.REGTYPE),
        ("inductor/../../outside", tarfile.REGTYPE),
        ("/tmp/raysearch-outside", tarfile.REGTYPE),
        ("elsewhere/file", tarfile.REGTYPE),
        (".lock", tarfile.REGTYPE),
        ("inductor/link", tarfile.SYMTYPE),
        ("triton/link", tarfile.LNKTYPE),
        ("triton/device", tarfile.FIFOTYPE),
    ],
)
def test_an_archive_with_anything_but_plain_files_of_a_cache_is_refused_whole(
    cache: CompileCache, name: str, kind: bytes
):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        good = tarfile.TarInfo("inductor/ab/good.py")
        good.size = 1
        tar.addfile(good, io.BytesIO(b"x"))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, "/etc/passwd"
        tar.addfile(bad)
    packed = Archive(file, len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest(), 0.0)
    before = sorted(cache.root.parent.rglob("*"))
    with pytest.raises(UserError, match="trials compile for themselves"):
        cache.receive([file.getvalue()], packed.sha256)
    assert sorted(cache.root.parent.rglob("*")) == before
    assert not Path("/tmp/raysearch-outside").exists()


def test_a_damaged_or_cut_archive_is_not_taken_in(cache: CompileCache, other: CompileCache):
    write(cache, "inductor/ab/one.py", b"x" * 100_000)
    age(cache)
    archive = cache.pack()
    assert archive is not None
    with archive.file:
        whole = b"".join(pieces(archive))
    for damaged in (whole[:-1], b"y" + whole[1:], b""):
        with pytest.raises(UserError, match="damaged on its way"):
            other.receive([damaged], archive.sha256)
    nonsense = b"no archive at all" * 100
    with pytest.raises(UserError, match="cannot be read"):
        other.receive([nonsense], hashlib.sha256(nonsense).hexdigest())
    assert other.is_empty()


def test_what_was_used_longest_ago_goes_first_and_a_kernel_goes_whole(cache: CompileCache):
    for number, name in enumerate(
        [
            "triton/OLD/k.cubin",
            "triton/OLD/k.json",
            "inductor/aa/second.py",
            "inductor/aa/third.py",
            "triton/NEW/k.json",
        ]
    ):
        path = write(cache, name, b"x" * 1000)
        os.utime(path, (time.time() - 1000 + 10 * number, time.time() - 5000))
    read = cache.folder / "triton/OLD/k.json"
    os.utime(read, (time.time() - 995, time.time() - 5000))
    assert cache.prune(6000) == 0
    assert cache.prune(4000) == 2000
    assert sorted(contents(cache)) == ["inductor/aa/second.py", "inductor/aa/third.py", "triton/NEW/k.json"]


def test_nothing_is_pruned_while_a_trial_runs_and_rubbish_goes_when_none_does(cache: CompileCache):
    write(cache, "inductor/aa/one.py", b"x" * 1000)
    rubbish = cache.root / ".incoming-killed"
    rubbish.mkdir()
    with CompileCache(cache.root, "another-kind").in_use():
        assert cache.prune(10) == 0
    assert not cache.is_empty()
    assert cache.prune(10) == 1000
    assert cache.is_empty()
    assert not rubbish.exists()


def test_one_slot_of_a_machine_fills_an_empty_cache_and_none_a_full_one(cache: CompileCache):
    with cache.to_be_filled() as first, CompileCache(cache.root, cache.key).to_be_filled() as second:
        assert (first, second) == (True, False)
    write(cache, "inductor/aa/one.py")
    with cache.to_be_filled() as wanted:
        assert not wanted


def test_a_folder_of_the_user_s_own_is_left_alone(tmp_path: Path):
    hardware = profile.cpu()
    env = {"RAYSEARCH_CACHE": str(tmp_path)}
    cache = open_cache(hardware, env)
    assert cache is not None
    assert cache.folder == tmp_path / "compile" / cache_key(hardware)
    assert set(cache.environment()) == {TORCH, TRITON}
    assert open_cache(hardware, env | {TORCH: "/mine"}) is None
    assert open_cache(hardware, env | {TRITON: "/mine"}) is None
    (tmp_path / "file").write_text("")
    assert open_cache(hardware, {"RAYSEARCH_CACHE": str(tmp_path / "file")}) is None


def test_the_key_names_the_card_and_the_software():
    card = profile.Hardware("cuda", "NVIDIA H100 80GB HBM3", 81559, "9.0", "570", "GPU-1", 64, "2.11.0+cu130")
    key = cache_key(card)
    assert key.startswith("h100-80gb-torch2.11.0+cu130-triton")
    assert f"py{sys.version_info.major}.{sys.version_info.minor}-" in key
    assert cache_key(dataclasses.replace(card, uuid="GPU-2", cores=8)) == key
    assert cache_key(dataclasses.replace(card, torch="2.13.0")) != key


# ---- between nodes ----


@pytest.mark.cluster
def test_a_node_that_joins_gets_the_cache_of_its_kind_beside_its_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two nodes on this machine, told apart by their environment; what is compiled is a stand-in, the way is real."""
    from ray.cluster_utils import Cluster
    from test_executors import Bench

    from raysearch.executors.ray import RayExecutor
    from raysearch.executors.ray_actors import SlotPlan

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in (TORCH, TRITON):
        monkeypatch.delenv(name, raising=False)  # torch itself sets it, if a test before has compiled something
    homes = [tmp_path / "one", tmp_path / "two"]
    caches: list[CompileCache] = []
    for home in homes:
        monkeypatch.setenv("RAYSEARCH_CACHE", str(home))
        cache = open_cache(profile.cpu(), os.environ)
        assert cache is not None
        caches.append(cache)
    write(caches[0], "inductor/ab/large.py", os.urandom(PIECE_BYTES + 1))
    write(caches[0], "triton/KERNEL/k.cubin", b"kernel")
    age(caches[0])
    (tmp_path / ".token").write_text("study")
    monkeypatch.setenv("RAYSEARCH_CACHE", str(homes[0]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        plan = SlotPlan("study", "cluster", str(tmp_path), ".token", preset="cpu", dataset="", datasets={})
        bench = Bench(RayExecutor(plan, address=cluster.address, device="cpu"), tmp_path, "cluster")
        try:
            bench.until(lambda: len(bench.slots) == 1)
            monkeypatch.setenv("RAYSEARCH_CACHE", str(homes[1]))
            cluster.add_node(num_cpus=1)
            bench.until(lambda: len(bench.slots) == 2)
            bench.until(lambda: contents(caches[1]) == contents(caches[0]))
            env = "import json, os; print(json.dumps(dict(os.environ))); print('score: 1')"
            for slot in bench.slots:
                bench.executor.start(slot, bench.spec(f"env-{slot}", files={"train.py": env}))
            found: set[str] = set()
            for slot in bench.slots:
                bench.ended(f"env-{slot}")
                log: dict[str, Any] = json.loads(
                    (tmp_path / "trials" / f"env-{slot}" / "run.log").read_text().splitlines()[0]
                )
                found.add(log[TORCH])
            assert found == {cache.environment()[TORCH] for cache in caches}
        finally:
            bench.executor.close()
    finally:
        cluster.shutdown()
