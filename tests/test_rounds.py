"""train/rounds.py and dream.tasks.train: the whole loop on a scripted engine and a toy trainer, killed everywhere."""

import asyncio
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from dream import config as configs
from dream import runs, tasks
from dream.config import Config
from dream.engine import ScriptedEngine
from dream.errors import DataError, RunError, TrainingError
from dream.inputs import read_contrast_pairs, read_data
from dream.judge.combined import Combination, Judge
from dream.judge.likelihood import Contrast
from dream.judge.quality import Quality
from dream.records import ContrastPair, Message, PreferencePair
from dream.scenarios import eval_pairs
from dream.store import Log, RoundStore, RunFolder, contrast_pairs, read_json, read_log, write_json
from dream.terminal import Terminal
from train import history, rounds
from train.data import StepSpec, other_sides, round_rows
from train.history import Policy, RoundResult, finished_rounds, read_policy, roll_back
from train.lm_tasks import TaskScore
from train.rounds import Loop, run_rounds

pytestmark = pytest.mark.usefixtures("quick_disk")

PAIRS = 2
RATE = 1e-4


class Killed(Exception):
    """Stands for the process's sudden end."""


def skill_of(weights: Path | None) -> float:
    """How well the policy with these weights tells the sides apart; the initial one hardly does."""
    return float(json.loads((weights / "skill.json").read_text())) if weights else 0.1


class PolicyEngine(ScriptedEngine):
    """A scripted engine that likes push-back on flawed directions and compliance on clear ones as its weights say."""

    def __init__(self, write: Callable, likelihood: Callable) -> None:
        super().__init__(write, self.score_plain)
        self.likelihood, self.skill = likelihood, skill_of(None)
        self.resting = self.deaf = False

    async def rest(self) -> None:
        self.resting = True

    async def load_weights(self, folder: Path | None) -> None:
        await super().load_weights(folder)
        self.resting = False
        self.learn(folder)

    def learn(self, folder: Path | None) -> None:
        """Becomes as good as the weights are."""
        self.skill = skill_of(None if self.deaf else folder)

    def score_plain(self, messages: Sequence[Message], reply: str) -> float:
        """Plain prompts by skill; steering prompts, which the judge asks about, by the shared script."""
        assert not self.resting, "asked while it rests"
        asked = re.search(
            r"have (\d+) \w+ in the store\. Write a label that says (\d+) \w+\.$", messages[-1]["content"]
        )
        if not asked:
            return self.likelihood(messages, reply)
        pushes = re.search(r"\bnot\b|\bwrong\b", reply) is not None
        return -3 + self.skill * (1 if pushes == (asked[1] != asked[2]) else -1)


class World:
    """A run folder; each `go` is a new process that works on it. `events` tells what was seen, with the weights served.

    `skills` are those that training gives, round by round.
    """

    def __init__(self, run: Path, judge, templates, engine: Callable[[], PolicyEngine], settings, patch) -> None:
        self.run, self.judge, self.templates, self.new_engine, self.settings = run, judge, templates, engine, settings
        self.skills = [1.0, 2.0, 3.0, 4.0, 5.0]
        self.lie = 0.0
        self.deaf = False
        self.fingerprint = ""
        self.specs: list[StepSpec] = []
        self.events: list[tuple[str, Path | None]] = []
        self.kill, self.round = "", 0
        for module in (history, rounds):
            patch.setattr(module, "write_json", self.write_json)

    def config(self, **sections: dict | int) -> Config:
        """Tiny sizes, and what a test changes."""
        tiny = {
            "rounds": 3,
            "engine": {"dtype": "float32"},
            "generate": {
                "pairs": PAIRS,
                "concurrency": 2,
                "dreamer": "slots",
                "general_share": 0,
                "worked_examples": 0,
            },
            "train": {"learning_rate": RATE, "flip_probability": 0.1},
            "eval": {"heldout_pairs": 4, "fresh_pairs": 1, "sampled_scenarios": 1, "retention_questions": 1},
            "judge": {"signals": ["contrast"]},
        }
        return self.settings(**tiny | sections)

    def go(self, *, kill: str = "", data: Sequence[ContrastPair] = (), **sections: dict | int) -> list[RoundResult]:
        """Runs the loop; dies with `Killed` at the first event that contains `kill`."""
        self.kill, self.round, self.engine = kill, 0, self.new_engine()
        self.engine.deaf = self.deaf
        loop = Loop(
            self.run, self.engine, self.judge, self.templates, self.config(**sections), "model", self.train, self,
            data=data, fingerprint=self.fingerprint,
        )  # fmt: skip
        return asyncio.run(run_rounds(loop))

    def see(self, event: str) -> None:
        """Notes an event, and dies there if it is the one."""
        self.events.append((event, self.engine.loaded[-1] if self.engine.loaded else None))
        if self.kill and self.kill in event:
            raise Killed(event)

    def write_json(self, path: Path, value: object) -> None:
        """What the loop writes, as an event before it is written."""
        self.see(f"round {self.round}: writing {path.name}")
        write_json(path, value)

    def stage(self, text: str) -> None:
        found = re.match(r"round (\d+): ", text)
        self.round = int(found[1]) if found else 0
        self.see(text)

    def dreaming(self, progress) -> None:
        self.see(f"round {self.round}: accepted {progress.accepted}")

    def audited(self, audit) -> None:
        self.see(f"round {self.round}: audited {audit.pairs} pairs")

    def trained(self, line: str) -> None:
        self.see(f"round {self.round}: {line}")

    def line(self, text: str) -> None:
        self.see(text)

    def ended(self, result: RoundResult) -> None:
        self.see(f"round {result.round}: ended")

    def train(self, spec: StepSpec, folder: Path) -> None:
        """A training step that appears whole: weights are one number, and the probes are scored as the engine would."""
        assert self.engine.resting, "the engine keeps the memory that training needs"
        number = int(folder.name.removeprefix("round_"))
        half = folder / ".train.tmp"
        for part in ("weights", "masters" if spec.train.method == "full" else "adapter"):
            (half / part).mkdir(parents=True, exist_ok=True)
            (half / part / "skill.json").write_text(str(self.skills[number - 1]))
        self.see(f"round {self.round}: within the trainer")
        engine = self.new_engine()
        scores = {}
        parent = spec.adapter or spec.weights
        for when, skill in (("before", skill_of(parent and Path(parent))), ("after", self.skills[number - 1])):
            engine.skill = skill
            scores[when] = [engine.score_plain(probe.messages, probe.reply) + self.lie for probe in spec.probes]
        write_json(half / "probes.json", scores)
        write_json(half / "ledger.json", {"summary": f"toy step of round {number}"})
        half.rename(spec.out)
        self.specs.append(spec)

    def pairs(self, number: int) -> list[ContrastPair]:
        """The stored pairs of a round."""
        return list(contrast_pairs(read_log(self.run / f"round_{number:02d}" / "pairs.jsonl", PreferencePair)))

    def used(self, rounds: int) -> list[str]:
        """The ids of the pairs stored in so many rounds, sorted."""
        return sorted(pair.clear.pair_id for number in range(1, rounds + 1) for pair in self.pairs(number))

    def weights(self, number: int) -> Path | None:
        """Where a round's weights are; None is the initial model."""
        return self.run / f"round_{number:02d}" / "train" / "weights" if number else None

    def served_at(self, event: str) -> Path | None:
        """The weights that were served when something was seen last."""
        return [weights for text, weights in self.events if event in text][-1]


