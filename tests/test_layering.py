"""Imports run one way, as docs/ARCHITECTURE.md draws them, and heavy packages are imported where they are allowed."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("dream", "train") for path in (ROOT / package).rglob("*.py"))

FLOORS = [
    {"dream", "dream.errors", "dream.records", "dream.hardware", "dream.config", "dream.paths", "dream.templates",
     "dream.sandbox", "dream.template", "dream.template_head", "dream.template_checks", "dream.template_new",
     "dream.prompts", "dream.stop", "dream.store", "dream.models", "dream.masking", "dream.memory"},
    {"dream.engine", "dream.link", "dream.vllm_engine", "dream.pool"},
    {"dream.scenarios", "dream.template_audit", "dream.selfplay", "dream.judge", "dream.filters", "dream.embed",
     "dream.views", "dream.audit", "dream.choose", "dream.diversity", "dream.demand", "dream.generate",
     "dream.inputs", "dream.conversations", "dream.evidence", "dream.logs"},
]  # fmt: skip
"""From the ground up; `dream.report` and `dream.cli` are the top, and `train` stands on these floors beside them."""

ALLOWED = {
    "ray": {"dream.pool", "train.workers"},
    "vllm": {"dream.vllm_engine"},
    "trl": {"train.dpo", "train.sft"},
    "peft": {"train.dpo", "train.sft", "train.checkpoints"},
}


def module_name(path: Path) -> str:
    """`dream.judge.rules` of dream/judge/rules.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules a file imports anywhere, also inside functions."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names} & {module_name(file) for file in FILES}
            found |= below or {str(node.module)}
    return found


def own(names: set[str]) -> set[str]:
    """Those that are ours."""
    return {name for name in names if name.split(".")[0] in ("dream", "train")}


def floor(module: str) -> int:
    """The floor a module of `dream` stands on; those that are on none are the top."""
    parts = [module, module.rpartition(".")[0]] if module.startswith("dream.judge.") else [module]
    return next((number for number, names in enumerate(FLOORS) if names & set(parts)), len(FLOORS))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_imports_from_its_floor_or_below(path: Path) -> None:
    """A module imports nothing from a floor above its own, and `dream` below its top nothing of `train`."""
    module = module_name(path)
    for name in own(imported(path)):
        if module.startswith("train"):
            assert not name.startswith(("dream.report", "dream.cli")), f"{module} imports {name}"
        elif name.startswith("train"):
            assert floor(module) == len(FLOORS), f"{module} imports {name}"
        else:
            assert floor(name) <= floor(module), f"{module} imports {name}"


def test_imports_have_no_cycle() -> None:
    """No module imports itself by way of others."""
    graph = {module_name(path): own(imported(path)) - {module_name(path)} for path in FILES}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("package", ALLOWED)
def test_heavy_package_has_its_places(package: str) -> None:
    """ray, vllm, trl and peft are imported only by the modules that wrap them."""
    users = {module_name(path) for path in FILES if package in {name.split(".")[0] for name in imported(path)}}
    assert users <= ALLOWED[package]


def test_ground_floor_knows_no_torch() -> None:
    """The ground floor imports neither ray nor torch; dream/models.py alone may use transformers."""
    for path in FILES:
        if floor(module_name(path)) == 0 and module_name(path).startswith("dream"):
            heavy = {name.split(".")[0] for name in imported(path)} & {
                "torch",
                "ray",
                "vllm",
                "trl",
                "peft",
                "transformers",
            }
            assert heavy <= ({"transformers"} if path.name == "models.py" else set()), module_name(path)


def test_dreaming_on_a_scripted_engine_imports_nothing_heavy() -> None:
    """All of the loop but the engine and the trainer is imported without ray, torch, vllm, trl or transformers."""
    code = (
        "import sys, dream.generate, dream.judge.planted, dream.models, dream.store, train.data\n"
        "print(sorted({'ray', 'torch', 'vllm', 'trl', 'peft', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert child.stdout == "[]\n"
