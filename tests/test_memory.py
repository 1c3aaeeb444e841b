"""What a process may use of its card: limits by arithmetic, a stand-in for older cards; on a GPU, the real limit."""

import os
import subprocess
import sys

import pytest
import torch

from trainer import memory
from trainer.errors import UsageError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB = memory.GB


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: object):
    """A card of capability 9.0, as far as a question about it goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    yield
    memory.hold(CUDA)
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


# ---- a limit ----


@pytest.mark.parametrize(
    ("limit_gb", "used_gb", "torch_gb"),
    [
        pytest.param(12, 0.5, 11.25, id="the context and later kernels are not torch's"),
        pytest.param(12, 40.0, 11.0, id="what others hold is not this process's, only its context is"),
        pytest.param(80, 0.5, 80, id="no limit below the card's own memory"),
    ],
)
def test_a_limit_leaves_torch_what_is_not_context(limit_gb: float, used_gb: float, torch_gb: float):
    share = memory.torch_share(int(limit_gb * GB), card_bytes=80 * GB, used_bytes=int(used_gb * GB))
    assert share == int(torch_gb * GB)


@pytest.mark.parametrize(("name", "value"), [("memory_gb", 12.0), ("capability", "8.6")])
def test_a_cpu_is_not_held(name: str, value: object):
    with pytest.raises(UsageError, match="with --device cpu: it is about a CUDA card; leave it out"):
        memory.hold(CPU, **{name: value})  # pyright: ignore[reportArgumentType]


def test_what_the_environment_says_of_cards_is_not_about_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(memory.MEMORY_VARIABLE, "nonsense")
    monkeypatch.setenv(memory.CAPABILITY_VARIABLE, "8.6")
    memory.hold(CPU)


@pytest.mark.parametrize("value", ["much", "-1", "0", "nan", "inf"])
def test_a_limit_of_the_environment_that_is_no_memory_is_refused(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(memory.MEMORY_VARIABLE, value)
    with pytest.raises(UsageError, match="must be a positive number of GiB; mend it or unset it"):
        memory.hold(CUDA)


# ---- another card's compute capability ----


def asked_from(module: str) -> tuple[int, int]:
    """What a module of that name is answered."""
    found: dict[str, tuple[int, int]] = {}
    exec("import torch\nfound['it'] = torch.cuda.get_device_capability()", {"__name__": module, "found": found})
    return found["it"]


@pytest.mark.usefixtures("hopper")
def test_programs_see_the_older_card_and_those_that_make_its_code_the_real_one():
    memory.hold(CUDA, capability="8.6")
    assert asked_from("candidate") == asked_from("torch._inductor.template_heuristics.triton") == (8, 6)
    assert asked_from("triton.backends.nvidia.driver") == asked_from("torch._dynamo.device_interface") == (9, 0)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith("compiled-as-8.6")
    memory.hold(CUDA, capability="8.9")
    assert asked_from("candidate") == (8, 9)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith("compiled-as-8.9")
    memory.hold(CUDA)
    assert asked_from("candidate") == (9, 0)


@pytest.mark.usefixtures("hopper")
def test_the_environment_names_a_capability_for_all_processes_of_a_slot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(memory.CAPABILITY_VARIABLE, "8.6")
    memory.hold(CUDA)
    assert asked_from("candidate") == (8, 6)
    monkeypatch.delenv(memory.CAPABILITY_VARIABLE)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ("12.0", "--capability 12.0: this card has 9.0, and can stand in for older ones alone"),
        ("sm_86", "--capability sm_86: it is two whole numbers with a dot between them, such as 8.6"),
    ],
)
def test_a_card_stands_in_for_older_ones_alone(capability: str, message: str):
    with pytest.raises(UsageError, match=message):
        memory.hold(CUDA, capability=capability)


# ---- on a GPU ----

FILL = """
import torch
from trainer import memory
memory.hold(torch.device("cuda"), memory_gb=4)
kept, before = [], memory.room()
try:
    while True:
        kept.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    pass
print(before.total_bytes / 2**30, before.free_bytes / 2**30, len(kept) / 4, memory.room().free_bytes / 2**30)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("segments", ["True", "False"])
def test_a_process_held_to_4_gb_gets_no_more(segments: str):
    env = {**os.environ, "PYTORCH_ALLOC_CONF": f"expandable_segments:{segments}"}
    done = subprocess.run([sys.executable, "-c", FILL], env=env, capture_output=True, text=True, check=True)
    total, free, filled, left = map(float, done.stdout.split())
    assert total == 4
    assert 2.9 <= free <= 3.6
    assert free - 0.3 <= filled <= free
    assert left < 0.3