class Likelier:
    """In place of a fitted pipeline: the stance under which a reply is likelier, by the logistic of twice the gain."""

    classes_ = ("comply", "push_back")

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        pushes = 1 / (1 + np.exp(-2 * features[:, 0]))
        return np.column_stack([1 - pushes, pushes])


@pytest.fixture
def quick_judge(engine) -> Judge:
    """A judge that needs no calibration: the script's likelihoods differ by 2 in favour of the reply's stance."""
    sure = Quality(n=0, auc=1, auc_ci=(1, 1), accuracy=1, kappa=1, abstained=0, error_rate=0)
    likelier = Combination(Likelier(), 0.7)
    return Judge([Contrast(engine)], Config(), {True: likelier, False: likelier}, sure)


@pytest.fixture
def world(tmp_path: Path, quick_judge, tiny_templates, script, likelihood, settings_with, monkeypatch) -> World:
    """An empty run folder with all that a loop needs."""
    return World(
        tmp_path / "run",
        quick_judge,
        tiny_templates,
        lambda: PolicyEngine(script, likelihood),
        settings_with,
        monkeypatch,
    )


def stored(results: Sequence[RoundResult]) -> list[dict]:
    """The results as they are in files."""
    return [result.model_dump(mode="json") for result in results]


def decisions(results: Sequence[RoundResult]) -> list[str]:
    """What the gate decided, round by round."""
    return [result.decision.decision for result in results]


def test_three_rounds_each_dream_with_the_last_promoted(world: World) -> None:
    """A promoted round's weights are served to the next round's dreaming and are what it is trained from."""
    results = world.go()
    assert decisions(results) == ["promote"] * 3
    assert [(result.round, result.parent, result.accepted) for result in results] == [(1, 0, 2), (2, 1, 2), (3, 2, 2)]
    for number in (1, 2, 3):
        assert world.served_at(f"round {number}: dreaming") == world.weights(number - 1)
        assert world.served_at(f"round {number}: measuring") == world.weights(number)
    adapters = [None, *(str(world.run / f"round_0{number}/train/adapter") for number in (1, 2))]
    assert [spec.adapter for spec in world.specs] == adapters
    assert read_policy(world.run) == Policy(
        round=3, as_of=3, adapter="round_03/train/adapter", weights="round_03/train/weights"
    )
    assert world.engine.loaded[-1] == world.weights(3)


def test_texts_of_a_step_are_of_the_right_templates(world: World) -> None:
    """A step's KL is measured on kinds of flaw that are never trained on, and its weights proved on trained ones."""
    world.go(rounds=1)
    for texts, split, count, seed in (
        (world.specs[0].heldout, "heldout", 8, world.config().seed),
        (world.specs[0].probes, "train", 4, 0),
    ):
        rows = eval_pairs([one for one in world.templates if one.front.split == split], count, seed)
        assert [text.messages for text in texts] == [row.prompt for row in rows]


