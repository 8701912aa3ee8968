"""Dreaming one round: scenarios in, accepted contrast pairs out. One coroutine a scenario, no barrier between stages.

Each of `concurrency` workers takes the scenario the round needs most, awaits its stages one after the other, and takes
the next; so requests of all stages fill the engine's batch together, and memory is bounded by the workers.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dream.audit import Audit, audit
from dream.choose import choose
from dream.config import Config
from dream.demand import Demand
from dream.diversity import Diversity, NearDuplicates, diversity
from dream.embed import Embed
from dream.engine import Engine
from dream.errors import CallRefused, DataError, TemplateError
from dream.filters import Judged, Refusal, already_right, contrast_pair, mirrored_pair, preference_pair
from dream.judge.combined import Judge
from dream.judge.question import Question
from dream.judge.rules import new_word_pairs
from dream.records import (
    RIGHT_STANCE,
    WRONG_STANCE,
    ContrastPair,
    Dropped,
    PreferencePair,
    Reply,
    Scenario,
    Side,
    Verdict,
)
from dream.scenarios import draw, draw_seed, eval_scenarios, mirrored
from dream.selfplay import on_policy, steered, with_background, written
from dream.stop import Stop
from dream.store import RoundStore, drop_reasons, read_log, round_folders, write_json
from dream.template import Template

FINISHING = "stopping: no scenario is begun, those under way are finished and stored; a second signal stops at once"


@dataclass(frozen=True)
class Progress:
    """What the terminal shows while a round is dreamed."""

    accepted: int
    wanted: int
    scenarios: int
    tokens: int
    seconds: float


class RoundDreamer:
    """Dreams one round into its folder. `run` can be called again after a kill and finishes what is missing."""

    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        store: RoundStore,
        templates: Sequence[Template],
        config: Config,
        *,
        round_number: int,
        policy: str,
        embed: Embed | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        stop: Stop | None = None,
    ) -> None:
        """`embed` is for the audit and the measures of diversity, which do without some figures where it is missing.

        When `stop` is asked for no scenario is begun, and `run` ends with those that are under way.
        """
        self._engine, self._judge, self._store, self._config = engine, judge, store, config
        self._round, self._policy, self._embed, self._on_progress = round_number, policy, embed, on_progress
        self._stop = stop or Stop()
        self._by_name = {template.name: template for template in templates if template.front.split == "train"}
        contrast = [template for template in self._by_name.values() if not template.general]
        general = [template for template in self._by_name.values() if template.general]
        if not contrast:
            raise DataError("no training templates; at least one needs `split: train` and a flaw")
        pairs, share = config.generate.pairs, config.generate.general_share
        dice = "" if config.generate.coverage else f"template/{config.seed}/{round_number}"
        self._contrast = Demand(contrast, pairs, dice=dice)
        self._general = Demand(general, math.ceil(2 * pairs * share / (1 - share)) if general else 0)
        self._seen = NearDuplicates(config.generate.near_duplicate)
        self._balanced_anew = False
        self._changed = asyncio.Event()
        self._count = 0
        self._tokens = 0
        self._began = time.monotonic()

    async def run(self) -> tuple[Audit, Diversity]:
        """Dreams until the wanted number of pairs is stored, or the allowed number of scenarios is used up; then audits
        and, where that finds a giveaway, chooses the set anew among all accepted pairs.

        `audit.json` and `diversity.json` of the round's folder hold the figures.

        Raises:
            Stopped: `stop` was asked for; what was under way is stored.
        """
        self._recover()
        await self._fill()
        found = self._audit(self._store.pairs)
        if found.over and not self._contrast.missing:
            found = await self._balanced(found)
        write_json(self._store.folder / "audit.json", found.model_dump())
        measured = diversity(self._store.pairs, self._embed)
        write_json(self._store.folder / "diversity.json", measured.model_dump())
        return found, measured

    async def _fill(self) -> None:
        workers = [asyncio.create_task(self._work()) for _ in range(self._config.generate.concurrency)]
        try:
            with self._stop.gently(FINISHING):
                await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _audit(self, pairs: Sequence[ContrastPair]) -> Audit:
        return audit(pairs, self._config.audit, self._embed, self._config.seed)

    async def _balanced(self, found: Audit) -> Audit:
        """The audit of the best set among the accepted pairs, after dreaming some more; the set is changed only if that
        brings fewer giveaways."""
        wanted, share = self._config.generate.pairs, self._config.generate.spare_share
        self._contrast.wanted = max(self._contrast.wanted, wanted + math.ceil(wanted * share))
        await self._fill()
        candidates = [*self._store.pairs, *self._store.spare]
        chosen = choose(candidates, wanted, self._config.audit, self._embed, self._config.seed)
        again = self._audit(chosen)
        if len(again.over) >= len(found.over):
            return found
        self._store.exchange(chosen)
        self._balanced_anew = True
        return again

    def summary(self) -> dict[str, Any]:
        """What was accepted and dropped, by kind of flaw and template, and which kinds and templates gave nothing."""
        accepted: Counter[str] = Counter(pair.clear.meta["flaw"] for pair in self._store.pairs)
        kinds = {template.front.flaw for template in self._contrast.templates}
        tried = [template.name for template in self._contrast.templates if self._contrast.attempts[template.name]]
        return {
            "wanted": self._config.generate.pairs,
            "accepted": len(self._store.pairs),
            "mirrored": sum("mirror_of" in pair.clear.meta for pair in self._store.pairs),
            "spare": len(self._store.spare),
            "balanced_anew": self._balanced_anew,
            "general": len(self._store.general),
            "general_wanted": self._general.wanted,
            "scenarios": self._count,
            "accepted_by_flaw": dict(accepted.most_common()),
            "starving": sorted(kinds - set(accepted)),
            "starving_templates": [name for name in tried if not self._contrast.accepted[name]],
            "dropped": drop_reasons(self._store.folder),
            "tokens": self._tokens,
            "seconds": round(time.monotonic() - self._began, 1),
            "judge": self._judge.quality.model_dump(),
        }

    def _recover(self) -> None:
        """Counts what an earlier process did; scenarios that it left under way get a row that says so."""
        done, begun = self._store.done, set()
        for scenario in read_log(self._store.folder / "scenarios.jsonl", Scenario):
            if scenario.scenario_id not in done:
                self._store.drop(self._dropped(scenario, "generate", "interrupted"))
            begun.add(scenario.scenario_id)
            if scenario.mirror_of:
                continue
            self._count = max(self._count, _number(scenario.scenario_id))
            demand, name = self._demand(scenario.template), scenario.template
            demand.attempts[name] += 1
            demand.drawn[name] = max(demand.drawn[name], scenario.seed - self._seed(0))
        for dropped in self._store.dropped:  # some could not be drawn and left no scenario
            self._count = max(self._count, _number(dropped.scenario_id))
            demand, name = self._demand(dropped.template), dropped.template
            demand.failed[name] += 1
            demand.attempts[name] += dropped.scenario_id not in begun
        for pair in (*self._store.pairs, *self._store.spare):
            self._contrast.accepted[pair.clear.meta["template"]] += 1
        for row in self._store.general:
            self._general.accepted[row.meta["template"]] += 1
        self._remember_known()

    def _remember_known(self) -> None:
        """The scenarios that policies are measured on, and those of pairs of this and of earlier rounds, so that none
        like them is dreamed."""
        trained, fresh = list(self._by_name.values()), self._config.eval.fresh_pairs
        for _, scenario in eval_scenarios(trained, fresh, self._config.seed):
            self._seen.add(scenario.scenario_id, self._substance(scenario))
        spare = {pair.clear.meta["scenario_id"] for pair in self._store.spare}
        for folder in round_folders(self._store.folder.parent).values():
            kept = spare | {row.pair_id for row in read_log(folder / "pairs.jsonl", PreferencePair)}
            for scenario in read_log(folder / "scenarios.jsonl", Scenario):
                if scenario.scenario_id in kept:
                    self._seen.add(scenario.scenario_id, self._substance(scenario))

    def _demand(self, template: str) -> Demand:
        known = self._by_name.get(template)
        return self._general if known is not None and known.general else self._contrast

    def _open(self) -> list[Demand]:
        """What lacks pairs and has scenarios left to try; empty where the round is complete or is to stop."""
        if self._stop.asked is not None:
            return []
        most = self._config.generate.max_scenarios_per_pair
        return [
            demand
            for demand in (self._general, self._contrast)
            if demand.missing and demand.attempts.total() < most * demand.wanted
        ]

    async def _work(self) -> None:
        while lacking := self._open():
            waiting = [demand for demand in lacking if not demand.covered]
            if not waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            demand = min(waiting, key=lambda one: one.served / one.wanted)
            await self._one(demand, demand.next())
            self._changed.set()
        self._changed.set()

    async def _one(self, demand: Demand, template: Template) -> None:
        """One scenario, from its number to its end."""
        for count in (demand.attempts, demand.under_way, demand.drawn):
            count[template.name] += 1
        self._count += 1
        scenario_id = f"r{self._round}-{self._count:06d}"
        try:
            seed = self._seed(demand.drawn[template.name])
            scenario = draw(template, seed, scenario_id, covered=self._config.generate.coverage)
            kept = await self._dream(template, scenario)
        except (TemplateError, CallRefused) as error:
            # One draw in many may not render, or be too long for the engine: a row, and not the end of the round.
            refused = isinstance(error, CallRefused)
            stage, reason = ("engine", "engine_refused") if refused else ("draw", "template_error")
            self._store.drop(
                Dropped(scenario_id=scenario_id, template=template.name, stage=stage, reason=reason, detail=str(error))
            )
            kept = 0
        finally:
            demand.under_way[template.name] -= 1
        demand.accepted[template.name] += kept
        demand.failed[template.name] += not kept
        self._on_progress(
            Progress(
                accepted=len(self._store.pairs),
                wanted=self._config.generate.pairs,
                scenarios=self._count,
                tokens=self._tokens,
                seconds=time.monotonic() - self._began,
            )
        )

    def _substance(self, scenario: Scenario) -> str:
        """What a scenario is about, without what the dreamer writes, which is new each time."""
        worded_anew = self._config.generate.dreamer == "write"
        asked = scenario.clear.aims["comply"] if worded_anew else scenario.clear.direction
        return f"{scenario.situation} {asked}"

    def _seed(self, number: int) -> int:
        return draw_seed(self._config, self._round, number)

    async def _dream(self, template: Template, scenario: Scenario) -> int:
        """One scenario's way from draw to pair; how many pairs it gave."""
        if not template.general and (twin := self._seen.find(self._substance(scenario))):
            self._store.add("scenarios", scenario)
            return self._drop(scenario, "draw", "near_duplicate", twin)
        dreamer = self._config.generate.dreamer
        if dreamer == "background":
            scenario = await with_background(self._engine, scenario)
        worded = await written(self._engine, scenario) if dreamer == "write" else scenario
        self._store.add("scenarios", worded or scenario)
        if worded is None:
            return self._drop(scenario, "dreamer", "dreamer_unreadable")
        scenario = worded
        sides = scenario.sides
        said = await asyncio.gather(*(self._on_policy(scenario, side) for side in sides))
        free = dict(zip(sides, said, strict=True))
        if not template.general and already_right(free):
            return self._drop(scenario, "selfplay", "already_right")
        completed = await asyncio.gather(*(self._complete(template, scenario, side, free[side]) for side in sides))
        replies = dict(zip(sides, completed, strict=True))
        if template.general:
            row = preference_pair(scenario, "clear", replies["clear"], self._config.filters)
            return self._keep_general(scenario, row)
        pair = contrast_pair(scenario, replies, self._config.filters)
        if isinstance(pair, Refusal):
            return self._drop(scenario, "filter", pair.reason, pair.detail)
        other = mirrored(template, scenario) if self._config.generate.mirror else None
        for one in filter(None, (scenario, other)):  # what it is like was kept while this one was under way
            if twin := self._seen.find(self._substance(one)):
                return self._drop(scenario, "filter", "near_duplicate", twin)
        if other is None:
            return self._keep((scenario, pair))
        self._store.add("scenarios", other)
        return self._keep((scenario, pair), (other, mirrored_pair(pair, other)))

    def _keep(self, *accepted: tuple[Scenario, ContrastPair]) -> int:
        """Stores accepted pairs, twins in one write: among the round's, or as spare ones where those are complete."""
        for scenario, _ in accepted:
            self._seen.add(scenario.scenario_id, self._substance(scenario))
        pairs = [pair for _, pair in accepted]
        room = max(0, self._config.generate.pairs - len(self._store.pairs))
        if kept := pairs[:room]:
            self._store.keep(*kept)
        for pair in pairs[room:]:
            self._store.keep_spare(pair)
        return len(pairs)

    async def _complete(self, template: Template, scenario: Scenario, side: Side, free: list[Judged]) -> list[Judged]:
        """The on-policy replies of one side, and steered ones for each stance that they did not give."""
        generate = self._config.generate
        judged = list(free)
        for stance in (RIGHT_STANCE[side], WRONG_STANCE[side]):
            for attempt in range(generate.steered_samples):
                if any(reply.is_stance(stance) for reply in judged):
                    break
                reply = await steered(self._engine, template, scenario, side, stance, generate, self._policy, attempt)
                judged += await self._judged(scenario, self._stored(reply))
        return judged

    async def _on_policy(self, scenario: Scenario, side: Side) -> list[Judged]:
        replies = await on_policy(self._engine, scenario, side, self._config.generate, self._policy)
        return await self._judged(scenario, self._stored(replies))

    def _stored(self, replies: list[Reply]) -> list[Reply]:
        self._store.add("replies", *replies)
        self._tokens += sum(reply.tokens for reply in replies)
        return replies

    async def _judged(self, scenario: Scenario, replies: list[Reply]) -> list[Judged]:
        questions = [Question.about(scenario, reply) for reply in replies]
        ruled = await self._judge.rule([reply.reply_id for reply in replies], questions)
        verdicts = [self._unless_invented(*pair) for pair in zip(questions, ruled, strict=True)]
        self._store.add("verdicts", *verdicts)
        return [Judged(reply, verdict) for reply, verdict in zip(replies, verdicts, strict=True)]

    def _unless_invented(self, question: Question, verdict: Verdict) -> Verdict:
        """The verdict, or an abstention where a reply strays too far from what the template knows."""
        allowed = self._config.filters.max_new_word_pairs
        if allowed is None or verdict.abstain or verdict.stance == "neither":
            return verdict
        if len(new := new_word_pairs(question, verdict.stance)) <= allowed:
            return verdict
        return verdict.model_copy(update={"abstain": True, "reason": f"invented {new[0]}"})

    def _keep_general(self, scenario: Scenario, row: PreferencePair | Refusal) -> int:
        if isinstance(row, Refusal):
            return self._drop(scenario, "filter", row.reason, row.detail)
        if not self._general.missing:
            return self._drop(scenario, "filter", "surplus")
        self._store.keep_general(row)
        return 1

    def _drop(self, scenario: Scenario, stage: str, reason: str, detail: str = "") -> int:
        self._store.drop(self._dropped(scenario, stage, reason, detail))
        return 0

    @staticmethod
    def _dropped(scenario: Scenario, stage: str, reason: str, detail: str = "") -> Dropped:
        return Dropped(
            scenario_id=scenario.scenario_id, template=scenario.template, stage=stage, reason=reason, detail=detail
        )


def _number(scenario_id: str) -> int:
    """The number in the id of a scenario or of its mirrored twin."""
    return int(scenario_id.rsplit("-", 1)[1].removesuffix("m"))
