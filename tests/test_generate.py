"""dream/generate.py: a whole round on the scripted engine, killed and continued too."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dream.config import Config
from dream.engine import Completion, Engine, Sampling, ScriptedEngine
from dream.errors import DataError, EngineError
from dream.generate import Progress, RoundDreamer
from dream.judge.combined import Judge
from dream.records import SIDES, Dropped, Message, PreferencePair, Reply, Scenario, Verdict
from dream.store import RoundStore, contrast_pairs, read_log
from dream.templates import Template, load

pytestmark = pytest.mark.usefixtures("quick_disk")


class Round:
    """What is in a round's folder."""

    def __init__(self, folder: Path) -> None:
        self.scenarios = list(read_log(folder / "scenarios.jsonl", Scenario))
        self.replies = {row.reply_id: row for row in read_log(folder / "replies.jsonl", Reply)}
        self.verdicts = {row.reply_id: row for row in read_log(folder / "verdicts.jsonl", Verdict)}
        self.rows = list(read_log(folder / "pairs.jsonl", PreferencePair))
        self.pairs = list(contrast_pairs(self.rows))
        self.general = list(read_log(folder / "general.jsonl", PreferencePair))
        self.dropped = list(read_log(folder / "dropped.jsonl", Dropped))


class UnevenEngine(ScriptedEngine):
    """A scripted engine whose calls take unlike times, so that scenarios overtake each other."""

    calls = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        await asyncio.sleep(0.002 * (self.calls * 7 % 11))
        return await super().generate(messages, sampling)


class StuckEngine(ScriptedEngine):
    """A scripted engine whose first call does not come back."""

    calls = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        await asyncio.sleep(3600 if self.calls == 1 else 0)
        return await super().generate(messages, sampling)


@pytest.fixture
def dream(tmp_path: Path, engine: ScriptedEngine, judge: Judge, tiny_templates: list[Template]) -> Callable[..., Round]:
    """Dreams a round into one folder, or goes on with it, and reads what is there afterwards.

    `stop_after` cancels it as soon as so many pairs are accepted.
    """

    def go(
        config: Config, use: Engine = engine, templates: Sequence[Template] = tiny_templates, stop_after: int = 0
    ) -> Round:
        async def killed() -> None:
            def look(progress: Progress) -> None:
                if stop_after and progress.accepted >= stop_after:
                    task.cancel()

            dreamer = RoundDreamer(
                use, judge, store, templates, config, round_number=1, policy="base", on_progress=look
            )
            task = asyncio.create_task(dreamer.run())
            await asyncio.wait_for(asyncio.gather(task, return_exceptions=bool(stop_after)), 20)

        store = RoundStore(tmp_path / "round_01")
        try:
            asyncio.run(killed())
        finally:
            store.close()
        return Round(tmp_path / "round_01")

    return go


@pytest.fixture
def config(settings_with) -> Callable[..., Config]:
    """A configuration with these values under `generate`."""
    return lambda **values: settings_with(generate={"concurrency": 8, **values})


def check_every_scenario_ended_once(found: Round) -> None:
    """Each scenario is a pair, a general pair or a dropped row with a reason, and only one of them."""
    ends = [pair.clear.pair_id for pair in found.pairs]
    ends += [row.pair_id for row in found.general]
    ends += [row.scenario_id for row in found.dropped]
    assert sorted(ends) == sorted(scenario.scenario_id for scenario in found.scenarios)
    assert all(row.reason for row in found.dropped)


def check_no_draw_twice(found: Round) -> None:
    """No template was drawn twice with one seed."""
    draws = Counter((scenario.template, scenario.seed) for scenario in found.scenarios)
    assert [draw for draw, count in draws.items() if count > 1] == []