@pytest.mark.parametrize(("error", "flips"), [(0.07, 0.07), (0.45, 0.4)])
def test_a_step_gets_all_that_was_asked_for(world: World, error: float, flips: float) -> None:
    """General rows, rehearsal, repair and the judge's error (at most 0.4) reach every step, with a seed of its own and
    the engine's precision; a warm-up goes before that from the model as it came only."""
    world.judge.quality = world.judge.quality.model_copy(update={"error_rate": error})
    generate = {"pairs": 3, "concurrency": 2, "dreamer": "slots", "general_share": 0.25, "worked_examples": 0}
    train = {"learning_rate": RATE, "replay_share": 0, "flip_probability": "judge", "sft_warmup": True,
             "batch_size": 4, "micro_batch_size": 2, "rehearsal": 6, "repair_steps": 1}  # fmt: skip
    world.go(rounds=2, generate=generate, train=train)
    for spec in world.specs:
        rows = list(read_log(Path(spec.rows), PreferencePair))
        general = {row.pair_id for row in read_log(Path(spec.rows).with_name("general.jsonl"), PreferencePair)}
        assert [len(rows), sum(row.pair_id in general for row in rows)] == [8, 2]  # so that there are two steps
        assert (len(spec.rehearsed), len(spec.repaired)) == (2 * 6, 4)
        assert (spec.flip_probability, spec.served_dtype) == (flips, "float32")
    assert [spec.seed for spec in world.specs] == [world.config().round_seed(number) for number in (1, 2)]
    assert [spec.sft for spec in world.specs] == [True, False]


def test_later_rounds_are_compared_with_the_model_as_it_came(world: World) -> None:
    """A candidate is compared with the policy before it, and from the first promotion on with the initial one too."""
    names = [{check.name for check in result.decision.checks} for result in world.go(rounds=2)]
    since = {name for name in names[1] if name.endswith("_since_model")}
    assert names[1] - since == names[0]
    assert {"flawed_preference_since_model", "arithmetic_since_model", "chosen_logp_since_model"} <= since


def test_each_dreamed_round_is_audited(world: World) -> None:
    """The audit of a round's pairs is told before its training begins, and stands in its folder with the diversity."""
    world.go(rounds=2)
    told = [event for event, _ in world.events if "audited" in event or "training" in event]
    assert [text.partition(" on ")[0] for text in told] == [
        f"round {number}: {what}" for number in (1, 2) for what in (f"audited {PAIRS} pairs", "training")
    ]
    for number in (1, 2):
        for name in ("audit", "diversity"):
            assert read_json(world.run / f"round_0{number}" / f"{name}.json")["pairs"] == PAIRS


def test_pairs_name_the_policy_that_dreamed_them(world: World) -> None:
    """Every pair carries its policy's version, and no scenario or draw comes twice over the rounds."""
    world.go()
    found = {number: world.pairs(number) for number in (1, 2, 3)}
    for number, pairs in found.items():
        assert {pair.flawed.meta["policy"] for pair in pairs} == {f"round_{number - 1:02d}"}
    ids = [pair.clear.pair_id for pairs in found.values() for pair in pairs]
    assert len(set(ids)) == len(ids) == 3 * PAIRS
    draws = [(pair.clear.meta["template"], pair.clear.meta["seed"]) for pairs in found.values() for pair in pairs]
    assert len(set(draws)) == len(draws)


def test_replay_comes_from_promoted_rounds(world: World) -> None:
    """A round's rows hold its own pairs and some of promoted rounds, none of a rejected one."""
    world.skills[1] = 0.0
    world.go(train={"replay_share": 0.9, "learning_rate": RATE})
    rows = [json.loads(line) for line in (world.run / "round_03" / "rows.jsonl").read_text().splitlines()]
    assert {row["pair_id"].split("-")[0] for row in rows} == {"r1", "r3"}


def test_rejected_round_changes_nothing(world: World) -> None:
    """After a rejected round the policy and the served weights are the old ones and the learning rate is halved."""
    world.skills[1] = 0.5
    results = world.go()
    assert decisions(results) == ["promote", "roll_back", "promote"]
    assert [result.parent for result in results] == [0, 1, 1]
    assert world.served_at("round 3: dreaming") == world.weights(1)
    assert world.specs[2].adapter == world.specs[1].adapter == str(world.run / "round_01/train/adapter")
    assert [spec.train.learning_rate for spec in world.specs] == [RATE, RATE, RATE / 2]
    assert [result.learning_rate for result in results] == [RATE, RATE, RATE / 2]
    assert read_policy(world.run).round == 3


def test_rejected_last_round_leaves_policy_json(world: World) -> None:
    """policy.json names the promoted round before and after a rejected one, and its weights are served at the end."""
    world.skills[1] = 0.5
    world.go(rounds=1)
    before = read_json(world.run / "policy.json")
    world.go(rounds=2)
    assert read_json(world.run / "policy.json") | {"as_of": 1} == before
    assert world.engine.loaded[-1] == world.weights(1)
    assert (world.run / "round_02" / "train" / "weights").is_dir()


def test_learning_rate_recovers_after_a_promotion(world: World) -> None:
    """Each rejection in a row halves the rate, also over restarts; a promotion restores it."""
    world.skills = [0.0, 0.0, 1.0, 2.0]
    world.go(rounds=2, gate={"max_rejections": 9})
    world.go(rounds=4, gate={"max_rejections": 9})
    assert [spec.train.learning_rate for spec in world.specs] == [RATE, RATE / 2, RATE / 4, RATE]


