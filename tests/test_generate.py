"""dream/generate.py and dream/demand.py: a whole round on the scripted engine, killed and continued too."""

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dream import template_checks
from dream.audit import Audit, View
from dream.config import Config
from dream.demand import Demand
from dream.diversity import Diversity
from dream.engine import Completion, Engine, Sampling, ScriptedEngine
from dream.errors import CallRefused, DataError, EngineError
from dream.generate import Progress, RoundDreamer
from dream.judge.combined import Judge
from dream.records import SIDES, ContrastPair, Dropped, Message, PreferencePair, Reply, Scenario, Verdict
from dream.scenarios import draw, eval_scenarios
from dream.selfplay import written
from dream.store import RoundStore, contrast_pairs, read_json, read_log
from dream.template import PLAN, Template
from dream.templates import load

pytestmark = pytest.mark.usefixtures("quick_disk")


class Round:
    """What is in a round's folder."""

    def __init__(self, folder: Path) -> None:
        self.scenarios = list(read_log(folder / "scenarios.jsonl", Scenario))
        self.replies = {row.reply_id: row for row in read_log(folder / "replies.jsonl", Reply)}
        self.verdicts = {row.reply_id: row for row in read_log(folder / "verdicts.jsonl", Verdict)}
        self.rows = list(read_log(folder / "pairs.jsonl", PreferencePair))
        self.pairs = list(contrast_pairs(self.rows))
        kept = {row.pair_id for row in self.rows}
        spare = contrast_pairs(read_log(folder / "spare.jsonl", PreferencePair))
        self.spare = list({pair.clear.pair_id: pair for pair in spare if pair.clear.pair_id not in kept}.values())
        self.general = list(read_log(folder / "general.jsonl", PreferencePair))
        self.dropped = list(read_log(folder / "dropped.jsonl", Dropped))
        self.folder = folder

    @property
    def audit(self) -> Audit:
        """What audit.json says."""
        return Audit.model_validate(read_json(self.folder / "audit.json"))


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


class CountingEngine(ScriptedEngine):
    """A scripted engine that remembers how many steered requests it had at a time."""

    now = most = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
        steered = messages[0]["role"] == "system"
        self.now += steered
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        completions = await super().generate(messages, sampling)
        self.now -= steered
        return completions


@pytest.fixture
def dream(tmp_path: Path, engine: ScriptedEngine, judge: Judge, tiny_templates: list[Template]) -> Callable[..., Round]:
    """Dreams a round into its folder, or goes on with it, and reads what is there afterwards.

    `stop` cancels it at the end of the first scenario for which it is true.
    """

    def go(
        config: Config,
        use: Engine = engine,
        templates: Sequence[Template] = tiny_templates,
        stop: Callable[[Progress], bool] | None = None,
        number: int = 1,
    ) -> Round:
        async def killed() -> None:
            def look(progress: Progress) -> None:
                if stop and stop(progress):
                    task.cancel()

            dreamer = RoundDreamer(
                use, judge, store, templates, config, round_number=number, policy="base", on_progress=look
            )
            task = asyncio.create_task(dreamer.run())
            await asyncio.wait_for(asyncio.gather(task, return_exceptions=bool(stop)), 20)

        folder = tmp_path / f"round_{number:02d}"
        store = RoundStore(folder)
        try:
            asyncio.run(killed())
        finally:
            store.close()
        return Round(folder)

    return go


@pytest.fixture
def config(settings_with) -> Callable[..., Config]:
    """A configuration with these values under `generate`, and so many fresh scenarios to measure on, which is none, as
    narrow templates have few draws."""
    return lambda fresh=0, **values: settings_with(generate={"concurrency": 8, **values}, eval={"fresh_pairs": fresh})


def check_every_scenario_ended_once(found: Round) -> None:
    """Each scenario is a pair, a spare or general one, or a dropped row with a reason, and only one of them."""
    ends = [pair.clear.pair_id for pair in [*found.pairs, *found.spare]]
    ends += [row.pair_id for row in found.general]
    ends += [row.scenario_id for row in found.dropped]
    assert sorted(ends) == sorted(scenario.scenario_id for scenario in found.scenarios)
    assert all(row.reason for row in found.dropped)


def check_no_draw_twice(found: Round) -> None:
    """No template was drawn twice with one seed, but for twins, which repeat that of the scenario that they mirror."""
    draws = Counter((scenario.template, scenario.seed, bool(scenario.mirror_of)) for scenario in found.scenarios)
    assert [draw for draw, count in draws.items() if count > 1] == []