@pytest.mark.parametrize(("pairs", "concurrency"), [(1, 1), (1, 64), (7, 1), (7, 8)])
def test_exactly_the_wanted_pairs(dream, config, pairs: int, concurrency: int) -> None:
    """A round holds exactly the wanted contrast pairs and its share of general ones, whatever the concurrency."""
    found = dream(config(pairs=pairs, concurrency=concurrency))
    assert len(found.pairs) == pairs
    assert len(found.rows) == 2 * pairs
    assert len(found.general) == -(-2 * pairs // 3)
    check_every_scenario_ended_once(found)


def test_kinds_of_flaw_are_balanced(dream, config) -> None:
    """Accepted pairs are spread evenly over the kinds of flaw, and held-out templates are never dreamed."""
    found = dream(config(pairs=12))
    flaws = Counter(pair.clear.meta["flaw"] for pair in found.pairs)
    assert set(flaws) == {"contradicts_given_data", "false_premise"}
    assert max(flaws.values()) - min(flaws.values()) <= 2
    assert {scenario.template for scenario in found.scenarios} == {"stock", "memo", "plain"}


def test_every_pair_can_be_traced(dream, config, tiny_templates: list[Template]) -> None:
    """A pair's texts are replies on record with verdicts, under the prompt of a scenario on record."""
    found = dream(config(pairs=4))
    scenarios = {scenario.scenario_id: scenario for scenario in found.scenarios}
    hashes = {template.name: template.hash for template in tiny_templates}
    for row in [*found.rows, *found.general]:
        assert row.prompt == scenarios[row.meta["scenario_id"]].prompt(row.side)
        assert row.meta["template_hash"] == hashes[row.meta["template"]]
        for place, message in (("chosen_reply", row.chosen), ("rejected_reply", row.rejected)):
            assert message == [{"role": "assistant", "content": found.replies[row.meta[place]].text}]
            assert not found.verdicts[row.meta[place]].abstain


def test_own_mistakes_are_the_rejected_side(dream, config) -> None:
    """Where the policy complies with a flawed direction unasked, that reply is the rejected one."""
    found = dream(config(pairs=4))
    assert {pair.flawed.meta["rejected_source"] for pair in found.pairs} == {"on_policy"}
    assert {pair.flawed.meta["chosen_source"] for pair in found.pairs} == {"steered"}


def test_background_is_the_same_on_both_sides(dream, config) -> None:
    """The dreamer's sentence stands in front of both directions; with `dreamer: slots` there is none."""
    found = dream(config(pairs=2))
    assert all(scenario.background for scenario in found.scenarios)
    for pair in found.pairs:
        clear, flawed = (row.prompt[0]["content"] for row in (pair.clear, pair.flawed))
        assert [re.sub(r"\d+", "#", clear)] == [re.sub(r"\d+", "#", flawed)]


def test_slots_alone_need_no_dreamer(dream, config) -> None:
    """With `dreamer: slots` a scenario is what its template drew."""
    found = dream(config(pairs=2, dreamer="slots"))
    assert {scenario.background for scenario in found.scenarios} == {""}


@pytest.mark.parametrize(("stop_after", "concurrency"), [(1, 8), (2, 1), (3, 8)])
def test_killed_round_is_continued(dream, config, script, stop_after: int, concurrency: int) -> None:
    """A round that is killed and run again holds the wanted pairs, nothing twice, and says what was interrupted."""
    settings = config(pairs=6, concurrency=concurrency)
    uneven = UnevenEngine(script)
    before = dream(settings, uneven, stop_after=stop_after)
    assert len(before.pairs) >= stop_after
    found = dream(settings, uneven)
    assert found.pairs[: len(before.pairs)] == before.pairs
    assert len({pair.clear.pair_id for pair in found.pairs}) == len(found.pairs) == 6
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)


def test_killed_round_does_not_draw_again(dream, config, script) -> None:
    """A draw is not dreamed a second time after a kill that left an earlier one without a trace."""
    settings = config(pairs=6, concurrency=2)
    dream(settings, StuckEngine(script), stop_after=3)
    check_no_draw_twice(dream(settings))


def test_finished_round_stays_as_it_is(dream, config) -> None:
    """Running a finished round again changes nothing and asks the engine nothing."""
    before = dream(config(pairs=3))
    silent = ScriptedEngine(lambda messages, number: pytest.fail("the engine was asked"))
    assert dream(config(pairs=3), silent).scenarios == before.scenarios


def test_steering_never_reaches_the_pairs(dream, config, script) -> None:
    """No pair shows a note, an aim or the steering system prompt, although some replies quote them."""

    asked: Counter[str] = Counter()

    def leaky(messages: Sequence[Message], number: int) -> str:
        text = messages[-1]["content"]
        asked[text] += 1
        note = re.search(r"\(([^()]*)\)$", text)
        leaks = [
            f"As the note says: {script(messages, number)}",
            f"{note[1] if note else ''} {script(messages, number)}",
        ]
        return leaks[asked[text] - 1] if note and asked[text] <= 2 else script(messages, number)

    found = dream(config(pairs=3, steered_samples=5), ScriptedEngine(leaky))
    assert "steering_leak" in {verdict.reason for verdict in found.verdicts.values()}
    assert len(found.pairs) == 3
    aims = [aim for scenario in found.scenarios for side in scenario.sides for aim in scenario.side(side).aims.values()]
    for row in [*found.rows, *found.general]:
        assert [message["role"] for message in [*row.prompt, *row.chosen, *row.rejected]] == [
            "user",
            "assistant",
            "assistant",
        ]
        texts = [message["content"] for message in [*row.prompt, *row.chosen, *row.rejected]]
        assert not any("note" in text or "(" in text or "brackets" in text for text in texts)
        assert not any(aim in text for text in texts for aim in aims)


@pytest.fixture
def stuck_template(tmp_path: Path, template_text) -> Template:
    """A template that the scripted engine cannot comply with."""
    path = tmp_path / "stuck.j2"
    path.write_text(template_text("stuck", "impossible_step").replace("label", "poster"))
    return load(path)


