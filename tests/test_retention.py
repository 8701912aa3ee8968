"""train/retention.py: arithmetic, facts, form and plain text that a policy must not forget."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.config import EvalConfig
from dream.engine import ScriptedEngine
from dream.errors import DataError
from dream.records import Message
from train.retention import Retention, questions, retention, stated

FACTS = Path(__file__).parent.parent / "prompts" / "retention" / "facts.jsonl"
TASK = re.compile(r"(\d+) ([+-]) (\d+)")


def solved(question: str) -> int:
    """The answer, from the question's text."""
    a, sign, b = TASK.search(question).groups()
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


@given(st.integers(0, 400), st.integers(0, 1000))
def test_questions_are_fixed_and_right(count: int, seed: int) -> None:
    """The same seed asks the same questions, none twice, their answers are right, and none is negative."""
    asked = questions(count, seed)
    assert asked == questions(count, seed)
    assert len(dict(asked)) == len(asked) == count
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


SIZES = EvalConfig(retention_questions=9, neutral_texts=4)


def answers(off: int = 0, knows: bool = True) -> ScriptedEngine:
    """An engine that adds with an error, says little else, and likes right or wrong facts and dull texts better."""
    facts = map(json.loads, FACTS.read_text().splitlines())
    right = {fact["question"]: fact["right"] for fact in facts}

    def write(messages: Sequence[Message], number: int) -> str:
        asked = messages[-1]["content"]
        return f"It is {solved(asked) + off}." if TASK.search(asked) else "yes"

    def score(messages: Sequence[Message], reply: str) -> float:
        return -1.0 if (right.get(messages[-1]["content"]) == reply) == knows else -2.0

    return ScriptedEngine(write, score)


@pytest.mark.parametrize(("off", "knows", "share"), [(0, True, 1.0), (1, False, 0.0)])
def test_right_answers_count_one_each(run: Callable, off: int, knows: bool, share: float) -> None:
    """Arithmetic by what is said, facts by what is likelier; a number for each question."""
    found = run(retention(answers(off, knows), SIZES, seed=3))
    assert found.arithmetic == [share] * 9
    assert found.facts == [share] * 9


def test_long_answers_lose_nothing_by_length(run: Callable) -> None:
    """Every fact is known to an engine that knows them, answers of several words too; there are no more than 64."""
    found = run(retention(answers(), EvalConfig(retention_questions=100, neutral_texts=0), seed=3))
    assert found.facts == [1.0] * 64


@pytest.mark.parametrize(
    ("name", "row", "key"),
    [
        ("facts", {"question": "Who?", "right": "", "wrong": ["I"]}, "right"),
        ("facts", {"question": "Who?", "right": "I", "wrong": []}, "wrong"),
        ("neutral", {"title": "Tea"}, "text"),
    ],
)
def test_broken_row_is_named(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: dict, key: str
) -> None:
    """A person's own file is read from the working directory, and its bad row is named by file, line and key."""
    shutil.copytree(FACTS.parent, tmp_path / "prompts" / "retention")
    path = tmp_path / "prompts" / "retention" / f"{name}.jsonl"
    path.write_text("\n" + json.dumps(row))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: {key}")):
        run(retention(answers(), SIZES, seed=3))


def test_format_and_neutral_texts_are_measured(run: Callable) -> None:
    """A bare "yes" keeps to some of the forms; perplexity is that of the texts' log-likelihoods."""
    found = run(retention(answers(), SIZES, seed=3))
    assert set(found.format) == {0.0, 1.0}
    assert found.neutral == [2.0] * 4
    assert found.perplexity == pytest.approx(math.exp(2))


def test_same_questions_every_time(run: Callable) -> None:
    """Two policies are compared question by question, so the order must not change."""
    first, second = (run(retention(answers(), SIZES, seed=5)) for _ in range(2))
    assert first == second


def test_nothing_asked_is_nothing_kept(run: Callable) -> None:
    """Without questions there are no answers."""
    sizes = EvalConfig(retention_questions=0, neutral_texts=0)
    assert run(retention(ScriptedEngine(lambda messages, number: ""), sizes, seed=1)) == Retention()


def test_data_files_are_sound() -> None:
    """Facts have a right answer that is not among the wrong ones; questions and titles stand once."""
    facts = [json.loads(line) for line in FACTS.read_text().splitlines()]
    texts = [json.loads(line) for line in (FACTS.parent / "neutral.jsonl").read_text().splitlines()]
    assert len(facts) >= EvalConfig().retention_questions
    assert len(texts) >= EvalConfig().neutral_texts
    assert all(fact["right"] not in fact["wrong"] and len(set(fact["wrong"])) >= 2 for fact in facts)
    assert len({fact["question"] for fact in facts}) == len(facts)
    assert len({text["title"] for text in texts}) == len(texts)