@pytest.mark.parametrize(("pairs", "concurrency"), [(1, 1), (1, 64), (7, 1), (7, 8)])
def test_exactly_the_wanted_pairs(dream, config, pairs: int, concurrency: int) -> None:
    """A round holds exactly the wanted contrast pairs and its share of general ones, whatever the concurrency."""
    found = dream(config(pairs=pairs, concurrency=concurrency))
    assert len(found.pairs) == pairs
    assert len(found.rows) == 2 * pairs
    assert len(found.general) == -(-2 * pairs // 3)
    check_every_scenario_ended_once(found)


def test_sides_of_a_scenario_are_steered_together(dream, config, script) -> None:
    """Neither side of a scenario waits for the other's steered replies, so that few scenarios fill the engine."""
    engine = CountingEngine(script)
    dream(config(pairs=2, concurrency=1), use=engine)
    assert engine.most == 2


def test_kinds_of_flaw_are_balanced(dream, config) -> None:
    """Accepted pairs are spread evenly over the kinds of flaw, and held-out templates are never dreamed."""
    found = dream(config(pairs=12, concurrency=1))
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


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize(("accepted", "concurrency"), [(1, 8), (2, 1), (3, 8)])
def test_killed_round_is_continued(
    dream, config, script, tiny_templates, twin_templates, accepted: int, concurrency: int, twins: bool
) -> None:
    """A round that is killed and run again holds the wanted pairs, nothing twice, and says what was interrupted."""
    settings, templates = config(pairs=6, concurrency=concurrency), twin_templates if twins else tiny_templates
    uneven = UnevenEngine(script)
    before = dream(settings, uneven, templates, stop=lambda progress: progress.accepted >= accepted)
    assert accepted <= len(before.pairs)
    found = dream(settings, uneven, templates)
    assert found.pairs[: len(before.pairs)] == before.pairs
    assert len({pair.clear.pair_id for pair in found.pairs}) == len(found.pairs) == 6
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)


def test_killed_round_does_not_draw_again(dream, config, script) -> None:
    """A draw is not dreamed a second time after a kill that left an earlier one without a trace."""
    settings = config(pairs=6, concurrency=2)
    dream(settings, StuckEngine(script), stop=lambda progress: progress.accepted >= 3)
    check_no_draw_twice(dream(settings))


def test_finished_round_stays_as_it_is(dream, config) -> None:
    """Running a finished round again changes nothing and asks the engine nothing."""
    before = dream(config(pairs=3))
    silent = ScriptedEngine(lambda messages, number: pytest.fail("the engine was asked"))
    assert dream(config(pairs=3), silent).scenarios == before.scenarios


@pytest.mark.parametrize(("pairs", "concurrency"), [(1, 1), (5, 8), (6, 1)])
def test_exactly_the_wanted_pairs_with_twins(dream, config, twin_templates, pairs: int, concurrency: int) -> None:
    """Where a scenario gives two pairs a round holds exactly the wanted ones too, and what is too many is spare."""
    found = dream(config(pairs=pairs, concurrency=concurrency), templates=twin_templates)
    assert len(found.pairs) == pairs
    assert len({pair.clear.pair_id for pair in [*found.pairs, *found.spare]}) == pairs + len(found.spare)
    assert (pairs + len(found.spare)) % 2 == 0
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)


def test_every_accepted_scenario_has_its_twin(dream, config, twin_templates) -> None:
    """Each pair comes with one of the same four replies the other way round, under a scenario on record."""
    found = dream(config(pairs=8), templates=twin_templates)
    scenarios = {scenario.scenario_id: scenario for scenario in found.scenarios}
    pairs = {pair.clear.pair_id: pair for pair in [*found.pairs, *found.spare]}
    twins = {pair_id: pair for pair_id, pair in pairs.items() if "mirror_of" in pair.clear.meta}
    assert len(pairs) == 2 * len(twins)
    for pair_id, twin in twins.items():
        original = pairs[twin.clear.meta["mirror_of"]]
        assert scenarios[pair_id].mirror_of == original.clear.pair_id
        assert (twin.clear.chosen, twin.clear.rejected) == (original.flawed.rejected, original.flawed.chosen)
        assert (twin.flawed.chosen, twin.flawed.rejected) == (original.clear.rejected, original.clear.chosen)
        for row in (twin.clear, twin.flawed):
            assert row.prompt == scenarios[pair_id].prompt(row.side)
            assert scenarios[pair_id].background == scenarios[original.clear.pair_id].background


