"""Labelled replies that need no labeller: the templates' own worked examples, which are right by construction."""

import random
from collections.abc import Mapping, Sequence

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
            text = scenario.side(side)
            others = [scenario.side(name).examples for name in scenario.sides if name != side]
            for stance in STANCES:
                line = rng.choice(range(odd, len(text.examples[stance]), 2))
                question = Question(
                    scenario.prompt(side),
                    text.examples[stance][line],
                    aims=text.aims,
                    mentions=text.mentions,
                    examples=_without(text.examples, line),
                    other_examples=_without(others[0], line) if others else {},
                )
                found.append(Labelled(question, stance, template.name))
    return found


def _without(examples: Mapping[Stance, Sequence[str]], line: int) -> dict[Stance, list[str]]:
    """The worked replies of each stance but that of one line."""
    return {name: [reply for place, reply in enumerate(replies) if place != line] for name, replies in examples.items()}
