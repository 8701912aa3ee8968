"""What the policy must not forget: arithmetic, facts, the form of an answer, and plain text.

Models unlearn first what the training data has none of. Everything is asked in a fixed order, so that two policies
are compared question by question. Not covered: languages other than English, and knowledge beyond the commonplace
(name `lm-eval` tasks in `eval.lm_eval_tasks` for that).
"""

import asyncio
import math
import random
import re
from typing import Annotated, NamedTuple

from pydantic import Field

from dream import prompts
from dream.config import EvalConfig
from dream.engine import Engine, Sampling, mean
from dream.inputs import read_user_rows
from dream.paths import data_folder
from dream.records import Record, user
from train.instructions import different, instructions
from train.lm_tasks import TaskScore

Text = Annotated[str, Field(min_length=1)]
"""Not empty: nothing has no log-probability, and would be likelier than any answer."""
LARGEST = (9, 20, 50)
"""Numbers of sums go up to one of these: what a small model can lose are mostly the sums of one digit."""


class Retention(Record):
    """Question by question 1.0 for a right answer, else 0.0; `neutral` are mean negative log-likelihoods of texts, in
    nats a token; `tasks` are those of `lm-eval`, by name."""

    arithmetic: list[float] = []
    facts: list[float] = []
    format: list[float] = []
    neutral: list[float] = []
    tasks: dict[str, TaskScore] = {}

    @property
    def perplexity(self) -> float:
        """Of the neutral texts: exp of their mean, each text counting alike."""
        return math.exp(mean(self.neutral))


class Sum(NamedTuple):
    """`a sign b = result`."""

    a: int
    b: int
    sign: str
    result: int


class Fact(Record):
    """A row of prompts/retention/facts.jsonl."""

    question: Text
    right: Text
    wrong: list[Text] = Field(min_length=1)


class Neutral(Record):
    """A row of prompts/retention/neutral.jsonl."""

    title: Text
    text: Text


async def retention(engine: Engine, sizes: EvalConfig, seed: int) -> Retention:
    """Asks the served policy; `sizes.retention_questions` of each kind, or as many facts as the file has.

    Raises:
        DataError: a data file in prompts/retention is missing or broken.
    """
    count = sizes.retention_questions
    arithmetic, facts, form, neutral = await asyncio.gather(
        _arithmetic(engine, count, seed),
        _facts(engine, count, seed),
        _format(engine, count, seed),
        _neutral(engine, sizes.neutral_texts),
    )
    return Retention(arithmetic=arithmetic, facts=facts, format=form, neutral=neutral)


def questions(count: int, seed: int) -> list[tuple[str, int]]:
    """`count` different sums and differences of small numbers, as (question, answer), of three sizes in turn; or as
    many as there are (some 2,500)."""
    rng = random.Random(f"arithmetic/{seed}")

    def drawn(number: int) -> tuple[str, int]:
        one = drawn_sum(rng, LARGEST[number % len(LARGEST)])
        return prompts.render("retention/arithmetic", a=one.a, b=one.b, sign=one.sign), one.result

    return list(different(drawn, count).items())


def drawn_sum(rng: random.Random, largest: int) -> Sum:
    """Of two numbers from 1 to `largest`; a difference is not negative."""
    a, b = sorted((rng.randint(1, largest), rng.randint(1, largest)), reverse=True)
    sign = rng.choice("+-")
    return Sum(a, b, sign, a + b if sign == "+" else a - b)


def stated(text: str) -> int | None:
    """The number a reply gives: the last one of its first line, None when there is none."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.strip().splitlines()[0]) if text.strip() else []
    return int(float(found[-1])) if found and float(found[-1]).is_integer() else None


async def _arithmetic(engine: Engine, count: int, seed: int) -> list[float]:
    asked = questions(count, seed)
    answers = await asyncio.gather(*(_greedy(engine, question, 16) for question, _ in asked))
    return [float(stated(text) == answer) for text, (_, answer) in zip(answers, asked, strict=True)]


async def _facts(engine: Engine, count: int, seed: int) -> list[float]:
    """By likelihood, which asks what a model knows and not how it puts it: the right answer's mean log-probability a
    token must be the largest (the mean, as answers differ in length)."""
    facts = read_user_rows(data_folder("prompts") / "retention" / "facts.jsonl", Fact) if count else []
    random.Random(f"facts/{seed}").shuffle(facts)

    async def known(fact: Fact) -> float:
        right, *wrong = map(mean, await engine.score([user(fact.question)], [fact.right, *fact.wrong]))
        return float(right > max(wrong))

    return list(await asyncio.gather(*map(known, facts[:count])))


async def _format(engine: Engine, count: int, seed: int) -> list[float]:
    asked = instructions(count, seed)
    answers = await asyncio.gather(*(_greedy(engine, instruction.text, 32) for instruction in asked))
    return [float(instruction.kept(text)) for instruction, text in zip(asked, answers, strict=True)]


async def _neutral(engine: Engine, count: int) -> list[float]:
    texts = read_user_rows(data_folder("prompts") / "retention" / "neutral.jsonl", Neutral) if count else []

    async def surprise(row: Neutral) -> float:
        (logps,) = await engine.score([user(prompts.render("retention/neutral", title=row.title))], [row.text])
        return -mean(logps)

    return list(await asyncio.gather(*map(surprise, texts[:count])))


async def _greedy(engine: Engine, question: str, max_tokens: int) -> str:
    (reply,) = await engine.generate([user(question)], Sampling(1, max_tokens=max_tokens, temperature=0.0))
    return reply.text
