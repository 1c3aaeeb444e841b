"""The launcher's files, read offline with Ray's own code, and held to what they promise beyond its schema."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config

from raysearch import labels
from raysearch.profile import Hardware, base_slug

ROOT = Path(__file__).parent.parent
LOCAL, AWS = ROOT / "cluster.yaml", ROOT / "examples/cluster-aws.yaml"
# as NVML has them: name and MiB
CARDS = {
    "p5.4xlarge": ("NVIDIA H100 80GB HBM3", 81559),
    "g6.2xlarge": ("NVIDIA L4", 23034),
    "g5.2xlarge": ("NVIDIA A10G", 23028),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def workers() -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in read(AWS)["available_node_types"].items() if name != "head"}


both = pytest.mark.parametrize("path", [LOCAL, AWS], ids=lambda path: path.name)


@both
def test_ray_s_launcher_accepts_the_file(path: Path):
    prepared = prepare_config(read(path))
    validate_config(prepared)
    for kind in prepared["available_node_types"].values():
        validate_node_label_syntax(kind.get("labels", {}))


@both
def test_every_ray_that_is_started_asks_for_the_token_and_says_what_its_node_is(path: Path):
    config = read(path)
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in config[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    for line in starts:
        assert re.search(r"RAY_AUTH_MODE=token .*ray start", line)
        assert '--labels="$(raysearch node-labels)"' in line
        assert ". ~/raysearch/venv/bin/activate && " in line
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@both
def test_every_node_installs_the_same_wheel_with_the_same_lock(path: Path):
    config = read(path)
    assert (ROOT / config["file_mounts"]["~/raysearch/constraints.txt"]).exists()
    install = config["setup_commands"][1]
    assert "--constraint ~/raysearch/constraints.txt ~/raysearch/dist/*.whl" in install
    assert "PATH=~/raysearch/venv/bin:$PATH RAY_AUTH_MODE=token" in config["setup_commands"][-1]  # `ray down` needs it
    assert not [key for key in ("head_setup_commands", "worker_setup_commands") if "torch" in str(config.get(key))]


@both
def test_every_command_is_a_shell_command(path: Path):
    config = read(path)
    for line in [line for key, lines in config.items() if key.endswith("_commands") for line in lines]:
        subprocess.run(["bash", "-n", "-c", line], check=True, stderr=subprocess.PIPE)


@both
def test_the_options_of_ray_start_are_ones_that_this_ray_has(path: Path):
    config = read(path)
    lines = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    code = "from ray.scripts.scripts import start; print(*[name for one in start.params for name in one.opts])"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {option for line in lines for option in re.findall(r"(--[a-z-]+)", line)} <= set(known)


def test_the_own_machines_are_all_started_and_none_is_rented():
    prepared = prepare_config(read(LOCAL))
    assert prepared["provider"]["type"] == "local"
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(prepared["provider"]["worker_ips"])


def test_the_labels_of_rented_machines_are_what_their_cards_are_called():
    for kind in workers().values():
        name, memory_mb = CARDS[kind["node_config"]["InstanceType"]]
        card = Hardware("cuda", name, memory_mb, "9.0", "580.1", "GPU-1", 8, "2.13.0")
        assert kind["labels"][labels.PROFILE] == base_slug(card)
        assert labels.names(kind["labels"][labels.PROFILE], card)


def test_rented_machines_come_when_they_are_wanted_and_are_limited():
    config = read(AWS)
    for kind in workers().values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
        assert kind["resources"]["GPU"] == 1
        is_spot = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert kind["labels"]["ray.io/market-type"] == ("spot" if is_spot else "on-demand")
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]


def test_what_the_example_wants_can_be_had_there():
    wanted = dict(re.findall(r"--want ([\w-]+)=(\d+)", AWS.read_text()))
    most = {kind["labels"][labels.PROFILE]: kind["max_workers"] for kind in workers().values()}
    assert wanted
    assert all(int(count) <= most[slug] for slug, count in wanted.items())
