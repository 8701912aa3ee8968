"""What policies make of the kinds of flaw that a configuration does not train: `python -P -m tests.bench.unseen COUNT
WEIGHTS ...`, a minute or two a policy.

COUNT scenarios of the training templates whose kinds of flaw are none of those that `configs/cpu-coffee.yaml` names, in
equal shares; held-out templates, all built alike, are a part of what is unseen. Likelihoods by Hugging Face, of the
model as it came and of each folder of weights (`runs/coffee/round_02/train/weights`), all together and by template.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dream.config import load
from dream.models import resolve
from dream.scenarios import eval_pairs, eval_scenarios
from dream.templates import Template, load_all
from tests.bench import effect
from tests.bench.trial import crossed_figures
from train.checkpoints import load_model
from train.evals import Evaluation, joined

CONFIG = Path("configs/cpu-coffee.yaml")
SEED = 7


def untrained(templates: Sequence[Template], trained: Sequence[str]) -> list[Template]:
    """The training templates of kinds of flaw that none of the `trained` ones, by name, has."""
    kinds = {template.front.flaw for template in templates if template.name in trained}
    return [
        template
        for template in templates
        if template.front.split == "train" and not template.general and template.front.flaw not in kinds
    ]


def main(arguments: list[str]) -> int:
    """Prints a table a policy."""
    count, folders = int(arguments[0]), arguments[1:]
    config, _ = load(CONFIG)
    source = resolve(config.model)
    templates = untrained(load_all(), config.generate.templates)
    pairs = joined(eval_pairs(templates, count, SEED))
    print(
        f"{count} scenarios of {len(templates)} templates, {len({one.front.flaw for one in templates})} kinds of flaw"
    )
    before, *policies = (
        crossed_figures(
            load_model(weights, "auto", trust_remote_code=False), source, pairs, config.train.mixed_precision, SEED
        )
        for weights in (source, *folders)
    )
    for folder, after in zip(folders, policies, strict=True):
        print("\n" + effect.head(folder))
        for name, items in effect.figures(before, after).items():
            print(effect.line(name, items))
        names = [template.name for template, _ in eval_scenarios(templates, count, SEED)]
        print("\n".join(by_template(names, before, after)))
    return 0


def by_template(names: Sequence[str], before: Evaluation, after: Evaluation) -> list[str]:
    """Markdown lines: crossed figures of each template, that which gained most margin first; `names` has one a pair."""
    rows = []
    for name in dict.fromkeys(names):
        own = np.array(names) == name
        means = [
            float(np.array(one.items[key])[own].mean()) for key in ("pair_right", "margin") for one in (before, after)
        ]
        rows.append((name, *means))
    rows.sort(key=lambda row: row[3] - row[4])
    return [
        "\n| template | strict, before | after | margin, before | after |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {a:.2f} | {b:.2f} | {c:+.3f} | {d:+.3f} |" for name, a, b, c, d in rows),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