def test_mirror_can_be_switched_off(dream, config, twin_templates) -> None:
    """With `generate.mirror: false` each scenario gives one pair, whatever its template has."""
    found = dream(config(pairs=4, mirror=False), templates=twin_templates)
    assert not [scenario for scenario in found.scenarios if scenario.mirror_of]
    assert not [row for row in found.rows if "mirror_of" in row.meta]
    check_every_scenario_ended_once(found)


def test_twin_without_its_pair_is_interrupted(dream, config, twin_templates) -> None:
    """A kill between a twin's scenario and its pair leaves a row that says so, once, and the round goes on."""
    settings = config(pairs=4, general_share=0, concurrency=1)
    before = dream(settings, templates=twin_templates)
    twin = before.scenarios[-1].scenario_id
    path = before.folder / "pairs.jsonl"
    path.write_text("".join(line for line in path.open() if f'"pair_id":"{twin}"' not in line))
    for _ in range(2):
        found = dream(settings, templates=twin_templates)
        assert [row.reason for row in found.dropped if row.scenario_id == twin] == ["interrupted"]
        assert len(found.pairs) == 4
        check_every_scenario_ended_once(found)


def test_twin_that_cannot_be_made_drops_its_scenario(dream, config, tmp_path: Path, template_text, monkeypatch) -> None:
    """A scenario whose twin does not render is dropped whole, with the reason, and not kept as well."""
    monkeypatch.setattr(template_checks, "DRAWS", [])  # a fault so rare that no check sees it
    path = tmp_path / "moody.j2"
    path.write_text(
        template_text("moody", mirror=True)
        .replace("n: {range: [20, 900]}", "n: {range: [20, 29]}")
        .replace("m: {range: [20, 900], not: n}", 'm: {range: [20, 29], not: n}\n  q: {expr: "7 // (n - 25)"}')
        .replace("in the store.", "in the store.{% if q %}{% endif %}")
    )
    found = dream(config(pairs=16, near_duplicate=1), templates=[load(path)])
    assert len(found.pairs) == 16
    failed = {row.scenario_id for row in found.dropped if row.reason == "template_error"}
    assert failed & {scenario.scenario_id for scenario in found.scenarios}, "no twin was tried that fails"
    assert not failed & {pair.clear.pair_id for pair in [*found.pairs, *found.spare]}


def test_ids_are_not_used_again_after_a_kill(dream, config, tmp_path: Path, template_text, monkeypatch) -> None:
    """A scenario that could not be drawn, and so left only a dropped row, keeps its number when the round goes on."""
    monkeypatch.setattr(template_checks, "DRAWS", [])  # a fault so rare that no check sees it
    path = tmp_path / "moody.j2"
    path.write_text(
        template_text("moody")
        .replace("  good:", '  k: {range: [0, 4]}\n  q: {expr: "7 // (k - 3)"}\n  good:')
        .replace("in the store.", "in the store.{% if q %}{% endif %}")
    )
    dropped = tmp_path / "round_01" / "dropped.jsonl"
    settings, templates = config(pairs=6, concurrency=1), [load(path)]
    dream(settings, templates=templates, stop=lambda progress: dropped.stat().st_size > 0)
    found = dream(settings, templates=templates)
    assert len(found.pairs) == 6
    failed = [row.scenario_id for row in found.dropped if row.reason == "template_error"]
    ids = [*failed, *(scenario.scenario_id for scenario in found.scenarios)]
    assert failed
    assert len(set(ids)) == len(ids)


@pytest.fixture
def telling(script) -> Callable[[int], Callable[[Sequence[Message], int], str]]:
    """A script whose right replies, and no others, say thanks, where the listed number is divisible by `divisor`."""

    def build(divisor: int) -> Callable[[Sequence[Message], int], str]:
        def write(messages: Sequence[Message], number: int) -> str:
            reply = script(messages, number)
            asked = re.search(r"have (\d+) \w+ in the store\. Write a label that says (\d+)", messages[-1]["content"])
            if not asked or int(asked[1]) % divisor:
                return reply
            right = (re.search(r"\bnot\b|\bwrong\b", reply) is not None) == (asked[1] != asked[2])
            return f"{reply} Thanks." if right else reply

        return write

    return build


