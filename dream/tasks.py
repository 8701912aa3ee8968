"""What the commands that need a model do: open an engine, a judge and a run, and carry one task out."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream import models, prompts, store, templates
from dream.config import Config
from dream.engine import Engine, WithSecond
from dream.errors import ConfigError, DataError, DreamError, EngineError, Stopped, TrainingError, UserError, last_line
from dream.records import Scenario
from dream.runs import manifest
from dream.stop import Stop
from dream.templates import Template
from dream.terminal import Terminal

if TYPE_CHECKING:  # these import numpy and scikit-learn, which `dream --help` does without
    from dream.audit import Audit
    from dream.diversity import Diversity
    from dream.judge.check import JudgeCheck
    from dream.judge.combined import Judge
    from dream.logs import ImportSummary
    from train.data import StepSpec
    from train.evals import Evaluation
    from train.history import RoundResult
    from train.undo import UndoResult

OpenEngine = Callable[[Config, str], AbstractAsyncContextManager[Engine]]


@asynccontextmanager
async def real_engine(config: Config, model: str) -> AsyncIterator[Engine]:
    """vLLM in Ray actors, serving the initial model."""
    from dream.pool import vllm_pool

    async with vllm_pool(config, model) as pool:
        yield pool


@asynccontextmanager
async def engine_and_judge(
    config: Config, model: str, loaded: list[Template], terminal: Terminal, open_engine: OpenEngine, force: bool
) -> "AsyncIterator[tuple[Engine, Judge]]":
    """An engine with the initial model (as `models.resolve` named it), and a judge that is calibrated on the gold set
    and has told known replies of the training templates apart."""
    from dream.embed import minilm
    from dream.judge.combined import calibrated, self_test
    from dream.judge.gold import halves, read_gold
    from dream.judge.planted import planted

    trained = [template for template in loaded if template.front.split == "train"]
    known = planted(trained, config.judge.self_test_replies, config.seed)
    unseen = planted(trained, config.judge.self_test_replies, config.seed, odd=True)
    gold = halves([labelled for _, labelled in read_gold()])
    terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype}) and calibrating the judge")
    # A judge that asks no model is made while the engine starts.
    early = None if asks_a_model(config) else asyncio.create_task(calibrated(None, config, gold[0], known, gold[1]))
    try:
        async with open_engine(config, model) as engine, _judging_engine(config, engine, open_engine) as asked:
            judge = await (early or calibrated(asked, config, gold[0], known, gold[1]))
            found = await self_test(judge, unseen, force)
            if "embedding" in config.judge.signals:
                minilm().save()
            terminal.judge(judge.quality, found)
            yield engine if asked is engine else WithSecond(engine, asked), judge
            with suppress(EngineError):  # figures are no reason to fail what is done
                terminal.served(await engine.stats())
    finally:
        if early is not None:
            early.cancel()


def asks_a_model(config: Config) -> bool:
    """Whether the judge has signals that need an engine."""
    return bool({"contrast", "rubric"} & set(config.judge.signals))


@asynccontextmanager
async def _judging_engine(config: Config, engine: Engine, open_engine: OpenEngine) -> AsyncIterator[Engine]:
    """The engine that the judge asks: that of `judge.model`, or the policy's own."""
    if config.judge.model is None or not asks_a_model(config):
        yield engine
        return
    async with open_engine(config, models.resolve(config.judge.model)) as second:
        yield second


def generate(
    config: Config,
    config_file: Path,
    out: Path | None,
    terminal: Terminal,
    *,
    force_judge: bool = False,
    allow_template_change: bool = False,
    open_engine: OpenEngine = real_engine,
) -> "tuple[Path, dict[str, Any], Audit, Diversity]":
    """Dreams one round of pairs; the run folder, what it holds, what it gives away and how various it is."""
    from dream.embed import minilm
    from dream.generate import RoundDreamer

    loaded = templates.selected(templates.load_all(), config.generate.templates)
    prompts.check_all()
    model = models.resolve(config.model)
    path = out or store.new_run_path("generate")
    stop = Stop(terminal.line, f"go on with the same command and --out {path}")

    async def work(run: store.RunFolder) -> "tuple[dict[str, Any], Audit, Diversity]":
        terminal.run(path, run.continued)
        async with engine_and_judge(config, model, loaded, terminal, open_engine, force_judge) as (engine, judge):
            run.note("judge", judge.quality.model_dump())
            terminal.stage("dreaming")
            rounds = store.RoundStore(store.round_folder(run.path, 1))
            try:
                dreamer = RoundDreamer(
                    engine, judge, rounds, loaded, config,
                    round_number=1, policy="round_00", embed=minilm(), on_progress=terminal.dreaming, stop=stop,
                )  # fmt: skip
                audit, diversity = await dreamer.run()
            finally:
                rounds.close()
            return dreamer.summary(), audit, diversity

    with store.RunFolder(path, manifest("generate", config, config_file, loaded), allow_template_change) as run:
        return path, *stop.run(work(run))


