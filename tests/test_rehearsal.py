"""train/rehearsal.py: ordinary requests and the policy's own answers."""

import asyncio
import re

import pytest

from dream import prompts
from dream.engine import ScriptedEngine
from dream.inputs import read_user_rows
from dream.paths import data_folder
from train.instructions import instructions
from train.rehearsal import rehearse, requests
from train.retention import Fact, Neutral, questions


def test_requests_are_seeded_and_half_of_them_sums() -> None:
    """The same seed gives the same ones, more than there are lines go round, and every second one asks for a sum."""
    asked = requests(160, 3)
    assert asked == requests(160, 3) != requests(160, 4)
    assert len(asked) == 160
    assert all(any(sign in one for sign in "+-") for one in asked[1::2])
    assert set(asked[::2]) == set(prompts.lines("rehearsal/questions"))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_is_measured_is_rehearsed(seed: int) -> None:
    """No question of the retention suite, else it would measure what was just trained."""
    rehearsed = set(requests(400, seed))
    facts = read_user_rows(data_folder("prompts") / "retention" / "facts.jsonl", Fact)
    measured = {fact.question for fact in facts} | {question for question, _ in questions(200, seed)}
    assert not rehearsed & (measured | {one.text for one in instructions(100, seed)})


def test_no_plain_text_that_is_measured_is_written_about() -> None:
    """None of the subjects of the neutral texts, in the singular or the plural."""
    texts = read_user_rows(data_folder("prompts") / "retention" / "neutral.jsonl", Neutral)
    words = set(re.findall(r"\w+", " ".join(prompts.lines("rehearsal/questions")).lower()))
    subjects = {word for text in texts for word in text.title.lower().split() if word != "the"}
    assert not words & (subjects | {subject.removesuffix("s") for subject in subjects})


def test_answers_are_the_policys_own() -> None:
    """What the engine says, whether it came to its end, and nothing where it says nothing."""
    engine = ScriptedEngine(lambda messages, number: "" if "snow" in messages[-1]["content"] else "I say so.")
    texts = asyncio.run(rehearse(engine, 160, 1))
    assert len(texts) == 159
    assert {text.reply for text in texts} == {"I say so."}
    assert all(text.finished for text in texts)