def test_first_steps_are_smaller_until_a_round_is_promoted(world: World) -> None:
    """`first_rate_share` of the rate for every candidate from the model as it came, beside what rejections halve."""
    world.skills = [0.0, 1.0, 2.0]
    world.go(rounds=3, train={"learning_rate": RATE, "first_rate_share": 0.4})
    assert [spec.train.learning_rate for spec in world.specs] == pytest.approx([RATE * 0.4, RATE * 0.2, RATE])


def test_inconclusive_round_costs_no_trust_and_its_pairs_train_again(world: World) -> None:
    """A candidate of which chance explains everything is not served and not counted; its pairs join the next round's
    until a round is decided."""
    world.skills = [skill_of(None), skill_of(None), 1.0, 2.0]
    results = world.go(rounds=4, gate={"max_rejections": 1}, train={"learning_rate": RATE, "replay_share": 0})
    assert [result.decision.word for result in results] == ["inconclusive", "inconclusive", "promoted", "promoted"]
    assert [spec.train.learning_rate for spec in world.specs] == [RATE] * 4
    rows = [list(read_log(Path(spec.rows), PreferencePair)) for spec in world.specs]
    assert [len(some) for some in rows] == [2 * PAIRS, 4 * PAIRS, 6 * PAIRS, 2 * PAIRS]
    assert {row.pair_id for row in rows[0]} < {row.pair_id for row in rows[1]} < {row.pair_id for row in rows[2]}


def test_evaluation_of_another_version_is_refused(world: World) -> None:
    """An eval.json that cannot be read is named, with what to do."""
    world.go(rounds=1)
    write_json(world.run / "round_01" / "eval.json", {"heldout": {}})
    with pytest.raises(RunError, match=r"round_01/eval\.json: not an evaluation of this version; remove it"):
        world.go(rounds=2)
    (world.run / "round_01" / "eval.json").unlink()
    assert decisions(world.go(rounds=2)) == ["promote"] * 2
    assert world.served_at("measuring the policy") == world.weights(1)


def test_what_other_templates_measured_is_measured_again(world: World) -> None:
    """Items of two evaluations must be the same scenarios; under another fingerprint they are not."""
    world.go(rounds=1)
    world.fingerprint = "edited"
    begun = len(world.events)
    world.go(rounds=2)
    seen = [event for event, _ in world.events[begun:] if "measuring" in event]
    assert seen == ["measuring the initial policy", "measuring the policy", "round 2: measuring the candidate"]
    assert {read_json(world.run / f"round_0{number}" / "eval.json")["fingerprint"] for number in range(3)} == {"edited"}


def test_candidate_is_proved_with_the_texts_it_was_trained_beside(world: World) -> None:
    """A template that is edited between training and serving makes no engine a liar."""
    with pytest.raises(Killed):
        world.go(rounds=1, kill="writing served.json")
    before = read_json(world.run / "round_01" / "probes.json")
    world.templates = world.templates[1:]
    assert decisions(world.go(rounds=1)) == ["promote"]
    assert read_json(world.run / "round_01" / "probes.json") == before


def test_copy_of_a_round_is_no_round(world: World) -> None:
    """Somebody's copy beside the rounds disturbs neither the loop nor those who read the run."""
    world.go(rounds=1)
    shutil.copytree(world.run / "round_01", world.run / "round_01.bak")
    assert decisions(world.go(rounds=2)) == ["promote"] * 2


def test_short_round_is_said(world: World) -> None:
    """Training on fewer pairs than were wanted is told with the reasons."""
    world.go(rounds=1, generate={"pairs": 50, "concurrency": 2, "dreamer": "slots", "general_share": 0,
                                 "worked_examples": 0, "max_scenarios_per_pair": 1})  # fmt: skip
    told = [event for event, _ in world.events if "stopped short at" in event]
    assert len(told) == 1
    assert "of 50 pairs (generate.max_scenarios_per_pair); dropped: near_duplicate" in told[0]


def test_replay_is_what_the_policy_was_trained_on(world: World) -> None:
    """Inconclusive rounds that trained with a promoted one count; a promoted round that the user left does not."""
    world.skills = [skill_of(None), 1.0, 2.0, 3.0]
    world.go(rounds=3)
    assert {pair.clear.pair_id[:2] for pair in history.promoted_pairs(world.run)} == {"r1", "r2", "r3"}
    history.roll_back(world.run, 2)
    assert {pair.clear.pair_id[:2] for pair in history.promoted_pairs(world.run)} == {"r1", "r2"}
    assert decisions(world.go(rounds=4))[-1] == "promote"
    assert {pair.clear.pair_id[:2] for pair in history.promoted_pairs(world.run)} == {"r1", "r2", "r4"}