def train(
    config: Config,
    config_file: Path,
    out: Path | None,
    data: list[Path],
    terminal: Terminal,
    *,
    force_judge: bool = False,
    allow_template_change: bool = False,
    open_engine: OpenEngine = real_engine,
    trainer: "Callable[[StepSpec, Path], None] | None" = None,
) -> "tuple[Path, list[RoundResult]]":
    """Runs the rounds; the run folder and the result of each round."""
    from dream.embed import minilm
    from dream.inputs import read_data
    from train.lm_tasks import check_installed
    from train.rehearsal import read_forms
    from train.rounds import Loop, check_data, run_rounds

    loaded = templates.selected(templates.load_all(), config.generate.templates)
    pairs = read_data(data)
    check_data(pairs, config.rounds)
    check_installed(config.eval.lm_eval_tasks)
    prompts.check_all()
    if config.train.repair_steps and config.train.repair_forms:
        read_forms()  # what is wrong there is to be said before any work
    model = models.resolve(config.model)
    path = out or store.new_run_path("train")
    stop = Stop(terminal.line, f"go on with the same command and --out {path}")

    async def work(run: store.RunFolder) -> "list[RoundResult]":
        terminal.run(path, run.continued)
        async with engine_and_judge(config, model, loaded, terminal, open_engine, force_judge) as (engine, judge):
            run.note("judge", judge.quality.model_dump())
            step = trainer or (lambda spec, folder: train_in_child(spec, folder, terminal.training, stop=stop))
            loop = Loop(
                run.path, engine, judge, loaded, config, model, step, terminal, minilm(),
                data=pairs, stop=stop, fingerprint=run.manifest["fingerprint"],
            )  # fmt: skip
            return await run_rounds(loop)

    with store.RunFolder(path, manifest("train", config, config_file, loaded, data), allow_template_change) as run:
        return path, stop.run(work(run))


def train_in_child(
    spec: "StepSpec",
    folder: Path,
    on_step: Callable[[dict[str, Any]], None],
    module: str = "train.step",
    stop: Stop | None = None,
) -> None:
    """One training step (or another `module`) in a process of its own: `python -P -m`, its log in the folder's
    train.log.

    Raises:
        UserError: the step cannot be taken with this configuration or these rows; the message is its own.
        TrainingError: it failed; the message holds its own.
        Stopped: `stop` was asked for. The step was ended, and is begun again by the same command.
    """
    path = folder / "train.spec.json"
    store.write_json(path, spec.model_dump(mode="json"))
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-P", "-m", "train.child", str(os.getpid()), module, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            assert child.stdout is not None
            with (stop or Stop()).gently("stopping; what this training step did is thrown away", child.kill):
                for line in child.stdout:
                    on_step(json.loads(line))
    if child.returncode:
        why = last_line((folder / "train.log").read_text(encoding="utf-8", errors="replace")).removeprefix("error: ")
        if child.returncode == UserError.exit_code:
            raise UserError(why)
        raise TrainingError(f"training ended with code {child.returncode}: {why} (see {folder / 'train.log'})")


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

    loaded = templates.selected(templates.load_all(), config.generate.templates)
    if pairs_file is not None:
        pairs = read_eval_pairs(pairs_file)
    else:
        held = [template for template in loaded if template.front.split == "heldout"]
        if not held:
            raise ConfigError("no held-out templates to evaluate on; give --pairs FILE")
        pairs = joined(eval_pairs(held, config.eval.heldout_pairs, config.seed))
    model = models.resolve(config.model)

    async def work() -> "Evaluation":
        async with engine_and_judge(config, model, loaded, terminal, open_engine, True) as (engine, judge):
            await engine.load_weights(weights)
            terminal.stage(f"scoring {len(pairs)} pairs")
            return await measure(engine, pairs, judge, config, sampled=config.eval.sampled_scenarios)

    return Stop(terminal.line).run(work())


