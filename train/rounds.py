"""The loop: dream, train, serve, evaluate, decide; round after round. Reads like the picture in docs/ARCHITECTURE.md.

Every stage leaves a file that is complete or absent, so the same command after a kill goes on where the run stood:
`gate.json` ends a round, `eval.json` ends its evaluation, `train/` its training; `pairs.jsonl` says what is dreamed.
A rejected candidate changes nothing: `policy.json` and the served weights stay those of the last promoted round.
"""

import asyncio
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dream.audit import Audit
from dream.config import Config
from dream.embed import Embed
from dream.engine import Engine, mean
from dream.errors import DataError, TrainingError
from dream.generate import Progress, RoundDreamer
from dream.judge.combined import Judge
from dream.records import ContrastPair, PreferencePair
from dream.scenarios import eval_pairs
from dream.stop import Stop
from dream.store import Log, RoundStore, drop_reasons, read_json, read_log, round_folder, write_json
from dream.templates import Template
from train.data import Probe, StepSpec, round_rows
from train.evals import RoundEvaluation, evaluate_round, summary
from train.gate import decide
from train.history import (
    Policy,
    RoundResult,
    finished_rounds,
    promoted_pairs,
    read_evaluation,
    read_policy,
    rejections,
    settle,
    stored_evaluation,
    stored_pairs,
    trained_policy,
    undecided_pairs,
)
from train.lm_tasks import TaskScore, lm_scores
from train.rehearsal import rehearse

Trainer = Callable[[StepSpec, Path], None]
"""Carries out one training step; the command line runs a child process, tests may do without."""


class Reporter(Protocol):
    """What the loop tells whoever watches it."""

    def stage(self, text: str) -> None:
        """A stage begins."""

    def dreaming(self, progress: Progress) -> None:
        """A scenario ended."""

    def audited(self, audit: Audit) -> None:
        """What the audit of a round's pairs found."""

    def trained(self, line: str) -> None:
        """The ledger's line on a finished training step."""

    def line(self, text: str) -> None:
        """Anything else that is to be read."""

    def ended(self, result: RoundResult) -> None:
        """A round ended."""


class Loop(NamedTuple):
    """What a round needs."""

    run: Path
    engine: Engine
    judge: Judge
    templates: Sequence[Template]
    config: Config
    model: str
    train: Trainer
    reporter: Reporter
    embed: Embed | None = None
    data: Sequence[ContrastPair] = ()
    """Pairs to train on instead of dreaming, shared out over the rounds."""
    stop: Stop | None = None
    """Whether the user asks to stop while a round is dreamed."""
    fingerprint: str = ""
    """Of configuration, templates and prompts; what was measured under another one is measured again."""


async def run_rounds(loop: Loop) -> list[RoundResult]:
    """Runs the rounds that are missing; the results of all rounds, the earlier ones included."""
    check_data(loop.data, loop.config.rounds)
    results = finished_rounds(loop.run)
    baseline = await evaluation(loop, loop.run / "round_00", Policy(), "measuring the initial policy")
    policy = settle(loop.run)
    await serve(loop, policy)
    while len(results) < loop.config.rounds:
        number = len(results) + 1
        rejected = rejections(results, policy)
        if rejected >= loop.config.gate.max_rejections:
            loop.reporter.line(
                f"no round {number}: {rejected} rolled back since the last promotion (gate.max_rejections), why stands "
                f"in each gate.json; the policy is that of round {policy.round}. `dream runs rollback {loop.run} --to "
                f"{policy.round}` begins the count anew"
            )
            break
        before = baseline
        if policy.round:
            before = await evaluation(loop, round_folder(loop.run, policy.round), policy, "measuring the policy")
        result = await one_round(loop, number, policy, before, rejected)
        policy = read_policy(loop.run)
        results.append(result)
        loop.reporter.ended(result)
    return results


async def one_round(loop: Loop, number: int, policy: Policy, before: RoundEvaluation, rejected: int) -> RoundResult:
    """One turn: dream with the policy, train a candidate, serve and measure it, promote it or go back."""
    folder = round_folder(loop.run, number)
    await dream(loop, folder, number, policy)
    pairs = stored_pairs(loop.run, number)
    dropped = drop_reasons(folder)
    share = 1.0 if policy.round else loop.config.train.first_rate_share
    rate = loop.config.train.learning_rate * share * 0.5**rejected
    candidate = await train_candidate(loop, folder, number, policy, pairs, rate)
    await serve(loop, candidate)
    await prove_served(loop, folder)
    after = await evaluation(loop, folder, candidate, f"round {number}: measuring the candidate")
    note_reply_length(folder / "train" / "ledger.json", before, after)
    decision = decide(before, after, loop.config.gate, stored_evaluation(loop.run, 0))
    result = RoundResult(
        round=number,
        parent=policy.round,
        learning_rate=rate,
        accepted=len(pairs),
        dropped=dropped,
        decision=decision,
        summary=summary(after),
    )
    write_json(folder / "gate.json", result.model_dump())
    await serve(loop, settle(loop.run))
    return result


