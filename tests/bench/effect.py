"""What runs did to the policy, from their folders: `python -P -m tests.bench.effect [OPTIONS] NAME=RUN ...`.

For each run the initial policy beside the one it ended with (`--candidate`: beside its last candidate, promoted or
not), on the run's own fixed scenarios, every change with its paired interval. `--together` adds a table of the
scenarios of all runs, for runs that differ in their seed; `--svg FILE` is a plot of either side's own pairs. The tables
of docs/EFFECT.md are made of its output and of eval.json.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dream.engine import mean
from tests.bench import svg
from train.evals import Evaluation, RoundEvaluation
from train.gate import Items, change
from train.history import RoundResult, finished_rounds, read_policy, stored_evaluation

CONFIDENCE = 0.95
COLOURS = {"clear": "#2f6fa7", "flawed": "#c2562d"}
LEFT, WIDTH, LINE = 190, 420, 26


class Shown(NamedTuple):
    """A run by its name: the initial policy and the one it is compared with."""

    name: str
    before: RoundEvaluation
    after: RoundEvaluation
    last: RoundResult


def shown(argument: str, candidate: bool) -> Shown:
    """NAME=RUN read from its folder."""
    name, _, folder = argument.rpartition("=")
    run = Path(folder)
    results = finished_rounds(run)
    number = results[-1].round if candidate else read_policy(run).round
    return Shown(name or run.name, stored_evaluation(run, 0), stored_evaluation(run, number), results[-1])


def figures(before: Evaluation, after: Evaluation) -> dict[str, Items]:
    """What is compared, item by item: crossed figures; either side's own pairs and sampled replies, right or not."""

    def right(side: str) -> Items:
        return Items(*([float(value > 0) for value in one.items[f"{side}_own"]] for one in (before, after)))

    found = {
        "strict crossed": Items(before.items["pair_right"], after.items["pair_right"]),
        "crossed margin": Items(before.items["margin"], after.items["margin"]),
        "own pairs, clear": right("clear"),
        "own pairs, flawed": right("flawed"),
    }
    for side, stance in (("clear", "comply"), ("flawed", "push back")):
        if before.items[f"{side}_right"]:
            found[f"sampled: {stance} on {side}"] = Items(before.items[f"{side}_right"], after.items[f"{side}_right"])
    return found


def table(run: Shown) -> list[str]:
    """Markdown lines."""
    lines = [head(run.name), *(line(name, items) for name, items in compared(run).items())]
    for where, before, after in measured(run):
        ranked = f"{before.ranked_accuracy:.3f} | {after.ranked_accuracy:.3f}"
        own = f"{before.own_pair_accuracy:.3f} | {after.own_pair_accuracy:.3f}"
        lines += [f"| {where}: ranked | {ranked} | |", f"| {where}: own pairs, both sides | {own} | |"]
    return lines


def measured(run: Shown) -> list[tuple[str, Evaluation, Evaluation]]:
    """On which scenarios a run was measured, before and after."""
    sets = (("fresh", run.before.fresh, run.after.fresh), ("held-out", run.before.heldout, run.after.heldout))
    return [(where, before, after) for where, before, after in sets if before is not None and after is not None]


def compared(run: Shown) -> dict[str, Items]:
    """All of a run that is compared item by item, by its name in the table. What is sampled, some scenarios of either
    set, is also compared over both, as the gate does."""
    by_set = {where: figures(before, after) for where, before, after in measured(run)}
    found = {f"{where}: {name}": items for where, one in by_set.items() for name, items in one.items()}
    sampled = [name for name in by_set["held-out"] if name.startswith("sampled")]
    if len(by_set) > 1:
        found |= {f"both: {name}": joined([one[name] for one in by_set.values()]) for name in sampled}
    was, now = run.before.retention, run.after.retention
    kinds = {kind: Items(getattr(was, kind), getattr(now, kind)) for kind in ("arithmetic", "facts", "format")}
    asked = {kind: items for kind, items in kinds.items() if items.before}
    found |= {f"retention: {name}": items for name, items in asked.items()}
    if asked:
        found["retention: mean of the kinds"] = alike(list(asked.values()))
    return found