def thankful(pairs: Sequence[ContrastPair]) -> float:
    """The share of rows that give away the right reply."""
    rows = [row for pair in pairs for row in (pair.clear, pair.flawed)]
    return sum("Thanks" in row.chosen[0]["content"] for row in rows) / len(rows)


@pytest.fixture
def simple_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit that finds thanks alone, and a choice that avoids them; the real ones go by chance in small sets."""

    def audit(pairs: Sequence[ContrastPair], *_: object) -> Audit:
        view = View(name="reply_within", bound=0.6, over=thankful(pairs) > 0)
        return Audit(pairs=len(pairs), templates=2, views=[view])

    def choose(pairs: Sequence[ContrastPair], count: int, *_: object) -> list[ContrastPair]:
        return sorted(pairs, key=lambda pair: thankful([pair]))[:count]

    monkeypatch.setattr("dream.generate.audit", audit)
    monkeypatch.setattr("dream.generate.choose", choose)


@pytest.mark.usefixtures("simple_audit")
def test_giveaway_is_balanced_out(dream, config, telling) -> None:
    """Where the audit finds a giveaway more pairs are dreamed and the set is chosen anew among all of them."""
    found = dream(config(pairs=12, general_share=0, spare_share=1), ScriptedEngine(telling(3)))
    assert found.audit.over == []
    assert len(found.pairs) == len({pair.clear.pair_id for pair in found.pairs}) == found.audit.pairs == 12
    assert len(found.spare) >= 12
    assert thankful(found.pairs) == 0 < thankful(found.spare)
    check_every_scenario_ended_once(found)
    silent = ScriptedEngine(lambda messages, number: pytest.fail("the engine was asked"))
    assert dream(config(pairs=12, general_share=0, spare_share=1), silent).rows == found.rows


def test_without_spare_pairs_the_giveaway_is_reported(dream, config, telling) -> None:
    """With no pairs to choose from the round stays as it is, and audit.json names what gives it away."""
    found = dream(config(pairs=12, general_share=0, spare_share=0, concurrency=1), ScriptedEngine(telling(1)))
    assert len(found.pairs) == 12
    assert found.spare == []
    assert [view.name for view in found.audit.over] == ["reply_within"]
    assert "thanks" in found.audit.over[0].giveaways[0].text


def test_set_is_not_changed_for_nothing(dream, config, telling, monkeypatch) -> None:
    """Where every candidate gives itself away the first set stays."""
    monkeypatch.setattr(RoundStore, "exchange", lambda store, chosen: pytest.fail("the pairs were exchanged"))
    found = dream(config(pairs=12, general_share=0), ScriptedEngine(telling(1)))
    assert "reply_within" in [view.name for view in found.audit.over]
    assert (len(found.pairs), thankful(found.pairs)) == (12, 1)
    assert len(found.spare) >= 3


def test_spare_pairs_are_not_dreamed_for_nothing(dream, config) -> None:
    """Where nothing is given away no further pair is dreamed."""
    found = dream(config(pairs=12, general_share=0, concurrency=1))
    assert (len(found.pairs), found.spare, found.audit.over) == (12, [], [])


@pytest.mark.usefixtures("simple_audit")
@pytest.mark.parametrize("further", [1, 6, 11])
def test_round_killed_while_it_is_balanced(dream, config, telling, further: int) -> None:
    """Killed while more pairs are dreamed for balance, the round ends as wanted and with nothing twice."""
    settings, engine = config(pairs=12, general_share=0, spare_share=1), ScriptedEngine(telling(3))
    before = dream(
        settings, engine, stop=lambda progress: progress.accepted == 12 and progress.scenarios > 12 + further
    )
    assert not (before.folder / "audit.json").exists()
    found = dream(settings, engine)
    assert len(found.pairs) == len({pair.clear.pair_id for pair in found.pairs}) == 12
    assert thankful(found.pairs) == 0
    check_every_scenario_ended_once(found)
    check_no_draw_twice(found)


@pytest.mark.usefixtures("simple_audit")
@pytest.mark.parametrize("step", ["dream.store.Log.replace", "dream.generate.write_json"])
def test_round_killed_around_the_exchange(dream, config, telling, monkeypatch, step: str) -> None:
    """Killed before the chosen pairs took their place, or before audit.json, the round ends as wanted too."""
    settings, engine = config(pairs=12, general_share=0, spare_share=1), ScriptedEngine(telling(3))
    with monkeypatch.context() as patch:
        patch.setattr(step, lambda *arguments: (_ for _ in ()).throw(EngineError("killed")))
        with pytest.raises(EngineError, match="killed"):
            dream(settings, engine)
    found = dream(settings, engine)
    assert len(found.pairs) == len({pair.clear.pair_id for pair in found.pairs}) == 12
    assert thankful(found.pairs) == 0
    assert found.audit.over == []
    check_every_scenario_ended_once(found)


@pytest.fixture
def narrow_template(tmp_path: Path, template_text) -> Callable[[bool], Template]:
    """A template with thirty sound situations only, six numbers of five goods, with a `mirror` or without."""

    def build(mirror: bool) -> Template:
        path = tmp_path / "narrow.j2"
        path.write_text(template_text("narrow", mirror=mirror).replace("[20, 900]", "[20, 25]"))
        return load(path)

    return build


def sound(scenario: Scenario) -> str:
    """What the clear side of a scenario says."""
    return f"{scenario.situation} {scenario.clear.direction}"


def check_no_prompt_twice(*rounds: Round) -> None:
    """No accepted scenario, or twin, says on its clear side what another says; spare ones count in the last round."""
    kept = {pair.clear.pair_id for pair in [*(pair for found in rounds for pair in found.pairs), *rounds[-1].spare]}
    said = Counter(sound(one) for found in rounds for one in found.scenarios if one.scenario_id in kept)
    assert said.total() == len(kept)
    assert [text for text, count in said.items() if count > 1] == []


@pytest.mark.parametrize("mirror", [False, True])
def test_no_scenario_is_dreamed_twice_over_rounds(dream, config, narrow_template, mirror: bool) -> None:
    """What repeats a kept scenario of this or an earlier round is dropped, naming it; twins count as kept."""
    settings = config(pairs=8, near_duplicate=1, general_share=0, coverage=False)
    rounds = [dream(settings, templates=[narrow_template(mirror)], number=number) for number in (1, 2)]
    assert [len(found.pairs) for found in rounds] == [8, 8]
    check_no_prompt_twice(*rounds)
    scenarios = {one.scenario_id: one for found in rounds for one in found.scenarios}
    repeated = [row for row in rounds[1].dropped if row.reason == "near_duplicate" and row.stage == "draw"]
    assert "r1" in {row.detail.partition("-")[0] for row in repeated}
    assert all(sound(scenarios[row.scenario_id]) == sound(scenarios[row.detail]) for row in repeated)
    check_every_scenario_ended_once(rounds[1])


@pytest.mark.parametrize("mirror", [False, True])
def test_no_scenario_that_is_measured_on_is_dreamed(dream, config, narrow_template, mirror: bool) -> None:
    """What repeats a fresh scenario of the evaluation is dropped, naming it, and is no twin of a pair either."""
    template = narrow_template(mirror)
    settings = config(pairs=8, near_duplicate=1, general_share=0, coverage=False, fresh=8)
    measured = {one.scenario_id: sound(one) for _, one in eval_scenarios([template], 8, settings.seed)}
    found = dream(settings, templates=[template])
    kept = {pair.clear.pair_id for pair in (*found.pairs, *found.spare)}
    assert len(found.pairs) == 8
    assert not {sound(one) for one in found.scenarios if one.scenario_id in kept} & set(measured.values())
    assert {row.detail for row in found.dropped if row.reason == "near_duplicate"} & set(measured)
    check_every_scenario_ended_once(found)


def test_near_duplicates_are_those_above_the_bound(dream, config, narrow_template) -> None:
    """With a low bound a scenario that is a word apart is dropped too, so that the round stops short."""
    settings = config(pairs=12, near_duplicate=0.5, general_share=0, max_scenarios_per_pair=3)
    found = dream(settings, templates=[narrow_template(False)])
    assert 0 < len(found.pairs) < 12
    assert {row.reason for row in found.dropped} == {"near_duplicate"}
    check_every_scenario_ended_once(found)


def test_spare_pairs_are_remembered_after_a_kill(dream, config, narrow_template) -> None:
    """A continued round dreams nothing that repeats one of its spare pairs."""
    template = narrow_template(True)
    assert len(dream(config(pairs=1, general_share=0), templates=[template]).spare) > 1
    check_no_prompt_twice(dream(config(pairs=18, near_duplicate=1, general_share=0), templates=[template]))


@pytest.mark.parametrize("coverage", [True, False])
def test_draws_take_turns(dream, config, tiny_templates, coverage: bool) -> None:
    """By plan each template draws each of its values once before any again; without `coverage` it does not."""
    found = dream(config(pairs=20, coverage=coverage, general_share=0), templates=tiny_templates)
    passes = []
    for name in ("stock", "memo"):
        drawn = {one.seed % PLAN: one.slots["good"] for one in found.scenarios if one.template == name}
        assert sorted(drawn) == list(range(1, len(drawn) + 1))
        passes += [[drawn[turn] for turn in range(start, start + 5)] for start in range(5, len(drawn) - 5, 5)]
    assert passes
    assert all(len(set(goods)) == 5 for goods in passes) == coverage


def drawn(demand: Demand, count: int) -> list[str]:
    """The names of the templates that a demand asks for, when every scenario gives a pair."""
    names = []
    for _ in range(count):
        name = demand.next().name
        demand.accepted[name] += 1
        demand.drawn[name] += 1
        names.append(name)
    return names


def test_dice_are_seeded_and_keep_no_turns(tiny_templates: list[Template]) -> None:
    """With `dice` templates come by chance, the same for the same seed; without they take turns."""
    templates = tiny_templates[:2]
    planned = drawn(Demand(templates, 60), 60)
    thrown = drawn(Demand(templates, 60, dice="a"), 60)
    assert planned == ["stock", "memo"] * 30
    assert any(one == next_one for one, next_one in itertools.pairwise(thrown))
    assert 15 < thrown.count("stock") < 45
    assert thrown == drawn(Demand(templates, 60, dice="a"), 60)
    assert thrown != drawn(Demand(templates, 60, dice="b"), 60)


def test_dice_go_on_after_a_kill(tiny_templates: list[Template]) -> None:
    """A demand that knows how many draws there were throws on, and not the same throws again."""
    whole = drawn(Demand(tiny_templates[:2], 40, dice="a"), 40)
    continued = Demand(tiny_templates[:2], 40, dice="a", drawn=Counter(whole[:15]))
    assert drawn(continued, 25) == whole[15:]


def test_rounds_without_coverage_throw_dice(dream, config, settings_with) -> None:
    """Without `coverage` a round's templates come by seeded chance, which each round and seed throws anew."""

    def order(number: int, seed: int = 1, *, coverage: bool = False) -> list[str]:
        generate = {"concurrency": 1, "pairs": 16, "general_share": 0, "coverage": coverage}
        found = dream(settings_with(seed=seed, generate=generate, eval={"fresh_pairs": 0}), number=number)
        check_every_scenario_ended_once(found)
        return [scenario.template for scenario in found.scenarios]

    assert order(1, coverage=True)[:4] == ["stock", "memo", "stock", "memo"]
    thrown = order(2)
    assert thrown[:16] != (["stock", "memo"] * 8)
    assert set(thrown) == {"stock", "memo"}
    assert len({tuple(names[:16]) for names in (thrown, order(3), order(4, seed=2))}) == 3


