"""dream/scenarios.py and the draws of dream/template.py: mirrored twins and covered draws, tiny and shipped."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.records import Scenario
from dream.scenarios import STANCES, draw, mirrored
from dream.template import PLAN, Template
from dream.templates import load

SHIPPED = sorted((Path(__file__).parent.parent / "prompts" / "scenarios").glob("*.j2"))
MIRRORED = [path for path in SHIPPED if "\nmirror:" in path.read_text()]
SEEDS = [7, PLAN + 1, PLAN + 2, PLAN + 3]

loaded = cache(load)  # checking a template takes a while, and most tests look at all of them


@pytest.fixture(params=[None, *MIRRORED], ids=lambda path: path.stem if path else "tiny")
def mirroring(request: pytest.FixtureRequest, twin_templates: list[Template]) -> Template:
    """Each template that has a `mirror`: a tiny one, then those that are shipped."""
    return loaded(request.param) if request.param else twin_templates[0]


@pytest.fixture(scope="session")
def with_slots(tiny_templates: list[Template]) -> Callable[..., Template]:
    """A template with these slots, to draw from but not to render."""

    def build(domains: list[str] | None = None, **slots: Any) -> Template:
        front = tiny_templates[0].front.model_copy(update={"slots": slots, "domains": domains or ["writing"]})
        return replace(tiny_templates[0], front=front)

    return build


def twins(template: Template) -> list[tuple[Scenario, Scenario]]:
    """Some scenarios of a template, by dice and by plan, with a background, each with its twin."""
    found = []
    for seed in SEEDS:
        scenario = draw(template, seed, f"r1-{seed:06d}", covered=seed >= PLAN)
        scenario = scenario.model_copy(update={"background": "I help my sister today."})
        twin = mirrored(template, scenario)
        assert twin is not None
        found.append((scenario, twin))
    return found


def test_shipped_templates_have_mirrors() -> None:
    """Most shipped templates have a `mirror`, so that the tests here speak of them."""
    assert len(MIRRORED) > len(SHIPPED) / 2


def test_twin_of_the_twin_is_the_scenario(mirroring: Template) -> None:
    """Mirrored twice, a scenario is what it was, but for the names."""
    for scenario, twin in twins(mirroring):
        again = mirrored(mirroring, twin)
        names = {"scenario_id": scenario.scenario_id, "mirror_of": ""}
        assert again.mirror_of == twin.scenario_id
        assert again.model_copy(update=names) == scenario


def test_directions_change_places_under_another_situation(mirroring: Template) -> None:
    """What the twin says is flawed was clear, word for word, and the other way round; only the situation is new."""
    for scenario, twin in twins(mirroring):
        assert (twin.clear, twin.flawed) == (scenario.flawed, scenario.clear)
        assert twin.situation != scenario.situation
        assert twin.prompt("clear") != scenario.prompt("flawed")
        assert twin.background == scenario.background


def test_twin_is_what_its_slots_draw(mirroring: Template) -> None:
    """The template renders from the twin's slots exactly the texts that the twin took over, on both sides."""
    for _, twin in twins(mirroring):
        for side in twin.sides:
            variables, text = mirroring.side_variables(side, twin.slots), twin.side(side)
            assert mirroring.render("situation", variables) == twin.situation
            assert mirroring.render(side, variables) == text.direction
            for stance in STANCES:
                assert mirroring.render(stance, variables) == text.aims[stance]
                assert mirroring.render(f"{stance}_examples", variables).splitlines() == text.examples[stance]
                assert mirroring.mentions(stance, variables) == text.mentions[stance]


def test_twin_keeps_its_provenance(mirroring: Template) -> None:
    """A twin names the scenario that it mirrors, and the same template, kind of flaw, domain and seed."""
    for scenario, twin in twins(mirroring):
        assert twin.mirror_of == scenario.scenario_id != twin.scenario_id
        for key in ("template", "template_hash", "flaw", "domain", "split", "seed"):
            assert getattr(twin, key) == getattr(scenario, key)


def test_without_mirror_there_is_no_twin(tiny_templates: list[Template]) -> None:
    """A contrast template without `mirror` and a general one give no twin."""
    for template in tiny_templates:
        assert mirrored(template, draw(template, 1, "r1-000001")) is None


