"""`dream judge check`: how good a judge is on labelled replies, combined and each of its signals alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from dream.config import Config
from dream.engine import Engine
from dream.judge.combined import Measured, calibrated, measured
from dream.judge.quality import STANCES, Quality
from dream.judge.question import Labelled
from dream.records import Stance

WORST = 10


@dataclass(frozen=True)
class Mistake:
    """A reply that the judge was wrong about, with the probability it gave to what it said."""

    example: Labelled
    said: Stance
    probability: float


@dataclass(frozen=True)
class JudgeCheck:
    """The combined judge's quality, that of each signal by itself, and the worst mistakes of the combined one."""

    combined: Quality
    alone: dict[str, Quality]
    worst: list[Mistake]


async def check(
    engine: Engine | None,
    config: Config,
    examples: Sequence[Labelled],
    known: Sequence[Labelled],
    labelled: Sequence[Labelled],
) -> JudgeCheck:
    """Calibrates a judge as a run does (see `calibrated`) and measures it on `labelled`.

    `engine` may be missing where no signal asks a model.
    """

    async def judged(signals: list[str]) -> Measured:
        settings = config.model_copy(update={"judge": config.judge.model_copy(update={"signals": signals})})
        return await measured(await calibrated(engine, settings, examples, known), labelled)

    names: list[str] = list(config.judge.signals)
    alone = {name: (await judged([name])).quality for name in names if len(names) > 1}
    combined, probabilities = await judged([*names])
    mistakes = [
        Mistake(example, STANCES[int(row.argmax())], float(row.max()))
        for example, row in zip(labelled, probabilities, strict=True)
        if STANCES[int(row.argmax())] != example.label
    ]
    return JudgeCheck(combined, alone, sorted(mistakes, key=lambda one: -one.probability)[:WORST])