STRAYED = "and a zebra"


def patterned(messages: Sequence[Message], number: int) -> str:
    """Words replies as the tiny templates do; where the number said is divisible by three, with something invented."""
    text = messages[-1]["content"]
    note = re.search(r"\(([^()]*)\)$", text)
    if note and (found := re.search(r"gives (\d+) (\w+), not (\d+)", note[1])):
        claimed, _, said = found.groups()
        reply = f"I see {claimed} on the list, not {said}"
    else:
        found = re.search(r"label with (\d+) (\w+)", note[1]) if note else re.search(r"says (\d+) (\w+)\.$", text)
        if not found:
            return text  # no background
        said, good = found.groups()
        reply = f"We have {said} {good} for you today"
    return f"{reply} {STRAYED}." if int(said) % 3 == 0 else f"{reply}."


@pytest.mark.parametrize("allowed", [None, 0, 2, 3])
def test_invented_words_are_not_trained_on(dream, config, settings_with, likelihood, allowed: int | None) -> None:
    """A reply with more new word pairs than allowed is abstained on, names the first, and is in no pair."""
    settings = settings_with(
        generate={"pairs": 8, "concurrency": 8, "dreamer": "slots"}, filters={"max_new_word_pairs": allowed}
    )
    found = dream(settings, ScriptedEngine(patterned, likelihood))
    assert len(found.pairs) == 8
    check_every_scenario_ended_once(found)
    strayed = {reply_id for reply_id, reply in found.replies.items() if STRAYED in reply.text}
    assert 0 < len(strayed) < len(found.replies)
    invented = {reply_id for reply_id, verdict in found.verdicts.items() if verdict.reason.startswith("invented")}
    trained = {row.meta[key] for row in [*found.rows, *found.general] for key in ("chosen_reply", "rejected_reply")}
    if allowed in (None, 3):  # "today and", "and a", "a zebra"
        assert not invented
        assert strayed & trained
        return
    assert invented
    assert invented <= strayed
    assert all(found.verdicts[reply_id].abstain for reply_id in invented)
    assert {found.verdicts[reply_id].reason.split(" ", 2)[2] for reply_id in invented} <= {"and"}
    assert not strayed & trained
    assert "invented" in {row.detail for row in found.dropped}


