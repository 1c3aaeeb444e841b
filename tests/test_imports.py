"""The layering: pure modules import no adapter, adapters what is allowed, raysearch and trainer never one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = {
    *("errors", "model", "wording", "knobs", "patches", "secrecy"),
    *("judge", "futility", "health", "bandit", "duplicates", "study", "schedule", "plan", "tally"),
    *("brief", "directions", "yields", "economics", "outline", "pace", "metrics"),
}
TOP = {"coordinator", "run", "simulate", "minds"}
# what each adapter may import of the package beside the pure modules
ALLOWED: dict[str, set[str]] = {
    "objective": set(),
    "profile": set(),
    "labels": {"profile"},
    "journal": set(),
    "ratchet": set(),
    "nursery": {"supervisor"},
    "compile_cache": {"profile"},
    "runner": {"leftovers", "nursery"},
    "leftovers": set(),
    "supervisor": set(),
    "figure": set(),
    "report": {"figure"},
    "console": set(),
    "parcels": set(),
    "data": {"objective", "parcels"},
    "task": {"objective"},
    "config": {"objective"},
    "proposers": set(),
    "proposers.reach": set(),
    "proposers.searchers": {"proposers.reach"},
    "proposers.failures": {"proposers.reach"},
    "proposers.sieve": {"proposers", "proposers.failures", "proposers.reach"},
    "proposers.knob_model": {"proposers.reach"},
    "proposers.additive": {"proposers", "proposers.knob_model", "proposers.reach", "proposers.sieve"},
    "proposers.tune": {"proposers", "proposers.searchers", "proposers.sieve"},
    "proposers.moves": {"proposers"},
    **{f"proposers.{name}": {"proposers", "proposers.moves"} for name in ("ablate", "simplify", "transfer", "combine")},
    "proposers.inbox": {"proposers"},
    "proposers.edits": set(),
    "proposers.prices": {"proposers"},
    "proposers.endpoints": {"proposers.prices"},
    "proposers.chat": {"proposers", "proposers.edits", "proposers.endpoints", "proposers.prices"},
    "proposers.importance": {"proposers"},
    "proposers.context": {"proposers", "proposers.importance"},
    "proposers.scratch": set(),
    "proposers.tables": set(),
    "proposers.agent_commands": {"proposers.tables"},
    "proposers.agent_output": {"proposers.agent_commands"},
    "proposers.agent_run": {"leftovers", "nursery", "proposers.scratch"},
    "proposers.agent": {"proposers", "proposers.scratch"}
    | {f"proposers.agent_{name}" for name in ("commands", "output", "run")},
    "asker": {"proposers"},
    "executors": {"data", "profile", "runner"},
    "executors.surrogate": {"profile"},
    "executors.simulated": {"asker", "executors", "executors.surrogate", "profile", "proposers", "ratchet", "runner"},
    "joining": {"executors", "labels", "profile"},
    "executors.ray": {"executors", "executors.ray_actors", "joining", "labels", "leftovers", "runner"},
    "executors.ray_actors": {"executors", "compile_cache", "data", "joining", "nursery", "objective", "parcels"}
    | {"profile", "runner"},
    "programs": set(),
    "folder": {"config", "journal", "ratchet"},
    "exporter": set(),
    "remote": set(),
    "bound": set(),
    "copying": {"folder", "journal", "report"},
    "mirrors": {"bound", "folder"},
}
# what a trial is made of may import of the trainer: nothing that prepares data
TRIAL: dict[str, set[str]] = {
    "train": set(),
    "errors": set(),
    "rows": {"errors"},
    "reporter": set(),
    "telemetry": set(),
    "sampler": {"telemetry"},
    "gauge": set(),
    "memory": {"common", "errors"},
    "micro_batch": {"common", "errors", "memory", "reporter", "telemetry"},
    "evaluation": {"errors", "memory", "reporter", "rows"},
    "run": {"errors", "micro_batch", "reporter", "rows"},
    "harness": {"errors", "evaluation", "memory", "reporter", "rows", "run", "sampler", "telemetry", "waiting"},
    "waiting": set(),
}


def modules(package: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / package).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path, package: str) -> set[str]:
    """Modules of the package that a file imports, by their names within it."""
    known = modules(package)
    found: set[str] = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != package:
            continue
        for length in range(len(parts), 1, -1):
            if ".".join(parts[1:length]) in known:
                found.add(".".join(parts[1:length]))
                break
    return found


def test_raysearch_and_trainer_never_import_one_another():
    for one, other in (("raysearch", "trainer"), ("trainer", "raysearch")):
        for path in modules(one).values():
            assert not {name for name in imported(path) if name.split(".")[0] == other}, path


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_import_pure_modules_alone(name: str):
    assert own(modules("raysearch")[name], "raysearch") <= PURE


@pytest.mark.parametrize("name", sorted(set(modules("raysearch")) - PURE - TOP - {"__init__"}))
def test_adapters_import_what_the_table_allows(name: str):
    assert own(modules("raysearch")[name], "raysearch") - PURE - {"__init__"} <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(TRIAL))
def test_a_trial_imports_what_the_table_allows(name: str):
    assert own(modules("trainer")[name], "trainer") <= TRIAL[name]


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_have_no_clock_no_file_no_process_and_no_chance(name: str):
    roots = {found.split(".")[0] for found in imported(modules("raysearch")[name])}
    effects = {"os", "pathlib", "shutil", "tempfile", "subprocess", "socket", "threading", "time", "random", "sqlite3"}
    assert not roots & effects


@pytest.mark.parametrize("package", ["raysearch", "trainer"])
def test_imports_are_written_in_full(package: str):
    for path in modules(package).values():
        relative = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert not relative, path


def test_ray_is_imported_in_four_places():
    found = {
        name for name, path in modules("raysearch").items() if any(imp.split(".")[0] == "ray" for imp in imported(path))
    }
    assert found == {"executors.ray", "executors.ray_actors", "exporter", "proposers.searchers"}


def test_the_command_line_starts_without_what_is_slow_to_import():
    slow = ("ray", "torch", "optuna", "matplotlib", "pandas", "scipy", "openai", "anthropic")
    code = f"import sys, raysearch.run; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