async def dream(loop: Loop, folder: Path, number: int, policy: Policy) -> None:
    """Fills the round's folder with accepted pairs, dreamed by the policy or shared out from `loop.data`."""
    if (folder / "train").exists():
        return
    loop.reporter.stage(f"round {number}: dreaming with {policy.version}")
    store = RoundStore(folder)
    try:
        if loop.data:
            for pair in share_of_data(loop, number)[len(store.pairs) :]:
                store.keep(pair)
        else:
            dreamer = RoundDreamer(
                loop.engine, loop.judge, store, loop.templates, loop.config,
                round_number=number, policy=policy.version, embed=loop.embed,
                on_progress=loop.reporter.dreaming, stop=loop.stop,
            )  # fmt: skip
            audit, _ = await dreamer.run()
            loop.reporter.audited(audit)
        if loop.data and not store.pairs:
            raise DataError(
                f"round {number}: earlier rounds used up the {len(loop.data)} pairs of --data; begin a run with more"
            )
        if not loop.data and len(store.pairs) < loop.config.generate.pairs:
            reasons = ", ".join(f"{reason} {count}" for reason, count in drop_reasons(folder).items())
            if not store.pairs:
                raise DataError(f"round {number}: no pair was accepted ({reasons}); see {folder / 'dropped.jsonl'}")
            loop.reporter.line(
                f"round {number}: stopped short at {len(store.pairs)} of {loop.config.generate.pairs} pairs "
                f"(generate.max_scenarios_per_pair); dropped: {reasons}"
            )
    finally:
        store.close()


def check_data(data: Sequence[ContrastPair], rounds: int) -> None:
    """Refuses fewer given pairs than rounds, before any work.

    Raises:
        DataError: there are too few.
    """
    if 0 < len(data) < rounds:
        raise DataError(f"--data: {len(data)} contrast pairs for {rounds} rounds; give more, or fewer --rounds")


def share_of_data(loop: Loop, number: int) -> list[ContrastPair]:
    """The pairs of `loop.data` that no earlier round trained on, in equal shares for the rounds that are left."""
    used = {pair.model_dump_json() for earlier in range(1, number) for pair in stored_pairs(loop.run, earlier)}
    left = [pair for pair in loop.data if pair.model_dump_json() not in used]  # ids of two files may be the same
    return left[: ceil(len(left) / (loop.config.rounds - number + 1))]


async def train_candidate(
    loop: Loop, folder: Path, number: int, policy: Policy, pairs: list[ContrastPair], rate: float
) -> Policy:
    """Trains on the round's rows in a child process; the candidate and where its weights are."""
    out = folder / "train"
    config = loop.config.train.model_copy(update={"learning_rate": rate})
    if not out.exists():
        loop.reporter.stage(f"round {number}: training on {len(pairs)} pairs at {rate:g}")
        general = list(read_log(folder / "general.jsonl", PreferencePair))
        rows = round_rows(
            pairs + undecided_pairs(loop.run), general, promoted_pairs(loop.run),
            batch_size=config.batch_size, general_share=loop.config.generate.general_share,
            replay_share=config.replay_share, seed=loop.config.round_seed(number), sides=config.sides,
        )  # fmt: skip
        steps = ceil(len(rows) / config.batch_size)
        rehearsed, repaired = await rehearse(loop.engine, config, steps, loop.config.round_seed(number))
        texts = probes(loop.templates)
        proofs = [
            text.model_copy(update={"served_before": score})
            for text, score in zip(texts, await served_scores(loop.engine, texts), strict=True)
        ]
        write_json(folder / "probes.json", [probe.model_dump() for probe in proofs])
        (folder / "rows.jsonl").unlink(missing_ok=True)
        log = Log(folder / "rows.jsonl")
        log.append(*rows)
        log.close()
        spec = StepSpec(
            model=loop.model,
            adapter=_inside(loop.run, policy.adapter),
            weights=_inside(loop.run, policy.masters or policy.weights) if config.method == "full" else None,
            rows=str(folder / "rows.jsonl"),
            out=str(out),
            train=config,
            flip_probability=flip_probability(loop),
            seed=loop.config.round_seed(number) % 2**32,  # as large as numpy takes
            served_dtype=loop.config.engine.dtype,
            trust_remote_code=loop.config.engine.trust_remote_code,
            probes=proofs,
            heldout=heldout_texts(loop.templates, loop.config.seed),
            rehearsed=rehearsed,
            repaired=repaired,
            sft=config.sft_warmup and policy.round == 0,
            ray_address=loop.config.ray.address,
        )
        await loop.engine.rest()
        loop.train(spec, folder)
        if loop.config.engine.release:
            loop.reporter.stage(f"round {number}: starting the engine again")
    loop.reporter.trained(str(read_json(out / "ledger.json")["summary"]))
    return trained_policy(loop.run, number)


async def serve(loop: Loop, policy: Policy) -> None:
    """Makes the engine serve the policy's weights, without a restart unless it ended to rest (`engine.release`)."""
    await loop.engine.load_weights(loop.run / policy.weights if policy.weights else None)


