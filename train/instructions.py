"""Instructions about the form of an answer, and code that checks whether it was kept: no judge is needed."""

import json
import random
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Check = Callable[[str], bool]
T = TypeVar("T")

WORDS = (
    "river",
    "window",
    "garden",
    "music",
    "bread",
    "winter",
    "mountain",
    "letter",
    "bicycle",
    "coffee",
    "lantern",
    "harbour",
)
LISTS = ("fruits", "colours", "animals", "sports", "tools", "countries", "vegetables", "trees")
KEYS = (("name", "age"), ("city", "country"), ("title", "year"), ("colour", "size"))
WITH_OPPOSITE = ("hot", "up", "big", "day", "open", "wet", "fast", "young")
YES_OR_NO = ("Is fire hot?", "Can a stone swim?", "Is snow white?", "Do fish live in water?", "Is the sun cold?",
             "Can a bird fly?", "Is a mouse bigger than a horse?")  # fmt: skip

TRIES = 20
"""Draws for each question wanted: one that is asked twice would count twice, which tests of chance do not know."""


class Instruction(NamedTuple):
    """What is asked, and whether an answer kept to the form."""

    text: str
    kept: Check


def instructions(count: int, seed: int) -> list[Instruction]:
    """`count` different instructions, the kinds in turn until they have no new ones; or all there are (some 360).

    The same seed gives the same, and more begin with the same ones.
    """
    rng = random.Random(f"format/{seed}")

    def drawn(number: int) -> tuple[str, Instruction]:
        one = KINDS[number % len(KINDS)](rng)
        return one.text, one

    return list(different(drawn, count).values())


def different(drawn: Callable[[int], tuple[str, T]], count: int) -> dict[str, T]:
    """What the first `count` different texts stand for, of draws numbered from 0; or of all that many draws bring."""
    made: dict[str, T] = {}
    for number in range(TRIES * count):
        if len(made) == count:
            break
        text, value = drawn(number)
        made.setdefault(text, value)
    return made


def stripped(answer: str) -> str:
    """The answer without white space, quotes and a full stop around it."""
    return answer.strip().strip("\"'*`.").strip()


def _one_word(rng: random.Random) -> Instruction:
    word = rng.choice(WITH_OPPOSITE)
    return Instruction(
        f"What is the opposite of {word}? Answer with one word.",
        lambda answer: re.fullmatch(r"[A-Za-z-]+", stripped(answer)) is not None,
    )


def _yes_or_no(rng: random.Random) -> Instruction:
    question = rng.choice(YES_OR_NO)
    return Instruction(
        f'{question} Answer only with "yes" or "no".', lambda answer: stripped(answer).lower() in ("yes", "no")
    )


def _number(rng: random.Random) -> Instruction:
    count = rng.randint(3, 9)
    return Instruction(
        f"How many apples are {count} apples? Answer with a number in digits and nothing else.",
        lambda answer: stripped(answer).isdigit(),
    )


def _bullets(rng: random.Random) -> Instruction:
    count, things = rng.randint(2, 4), rng.choice(LISTS)

    def kept(answer: str) -> bool:
        lines = [line for line in answer.strip().splitlines() if line.strip()]
        return len(lines) == count and all(line.lstrip().startswith("- ") for line in lines)

    return Instruction(
        f'Name {count} {things}, one on each line, every line beginning with "- ". Write nothing else.', kept
    )


def _commas(rng: random.Random) -> Instruction:
    count, things = rng.randint(2, 4), rng.choice(LISTS)
    return Instruction(
        f"Name {count} {things} on one line with commas between them, and nothing else.",
        lambda answer: (
            "\n" not in answer.strip() and len(re.split(r",|\band\b", answer.replace(", and", ","))) == count
        ),
    )


def _lower_case(rng: random.Random) -> Instruction:
    word = rng.choice(WORDS)
    return Instruction(
        f"Write one short sentence about a {word} in lower case letters only.",
        lambda answer: bool(answer.strip()) and answer == answer.lower(),
    )


def _upper_case(rng: random.Random) -> Instruction:
    word = rng.choice(WORDS)
    return Instruction(
        f"Write the word {word} in capital letters and nothing else.", lambda answer: stripped(answer) == word.upper()
    )


def _repeat(rng: random.Random) -> Instruction:
    first, second = rng.sample(WORDS, 2)
    return Instruction(
        f'Repeat exactly these words and nothing else: "{first} {second}"',
        lambda answer: stripped(answer).lower() == f"{first} {second}",
    )


def _begins(rng: random.Random) -> Instruction:
    word, other = rng.sample(WORDS, 2)
    return Instruction(
        f'Write one sentence about a {other}. Begin it with the word "{word.capitalize()}".',
        lambda answer: stripped(answer).lower().startswith(word),
    )


def _json(rng: random.Random) -> Instruction:
    keys = rng.choice(KEYS)

    def kept(answer: str) -> bool:
        try:
            made = json.loads(re.sub(r"^```(?:json)?|```$", "", answer.strip()).strip())
        except ValueError:
            return False
        return isinstance(made, dict) and set(made) == set(keys)

    return Instruction(f'Write a JSON object with the keys "{keys[0]}" and "{keys[1]}" and nothing else.', kept)


KINDS: tuple[Callable[[random.Random], Instruction], ...] = (
    _one_word, _yes_or_no, _number, _bullets, _commas, _lower_case, _upper_case, _repeat, _begins, _json,
)  # fmt: skip
