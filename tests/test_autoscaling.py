"""Ray's own autoscaler starts what the executor asks for, and takes it back: real Ray nodes, on one machine.

The machines alone are imagined: Ray's provider for its own tests starts a raylet where a cloud would start an instance.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray_kit import START_LIMIT_S, nodes
from test_executors import Bench, wait_until

from raysearch.executors.ray import RayExecutor
from raysearch.executors.ray_actors import SlotPlan

pytestmark = pytest.mark.cluster
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as the provider has it


def node_type(profile: str, most: int) -> dict[str, Any]:
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 100 * 2**20}
    labels = {"raysearch/profile": profile}
    return {"resources": resources, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": most}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A head without CPU and GPU whose autoscaler may start nodes of two kinds."""
    with nodes(tmp_path) as found:
        (tmp_path / "autoscaling.json").write_text(json.dumps(autoscaling(found.address)))
        env = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_NODE_TYPE_NAME": "ray.head.default",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        found.head(f"--autoscaling-config={tmp_path / 'autoscaling.json'}", env=env)
        yield found.address


def autoscaling(address: str) -> dict[str, Any]:
    """A configuration as `ray up` hands it to the head."""
    config: dict[str, Any] = {
        "cluster_name": "imagined",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "gcs_address": address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "h100": node_type("h100-80gb", 1),
            "rtx3060": node_type("rtx3060-12gb", 2),
        },
        "head_node_type": "ray.head.default",
    }
    for command in ("setup", "head_setup", "worker_setup", "initialization"):
        config[f"{command}_commands"] = []
    for command in ("head_start_ray", "worker_start_ray"):
        config[f"{command}_commands"] = []
    config |= {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
    return config


def kinds() -> list[str]:
    """Labels of the nodes that are there, the head left out."""
    found = [node["Labels"].get("raysearch/profile") for node in ray.nodes() if node["Alive"]]
    return sorted(label for label in found if label)


def wait(bench: Bench, wanted: list[str]) -> None:
    """Until these nodes are there, with a slot each; a busy machine needs a second attempt to start one."""
    deadline = time.monotonic() + START_LIMIT_S
    while len(bench.slots) < len(wanted):
        assert time.monotonic() < deadline, f"waited in vain for {wanted}; there are {kinds()}: {bench.reports}"
        bench.poll()
    assert kinds() == wanted


def test_the_autoscaler_starts_the_kinds_of_nodes_that_are_wanted_and_no_others(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("ray.autoscaler.v2.utils.cached_is_autoscaler_v2", None)  # of a test's cluster before
    (tmp_path / ".token").write_text("study")
    executor = RayExecutor(SlotPlan("study", "s", str(tmp_path), ".token", "", "", {}), address=address, device="cpu")
    bench = Bench(executor, tmp_path, "s")
    try:
        bench.poll()
        assert kinds() == []
        executor.want({"rtx3060-12gb": 1})
        wait(bench, ["rtx3060-12gb"])
        executor.want({"rtx3060-12gb": 1, "h100-80gb": 1})
        wait(bench, ["h100-80gb", "rtx3060-12gb"])
    finally:
        executor.close()
    ray.init(address=address, log_to_driver=False)
    try:
        wait_until(lambda: kinds() == [], START_LIMIT_S)  # what was asked for is taken back
    finally:
        ray.shutdown()
