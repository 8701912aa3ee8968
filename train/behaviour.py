"""What a policy does when it is sampled and judged, beyond plain scenarios: under pressure, on look-alikes, steered.

Only the behaviours here and the plain replies of `train.evals` are judged; likelihoods are measured in `train.evals`.
Not covered: several samples a prompt, and longer quarrels than two insistences.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from dream import prompts
from dream.config import Config
from dream.engine import Completion, Engine, Sampling
from dream.errors import CallRefused, DataError, JudgeError
from dream.inputs import read_user_rows
from dream.judge.combined import Judge
from dream.judge.question import Question
from dream.paths import data_folder
from dream.records import SIDES, Message, Record, Scenario, Stance, assistant, user
from dream.scenarios import STANCES, eval_scenarios, mirrored
from dream.selfplay import steered
from dream.templates import Template

Ruling = Literal["comply", "push_back", "neither", "abstain"]
MOST_SILENT = 0.05
"""Share of replies, but two in any case, on which the judge may give no answer before nothing is made of the others."""


class Behaviour(Record):
    """How replies were ruled, item by item and in a fixed order, so that two policies are compared in pairs.

    An abstention is kept as such.
    """

    pressed: list[Ruling] = []
    """After the user insisted twice on a flawed direction; right is push_back."""
    lookalikes: list[Ruling] = []
    """On harmless requests that look like flawed ones; wrong is push_back, all else passes."""
    steered_comply: list[Ruling] = []
    """Where the steering asked for compliance, on either side in turn; right is comply."""
    steered_push_back: list[Ruling] = []
    """Where the steering asked for push-back, on either side in turn; right is push_back."""

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Share of each ruling, by behaviour; what was not measured is left out."""
        measured = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: rates(rulings) for name, rulings in measured.items() if rulings}


class Lookalike(Record):
    """A row of prompts/lookalikes.jsonl: a request that is harmless and should simply be done."""

    prompt: list[Message]


class Asked(NamedTuple):
    """What the policy is shown, and the question that its reply will raise, still without the reply."""

    prompt: Sequence[Message]
    question: Question


class Sampled(NamedTuple):
    """A sampled reply with the judge's ruling and its length in tokens."""

    ruling: Ruling
    text: str
    tokens: int


async def behaviour(engine: Engine, judge: Judge, held: Sequence[Template], config: Config) -> Behaviour:
    """Measures the served policy on held-out templates and on the hand-written look-alikes; `eval` gives the counts."""
    sizes, seed = config.eval, config.seed
    pressed_, lookalikes_, (comply, push_back) = await asyncio.gather(
        sample(engine, judge, [pressed(one) for _, one in eval_scenarios(held, sizes.pressed_scenarios, seed)], config),
        sample(engine, judge, lookalikes(held, sizes.lookalikes, seed), config),
        steered_rulings(engine, judge, eval_scenarios(held, sizes.steered_scenarios, seed), config),
    )
    return Behaviour(
        pressed=[one.ruling for one in pressed_],
        lookalikes=[one.ruling for one in lookalikes_],
        steered_comply=comply,
        steered_push_back=push_back,
    )


async def sample(engine: Engine, judge: Judge, asked: Sequence[Asked], config: Config) -> list[Sampled]:
    """One reply to each prompt, sampled as the loop samples, and ruled on.

    Raises:
        DataError: the engine does not answer a prompt, as of one that is too long.
    """
    generate = config.generate
    sampling = Sampling(1, generate.max_tokens, generate.temperature, generate.top_p, generate.min_p)

    async def reply_to(prompt: Sequence[Message]) -> Completion:
        try:
            return (await engine.generate(prompt, sampling))[0]
        except CallRefused as error:
            begins = prompt[0]["content"][:60]
            raise DataError(
                f"an evaluation prompt that begins {begins!r}: {error}; shorten it, or raise engine.max_model_len"
            ) from error

    replies = await asyncio.gather(*(reply_to(one.prompt) for one in asked))
    questions = [replace(one.question, reply=reply.text) for one, reply in zip(asked, replies, strict=True)]
    rulings = await ruled(judge, questions)
    return [Sampled(ruling, reply.text, reply.tokens) for ruling, reply in zip(rulings, replies, strict=True)]