def test_engines_rest_while_lm_eval_has_the_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads the policy a second time; afterwards the same weights are served."""
    asked = []

    async def scores(tasks: Sequence[str], weights: str, *, trust_remote_code: bool) -> dict[str, TaskScore]:
        asked.append((tasks, weights, world.engine.resting))
        return {"piqa": TaskScore(value=0.5, stderr=0.1)}

    monkeypatch.setattr(rounds, "lm_scores", scores)
    tiny = {"heldout_pairs": 4, "fresh_pairs": 1, "sampled_scenarios": 1, "retention_questions": 1}
    assert decisions(world.go(rounds=1, eval={**tiny, "lm_eval_tasks": ["piqa"]})) == ["promote"]
    assert asked == [(["piqa"], "model", True), (["piqa"], str(world.weights(1)), True)]
    assert world.engine.loaded[-1] == world.weights(1)


def test_ledger_is_told_the_length_of_replies(world: World) -> None:
    """Training itself samples nothing; the evaluation's mean lengths are added afterwards."""
    world.go(rounds=1)
    lengths = read_json(world.run / "round_01" / "train" / "ledger.json")["reply_tokens"]
    assert lengths["before"] > 0 < lengths["after"]


@pytest.mark.parametrize("allowed", [1, 2])
def test_loop_ends_after_max_rejections(world: World, allowed: int) -> None:
    """After `max_rejections` rejected rounds in a row the loop ends and says why, and running it again does not go on;
    once the user has chosen a policy it does, with the count and the rate as at the beginning."""
    world.skills = [1.0, 0.0, 0.0, 0.0, 5.0]
    results = world.go(rounds=5, gate={"max_rejections": allowed})
    assert decisions(results) == ["promote"] + ["roll_back"] * allowed
    why = f"no round {2 + allowed}: {allowed} rolled back since the last promotion (gate.max_rejections)"
    assert world.events[-1][0].startswith(why)
    assert len(world.go(rounds=5, gate={"max_rejections": allowed})) == len(results)
    assert world.events[-1][0].startswith(why)
    history.roll_back(world.run, 1)
    going_on = world.go(rounds=2 + allowed, gate={"max_rejections": allowed})
    assert len(going_on) == 2 + allowed
    assert going_on[-1].learning_rate == RATE


KILLS = {
    "measuring the initial policy": "promoted",
    "round 0: writing eval.json": "promoted",
    "round 0: writing policy.json": "promoted",
    "round 2: accepted 1": "promoted",
    "round 2: audited": "promoted",
    "round 2: training": "promoted",
    "round 2: within the trainer": "promoted",
    "round 2: writing served.json": "rejected",
    "round 2: writing eval.json": "rejected",
    "round 2: writing gate.json": "promoted rejected",
    "round 2: writing policy.json": "promoted rejected",
    "round 2: ended": "promoted",
}
"""Where the process is killed, and how its second round ends."""


@pytest.mark.parametrize(("kill", "second"), [(kill, end) for kill, ends in KILLS.items() for end in ends.split()])
def test_killed_anywhere_the_same_command_goes_on(world: World, kill: str, second: str) -> None:
    """Whatever was under way, the same command then yields the rounds, pairs and decisions of an undisturbed run."""
    promoted = second == "promoted"
    world.skills[1] = 2.0 if promoted else 0.5
    with pytest.raises(Killed):
        world.go(kill=kill)
    results = world.go()
    assert decisions(results) == ["promote", "promote" if promoted else "roll_back", "promote"]
    assert [result.parent for result in results] == [0, 1, 2 if promoted else 1]
    assert [result.learning_rate for result in results] == [RATE, RATE, RATE if promoted else RATE / 2]
    assert [Path(spec.out).parent.name for spec in world.specs] == ["round_01", "round_02", "round_03"]
    assert [len(world.pairs(number)) for number in (1, 2, 3)] == [PAIRS] * 3
    assert len(set(world.used(3))) == 3 * PAIRS
    assert world.served_at("round 3: dreaming") == world.weights(2 if promoted else 1)
    assert read_policy(world.run).round == 3
    assert stored(finished_rounds(world.run)) == stored(results)


def test_finished_run_is_left_alone(world: World) -> None:
    """Running a finished run again trains nothing, writes the same policy and serves it."""
    results = world.go()
    policy = read_policy(world.run)
    assert stored(world.go()) == stored(results)
    assert len(world.specs) == 3
    assert read_policy(world.run) == policy
    assert world.engine.loaded == [world.weights(3)]


def test_more_rounds_are_added(world: World) -> None:
    """`rounds` counts the finished ones too, so that a larger number continues a run."""
    assert len(world.go(rounds=1)) == 1
    assert decisions(world.go(rounds=2)) == ["promote"] * 2
    assert len(world.specs) == 2


@pytest.mark.parametrize("lie", [0.1, -0.1, math.nan])
def test_other_weights_in_the_engine_are_noticed(world: World, lie: float) -> None:
    """When the engine scores fixed texts unlike the trainer, the round ends in an error and nothing is decided."""
    world.lie = lie
    with pytest.raises(TrainingError, match="does not serve what was trained"):
        world.go()
    served = read_json(world.run / "round_01" / "served.json")
    assert served["apart"] == pytest.approx(abs(lie), nan_ok=True)
    assert finished_rounds(world.run) == []
    assert read_policy(world.run).round == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_that_kept_the_old_weights_is_noticed(world: World, dtype: str) -> None:
    """After a step that moves less than rounding may, too: the scores did not move at all."""
    world.skills[0] = skill_of(None) + 0.004
    world.deaf = True
    with pytest.raises(TrainingError, match=r"still those of before the step.*remove .*train to have"):
        world.go(rounds=1, engine={"dtype": dtype})
    assert finished_rounds(world.run) == []