def undo(config: Config, run: Path, terminal: Terminal) -> "UndoResult":
    """How many opposite examples take back what a run taught its policy; nothing in the run folder changes.

    When the child fails, its temporary folder stays, as the message names the log in it.
    """
    from train.undo import UndoResult, prepare

    loaded = templates.selected(templates.load_all(), config.generate.templates)
    spec = prepare(run, config, loaded, models.resolve(config.model))
    folder = Path(spec.out).parent
    terminal.stage("measuring the disposition, then training on opposite examples")
    stop = Stop(terminal.line)

    async def work() -> None:
        train_in_child(spec, folder, terminal.undoing, "train.undo", stop)

    try:
        stop.run(work())
    except Stopped:
        shutil.rmtree(folder)
        raise
    result = UndoResult.model_validate(store.read_json(Path(spec.out)))
    shutil.rmtree(folder)
    return result


def check_judge(
    config: Config, file: Path | None, terminal: Terminal, open_engine: OpenEngine = real_engine
) -> "JudgeCheck":
    """How good the judge is on a file of labelled replies, or on the test half of the gold set: combined, and each of
    its signals alone."""
    from dream.embed import minilm
    from dream.inputs import read_labelled
    from dream.judge.check import check
    from dream.judge.gold import halves, read_gold
    from dream.judge.planted import planted
    from dream.scenarios import STANCES

    calibrate, test = halves([labelled for _, labelled in read_gold()])
    labelled = read_labelled(file) if file else test
    for stance in STANCES:
        if not any(one.label == stance for one in labelled):
            raise DataError(f"{file}: no reply is labelled {stance}; the judge is measured on replies of both stances")
    loaded = templates.selected(templates.load_all(), config.generate.templates)
    trained = [template for template in loaded if template.front.split == "train"]
    known = planted(trained, config.judge.self_test_replies, config.seed)

    async def work() -> "JudgeCheck":
        if not asks_a_model(config):
            terminal.stage(f"judging {len(labelled)} replies")
            return await check(None, config, calibrate, known, labelled)
        name = config.judge.model or config.model
        terminal.stage(f"starting the engine with {name} ({config.engine.dtype})")
        async with open_engine(config, models.resolve(name)) as engine:
            terminal.stage(f"judging {len(labelled)} replies")
            return await check(engine, config, calibrate, known, labelled)

    found = Stop(terminal.line).run(work())
    if "embedding" in config.judge.signals:
        minilm().save()
    return found


def import_logs(
    config: Config,
    logs: list[Path],
    out: Path,
    terminal: Terminal,
    *,
    force_judge: bool = False,
    open_engine: OpenEngine = real_engine,
) -> "ImportSummary":
    """Turns that went wrong in conversation logs, as preference pairs appended to `out`."""
    from dream.logs import LogImporter, check_paths

    check_paths(logs, out)
    loaded = templates.load_all()
    prompts.check_all()
    model = models.resolve(config.model)

    stop = Stop(terminal.line, f"the rows found so far are in {out}; the same command finds the others")

    async def work() -> "ImportSummary":
        async with engine_and_judge(config, model, loaded, terminal, open_engine, force_judge) as (engine, judge):
            terminal.stage(f"reading {len(logs)} logs")
            return await LogImporter(engine, judge, out, config, policy="round_00", stop=stop).run(logs)

    return stop.run(work())


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
    if not write or config.generate.dreamer == "slots":
        return drawn
    prompts.check_all()
    model = models.resolve(config.model)
    worded = written if config.generate.dreamer == "write" else with_background

    async def work() -> list[Scenario]:
        terminal.stage(f"starting the engine with {config.model} ({config.engine.dtype})")
        async with open_engine(config, model) as engine:
            found = [one for scenario in drawn if (one := await worded(engine, scenario)) is not None]
        if len(found) < count:
            terminal.line(f"{count - len(found)} of {count} answers of the dreamer could not be used")
        return found

    return Stop(terminal.line).run(work())


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
        trust = str(config.engine.trust_remote_code)
        command = [models.resolve(config.model), str(adapter), str(folder), config.engine.dtype, trust]
        run = subprocess.run(
            [sys.executable, "-P", "-m", "train.checkpoints", *command], capture_output=True, text=True
        )
        if run.returncode:
            why = f"code {run.returncode}: {last_line(run.stderr)}"
            raise DreamError(f"--adapter {adapter}: merging ended with {why}")
        yield folder
