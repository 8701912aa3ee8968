"""Labelled replies that need no labeller: the templates' own worked examples, which are right by construction."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dream.judge.question import Labelled, Question
from dream.records import Stance
from dream.scenarios import STANCES, draw
from dream.templates import Template


def planted(templates: Sequence[Template], count: int, seed: int, odd: bool = False) -> list[Labelled]:
    """About `count` labelled replies, spread evenly over templates, sides and stances.

    They are worded as every second line of a template's examples, with `odd` as those in between: a judge that learned
    from the one half can be tested on the other. The question's worked examples leave that line out.
    """
    rng = random.Random(f"planted/{seed}/{odd}")
    found: list[Labelled] = []
    while templates and len(found) < count:
        for template in templates:
            scenario = draw(template, rng.randrange(2**31), "planted")
            side = rng.choice(scenario.sides)
            asked = Question.unanswered(scenario, side)
            for stance in STANCES:
                line = rng.choice(range(odd, len(asked.examples[stance]), 2))
                question = replace(
                    asked,
                    reply=asked.examples[stance][line],
                    examples=_without(asked.examples, line),
                    other_examples=_without(asked.other_examples, line),
                )
                found.append(Labelled(question, stance, template.name))
    return found


def _without(examples: Mapping[Stance, Sequence[str]], line: int) -> dict[Stance, list[str]]:
    """The worked replies of each stance but that of one line."""
    return {name: [reply for place, reply in enumerate(replies) if place != line] for name, replies in examples.items()}