def test_template_that_never_passes_does_not_stop_the_others(dream, config, tiny_templates, stuck_template) -> None:
    """The wanted pairs come from the other templates, and the hopeless one does not eat the round."""
    found = dream(config(pairs=6), templates=[*tiny_templates, stuck_template])
    assert {pair.clear.meta["template"] for pair in found.pairs} == {"stock", "memo"}
    assert len(found.pairs) == 6
    tried = Counter(scenario.template for scenario in found.scenarios)
    assert 0 < tried["stuck"] < 30
    assert {row.reason for row in found.dropped if row.template == "stuck"} <= {"no_comply_on_clear", "surplus"}
    check_every_scenario_ended_once(found)


def test_round_stops_short_when_nothing_passes(dream, config, stuck_template: Template) -> None:
    """After the allowed number of scenarios the round ends, with a reason for each of them."""
    found = dream(config(pairs=2, max_scenarios_per_pair=3), templates=[stuck_template])
    assert found.pairs == []
    assert [row.reason for row in found.dropped] == ["no_comply_on_clear"] * 6
    check_every_scenario_ended_once(found)


def test_right_policy_is_counted_not_trained_on(dream, config, script, tiny_templates: list[Template]) -> None:
    """Scenarios in which the policy already routes right on both sides are dropped for that reason."""

    def wise(messages: Sequence[Message], number: int) -> str:
        text = messages[-1]["content"]
        asked = re.search(r"have (\d+) (\w+) in the store\. Write a label that says (\d+) \w+\.$", text)
        if asked and asked[1] != asked[3]:
            return f"I count {asked[1]} {asked[2]} and not {asked[3]}; shall I change it?"
        return script(messages, number)

    found = dream(config(pairs=2, max_scenarios_per_pair=3), ScriptedEngine(wise), tiny_templates[:1])
    assert [row.reason for row in found.dropped] == ["already_right"] * 6


def test_dreamer_words_both_directions(dream, config, script) -> None:
    """With `dreamer: write` usable wordings become the directions, and unusable answers are dropped with a reason."""
    answers = iter(range(10_000))

    def writer(messages: Sequence[Message], number: int) -> str:
        text = messages[-1]["content"]
        if "SOUND: ..." not in text:
            return script(messages, number)
        clear, flawed = re.findall(r"^(?:Sound|Flawed): Write (.*)$", text, re.MULTILINE)
        return (
            f"SOUND: Please make {clear}\nFLAWED: Please make {flawed}" if next(answers) % 2 else "I would rather not."
        )

    found = dream(config(pairs=3, dreamer="write"), ScriptedEngine(writer))
    assert len(found.pairs) == 3
    assert all("Please make a label" in row.prompt[0]["content"] for row in found.rows)
    assert "dreamer_unreadable" in {row.reason for row in found.dropped}
    check_every_scenario_ended_once(found)


def test_dead_engine_leaves_a_round_to_continue(dream, config, script) -> None:
    """An engine that dies ends the round with its error, and another engine finishes it."""
    asked = iter(range(10_000))

    def dying(messages: Sequence[Message], number: int) -> str:
        if next(asked) > 60:
            raise EngineError("gone")
        return script(messages, number)

    with pytest.raises(EngineError, match="gone"):
        dream(config(pairs=6), ScriptedEngine(dying))
    found = dream(config(pairs=6))
    assert len(found.pairs) == 6
    check_every_scenario_ended_once(found)


def test_draw_that_fails_does_not_end_the_round(dream, config, tmp_path: Path, template_text, tiny_templates) -> None:
    """A template that cannot be drawn with some seed costs that scenario, not the round."""
    path = tmp_path / "moody.j2"
    path.write_text(
        template_text("moody", "rare")
        .replace("  good:", '  k: {range: [0, 9]}\n  q: {expr: "7 // (k - 8)"}\n  good:')
        .replace("in the store.", "in the store.{# {{ q }} #}{% if q %}{% endif %}")
    )
    found = dream(config(pairs=6), templates=[load(path), *tiny_templates])
    assert len(found.pairs) == 6


def test_training_templates_are_needed(dream, config, tiny_templates: list[Template]) -> None:
    """Without a contrast template to train on there is nothing to dream, and that is the user's error."""
    with pytest.raises(DataError, match="no training templates"):
        dream(config(pairs=1), templates=tiny_templates[2:])


def test_sides_of_a_pair_differ_in_the_direction_only(dream, config) -> None:
    """Both rows of a pair belong to one scenario and one seed, one a side."""
    for pair in dream(config(pairs=4)).pairs:
        assert (pair.clear.side, pair.flawed.side) == SIDES
        assert pair.clear.pair_id == pair.flawed.pair_id
        assert pair.clear.meta["seed"] == pair.flawed.meta["seed"]
        assert pair.clear.prompt != pair.flawed.prompt
