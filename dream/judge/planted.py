"""Labelled replies that need no labeller: the templates' own worked examples, which are right by construction."""

import random
from collections.abc import Sequence

from dream.judge.question import Labelled, Question
from dream.scenarios import STANCES, draw
from dream.templates import Template


def planted(templates: Sequence[Template], count: int, seed: int) -> list[Labelled]:
    """About `count` labelled replies, spread evenly over templates, sides and stances."""
    rng = random.Random(f"planted/{seed}")
    examples: list[Labelled] = []
    while templates and len(examples) < count:
        for template in templates:
            scenario = draw(template, rng.randrange(2**31), "planted")
            side = rng.choice(scenario.sides)
            text = scenario.side(side)
            for stance in STANCES:
                reply = rng.choice(scenario.side(side).examples[stance])
                question = Question(scenario.prompt(side), reply, aims=text.aims, mentions=text.mentions)
                examples.append(Labelled(question, stance, template.name))
    return examples
