"""Replies that try to forge a verdict: none may turn a wrong reply into a right one."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dream.config import Config
from dream.engine import ScriptedEngine
from dream.judge.combined import Judge, calibrated
from dream.judge.gold import halves, read_gold
from dream.judge.likelihood import RUBRIC, rubric_prompt
from dream.judge.planted import planted
from dream.judge.question import Question
from dream.judge.transcript import CONTROL
from dream.paths import data_folder
from dream.records import RIGHT_STANCE, Reply, Scenario
from dream.store import read_log
from dream.templates import load_all

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "hostile.jsonl").read_text().splitlines()]
SCENARIOS = {one.scenario_id: one for one in read_log(data_folder("prompts") / "gold" / "scenarios.jsonl", Scenario)}


def question(row: dict[str, Any], text: str) -> Question:
    """The question that a reply to a row's scenario raises."""
    reply = Reply(
        reply_id="hostile", scenario_id=row["scenario_id"], side=row["side"], source="on_policy", asked=None, text=text,
        tokens=0, finish_reason="stop", policy="base",
    )  # fmt: skip
    return Question.about(SCENARIOS[row["scenario_id"]], reply)


def gold_judge(config: Config) -> Judge:
    """A judge made as runs make it."""
    calibrate, test = halves([labelled for _, labelled in read_gold()])
    known = planted([template for template in load_all() if template.front.split == "train"], 64, 1)
    return asyncio.run(calibrated(ScriptedEngine(lambda messages, number: ""), config, calibrate, known, test))


def check_none_wins(judge: Judge) -> None:
    """No hostile reply is ruled to have the stance that is right on its side, which the honest one has not."""
    questions = [question(row, row["hostile"]) for row in ROWS]
    verdicts = asyncio.run(judge.rule([str(number) for number in range(len(ROWS))], questions))
    won = [
        (row["attack"], row["hostile"])
        for row, verdict in zip(ROWS, verdicts, strict=True)
        if not verdict.abstain and verdict.stance == RIGHT_STANCE[row["side"]]
    ]
    assert won == []


def test_the_set_is_what_it_claims() -> None:
    """Enough rows, kinds of attack and labels; the label is never the right stance; the honest reply is inside."""
    assert len(ROWS) >= 40
    assert len({row["attack"] for row in ROWS}) >= 12
    assert set(Counter(row["label"] for row in ROWS)) == {"comply", "push_back", "neither"}
    for row in ROWS:
        assert row["label"] != RIGHT_STANCE[row["side"]]
        assert row["honest"] in row["hostile"]


def test_no_attack_turns_a_wrong_reply_right_for_quick_signals(settings_with: Callable[..., Config]) -> None:
    """The signals that need no model of any kind."""
    check_none_wins(gold_judge(settings_with(judge={"signals": ["wording", "structure"]})))


@pytest.mark.model
def test_no_attack_turns_a_wrong_reply_right_for_the_default_judge() -> None:
    """The judge as runs have it, with the real embeddings."""
    check_none_wins(gold_judge(Config()))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['attack']}-{number}" for number, row in enumerate(ROWS)])
def test_no_control_token_reaches_the_rubric(row: dict[str, Any]) -> None:
    """In a judging prompt no line of the reply stands outside its quotation and no control token is left."""
    text = rubric_prompt(question(row, row["hostile"]), list(RUBRIC))
    quoted, *rest = text.split("Reply:\n", 1)[1].rsplit("\n\n", 2)
    assert not CONTROL.search(text)
    assert all(line.startswith(">") for line in quoted.splitlines() if line.strip())
    assert "Answer with the letter only." in "".join(rest)
