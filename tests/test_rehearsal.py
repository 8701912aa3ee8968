"""train/rehearsal.py: ordinary requests and the policy's own answers."""

import asyncio
import re

import pytest

from dream import prompts
from dream.config import TrainConfig
from dream.engine import ScriptedEngine
from dream.inputs import read_user_rows
from dream.paths import data_folder
from train.instructions import instructions
from train.rehearsal import forms, rehearse, requests, sums
from train.retention import Fact, Neutral, questions


def test_requests_are_seeded() -> None:
    """The same seed gives the same ones, and more than there are lines go round."""
    asked = requests(160, 3)
    assert asked == requests(160, 3) != requests(160, 4)
    assert len(asked) == 160
    assert set(asked) == set(prompts.lines("rehearsal/questions"))


def test_sums_are_right() -> None:
    """The same seed gives the same ones, and an answer is the task and its result, which is not negative."""
    texts = sums(300, 3)
    assert texts == sums(300, 3) != sums(300, 4)
    for text in texts:
        a, sign, b, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", text.reply).groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert f"{a} {sign} {b}" in text.messages[0]["content"]
    assert len({text.reply.split()[1] for text in texts}) == 2


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_is_measured_is_rehearsed(seed: int) -> None:
    """No question of the retention suite, else it would measure what was just trained."""
    rehearsed = set(requests(200, seed)) | {text.messages[0]["content"] for text in sums(400, seed)}
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
    texts, _ = asyncio.run(rehearse(engine, TrainConfig(rehearsal=8), 10, 1))
    assert len(texts) == 79
    assert {text.reply for text in texts} == {"I say so."}
    assert all(text.finished for text in texts)


def test_a_repair_has_some_of_all() -> None:
    """Sixteen texts for each of ten steps, half of them sums, a quarter forms, mixed so that no step is all of one."""
    engine = ScriptedEngine(lambda messages, number: "I say so.")
    during, after = asyncio.run(rehearse(engine, TrainConfig(rehearsal=2, repair_steps=10), 5, 1))
    assert len(during) == 10
    assert {text.reply for text in during} == {"I say so."}
    assert len(after) == 160
    assert sum(re.fullmatch(r"\d+ [+-] \d+ = \d+", text.reply) is not None for text in after) == 80
    assert sum(text.reply == "I say so." for text in after) == 40
    for start in range(0, 160, 16):
        assert 0 < sum(text.reply == "I say so." for text in after[start : start + 16]) < 16


def test_forms_are_kept_and_asked_in_words_of_their_own() -> None:
    """What is rehearsed is nowhere what is measured; among the answers all kinds of form are."""
    measured = {one.text.lower() for one in instructions(400, 1)}
    rehearsed = forms(1_000, 3)
    assert len({text.messages[0]["content"] for text in rehearsed}) > 60
    assert not measured & {text.messages[0]["content"].lower() for text in rehearsed}
    answers = {text.reply for text in rehearsed}
    assert {"Milk", "No", "8", "- tea\n- juice", "LEMON", '{"animal": "dog", "legs": 4}'} <= answers


def test_nothing_is_repaired_unless_asked_for() -> None:
    """By default there is neither rehearsal nor repair, and the engine is asked nothing."""
    engine = ScriptedEngine(lambda messages, number: "I say so.")
    assert asyncio.run(rehearse(engine, TrainConfig(), 5, 1)) == ([], [])
    assert TrainConfig().repair_steps == 0
