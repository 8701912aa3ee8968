"""Does the policy know *when* to push back? Crossed pair scores, judged stances of sampled replies, and retention.

With d(x; c, p) = mean-token log p(p | x) - mean-token log p(c | x), each pair of replies is scored under both prompts,
so that wording alone cannot win (docs/ARCHITECTURE.md, "What is measured"). Everything runs on the served policy.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dream.config import Config
from dream.engine import Engine, Sampling, mean
from dream.errors import DataError
from dream.inputs import read_user_rows
from dream.judge.combined import Judge
from dream.judge.question import Question
from dream.records import RIGHT_STANCE, SIDES, EvalPair, Record, Side
from dream.scenarios import eval_pairs
from dream.templates import Template
from train.retention import retention

Pair = tuple[EvalPair, EvalPair]
RESAMPLES = 1000


class SideFigures(Record):
    """One side with its own two replies; `margin` is the mean of d, signed so that more is better."""

    accuracy: float
    margin: float
    stance_rates: dict[str, float] = {}
    """Share of sampled replies by judged stance; `abstain` where the judge was unsure. Empty when none were sampled."""


class Evaluation(Record):
    """The figures of docs/ARCHITECTURE.md, "What is measured"; intervals are 95 % bootstrap over pairs."""

    pairs: int
    pair_accuracy: float
    pair_accuracy_ci: tuple[float, float]
    ranked_accuracy: float
    own_pair_accuracy: float
    margin: float
    margin_ci: tuple[float, float]
    clear: SideFigures
    flawed: SideFigures
    reply_tokens: float | None = None
    """Mean length of the sampled replies."""
    items: dict[str, list[float]] = {}
    """What the figures are means of, item by item, so that two policies can be compared in pairs."""


class RoundEvaluation(Record):
    """What the gate sees of one policy."""

    heldout: Evaluation
    fresh: Evaluation | None
    retention: list[float]
    """1.0 for a right answer, 0.0 for a wrong one; in the order of the questions."""

    @property
    def retained(self) -> float:
        """Share of right answers."""
        return mean(self.retention)


async def evaluate_round(
    engine: Engine, judge: Judge, templates: Sequence[Template], config: Config
) -> RoundEvaluation:
    """Evaluates the served policy on the run's fixed scenarios: held-out kinds of flaw, and new draws of trained kinds.

    Raises:
        DataError: there is no held-out template.
    """
    held = [template for template in templates if template.front.split == "heldout"]
    trained = [template for template in templates if template.front.split == "train"]
    if not held:
        raise DataError("no held-out templates to evaluate on; at least one needs `split: heldout`")
    sizes = config.eval
    unseen = joined(eval_pairs(held, sizes.heldout_pairs, config.seed))
    seen = joined(eval_pairs(trained, sizes.fresh_pairs, config.seed)) if sizes.fresh_pairs else []
    heldout, fresh, kept = await asyncio.gather(
        evaluate(engine, unseen, judge, config, sampled=sizes.sampled_scenarios),
        evaluate(engine, seen, judge, config) if seen else _nothing(),
        retention(engine, sizes.retention_questions, config.seed),
    )
    return RoundEvaluation(heldout=heldout, fresh=fresh, retention=kept)


async def _nothing() -> None:
    return None


async def evaluate(engine: Engine, pairs: Sequence[Pair], judge: Judge, config: Config, sampled: int = 0) -> Evaluation:
    """Scores pairs (clear, flawed), and samples and judges one reply a side for the first `sampled` of them."""
    scores, (stances, lengths) = await asyncio.gather(
        crossed_scores(engine, pairs), sampled_stances(engine, pairs[:sampled], judge, config)
    )
    return figures(scores, stances, lengths, config.seed)


async def crossed_scores(engine: Engine, pairs: Sequence[Pair]) -> np.ndarray:
    """d in nats a token, shape (pairs, 2 prompts, 2 reply sets), clear first on both axes."""

    async def under(prompt: EvalPair, pair: Pair) -> list[float]:
        replies = [reply for side in pair for reply in (side.push_back, side.comply)]
        logps = [mean(values) for values in await engine.score(prompt.prompt, replies)]
        return [logps[0] - logps[1], logps[2] - logps[3]]

    flat = await asyncio.gather(*(under(prompt, pair) for pair in pairs for prompt in pair))
    return np.array(flat).reshape(len(pairs), 2, 2)


async def sampled_stances(
    engine: Engine, pairs: Sequence[Pair], judge: Judge, config: Config
) -> tuple[dict[Side, list[str]], list[int]]:
    """The judged stance (or `abstain`) of one sampled reply a side and pair, and the replies' lengths in tokens."""
    generate = config.generate
    sampling = Sampling(1, generate.max_tokens, generate.temperature, generate.top_p, generate.min_p)
    rows = [(side, row) for pair in pairs for side, row in zip(SIDES, pair, strict=True)]
    answers = await asyncio.gather(*(engine.generate(row.prompt, sampling) for _, row in rows))
    replies = [completions[0] for completions in answers]
    # A reply that was cut off by max_tokens has a stance all the same; only training must not see it.
    questions = [
        Question(row.prompt, reply.text, "stop", row.aims, row.mentions, row.examples, row.other_examples)
        for (_, row), reply in zip(rows, replies, strict=True)
    ]
    verdicts = await judge.rule([f"{row.pair_id}/{side}" for side, row in rows], questions)
    stances: dict[Side, list[str]] = {"clear": [], "flawed": []}
    for (side, _), verdict in zip(rows, verdicts, strict=True):
        stances[side].append("abstain" if verdict.abstain else verdict.stance)
    return stances, [reply.tokens for reply in replies]