def test_kinds_stay_balanced_where_one_gives_two_pairs(tiny_templates, twin_templates) -> None:
    """A kind whose scenarios give two pairs each gets half the attempts, not more pairs."""
    demand = Demand([twin_templates[0], tiny_templates[1]], 200)
    while demand.missing:
        template = demand.next()
        demand.attempts[template.name] += 1
        demand.accepted[template.name] += 2 if template.front.mirror else 1
    assert abs(demand.accepted["stock"] - demand.accepted["memo"]) <= 2
    assert demand.attempts["memo"] >= 2 * demand.attempts["stock"] - 2


def test_audit_and_diversity_are_written(dream, config, twin_templates) -> None:
    """A round leaves the figures on its own pairs, also where it is too small to be audited or stops short."""
    found = dream(config(pairs=4), templates=twin_templates)
    assert found.audit.pairs == 4
    assert all("12 are needed" in view.reason for view in found.audit.views)
    measured = Diversity.model_validate(read_json(found.folder / "diversity.json"))
    assert (measured.pairs, measured.unmirrored) == (4, sum("mirror_of" not in row.clear.meta for row in found.pairs))
    assert measured.vendi_score is None


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


def test_call_that_the_engine_refuses_costs_its_scenario(dream, config, script) -> None:
    """As one whose prompt is too long for the engine: the scenario ends with that reason, and the round goes on."""

    def picky(messages: Sequence[Message], number: int) -> str:
        if "5" in messages[-1]["content"]:
            raise CallRefused("the engine refused a call: too long")
        return script(messages, number)

    found = dream(config(pairs=4), ScriptedEngine(picky))
    assert len(found.pairs) == 4
    refused = [row for row in found.dropped if row.reason == "engine_refused"]
    assert refused
    assert {(row.stage, row.detail) for row in refused} == {("engine", "the engine refused a call: too long")}
    check_every_scenario_ended_once(found)


