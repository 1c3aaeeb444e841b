"""What a slot is made of, and the slug that names its ratchet. It runs no trial and makes no CUDA context.

`python -m raysearch.profile` prints the hardware that a process here would train on, as JSON: slots run it in a process
of its own, so that neither the driver library nor torch ends up in a worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil

from raysearch.errors import UserError
from raysearch.model import Profile

MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Hardware:
    """One slot's hardware.

    Attributes:
        device: `cuda` or `cpu`.
        name: GPU model or CPU model.
        memory_mb: GPU memory in MiB, 0 on a CPU.
        capability: CUDA compute capability (`8.6`), empty on a CPU.
        driver: NVIDIA driver version, empty on a CPU.
        uuid: Of the GPU, empty on a CPU.
        cores: CPU cores of the machine.
        torch: Version of torch that trials will import.
        mig: Whether it is a slice of a GPU (MIG), which has memory and a UUID of its own.
        display: Whether a display server runs on it.
        gpus: GPUs and slices of the machine, hidden ones included; 0 on a CPU.
    """

    device: str
    name: str
    memory_mb: int
    capability: str
    driver: str
    uuid: str
    cores: int
    torch: str
    mig: bool = False
    display: bool = False
    gpus: int = 0


def detect() -> list[Hardware]:
    """The GPUs that a child of this process may use, in CUDA's order; the CPU when there is none.

    Raises:
        UserError: The environment limits a GPU to what is no memory or no capability.
    """
    gpus = [held(gpu, os.environ) for gpu in _gpus()]
    return gpus if gpus else [_cpu()]


def _cpu() -> Hardware:
    return Hardware(
        device="cpu",
        name=_cpu_name(),
        memory_mb=0,
        capability="",
        driver="",
        uuid="",
        cores=psutil.cpu_count() or 1,
        torch=torch_version(),
    )


def cpu() -> Hardware:
    """The CPU, also where there are GPUs."""
    return _cpu()


def _gpus() -> list[Hardware]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unrelated package named pynvml warns at import
        nvml: Any = importlib.import_module("pynvml")  # untyped
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return visible(read_gpus(nvml), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        nvml.nvmlShutdown()


def read_gpus(nvml: Any) -> list[list[Hardware]]:
    """All GPUs of the machine, hidden ones too: each as itself, or as the slices that it is cut into.

    Args:
        nvml: The module `pynvml`, initialised.
    """
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = [_parts(nvml, handle, driver) for handle in handles]
    count = sum(len(parts) for parts in found)
    return [[dataclasses.replace(part, gpus=count) for part in parts] for parts in found]


def _parts(nvml: Any, handle: Any, driver: str) -> list[Hardware]:
    """A GPU as it can be used. One in MIG mode is no device of its own, and of no use before it was cut."""
    slices = _slices(nvml, handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)  # a slice does not say
    display = bool(_supported(nvml, nvml.nvmlDeviceGetDisplayActive, handle))
    return [
        Hardware(
            device="cuda",
            name=_text(nvml.nvmlDeviceGetName(part)),
            memory_mb=int(nvml.nvmlDeviceGetMemoryInfo(part).total) // 2**20,
            capability=f"{major}.{minor}",
            driver=driver,
            uuid=_text(nvml.nvmlDeviceGetUUID(part)),
            cores=psutil.cpu_count() or 1,
            torch=torch_version(),
            mig=slices is not None,
            display=display,
        )
        for part in (slices if slices is not None else [handle])
    ]


def _slices(nvml: Any, handle: Any) -> list[Any] | None:
    """Handles of a GPU's slices; None if it is not in MIG mode."""
    modes = _supported(nvml, nvml.nvmlDeviceGetMigMode, handle)  # now, and after a reset
    if not modes or modes[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    found: list[Any] = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # the places need not be filled in order
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return found


def _supported(nvml: Any, ask: Callable[[Any], Any], handle: Any) -> Any:
    """What NVML says of a device, None where the card or the driver knows no such thing."""
    try:
        return ask(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def visible(gpus: Sequence[Sequence[Hardware]], cuda_visible_devices: str | None) -> list[Hardware]:
    """The GPUs that CUDA would show: by index or UUID prefix, up to the first entry that names none.

    Without a choice of slices CUDA takes one; here they are all shown, since each can be chosen by its UUID.

    Args:
        gpus: As `read_gpus` has them.
        cuda_visible_devices: The variable's value; None if it is not set.
    """
    parts = [part for gpu in gpus for part in gpu]
    if cuda_visible_devices is None:
        return parts
    chosen: list[Hardware] = []
    for entry in (part.strip() for part in cuda_visible_devices.split(",")):
        matches = [part for part in parts if entry and part.uuid.startswith(entry)]
        if entry.isdecimal() and int(entry) < len(gpus):
            matches = list(gpus[int(entry)])  # of a GPU that is cut CUDA takes the first slice
        if not matches:
            break
        chosen.append(matches[0])
    return chosen


def remarks(hardware: Hardware) -> list[str]:
    """What whoever owns the card should know of it, in a few words each."""
    said: list[str] = []
    if hardware.mig:
        said.append("a MIG slice: its neighbours share the card's power, so its speed may vary with them")
    if hardware.display:
        said.append("drives a display, which takes memory and time from trials")
    return said


def held(gpu: Hardware, environment: Mapping[str, str]) -> Hardware:
    """A GPU as trials will see it that are held to less: RAYSEARCH_MEMORY_GB, RAYSEARCH_CAPABILITY of the environment.

    The trainer reads the same two, so a GPU that is held is another kind of hardware, with the preset and the ratchet
    of that kind.

    Raises:
        UserError: One of them is not what it should be.
    """
    memory, capability = environment.get("RAYSEARCH_MEMORY_GB"), environment.get("RAYSEARCH_CAPABILITY")
    if memory:
        try:
            limit_mb = float(memory) * MIB_PER_GIB
        except ValueError:
            limit_mb = math.nan
        if not 0 < limit_mb < math.inf:
            raise UserError(f"RAYSEARCH_MEMORY_GB is {memory!r}: it must be a positive number of GiB; mend or unset it")
        gpu = dataclasses.replace(gpu, memory_mb=min(gpu.memory_mb, int(limit_mb)))
    if capability:
        if not re.fullmatch(r"\d+\.\d+", capability) or _version(capability) > _version(gpu.capability):
            raise UserError(
                f"RAYSEARCH_CAPABILITY is {capability!r}: it must be a compute capability such as 8.6, "
                f"no higher than the card's own {gpu.capability}; mend or unset it"
            )
        gpu = dataclasses.replace(gpu, capability=capability)
    return gpu


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def base_slug(hardware: Hardware) -> str:
    """Short name of a kind of hardware: `rtx3060-12gb`, `h100-80gb`, `h100-pcie-80gb`, `cpu`."""
    if hardware.device == "cpu":
        return "cpu"
    name = re.sub(
        r"\b(nvidia|geforce|tesla|quadro|generation|gpu|hbm\w*|sxm\w*|\d+\s*gb)\b", " ", hardware.name.lower()
    )
    name = name.replace("rtx ", "rtx").replace("gtx ", "gtx")
    name = re.sub(r"(\d) (ti|super)\b", r"\1\2", re.sub(r"\s+", " ", name.replace("-", " ")).strip())
    name = re.sub(r"(ti) (super)\b", r"\1\2", name)
    gigabytes = round(hardware.memory_mb / MIB_PER_GIB)
    return f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-') or 'gpu'}-{gigabytes}gb"


def same_profile(one: Profile, other: Profile) -> bool:
    """Whether scores of the two may be compared: everything but the slug is equal."""
    return dataclasses.replace(one, slug="") == dataclasses.replace(other, slug="")


def with_slug(profile: Profile, base: str, taken: Collection[str]) -> Profile:
    """Names a new profile: `base`, or with four digits of its hash when another kind has that name already."""
    if base not in taken:
        return dataclasses.replace(profile, slug=base)
    facts = json.dumps(dataclasses.asdict(dataclasses.replace(profile, slug="")), sort_keys=True)
    return dataclasses.replace(profile, slug=f"{base}-{hashlib.sha256(facts.encode()).hexdigest()[:4]}")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def torch_version() -> str:
    """Of torch as it is installed here, with its build; `none` without one."""
    try:
        return metadata.version("torch")  # from the package's metadata: importing torch takes seconds
    except metadata.PackageNotFoundError:
        return "none"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(hardware) for hardware in detect()]))  # noqa: T201
