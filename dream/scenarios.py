"""What templates draw: scenarios, worked examples and evaluation pairs. All of it is seeded and needs no model."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from dream.config import Config
from dream.records import SIDES, EvalPair, Scenario, Side, SideText, Stance
from dream.template import PLAN
from dream.templates import Template

STANCES: tuple[Stance, Stance] = ("comply", "push_back")


def draw(template: Template, seed: int, scenario_id: str, covered: bool = False) -> Scenario:
    """The scenario that a template draws with this seed. A general template has no flawed side.

    `covered` draws by the coverage plan: see `Template.variables`.
    """
    slots = template.variables(seed, covered)
    wanted: tuple[Side, ...] = ("clear",) if template.general else SIDES
    sides = {side: _side(template, side, slots) for side in wanted}
    return Scenario(
        scenario_id=scenario_id,
        template=template.name,
        template_hash=template.hash,
        flaw=template.front.flaw,
        domain=template.domain(seed, covered),
        split=template.front.split,
        seed=seed,
        slots=slots,
        situation=template.render("situation", template.side_variables("clear", slots)),
        clear=sides["clear"],
        flawed=sides.get("flawed"),
    )


def draw_seed(config: Config, round_number: int, number: int) -> int:
    """A draw that no other round makes, for the n-th scenario of a template: one plan of draws a round."""
    return config.round_seed(round_number) * PLAN + number


def mirrored(template: Template, scenario: Scenario) -> Scenario | None:
    """The scenario in which the two directions change places: what was flawed is clear, word for word, and the other
    way round. None where the template has no `mirror`."""
    if scenario.flawed is None or not template.front.mirror:
        return None
    slots = template.mirrored(scenario.slots)
    return scenario.model_copy(
        update={
            "scenario_id": f"{scenario.scenario_id}m",
            "mirror_of": scenario.scenario_id,
            "slots": slots,
            "situation": template.render("situation", template.side_variables("clear", slots)),
            "clear": scenario.flawed,
            "flawed": scenario.clear,
        }
    )


def _side(template: Template, side: Side, slots: dict[str, object]) -> SideText:
    variables = template.side_variables(side, slots)
    return SideText(
        direction=template.render(side, variables),
        aims={stance: template.render(stance, variables) for stance in STANCES},
        mentions={stance: template.mentions(stance, variables) for stance in STANCES},
        examples={stance: template.render(f"{stance}_examples", variables).splitlines() for stance in STANCES},
    )


def plan(templates: Sequence[Template], seed: int) -> Iterator[tuple[Template, int]]:
    """An endless plan of draws (template, seed): balanced over kinds of flaw, then over the templates of each kind.

    Every pass visits each kind once, in a new order; a kind with several templates takes turns between them.
    """
    rng = random.Random(f"plan/{seed}")
    kinds: dict[str, list[Template]] = {}
    for template in templates:
        kinds.setdefault(template.front.flaw, []).append(template)
    turn = 0
    while True:
        order = sorted(kinds)
        rng.shuffle(order)
        for kind in order:
            yield kinds[kind][turn % len(kinds[kind])], rng.randrange(2**31)
        turn += 1


def eval_scenarios(templates: Sequence[Template], count: int, seed: int) -> list[tuple[Template, Scenario]]:
    """The first `count` scenarios that policies are evaluated on, with their templates; general ones are left out."""
    contrast = [template for template in templates if not template.general]
    draws = islice(plan(contrast, seed), count if contrast else 0)
    return [(one, draw(one, draw_seed, f"eval-{seed}-{number:04d}")) for number, (one, draw_seed) in enumerate(draws)]


def eval_pairs(templates: Sequence[Template], count: int, seed: int) -> list[EvalPair]:
    """`count` scenarios as evaluation pairs (two rows each: clear, flawed) from the templates' worked replies.

    On each side the two replies come from the same line of the examples, so both sides are worded alike.
    """
    rows: list[EvalPair] = []
    for _, scenario in eval_scenarios(templates, count, seed):
        for side, other in zip(SIDES, reversed(SIDES), strict=True):
            text = scenario.side(side)
            replies = text.examples
            rows.append(
                EvalPair(
                    pair_id=scenario.scenario_id,
                    side=side,
                    prompt=scenario.prompt(side),
                    comply=replies["comply"][scenario.seed % len(replies["comply"])],
                    push_back=replies["push_back"][scenario.seed % len(replies["push_back"])],
                    aims=text.aims,
                    mentions=text.mentions,
                    examples=text.examples,
                    other_examples=scenario.side(other).examples,
                )
            )
    return rows
