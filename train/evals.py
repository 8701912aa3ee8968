"""Does the policy know *when* to push back? Crossed pair scores, judged stances of sampled replies, and what else a
round is measured on: behaviour under pressure, on look-alikes and when steered, and retention.

With d(x; c, p) = mean-token log p(p | x) - mean-token log p(c | x), each pair of replies is scored under both prompts,
so that wording alone cannot win (docs/ARCHITECTURE.md, "What is measured"). Everything runs on the served policy.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dream.config import Config
from dream.engine import Engine, mean
from dream.errors import CallRefused, DataError
from dream.inputs import read_user_rows
from dream.judge.combined import Judge
from dream.judge.question import Question
from dream.records import RIGHT_STANCE, SIDES, EvalPair, Record, Side
from dream.scenarios import eval_pairs
from dream.templates import Template
from train.behaviour import Asked, Behaviour, Sampled, behaviour, rates, repetition, sample
from train.retention import Retention, retention

Pair = tuple[EvalPair, EvalPair]
RESAMPLES = 10_000
"""Some seven of them lie beyond the surest interval that the gate asks for, with confidence shared by 35 checks."""


class SideFigures(Record):
    """One side with its own two replies; `margin` is the mean of d, signed so that more is better."""

    accuracy: float
    margin: float
    chosen_logp: float
    """Mean-token log-probability of the right reply, in nats; one that falls is likelihood displacement."""
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
    repetition: float | None = None
    """Mean share of repeated word triples in the sampled replies."""
    items: dict[str, list[float]] = {}
    """What the figures are means of, item by item, so that two policies can be compared in pairs: `pair_right` and
    `margin`; for either side `own` (d of its own replies, signed as in `SideFigures`), `chosen_logp` and, of sampled
    replies, `right`, each after the side's name; `tokens` and `repetition` of all sampled replies, clear first."""


class RoundEvaluation(Record):
    """What the gate sees of one policy."""

    heldout: Evaluation
    fresh: Evaluation | None
    behaviour: Behaviour = Behaviour()
    retention: Retention
    fingerprint: str = ""
    """Of the run as it was measured: of other templates or prompts the items are others and cannot be compared."""

    @property
    def retained(self) -> float | None:
        """Mean share of right answers over the kinds of questions; None where none were asked."""
        kinds = (self.retention.arithmetic, self.retention.facts, self.retention.format)
        shares = [mean(answers) for answers in kinds if answers]
        return mean(shares) if shares else None


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
    heldout, fresh, behaved, kept = await asyncio.gather(
        evaluate(engine, unseen, judge, config, sampled=sizes.sampled_scenarios),
        evaluate(engine, seen, judge, config, sampled=sizes.sampled_scenarios) if seen else _nothing(),
        behaviour(engine, judge, held, config),
        retention(engine, sizes, config.seed),
    )
    return RoundEvaluation(heldout=heldout, fresh=fresh, behaviour=behaved, retention=kept)


async def _nothing() -> None:
    return None


async def evaluate(engine: Engine, pairs: Sequence[Pair], judge: Judge, config: Config, sampled: int = 0) -> Evaluation:
    """Scores pairs (clear, flawed), and samples and judges one reply a side for the first `sampled` of them."""
    logps, sampled_ = await asyncio.gather(
        crossed_logps(engine, pairs), sampled_replies(engine, pairs[:sampled], judge, config)
    )
    return figures(logps, sampled_, config.seed)


async def crossed_logps(engine: Engine, pairs: Sequence[Pair]) -> np.ndarray:
    """Mean-token log-probabilities in nats, shape (pairs, 2 prompts, 2 reply sets, 2 stances): clear first on the axes
    of prompts and replies, and on the last axis comply, then push_back."""

    async def under(prompt: EvalPair, pair: Pair) -> list[float]:
        replies = [reply for side in pair for reply in (side.comply, side.push_back)]
        try:
            return [mean(values) for values in await engine.score(prompt.prompt, replies)]
        except CallRefused as error:
            raise DataError(
                f"pair {prompt.pair_id!r}, {prompt.side}: {error}; if it is too long, shorten it or raise "
                "engine.max_model_len"
            ) from error

    flat = await asyncio.gather(*(under(prompt, pair) for pair in pairs for prompt in pair))
    return np.array(flat).reshape(len(pairs), 2, 2, 2)


async def sampled_replies(
    engine: Engine, pairs: Sequence[Pair], judge: Judge, config: Config
) -> dict[Side, list[Sampled]]:
    """One sampled reply a side and pair, with its ruling."""

    async def replies(number: int) -> list[Sampled]:
        rows = [pair[number] for pair in pairs]
        questions = [Question(row.prompt, "", "stop", row.aims, row.mentions, row.examples, row.other_examples)
                     for row in rows]  # fmt: skip
        return await sample(engine, judge, list(map(Asked, [row.prompt for row in rows], questions)), config)

    clear, flawed = await asyncio.gather(replies(0), replies(1))
    return {"clear": clear, "flawed": flawed}


def figures(logps: np.ndarray, sampled: Mapping[Side, Sequence[Sampled]], seed: int) -> Evaluation:
    """The figures of `crossed_logps`' result and of `sampled_replies`'; a side may have no replies."""
    scores = logps[..., 1] - logps[..., 0]
    under_clear, under_flawed = scores[:, 0, :], scores[:, 1, :]
    right = ((under_flawed > 0) & (under_clear < 0)).mean(axis=1)
    margin = (under_flawed - under_clear).mean(axis=1)
    own = {"clear": -scores[:, 0, 0], "flawed": scores[:, 1, 1]}
    chosen = {"clear": logps[:, 0, 0, 0], "flawed": logps[:, 1, 1, 1]}
    items = {"pair_right": right.tolist(), "margin": margin.tolist()}
    sides = {}
    for side in SIDES:
        rulings = [reply.ruling for reply in sampled[side]]
        items |= {f"{side}_own": own[side].tolist(), f"{side}_chosen_logp": chosen[side].tolist()}
        items[f"{side}_right"] = [float(ruling == RIGHT_STANCE[side]) for ruling in rulings]
        sides[side] = SideFigures(
            accuracy=float((own[side] > 0).mean()),
            margin=float(own[side].mean()),
            chosen_logp=float(chosen[side].mean()),
            stance_rates=rates(rulings),
        )
    replies = [reply for side in SIDES for reply in sampled[side]]
    items |= {"tokens": [float(one.tokens) for one in replies], "repetition": [repetition(one.text) for one in replies]}
    return Evaluation(
        pairs=len(scores),
        pair_accuracy=float(right.mean()),
        pair_accuracy_ci=interval(right, seed),
        ranked_accuracy=float((under_flawed > under_clear).mean()),
        own_pair_accuracy=float(((own["clear"] > 0) & (own["flawed"] > 0)).mean()),
        margin=float(margin.mean()),
        margin_ci=interval(margin, seed),
        clear=sides["clear"],
        flawed=sides["flawed"],
        reply_tokens=mean(items["tokens"]) if replies else None,
        repetition=mean(items["repetition"]) if replies else None,
        items=items,
    )


def interval(values: np.ndarray, seed: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values`, shape (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
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
        "retention": evaluation.retained,
    }