@pytest.fixture
def stuck_template(tmp_path: Path, template_text) -> Template:
    """A template that the scripted engine cannot comply with."""
    path = tmp_path / "stuck.j2"
    path.write_text(template_text("stuck", "impossible_step").replace("label", "poster"))
    return load(path)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_template_that_never_passes_does_not_stop_the_others(
    dream, config, tiny_templates, stuck_template, concurrency: int
) -> None:
    """The wanted pairs come from the other templates, and the hopeless one does not eat the round."""
    found = dream(config(pairs=6, concurrency=concurrency), templates=[*tiny_templates, stuck_template])
    assert {pair.clear.meta["template"] for pair in found.pairs} == {"stock", "memo"}
    assert len(found.pairs) == 6
    tried = Counter(scenario.template for scenario in found.scenarios)
    assert 0 < tried["stuck"] < 30
    assert {row.reason for row in found.dropped if row.template == "stuck"} <= {"no_comply_on_clear", "surplus"}
    check_every_scenario_ended_once(found)


def test_general_template_that_never_passes_does_not_stop_the_pairs(
    dream, config, tmp_path: Path, tiny_templates, template_text
) -> None:
    """General pairs have scenarios of their own to use up, and fall behind as a template does."""
    path = tmp_path / "hopeless.j2"
    path.write_text(template_text("hopeless", "none").replace("label", "poster"))
    found = dream(config(pairs=6, max_scenarios_per_pair=4), templates=[*tiny_templates[:2], load(path)])
    assert (len(found.pairs), found.general) == (6, [])
    general = [one for one in found.scenarios if one.template == "hopeless"]
    assert len(general) == 4 * 4  # a share of 25 % of the rows is four of sixteen
    contrast = [place for place, one in enumerate(found.scenarios) if one.template != "hopeless"]
    assert contrast[5] < len(found.scenarios) // 2


