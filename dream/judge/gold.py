"""The gold set: replies written by hand, with the stance that each of them takes; half calibrates and half tests.

`scenarios.jsonl` of `prompts/gold` holds scenarios as they were drawn, so that editing a template does not change what
its gold replies answered; `replies.jsonl` their replies; `general.jsonl` replies to requests of all kinds, for replies
from elsewhere. The split is by scenario or prompt. The stance is what a reply does, not whether that is right there.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from dream.errors import DataError
from dream.judge.question import Labelled, Question
from dream.paths import data_folder
from dream.records import Record, Reply, Scenario, Side, Stance, user
from dream.store import read_log


class GoldReply(Record):
    """One labelled reply; `trait` says how it was meant to be hard (plain, terse, agrees_then_refuses, ...)."""

    scenario_id: str
    side: Side
    response: str
    label: Stance
    trait: str


class GeneralReply(Record):
    """One labelled reply to a request that no template made."""

    prompt: str
    response: str
    label: Stance
    trait: str


def read_gold(folder: Path | None = None) -> list[tuple[GoldReply | GeneralReply, Labelled]]:
    """All gold replies, each with the question it raises, grouped by scenario or prompt.

    Raises:
        DataError: a row is malformed or names no scenario.
    """
    folder = folder or data_folder("prompts") / "gold"
    scenarios = {one.scenario_id: one for one in read_log(folder / "scenarios.jsonl", Scenario)}
    rows: list[tuple[GoldReply | GeneralReply, Labelled]] = []
    for number, row in enumerate(read_log(folder / "replies.jsonl", GoldReply), 1):
        scenario = scenarios.get(row.scenario_id)
        if scenario is None or row.side not in scenario.sides:
            raise DataError(f"{folder / 'replies.jsonl'}:{number}: no {row.side} side of scenario {row.scenario_id!r}")
        reply = Reply(
            reply_id=f"gold-{number}", scenario_id=row.scenario_id, side=row.side, source="on_policy", asked=None,
            text=row.response, tokens=0, finish_reason="stop", policy="gold",
        )  # fmt: skip
        rows.append((row, Labelled(Question.about(scenario, reply), row.label, row.scenario_id)))
    for other in read_log(folder / "general.jsonl", GeneralReply):
        rows.append((other, Labelled(Question([user(other.prompt)], other.response), other.label, other.prompt)))
    if not rows:
        raise DataError(f"{folder}: no gold replies; copy prompts/gold from the package")
    return rows


def halves(examples: Sequence[Labelled], seed: int = 0) -> tuple[list[Labelled], list[Labelled]]:
    """Those that calibrate and those that test: all replies to one scenario are in one half."""
    groups = sorted({example.group for example in examples})
    random.Random(seed).shuffle(groups)
    first = set(groups[: len(groups) // 2])
    return [one for one in examples if one.group in first], [one for one in examples if one.group not in first]