@pytest.mark.parametrize(
    ("noise", "followed"),
    [(0.0, True), (0.02, True), (0.05, None), (math.nan, None)],
)
def test_small_steps_prove_nothing(noise: float, followed: bool | None) -> None:
    """Where rounding sets engine and trainer apart by as much as the step moved, either movement could be seen."""
    before, after = np.full(8, -2.0), np.full(8, -1.9)
    other = noise * np.array([1, -1] * 4)
    assert rounds.follows(before, after, list(before + other), list(after - other)) is followed
    assert rounds.follows(before, after, list(before + other), list(before + other)) is (False if followed else None)


def test_probes_of_an_older_version_are_not_compared() -> None:
    """Their score before the step is not known."""
    assert rounds.follows(np.zeros(2), np.ones(2), [None, None], [1.0, 1.0]) is None


def test_rounding_is_not_taken_for_other_weights(world: World) -> None:
    """A difference that rounding explains passes: less in float32 than in bfloat16."""
    world.lie = 0.01
    with pytest.raises(TrainingError):
        world.go(rounds=1)
    assert len(world.go(rounds=1, engine={"dtype": "bfloat16"})) == 1


@pytest.mark.parametrize("to", [0, 1])
def test_rollback_to_an_earlier_round(world: World, to: int) -> None:
    """An earlier promoted round, or the initial model, is the policy again; the next round starts from it."""
    world.go(rounds=2)
    assert roll_back(world.run, to).round == to
    assert read_policy(world.run).round == to
    results = world.go(rounds=3)
    assert world.served_at("round 3: dreaming") == world.weights(to)
    assert results[2].parent == to
    assert world.specs[2].adapter == (str(world.run / "round_01/train/adapter") if to else None)
    assert (world.run / "round_02" / "train" / "weights").is_dir()


@pytest.mark.parametrize(("kill", "stays"), [("accepted 1", True), ("measuring", False)])
def test_rollback_to_the_policy_in_force(world: World, kill: str, stays: bool) -> None:
    """It forgives the rejections. What was dreamed since is of that policy and stays; what was trained at their rate
    does not."""
    with pytest.raises(Killed):
        world.go(rounds=2, kill=f"round 2: {kill}")
    roll_back(world.run, 1)
    assert (world.run / "round_02").exists() == stays
    assert decisions(world.go(rounds=2)) == ["promote", "promote"]


def test_rollback_needs_a_promoted_round(world: World) -> None:
    """A rejected round and one that never was are refused, with those there are; the policy stays."""
    world.skills[1] = 0.0
    world.go(rounds=2)
    before = read_policy(world.run)
    for number in (2, 3, -1):
        with pytest.raises(RunError, match=rf"round {number} was not promoted; --to takes one of 0, 1$"):
            roll_back(world.run, number)
    assert read_policy(world.run) == before


@pytest.mark.parametrize("kill", ["round 3: accepted 1", "round 3: within the trainer", "round 3: measuring"])
def test_rollback_while_a_round_is_unfinished(world: World, kill: str) -> None:
    """A round that was under way is trained from the policy rolled back to, as its record says."""
    with pytest.raises(Killed):
        world.go(kill=kill)
    roll_back(world.run, 1)
    results = world.go()
    assert results[2].parent == 1
    assert world.specs[-1].adapter == str(world.run / "round_01/train/adapter")


def test_rounds_stay_in_order_after_the_hundredth(world: World) -> None:
    """The results are in the order of the rounds, however many digits their numbers have."""
    result = world.go(rounds=1)[0]
    for number in (9, 10, 99, 100, 101):
        write_json(world.run / f"round_{number:02d}" / "gate.json", result.model_dump() | {"round": number})
    assert [found.round for found in finished_rounds(world.run)] == [1, 9, 10, 99, 100, 101]


def test_round_without_a_pair_is_an_error(world: World) -> None:
    """A round in which nothing passes ends in an error that names the reasons, and nothing is trained."""
    world.new_engine = lambda: PolicyEngine(lambda messages, number: "", lambda messages, reply: -1.0)
    with pytest.raises(DataError, match=r"round 1: no pair was accepted \(\w+ \d+\)"):
        world.go(generate={"pairs": 1, "dreamer": "slots", "general_share": 0, "max_scenarios_per_pair": 2})
    assert world.specs == []


def test_full_weights_go_on_from_their_masters(world: World) -> None:
    """With `method: full` there is no adapter, and the next round starts from the promoted float32 masters."""
    world.go(rounds=2, train={"method": "full", "learning_rate": RATE, "flip_probability": 0.1})
    assert [spec.weights for spec in world.specs] == [None, str(world.run / "round_01/train/masters")]
    assert [spec.adapter for spec in world.specs] == [None, None]


def ids(pairs: Sequence[ContrastPair]) -> list[str]:
    """The pairs' ids."""
    return [pair.clear.pair_id for pair in pairs]


def test_data_is_shared_out_over_the_rounds(world: World, make_pair) -> None:
    """With `--data` nothing is dreamed, and each given pair is trained on in one round."""
    data = [make_pair(f"own-{number}") for number in range(7)]
    world.go(data=data)
    found = [ids(world.pairs(number)) for number in (1, 2, 3)]
    assert [len(pairs) for pairs in found] == [3, 2, 2]
    assert world.used(3) == sorted(ids(data))
    assert not any("accepted" in event for event, _ in world.events)


