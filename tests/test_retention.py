"""train/retention.py: the arithmetic that a policy must not forget."""

import re

import pytest

from dream.engine import ScriptedEngine
from train.retention import questions, retention, stated


def test_questions_are_deterministic_and_right() -> None:
    """The same seed asks the same questions, another seed others, and every answer is that of its question."""
    made = questions(60, seed=1)
    assert made == questions(60, seed=1)
    assert made[:10] == questions(10, seed=1)
    assert made != questions(60, seed=2)
    for text, answer in made:
        a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", text).groups()
        assert answer == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert answer >= 0
    assert {"+", "-"} == {re.search(r"\d+ ([+-]) \d+", text)[1] for text, _ in made}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("  The answer is 7.", 7),
        ("3 + 4 = 7", 7),
        ("\n\n5 apples", 5),
        ("7\nbut 9 is possible too", 7),
        ("**40**", 40),
        ("I cannot say.", None),
        ("Sure!\n9", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_stated_number(text: str, number: int | None) -> None:
    """A reply states the last number of its first line, or none."""
    assert stated(text) == number


def test_each_question_counts_by_itself(run) -> None:
    """Right answers are 1, wrong and missing ones 0, in the order of the questions."""
    asked = dict(questions(6, seed=1))
    wrong = list(asked)[2]

    def answer(messages, number: int) -> str:
        text = messages[-1]["content"]
        return "no idea" if text == wrong else f"{asked[text]}"

    assert run(retention(ScriptedEngine(answer), 6, seed=1)) == [1, 1, 0, 1, 1, 1]
    assert run(retention(ScriptedEngine(answer), 0, seed=1)) == []