def together(runs: Sequence[Shown]) -> list[str]:
    """Markdown lines: the items of all runs as those of one. The chance of their intervals is that of scenarios; that
    of seeds, of which there are few, can be told from the runs' own tables only."""
    every = [compared(run) for run in runs]
    return [head("together"), *(line(name, joined([one[name] for one in every])) for name in every[0])]


def joined(sets: Sequence[Items]) -> Items:
    """The items of several sets, one set after the other."""
    return Items(*([value for one in sets for value in one[place]] for place in (0, 1)))


def alike(kinds: Sequence[Items]) -> Items:
    """All items of several kinds, weighted so that their mean is the mean of the kinds' means."""
    total = sum(len(kind.before) for kind in kinds)
    weights = [total / len(kinds) / len(kind.before) for kind in kinds]
    return Items(
        *(
            [weight * value for weight, kind in zip(weights, kinds, strict=True) for value in kind[place]]
            for place in (0, 1)
        )
    )


def head(name: str) -> str:
    """The two lines that a table begins with."""
    return f"| {name} | before | after | change, 95 % |\n| --- | --- | --- | --- |"


def line(name: str, items: Items) -> str:
    """A row of the table."""
    ci = change(items, CONFIDENCE)
    span = "unknown" if ci is None else f"[{ci[0]:+.3f}, {ci[1]:+.3f}]"
    return f"| {name} | {mean(items.before):.3f} | {mean(items.after):.3f} | {span} |"


def plot(runs: Sequence[Shown]) -> str:
    """An SVG: for each run the share of either side's own pairs that were right, before (ring) and after (dot)."""
    body, y = [], 40
    for run in runs:
        body.append(f'<text x="12" y="{y + LINE - 4}">{run.name}</text>')
        body.append(f'<text x="12" y="{y + LINE + 12}" class="small">{run.last.decision.word}</text>')
        for side, colour in COLOURS.items():
            y += LINE
            own = joined([figures(before, after)[f"own pairs, {side}"] for _, before, after in measured(run)])
            a, b = map(mean, own)
            x1, x2 = (LEFT + WIDTH * value for value in (a, b))
            body.append(
                f'<line x1="{x1:.0f}" y1="{y - 8}" x2="{x2:.0f}" y2="{y - 8}" stroke="{colour}" stroke-width="3"/>'
                f'<circle cx="{x1:.0f}" cy="{y - 8}" r="5" fill="#fff" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{x2:.0f}" cy="{y - 8}" r="5" fill="{colour}"/>'
                f'<text x="{max(x1, x2) + 10:.0f}" y="{y - 4}" class="small">{side} {a:.2f} to {b:.2f}</text>'
            )
        y += LINE // 2
    ticks = "".join(
        f'<line x1="{LEFT + WIDTH * k / 4:.0f}" y1="36" x2="{LEFT + WIDTH * k / 4:.0f}" y2="{y + 4}" stroke="#ddd"/>'
        f'<text x="{LEFT + WIDTH * k / 4 - 8:.0f}" y="{y + 20}" class="small">{k / 4:.2f}</text>'
        for k in range(5)
    )
    return svg("Own pairs decided rightly, before (ring) and after (dot)", 760, y + 32, ticks + "".join(body))


def main(arguments: list[str]) -> int:
    """Prints the tables and writes the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--candidate", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    runs = [shown(argument, given.candidate) for argument in given.runs]
    for run in runs:
        print("\n".join([*table(run), f"\nLast round {run.last.decision.said}\n"]))
    if given.together:
        print("\n".join(together(runs)))
    if given.svg:
        given.svg.write_text(plot(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