def test_demand_is_the_same_after_a_kill(dream, config, twin_templates, stuck_template) -> None:
    """A continued round tries a template that never passes about as often as an undisturbed one does."""
    settings, templates = config(pairs=10, concurrency=1), [*twin_templates, stuck_template]
    dream(settings, templates=templates, stop=lambda progress: progress.accepted >= 6)
    rounds = [dream(settings, templates=templates, number=number) for number in (1, 2)]
    continued, undisturbed = ([one.template for one in found.scenarios].count("stuck") for found in rounds)
    assert abs(continued - undisturbed) <= 4


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


def test_scenario_that_the_dreamer_words_anew_is_not_dreamed_again(dream, config, script, narrow_template) -> None:
    """What a scenario is about is told by the template: other words for the same draw make no other scenario."""
    voices = itertools.cycle(["Be so kind as to make", "I would like to have from you today", "What we need now is"])

    def writer(messages: Sequence[Message], number: int) -> str:
        text = messages[-1]["content"]
        if "SOUND: ..." not in text:
            return script(messages, number)
        clear, flawed = re.findall(r"^(?:Sound|Flawed): Write (.*)$", text, re.MULTILINE)
        return f"SOUND: {next(voices)} {clear}\nFLAWED: {next(voices)} {flawed}"

    settings = config(pairs=60, dreamer="write", general_share=0, max_scenarios_per_pair=1)
    found = dream(settings, ScriptedEngine(writer), templates=[narrow_template(False)])
    kept = {row.pair_id for row in found.rows}
    drawn = [tuple(sorted(one.slots.items())) for one in found.scenarios if one.scenario_id in kept]
    assert len(set(drawn)) == len(drawn)
    assert "near_duplicate" in {row.reason for row in found.dropped}


@pytest.mark.parametrize(
    ("line", "direction"),
    [("**SOUND:** {}", "{}"), ("**SOUND: {}**", "{}"), ('SOUND: "{}"', "{}"), ("- `SOUND`: `{}`", "{}")],
)
def test_dreamers_markdown_is_not_part_of_the_direction(tiny_templates, line: str, direction: str) -> None:
    """Chat models put labels in bold and sentences in quotation marks."""
    scenario = draw(tiny_templates[0], 1, "r1-000001")
    said = {side: scenario.side(side).direction.replace("Write", "Make") for side in SIDES}
    answer = f"{line.format(said['clear'])}\n{line.replace('SOUND', 'FLAWED').format(said['flawed'])}"
    found = asyncio.run(written(ScriptedEngine(lambda messages, number: answer), scenario))
    assert found is not None
    assert {side: found.side(side).direction for side in SIDES} == said


def test_dreamers_answer_that_was_cut_off_is_not_used(tiny_templates: list[Template]) -> None:
    """Its last direction lacks its end."""
    scenario = draw(tiny_templates[0], 1, "r1-000001")
    clear, flawed = (scenario.side(side).direction.replace("Write", "Make") for side in SIDES)

    class Short(ScriptedEngine):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> list[Completion]:
            return [Completion(f"SOUND: {clear}\nFLAWED: {flawed}", 256, "length")]

    assert asyncio.run(written(Short(lambda messages, number: ""), scenario)) is None


def test_dreamer_must_keep_what_the_direction_names(tiny_templates: list[Template]) -> None:
    """A wording with the right numbers that loses a word which `mentions` asks for cannot be used."""
    scenario = draw(tiny_templates[0], 1, "r1-000001")

    def worded(good: str) -> Scenario | None:
        said = [scenario.side(side).mentions["comply"][0] for side in SIDES]
        answer = f"SOUND: Make a label for {said[0]} {good}.\nFLAWED: Make a label for {said[1]} {good}."
        return asyncio.run(written(ScriptedEngine(lambda messages, number: answer), scenario))

    kept = worded(scenario.slots["good"])
    assert kept is not None
    assert kept.clear.direction.startswith("Make a label")
    assert worded("things") is None


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
