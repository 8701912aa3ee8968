"""train/instructions.py: the form of an answer is checked by code."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import instructions as module
from train.instructions import KINDS, instructions

KEPT = {
    "_one_word": ("Cold.", "The opposite is cold."),
    "_yes_or_no": ('"Yes."', "Yes, it is hot."),
    "_number": ("7", "seven"),
    "_upper_case": ("RIVER", "river"),
    "_lower_case": ("the river is wide.", "The river is wide."),
}


@pytest.mark.parametrize("name", KEPT)
def test_form_is_told_from_what_is_not(name: str) -> None:
    """An answer in the form asked for passes, one in another form does not."""
    rng = random.Random(1)
    rng.choice = lambda options: options[0]  # type: ignore[method-assign]
    instruction = getattr(module, name)(rng)
    good, bad = KEPT[name]
    assert instruction.kept(good)
    assert not instruction.kept(bad)


def test_lists_and_words_are_counted() -> None:
    """Number of lines, of items on a line, exact words and keys of an object."""
    rng = random.Random(3)
    bullets = module._bullets(rng)
    count = int(bullets.text.split()[1])
    assert bullets.kept("\n".join(["- one"] * count))
    assert not bullets.kept("\n".join(["- one"] * (count + 1)))
    assert not bullets.kept("\n".join(["one"] * count))
    commas = module._commas(rng)
    count = int(commas.text.split()[1])
    assert commas.kept(", ".join(["one"] * count))
    assert not commas.kept(", ".join(["one"] * (count + 1)))
    repeat = module._repeat(rng)
    assert repeat.kept(repeat.text.split('"')[1])
    assert not repeat.kept("Sure: " + repeat.text.split('"')[1])
    begins = module._begins(rng)
    assert begins.kept(begins.text.split('"')[1] + " and more.")
    made = module._json(rng)
    keys = made.text.split('"')[1::2]
    assert made.kept("```json\n" + "{" + ", ".join(f'"{key}": 1' for key in keys) + "}\n```")
    assert not made.kept("{}")


@given(st.integers(0, 60), st.integers(0, 1000))
def test_instructions_are_fixed(count: int, seed: int) -> None:
    """The same seed asks the same, fewer are the beginning of more, and none is asked twice."""
    asked = [instruction.text for instruction in instructions(count, seed)]
    assert asked == [instruction.text for instruction in instructions(count + 5, seed)][:count]
    assert len(set(asked)) == count


def test_no_instruction_is_given_twice() -> None:
    """Also where more are wanted than there are."""
    asked = [instruction.text for instruction in instructions(500, 1)]
    assert 300 < len(asked) == len(set(asked)) < 400


@given(st.text(), st.integers(0, len(KINDS) - 1))
def test_checkers_take_any_text(text: str, kind: int) -> None:
    """Whatever a model writes is kept or not, never an error."""
    assert KINDS[kind](random.Random(1)).kept(text) in (True, False)