lists = st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True)


@given(values=lists, others=lists, plan=st.integers(0, 5), turn=st.integers(0, 3))
def test_a_pass_visits_every_value_once(with_slots, values: list[int], others: list[int], plan: int, turn: int) -> None:
    """Draws that follow one another visit each value of a list once before any comes again, whatever the other slots.

    So do slots that take their values from a list or a range, and domains.
    """
    span = {"range": [5, 4 + len(values)]}
    named = [f"domain {value}" for value in values]
    template = with_slots(named, values=values, others=others, again={"from": "values"}, span=span)
    seeds = range(plan * PLAN + turn * len(values), plan * PLAN + (turn + 1) * len(values))
    draws = [template.variables(seed, covered=True) for seed in seeds]
    assert sorted(drawn["values"] for drawn in draws) == sorted(values)
    assert sorted(drawn["again"] for drawn in draws) == sorted(values)
    assert sorted(drawn["span"] for drawn in draws) == list(range(5, 5 + len(values)))
    domains = [template.domain(seed, covered=True) for seed in seeds]
    assert sorted(domains) == sorted(named)
    assert draws == [template.variables(seed, covered=True) for seed in seeds]


@given(values=st.lists(st.integers(0, 99), min_size=2, max_size=12, unique=True), seed=st.integers(0, 3 * PLAN))
def test_turns_pass_over_what_is_taken(with_slots, values: list[int], seed: int) -> None:
    """A value that `not` keeps away is passed over, by plan as by dice."""
    template = with_slots(
        one=values, other={"from": "one", "not": "one"}, third={"range": [0, 99], "not": ["one", "other"]}
    )
    for covered in (True, False):
        drawn = template.variables(seed, covered)
        assert drawn["other"] in values
        assert len(set(drawn.values())) == 3


def test_slots_take_turns_apart(with_slots) -> None:
    """Slots with as many values each do not go in step, and another plan has another order."""
    template = with_slots(one=list(range(8)), other=list(range(8)))
    passes = [[template.variables(seed, covered=True) for seed in range(n * 8, n * 8 + 8)] for n in range(8)]
    met = {(drawn["one"], drawn["other"]) for draws in passes for drawn in draws}
    assert len(met) > 24
    assert len({tuple(drawn["one"] for drawn in draws) for draws in passes}) > 1
    assert passes[0] != [template.variables(PLAN + turn, covered=True) for turn in range(8)]


def test_dice_where_draws_are_not_covered(with_slots) -> None:
    """Without the plan values come by chance: some come again before all were drawn."""
    template = with_slots(["a", "b", "c", "d", "e", "f"], value=list(range(6)))
    rolls = [template.variables(seed) for seed in range(12)]
    assert rolls == [template.variables(seed, covered=False) for seed in range(12)]
    assert len({roll["value"] for roll in rolls[:6]}) < 6
    assert len({template.domain(seed) for seed in range(6)}) < 6


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_lists_are_covered(path: Path) -> None:
    """In every shipped template a pass through a list of values, or of domains, visits each once."""
    template = loaded(path)
    lists = {slot: values for slot, values in template.front.slots.items() if isinstance(values, list)}
    longest = max(map(len, lists.values()), default=0)
    draws = [template.variables(3 * PLAN + turn, covered=True) for turn in range(longest)]
    for slot, values in lists.items():
        drawn = [one[slot] for one in draws[: len(values)]]
        assert sorted(map(str, drawn)) == sorted(map(str, values))
    domains = template.front.domains
    assert sorted(template.domain(PLAN + turn, covered=True) for turn in range(len(domains))) == sorted(domains)


def test_scenario_takes_its_draw_from_the_plan(tiny_templates: list[Template]) -> None:
    """`draw` passes the choice on: covered scenarios hold the slots and the domain of the plan."""
    template = tiny_templates[0]
    for covered in (True, False):
        scenario = draw(template, PLAN + 4, "s", covered)
        assert scenario.slots == template.variables(PLAN + 4, covered)
        assert scenario.domain == template.domain(PLAN + 4, covered)
    goods = {draw(template, PLAN + turn, "s", covered=True).slots["good"] for turn in range(5)}
    assert goods == {"lamps", "chairs", "kettles", "tents", "mugs"}