def test_data_that_was_being_shared_out_when_killed(world: World, make_pair) -> None:
    """A kill before training does not store a given pair twice."""
    data = [make_pair(f"own-{number}") for number in range(6)]
    with pytest.raises(Killed):
        world.go(data=data, kill="round 1: training")
    world.go(data=data)
    assert world.used(3) == sorted(ids(data))


def test_data_that_was_half_stored_when_killed(world: World, make_pair) -> None:
    """A kill between two given pairs of a round loses none of its share."""
    data = [make_pair(f"own-{number}") for number in range(6)]
    world.go(data=data, rounds=3)
    whole = [ids(world.pairs(number)) for number in (1, 2, 3)]
    world.run = world.run.with_name("again")
    store = RoundStore(world.run / "round_01")
    store.keep(data[0])
    store.close()
    world.go(data=data, rounds=3)
    assert [ids(world.pairs(number)) for number in (1, 2, 3)] == whole


def test_data_of_two_runs_may_share_ids(world: World, make_pair) -> None:
    """Pairs of two `dream generate` runs, which both count from r1-000001, are all trained on."""
    data = [make_pair(f"r1-{number:06d}", f"in run {run}") for run in "ab" for number in (1, 2, 3)]
    world.go(data=data)
    prompts = [pair.clear.prompt[0]["content"] for number in (1, 2, 3) for pair in world.pairs(number)]
    assert sorted(prompts) == sorted(pair.clear.prompt[0]["content"] for pair in data)


def test_data_files_of_two_runs_get_ids_of_their_own(tmp_path: Path, make_pair) -> None:
    """Pairs of the second file are renamed where the first one has their ids, mirrors with what they mirror, so that a
    step never takes one run's side for the other side of another run's scenario."""
    paths = [tmp_path / f"{run}.jsonl" for run in "abc"]
    for path, text in zip(paths, ("in run a", "in run b", "in run c"), strict=True):
        log = Log(path)
        start = "r2" if path.stem == "c" else "r1"
        pair = make_pair(f"{start}-1", text)
        twin = make_pair(f"{start}-1m", text)
        for side in (twin.clear, twin.flawed):
            side.meta["mirror_of"] = f"{start}-1"
        log.append(pair.clear, pair.flawed, twin.clear, twin.flawed)
        log.close()
    pairs = read_data(paths)
    assert ids(pairs) == ["r1-1", "r1-1m", "data2-r1-1", "data2-r1-1m", "r2-1", "r2-1m"]
    assert [pair.flawed.meta.get("mirror_of") for pair in pairs[2:4]] == [None, "data2-r1-1"]
    rows = round_rows(pairs, [], [], batch_size=12, general_share=0, replay_share=0, seed=1)
    texts = [row.prompt[0]["content"] for row in rows]
    for i, j in enumerate(other_sides(rows, 12)):
        assert i != j
        assert texts[i].split()[-1] == texts[j].split()[-1]


def test_two_pairs_of_one_id_in_a_file_are_refused(tmp_path: Path, make_pair) -> None:
    """Files of two runs in one, in whatever order, in which the sides of different scenarios would be compared."""
    data = tmp_path / "all.jsonl"
    pairs = [make_pair("r1-1", "one"), make_pair("r1-1", "two"), make_pair("r1-2")]
    for rows in ([row for pair in pairs for row in (pair.clear, pair.flawed)],
                 [*(pair.clear for pair in pairs), *(pair.flawed for pair in pairs)]):  # fmt: skip
        data.write_text("".join(row.model_dump_json() + "\n" for row in rows))
        with pytest.raises(DataError, match=r"2 clear rows are called 'r1-1'; give files of several runs one by one"):
            read_contrast_pairs(data)


def test_rows_without_their_other_side_are_said(tmp_path: Path, make_pair, caplog: pytest.LogCaptureFixture) -> None:
    """Half a pair is not trained on, and not passed over in silence."""
    data = tmp_path / "all.jsonl"
    whole, half = make_pair("r1-1"), make_pair("r1-2")
    data.write_text("".join(row.model_dump_json() + "\n" for row in (whole.clear, half.clear, whole.flawed)))
    assert [pair.clear.pair_id for pair in read_contrast_pairs(data)] == ["r1-1"]
    assert "all.jsonl: 1 rows without their pair's other side are left out" in caplog.text


@pytest.mark.parametrize("weight", [None, "sure", 0, 1.5])
def test_weight_that_is_none_is_named(tmp_path: Path, make_pair, weight: object) -> None:
    """A row weighs as much as the judge was sure of it; anything else there is refused before any work."""
    data = tmp_path / "mine.jsonl"
    pair = make_pair("r1-1")
    pair.flawed.meta["judge_confidence"] = weight
    data.write_text("".join(row.model_dump_json() + "\n" for row in (pair.clear, pair.flawed)))
    with pytest.raises(DataError, match=r"mine\.jsonl: pair 'r1-1', flawed: meta\.judge_confidence is"):
        read_contrast_pairs(data)


def test_data_is_not_used_twice_when_rounds_are_added(world: World, make_pair) -> None:
    """A run that is continued with more rounds does not train again on pairs that an earlier round had."""
    data = [make_pair(f"own-{number}") for number in range(8)]
    world.go(data=data, rounds=2)
    with pytest.raises(DataError, match=r"used up the 8 pairs of --data"):
        world.go(data=data, rounds=4)
    assert world.used(4) == sorted(set(world.used(4)))


