"""What a training configuration teaches, in minutes and without an engine or a judge: one training step on the
templates' worked replies, and the crossed figures before and after it.

`python -P -m tests.bench.trial --out FOLDER [--rows N] [--config C] [--set key=value ...]` trains as a round does (no
rehearsal) on N rows of `generate.templates` and their mirrors; then scores fresh scenarios of these and scenarios of
kinds that are never trained on with the weights as served. The experiments of docs/LOG.md are made with it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from dream.config import load
from dream.models import resolve
from dream.records import SIDES, ContrastPair, EvalPair, PreferencePair, Scenario, Side, assistant
from dream.scenarios import STANCES, draw, eval_pairs, mirrored, plan
from dream.store import Log
from dream.templates import Template, load_all
from tests.bench.effect import figures as compared
from tests.bench.effect import head, line
from train.checkpoints import load_model, load_tokenizer
from train.data import Encoded, StepSpec, chat_ids, round_rows
from train.evals import Evaluation, Pair, figures, joined
from train.scoring import score_pairs
from train.step import run

DRAWS = 1000
"""Added to the seed for rows, so that no row is a scenario that is measured."""
FLIP_PROBABILITY = 0.05
"""About the judge's error on dreamed pairs; worked replies have none."""


def worked_rows(templates: Sequence[Template], count: int, seed: int, batch_size: int) -> list[PreferencePair]:
    """`count` rows in training order from the templates' worked replies, every scenario with its mirror."""
    pairs: list[ContrastPair] = []
    for number, (template, draw_seed) in enumerate(plan(templates, seed)):
        if 2 * len(pairs) >= count:
            break
        scenario = draw(template, draw_seed, f"trial-{number:04d}")
        twin = mirrored(template, scenario)
        pairs += [worked_pair(one) for one in (scenario, twin) if one]
    return round_rows(pairs, [], [], batch_size=batch_size, general_share=0, replay_share=0, seed=seed)[:count]


def worked_pair(scenario: Scenario) -> ContrastPair:
    """The contrast pair of a scenario; all four replies follow the same line of the examples."""

    def row(side: Side) -> PreferencePair:
        examples = scenario.side(side).examples
        comply, push_back = (examples[stance][scenario.seed % len(examples[stance])] for stance in STANCES)
        chosen, rejected = (comply, push_back) if side == "clear" else (push_back, comply)
        return PreferencePair(
            pair_id=scenario.scenario_id, side=side, prompt=scenario.prompt(side),
            chosen=[assistant(chosen)], rejected=[assistant(rejected)],
            meta={"scenario_id": scenario.scenario_id, "mirror_of": scenario.mirror_of},
        )  # fmt: skip

    return ContrastPair(clear=row("clear"), flawed=row("flawed"))


def crossed_figures(model: PreTrainedModel, source: str, pairs: Sequence[Pair], bf16: bool, seed: int) -> Evaluation:
    """The figures of `evals.figures` without sampled replies, scored by Hugging Face."""
    tokenizer = load_tokenizer(source, trust_remote_code=False)

    def encoded(prompt: EvalPair, pair: Pair) -> Encoded:
        head = chat_ids(tokenizer, prompt.prompt, add_generation_prompt=True)
        texts = [reply for side in pair for reply in (side.comply, side.push_back)]
        replies = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return Encoded(head, replies[0], replies[1], (replies[2], replies[3]))

    rows = [encoded(prompt, pair) for pair in pairs for prompt in pair]
    scores = score_pairs(model, rows, shared=True, bf16=bf16, batch=8)
    means = [[s / len(reply) for s, reply in zip(score, row.replies, strict=True)]
             for score, row in zip(scores, rows, strict=True)]  # fmt: skip
    return figures(np.array(means).reshape(len(pairs), 2, 2, 2), {side: [] for side in SIDES}, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and prints a table for fresh scenarios and one for kinds that are never trained on."""
    parser = argparse.ArgumentParser(prog="python -P -m tests.bench.trial")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--config", type=Path, default=Path("configs/cpu-coffee.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args(argv)
    config, _ = load(options.config, options.overrides)
    source = resolve(config.model)
    train = config.train
    templates = [one for one in load_all() if not one.general]
    names = config.generate.templates
    trained = [one for one in templates if one.front.split == "train" and (not names or one.name in names)]
    held = [one for one in templates if one.front.split == "heldout"]
    measured = {
        "fresh": joined(eval_pairs(trained, config.eval.fresh_pairs, config.seed)),
        "held-out": joined(eval_pairs(held, config.eval.heldout_pairs, config.seed)),
    }
    options.out.mkdir(parents=True)
    log = Log(options.out / "rows.jsonl")
    log.append(*worked_rows(trained, options.rows, config.seed + DRAWS, train.batch_size))
    log.close()
    out = options.out / "train"
    run(
        StepSpec(
            model=source,
            rows=str(options.out / "rows.jsonl"),
            out=str(out),
            train=train,
            flip_probability=FLIP_PROBABILITY,
            seed=config.seed,
            served_dtype=config.engine.dtype,
        ),
        lambda report: print(report, file=sys.stderr),
    )
    before, after = (load_model(str(where), "auto", trust_remote_code=False) for where in (source, out / "weights"))
    bf16 = train.mixed_precision
    for name, pairs in measured.items():
        both = [crossed_figures(model, source, pairs, bf16, config.seed) for model in (before, after)]
        print(head(name))
        print("\n".join(line(figure, items) for figure, items in compared(*both).items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
