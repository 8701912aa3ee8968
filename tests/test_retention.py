"""train/retention.py: arithmetic that a policy must not forget."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.engine import ScriptedEngine
from train.retention import questions, retention, stated

TASK = re.compile(r"(\d+) ([+-]) (\d+)")


def solved(question: str) -> int:
    """The answer, from the question's text."""
    a, sign, b = TASK.search(question).groups()
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


@given(st.integers(0, 40), st.integers(0, 1000))
def test_questions_are_fixed_and_right(count: int, seed: int) -> None:
    """The same seed asks the same questions, their answers are right, and none is negative."""
    asked = questions(count, seed)
    assert asked == questions(count, seed)
    assert len(asked) == count
    assert all(solved(question) == answer >= 0 for question, answer in asked)


def test_questions_differ() -> None:
    """Another seed asks other questions, more questions begin with the same ones, and both signs occur."""
    assert questions(30, 1) != questions(30, 2)
    assert questions(30, 1)[:10] == questions(10, 1)
    assert {TASK.search(question)[2] for question, _ in questions(30, 1)} == {"+", "-"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("  The answer is 12.", 12),
        ("3 + 4 = 7", 7),
        ("3 + 4 = 7\nWait, 8.", 7),
        ("\n\n9", 9),
        ("**15**", 15),
        ("seven", None),
        ("", None),
        (" \n ", None),
        ("Well:\n7", None),
    ],
)
def test_stated_is_the_last_number_of_the_first_line(text: str, number: int | None) -> None:
    """A reply's number is the last one of its first line with text."""
    assert stated(text) == number


@pytest.mark.parametrize(("text", "number"), [("-5", -5), ("The answer is 12.0", 12)])
def test_stated_reads_signs_and_decimals(text: str, number: int) -> None:
    """A minus before the number counts, and 12.0 states 12, not 0."""
    assert stated(text) == number


@given(st.text("019 .,+-=\n\r\u2028²½٣é"))
def test_stated_takes_any_text(text: str) -> None:
    """Whatever a model writes is a number or none, never an error."""
    assert stated(text) is None or isinstance(stated(text), int)


@pytest.mark.parametrize(("off", "share"), [(0, 1.0), (1, 0.0)])
def test_retention_counts_right_answers(run: Callable, off: int, share: float) -> None:
    """Right answers count 1, wrong ones 0, a number for each question."""
    engine = ScriptedEngine(lambda messages, number: f"It is {solved(messages[-1]['content']) + off}.")
    assert run(retention(engine, 9, seed=3)) == [share] * 9


def test_nothing_asked_is_nothing_kept(run: Callable) -> None:
    """Without questions there are no answers."""
    assert run(retention(ScriptedEngine(lambda messages, number: ""), 0, seed=1)) == []