async def prove_served(loop: Loop, folder: Path) -> None:
    """Checks that the engine serves what was trained: fixed texts must score there as in the trainer, and their scores
    must have moved as they did there.

    Raises:
        TrainingError: the engine's log-probabilities differ from the trainer's by more than rounding explains, or they
            are still those of before the step.
    """
    # As they were when the round trained: templates may be edited since.
    texts = [Probe.model_validate(probe) for probe in read_json(folder / "probes.json")]
    trained = read_json(folder / "train" / "probes.json")
    served = await served_scores(loop.engine, texts)
    before, after = np.array(trained["before"]), np.array(trained["after"])
    changed, apart = float(np.abs(after - before).max()), float(np.abs(after - served).max())
    followed = follows(before, after, [probe.served_before for probe in texts], served)
    write_json(
        folder / "served.json",
        {**trained, "served": served, "largest_change": changed, "apart": apart, "followed": followed},
    )
    way_out = f"see {folder / 'served.json'}; remove {folder / 'train'} to have the same command train the round again"
    tolerance = 0.05 if loop.config.engine.dtype != "float32" else 0.005
    if not apart <= tolerance:  # also when it is not a number
        raise TrainingError(
            f"{folder}: the engine does not serve what was trained: log-probabilities of fixed texts differ by "
            f"{apart:.3f} a token; {way_out}"
        )
    if followed is False:
        raise TrainingError(
            f"{folder}: the engine does not serve what was trained: log-probabilities of fixed texts are still those "
            f"of before the step; {way_out}"
        )


async def served_scores(engine: Engine, texts: Sequence[Probe]) -> list[float]:
    """Mean-token log-probabilities of texts; all asked for at once, so that every replica that is up gets some."""
    scores = await asyncio.gather(*(engine.score(probe.messages, [probe.reply]) for probe in texts))
    return [mean(score[0]) for score in scores]


def follows(
    before: np.ndarray, after: np.ndarray, served_before: Sequence[float | None], served: Sequence[float]
) -> bool | None:
    """Whether the engine's scores moved by at least half of what the trainer's did, in the same direction.

    None where that cannot be seen: the step is not large beside what rounding sets the two apart by, as at the rates of
    large models, or the engine was not asked before.
    """
    if None in served_before:
        return None
    there = np.array(served_before, dtype=float)
    step = after - before
    if not np.linalg.norm(step) > 4 * np.linalg.norm(there - before):
        return None
    return bool(step @ (np.array(served) - there) >= 0.5 * (step @ step))


async def evaluation(loop: Loop, folder: Path, policy: Policy, stage: str) -> RoundEvaluation:
    """The evaluation of the served policy, kept in the folder's eval.json."""
    path = folder / "eval.json"
    if path.exists() and (stored := read_evaluation(path)).fingerprint == loop.fingerprint:
        return stored
    loop.reporter.stage(stage)
    tasks: dict[str, TaskScore] = {}
    if names := loop.config.eval.lm_eval_tasks:  # first, as it is what may fail
        await loop.engine.rest()  # lm-eval loads the policy a second time
        weights = str(loop.run / policy.weights) if policy.weights else loop.model
        tasks = await lm_scores(names, weights, trust_remote_code=loop.config.engine.trust_remote_code)
        await serve(loop, policy)
    measured = await evaluate_round(loop.engine, loop.judge, loop.templates, loop.config)
    kept = measured.retention.model_copy(update={"tasks": tasks})
    write_json(path, measured.model_copy(update={"retention": kept, "fingerprint": loop.fingerprint}).model_dump())
    return read_evaluation(path)


def note_reply_length(path: Path, before: RoundEvaluation, after: RoundEvaluation) -> None:
    """Adds the mean length of sampled replies, in tokens, which training itself does not see, to the ledger."""
    lengths = {"before": before.heldout.reply_tokens, "after": after.heldout.reply_tokens}
    write_json(path, {**read_json(path), "reply_tokens": lengths})


def probes(templates: Sequence[Template]) -> list[Probe]:
    """Fixed texts, four a side, whose likelihood must change in the engine as in the trainer."""
    return _right_replies([template for template in templates if template.front.split == "train"], 4, seed=0)


def heldout_texts(templates: Sequence[Template], seed: int) -> list[Probe]:
    """Texts of kinds of flaw that are never trained on, on which a round's KL is measured."""
    return _right_replies([template for template in templates if template.front.split == "heldout"], 8, seed)


def _right_replies(templates: Sequence[Template], count: int, seed: int) -> list[Probe]:
    rows = eval_pairs(templates, count, seed)
    return [Probe(messages=row.prompt, reply=row.push_back if row.side == "flawed" else row.comply) for row in rows]


def flip_probability(loop: Loop) -> float:
    """The probability that a pair's label is wrong: configured, or the judge's measured error."""
    setting = loop.config.train.flip_probability
    return min(0.4, loop.judge.quality.error_rate) if setting == "judge" else float(setting)


def _inside(run: Path, relative: str | None) -> str | None:
    return str(run / relative) if relative else None