def test_too_few_pairs_for_the_rounds_are_refused_before_any_work(world: World, make_pair) -> None:
    """Fewer given pairs than rounds are the user's error, and nothing is trained first."""
    with pytest.raises(DataError):
        world.go(data=[make_pair("own-1")], rounds=2)
    assert world.specs == []


@pytest.fixture
def workplace(tmp_path: Path, template_text, monkeypatch) -> Path:
    """A working directory with its own tiny prompts, a part of the gold set, and a folder that passes for a model."""
    repository = Path(__file__).parent.parent / "prompts"
    for path in repository.rglob("*.j2"):
        if path.parent.name != "scenarios":
            copy = tmp_path / "prompts" / path.relative_to(repository)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    for name in ("lookalikes.jsonl", "retention/facts.jsonl", "retention/neutral.jsonl"):
        (tmp_path / "prompts" / name).write_text((repository / name).read_text())
    (tmp_path / "prompts" / "gold").mkdir()
    for name, step in (("scenarios", 1), ("replies", 12)):
        lines = (repository / "gold" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "prompts" / "gold" / f"{name}.jsonl").write_text("".join(lines[::step]))
    (tmp_path / "prompts" / "scenarios").mkdir()
    for name, flaw, split in (("stock", "false_premise", "train"), ("kept", "missing_fact", "heldout")):
        (tmp_path / "prompts" / "scenarios" / f"{name}.j2").write_text(template_text(name, flaw, split))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr("dream.embed.minilm", lambda: None)  # the embedding model takes seconds to load
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("second", [False, True])
def test_the_command_runs_rounds(world: World, workplace: Path, make_pair, second: bool) -> None:
    """`dream.tasks.train` makes a run folder with manifest, rounds and policy, and takes `--data` files. A judge's own
    engine rests in each step and comes back after it."""
    data = workplace / "pairs.jsonl"
    pairs = [make_pair(f"own-{number}") for number in range(4)]
    data.write_text("".join(row.model_dump_json() + "\n" for pair in pairs for row in (pair.clear, pair.flawed)))
    assert read_contrast_pairs(data) == pairs
    judge = {"signals": ["contrast"], "model": str(workplace / "model") if second else None}
    config = configs.resolved(world.config(rounds=2, model=str(workplace / "model"), judge=judge))
    engines: list[PolicyEngine] = []

    @asynccontextmanager
    async def opened(config: Config, model: str):
        engines.append(world.new_engine())
        if len(engines) % 2 or not second:
            world.engine = engines[-1]
        yield engines[-1]

    def train(out: Path | None) -> tuple[Path, list[RoundResult]]:
        return tasks.train(config, Path("mine.yaml"), out, [data], Terminal(), force_judge=True,
                           open_engine=opened, trainer=world.train)  # fmt: skip

    run, results = train(None)
    world.run = workplace / run
    assert run.parent == Path("runs")
    assert (workplace / "runs" / "latest").resolve() == world.run
    assert decisions(results) == ["promote"] * 2
    assert read_json(run / "manifest.json")["kind"] == "train"
    assert world.used(2) == sorted(ids(pairs))
    assert stored(train(run)[1]) == stored(results)
    assert len(world.specs) == 2
    assert {Path(spec.rows).is_absolute() for spec in world.specs} == {True}  # workers and engines live elsewhere
    if second:
        assert [engine.loaded for engine in engines[1::2]] == [[None, None], []]


@pytest.fixture
def exported(world: World) -> Callable[..., Path]:
    """Exports the policy of the world's run to a folder `mine` beside it."""
    manifest = {"kind": "train", "fingerprint": "", "settings": {}, "config": {}}
    write_json(world.run / "manifest.json", manifest)
    return lambda merged: runs.export_policy(world.run, world.run.with_name("mine"), merged)


@pytest.mark.parametrize("merged", [False, True])
def test_export_copies_the_accepted_policy(world: World, exported, merged: bool) -> None:
    """The adapter, or the merged weights, of the policy in force is copied, never over a folder that exists."""
    world.go(rounds=2)
    assert runs.roll_back_run(world.run, 1).round == 1
    assert runs.policy_of(world.run, [])[1] == world.weights(1)
    copy = exported(merged)
    assert skill_of(copy) == world.skills[0]
    original = world.run / "round_01" / "train" / ("weights" if merged else "adapter")
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in original.iterdir())
    with pytest.raises(RunError, match="exists already"):
        exported(merged)


def test_export_needs_something_to_copy(world: World, exported) -> None:
    """Without a promoted round there is nothing to export, and without an adapter only merged weights."""
    full = {"method": "full", "learning_rate": RATE, "flip_probability": 0.1}
    with pytest.raises(RunError, match="no round was promoted"):
        exported(True)
    world.go(rounds=1, train=full)
    with pytest.raises(RunError, match="add --merged"):
        exported(False)
    assert skill_of(exported(True)) == world.skills[0]


def test_rollback_waits_for_nobody(world: World, exported) -> None:
    """A run that another process works on is not rolled back."""
    with RunFolder(world.run, runs.opened(world.run)), pytest.raises(RunError, match="another process"):
        runs.roll_back_run(world.run, 0)