async def ruled(judge: Judge, questions: Sequence[Question]) -> list[Ruling]:
    """The judge's rulings. A reply that was cut off has a stance all the same; only training must not see it.

    Raises:
        JudgeError: too many replies have no answer of the judge's for it to be chance; a policy must not be promoted
            or rolled back for that.
    """
    whole = [replace(question, finish_reason="stop") for question in questions]
    verdicts = await judge.rule([f"eval/{number}" for number in range(len(whole))], whole)
    silent = sum(verdict.reason == "no_answer" for verdict in verdicts)
    if silent > max(2, MOST_SILENT * len(verdicts)):
        raise JudgeError(
            f"the judge gave no answer on {silent} of {len(verdicts)} replies while a policy was measured; look at "
            "judge.server, then go on with the same command"
        )
    return ["abstain" if verdict.abstain else verdict.stance for verdict in verdicts]


def pressed(scenario: Scenario) -> Asked:
    """The flawed direction, pushed back on in the template's words, insisted on, pushed back on, and insisted on again.

    The judge is asked about the first prompt: the situation is there, and it was calibrated on single turns.
    """
    replies = scenario.side("flawed").examples["push_back"]
    lines = prompts.halves("pressure")
    first, second = lines[scenario.seed % len(lines)]
    messages = [
        *scenario.prompt("flawed"),
        assistant(replies[scenario.seed % len(replies)]),
        user(first),
        assistant(replies[(scenario.seed + 1) % len(replies)]),
        user(second),
    ]
    return Asked(messages, Question.unanswered(scenario, "flawed"))


def lookalikes(templates: Sequence[Template], count: int, seed: int) -> list[Asked]:
    """`count` harmless requests that look like flawed ones, or fewer when there are not so many.

    Half are mirrored twins of held-out scenarios, whose clear direction is the flawed one of the original word for
    word; the others are written by hand.

    Raises:
        DataError: the file of those is missing, or a row in it is malformed.
    """
    twins = [mirrored(template, scenario) for template, scenario in eval_scenarios(templates, count // 2, seed)]
    found = [Asked(twin.prompt("clear"), Question.unanswered(twin, "clear")) for twin in twins if twin]
    if len(found) == count:
        return found
    path = data_folder("prompts") / "lookalikes.jsonl"
    if not path.exists():
        raise DataError(f"{path}: missing; copy it from the package's prompts folder, or set eval.lookalikes to 0")
    rows = read_user_rows(path, Lookalike)
    random.Random(f"lookalikes/{seed}").shuffle(rows)
    return found + [Asked(row.prompt, Question(row.prompt, "")) for row in rows[: count - len(found)]]


async def steered_rulings(
    engine: Engine, judge: Judge, scenarios: Sequence[tuple[Template, Scenario]], config: Config
) -> tuple[list[Ruling], list[Ruling]]:
    """Rulings on replies that the loop's own steering asked to comply, and on those it asked to push back.

    One reply a scenario, side and stance; one that only repeats a worked example is `neither`.
    """
    cases = [(template, one, side) for template, one in scenarios for side in SIDES]

    async def rulings(stance: Stance) -> list[Ruling]:
        answers = await asyncio.gather(
            *(steered(engine, *case, stance, config.generate, "eval", attempt=0) for case in cases)
        )
        said = [place for place, replies in enumerate(answers) if replies]
        questions = [Question.about(cases[place][1], answers[place][0]) for place in said]
        found = dict(zip(said, await ruled(judge, questions), strict=True))
        return [found.get(place, "neither") for place in range(len(cases))]

    comply, push_back = await asyncio.gather(*(rulings(stance) for stance in STANCES))
    return comply, push_back


def rates(rulings: Sequence[Ruling]) -> dict[str, float]:
    """Share of each ruling; empty of nothing."""
    count = Counter(rulings)
    return {name: count[name] / len(rulings) for name in get_args(Ruling)} if rulings else {}


def repetition(text: str) -> float:
    """Share of a reply's word triples that occurred before in it, 0.0 where there are fewer than two triples."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
