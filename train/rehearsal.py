"""What keeps a policy as it is where no pair speaks: texts of which it is to think as the initial model does.

They are ordinary requests with the policy's own answers, right or wrong, and, after the pairs, sums and requests for
a form with short right answers. Distilled from itself (learning without forgetting; Li and Hoiem 2016, arXiv
1606.09282) on texts of its own making (self-synthesised rehearsal; Huang et al. 2024, arXiv 2403.01244).
"""

import asyncio
import itertools
import random

from pydantic import Field

from dream import prompts
from dream.config import TrainConfig
from dream.engine import Engine, Sampling
from dream.inputs import read_user_rows
from dream.paths import data_folder
from dream.records import Record, user
from train.data import Rehearsed
from train.retention import LARGEST, drawn_sum

MAX_TOKENS = 64
"""Of an answer; a longer one has no end."""


async def rehearse(
    engine: Engine, train: TrainConfig, steps: int, seed: int
) -> tuple[list[Rehearsed], list[Rehearsed]]:
    """What `steps` optimiser steps on pairs rehearse, and the repair after them; requests are answered by the served
    policy, and those that it answers with nothing are left out."""

    async def answered(request: str) -> Rehearsed:
        messages = [user(request)]
        (reply,) = await engine.generate(messages, Sampling(1, MAX_TOKENS, temperature=0.7, min_p=0.05))
        return Rehearsed(messages=messages, reply=reply.text, finished=reply.finish_reason == "stop")

    beside = train.rehearsal * steps
    repaired = train.batch_size * train.repair_steps
    short = sums(round(train.repair_sums * repaired), seed) + forms(round(train.repair_forms * repaired), seed)
    answers = await asyncio.gather(*map(answered, requests(beside + max(0, repaired - len(short)), seed)))
    during, after = ([text for text in part if text.reply.strip()] for part in (answers[:beside], answers[beside:]))
    after += short
    random.Random(f"rehearsal/order/{seed}").shuffle(after)
    return during, after


class Form(Record):
    """A row of prompts/rehearsal/forms.jsonl."""

    request: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def forms(count: int, seed: int) -> list[Rehearsed]:
    """`count` requests for a form, none in the words of train/instructions.py, each with an answer that keeps it."""
    rows = read_forms() if count else []
    random.Random(f"rehearsal/forms/{seed}").shuffle(rows)
    return [
        Rehearsed(messages=[user(row.request)], reply=row.answer, finished=True)
        for row in itertools.islice(itertools.cycle(rows), count)
    ]


def read_forms() -> list[Form]:
    """All rows of prompts/rehearsal/forms.jsonl.

    Raises:
        DataError: it is missing, empty, or a row in it is malformed.
    """
    return read_user_rows(data_folder("prompts") / "rehearsal" / "forms.jsonl", Form)


def requests(count: int, seed: int) -> list[str]:
    """`count` lines of prompts/rehearsal/questions.j2, round and round."""
    lines = prompts.lines("rehearsal/questions")
    random.Random(f"rehearsal/{seed}").shuffle(lines)
    return [lines[number % len(lines)] for number in range(count)]


def sums(count: int, seed: int) -> list[Rehearsed]:
    """`count` sums and differences of small numbers with nothing but the right result after the task.

    Not the policy's own answers: those of a small model are wordy and mostly wrong, and hardly a token of them is the
    digit on which its knowledge shows.
    """
    rng = random.Random(f"rehearsal/sums/{seed}")

    def made() -> Rehearsed:
        a, b, sign, result = drawn_sum(rng, rng.choice(LARGEST))
        request = rng.choice(prompts.lines("rehearsal/sums", a=a, b=b, sign=sign))
        return Rehearsed(messages=[user(request)], reply=f"{a} {sign} {b} = {result}", finished=True)

    return [made() for _ in range(count)]
