"""An engine without a model that gives the templates' worked replies, so that the orchestrator alone is measured."""

from collections.abc import Sequence

from dream.config import Config
from dream.engine import ScriptedEngine
from dream.records import Message
from dream.scenarios import STANCES, draw, draw_seed
from dream.selfplay import note
from dream.templates import Template

BACKGROUND = "I help my sister with our small stall and we are late today."


def worked_engine(templates: Sequence[Template], config: Config, draws: int, delay_s: float) -> ScriptedEngine:
    """Gives the stance that a note asks for and complies with a plain prompt, in round 1 of `config`, for the first
    `draws` scenarios of each template; scenarios behind these get nonsense and are dropped."""
    noted: dict[str, list[str]] = {}
    plain: dict[str, str] = {}
    for template in templates:
        for number in range(draws + 1):
            seed = draw_seed(config, 1, number)
            scenario = draw(template, seed, "bench", covered=config.generate.coverage)
            for side in scenario.sides:
                text = scenario.side(side)
                plain[scenario.prompt(side)[0]["content"]] = text.examples["comply"][
                    seed % len(text.examples["comply"])
                ]
                for stance in STANCES:
                    noted[note(scenario, side, stance)] = text.examples[stance]

    def write(messages: Sequence[Message], number: int) -> str:
        text = messages[-1]["content"]
        if text.startswith("("):
            replies = noted.get(text[1:-1])
            return replies[len(text) % len(replies)] if replies else "I do not know this note."
        return plain.get(text.removeprefix(BACKGROUND).strip(), BACKGROUND)

    return ScriptedEngine(write, delay_s=delay_s)