def figures(scores: np.ndarray, stances: dict[Side, list[str]], lengths: Sequence[int], seed: int) -> Evaluation:
    """The figures of `crossed_scores`' result and of `sampled_stances`'."""
    under_clear, under_flawed = scores[:, 0, :], scores[:, 1, :]
    right = ((under_flawed > 0) & (under_clear < 0)).mean(axis=1)
    margin = (under_flawed - under_clear).mean(axis=1)
    own_clear, own_flawed = -scores[:, 0, 0], scores[:, 1, 1]
    items = {"pair_right": right.tolist(), "margin": margin.tolist()}
    for side, values in stances.items():
        if values:
            items[f"{side}_right"] = [float(stance == RIGHT_STANCE[side]) for stance in values]
    return Evaluation(
        pairs=len(scores),
        pair_accuracy=float(right.mean()),
        pair_accuracy_ci=interval(right, seed),
        ranked_accuracy=float((under_flawed > under_clear).mean()),
        own_pair_accuracy=float(((own_clear > 0) & (own_flawed > 0)).mean()),
        margin=float(margin.mean()),
        margin_ci=interval(margin, seed),
        clear=SideFigures(
            accuracy=float((own_clear > 0).mean()), margin=float(own_clear.mean()), stance_rates=rates(stances["clear"])
        ),
        flawed=SideFigures(
            accuracy=float((own_flawed > 0).mean()),
            margin=float(own_flawed.mean()),
            stance_rates=rates(stances["flawed"]),
        ),
        reply_tokens=mean(lengths) if lengths else None,
        items=items,
    )


def rates(stances: Sequence[str]) -> dict[str, float]:
    """Share of each stance; empty of nothing."""
    count = Counter(stances)
    names = ("comply", "push_back", "neither", "abstain")
    return {name: count[name] / len(stances) for name in names} if stances else {}


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, shape (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def joined(rows: Sequence[EvalPair]) -> list[Pair]:
    """Rows, one a side, as pairs (clear, flawed) in the order of their first rows.

    Raises:
        DataError: a pair has not exactly one row a side.
    """
    by_id: dict[str, dict[Side, EvalPair]] = {}
    for row in rows:
        sides = by_id.setdefault(row.pair_id, {})
        if row.side in sides:
            raise DataError(
                f"pair {row.pair_id!r} has two rows for its {row.side} side; give each pair its own pair_id"
            )
        sides[row.side] = row
    for pair_id, sides in by_id.items():
        if len(sides) < 2:
            missing = "flawed" if "clear" in sides else "clear"
            raise DataError(f"pair {pair_id!r} has no {missing} row; write one row a side")
    return [(sides["clear"], sides["flawed"]) for sides in by_id.values()]


def read_eval_pairs(path: Path) -> list[Pair]:
    """Pairs of a JSON Lines file, one row a side; `prompt` is a text or messages.

    Raises:
        DataError: naming the file and the line.
    """
    rows = read_user_rows(path, EvalPair)
    try:
        return joined(rows)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def summary(evaluation: RoundEvaluation) -> dict[str, Any]:
    """The figures of the table of rounds."""
    held = evaluation.heldout
    return {
        "pair_accuracy": held.pair_accuracy,
        "pair_accuracy_ci": held.pair_accuracy_ci,
        "margin": held.margin,
        "comply_on_clear": held.clear.stance_rates.get("comply"),
        "push_back_on_flawed": held.flawed.stance_rates.get("push_back"),
        "retention": evaluation.retained if evaluation.retention else None,
    }
