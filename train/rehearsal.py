"""What keeps a policy as it is where no pair speaks: ordinary requests with the policy's own answers, right or wrong,
of which it is to think as the initial model does.

Distilled from itself (learning without forgetting; Li and Hoiem 2016, arXiv 1606.09282) on texts of its own making
(self-synthesised rehearsal; Huang et al. 2024, arXiv 2403.01244).
"""

import asyncio
import random

from dream import prompts
from dream.engine import Engine, Sampling
from dream.records import user
from train.data import Rehearsed

MAX_TOKENS = 64
"""Of an answer; a longer one has no end."""
LARGEST = (9, 20, 50)
"""Numbers of sums go up to one of these: what a small model can lose are mostly the sums of one digit."""


async def rehearse(engine: Engine, count: int, seed: int) -> list[Rehearsed]:
    """`count` requests, answered by the served policy."""

    async def answered(request: str) -> Rehearsed:
        messages = [user(request)]
        (reply,) = await engine.generate(messages, Sampling(1, MAX_TOKENS, temperature=0.7, min_p=0.05))
        return Rehearsed(messages=messages, reply=reply.text, finished=reply.finish_reason == "stop")

    answers = await asyncio.gather(*map(answered, requests(count, seed)))
    return [answer for answer in answers if answer.reply.strip()]


def requests(count: int, seed: int) -> list[str]:
    """`count` requests: lines of prompts/rehearsal/questions.j2, and sums and differences of small numbers, in turn."""
    rng = random.Random(f"rehearsal/{seed}")
    lines = prompts.lines("rehearsal/questions")
    rng.shuffle(lines)
    made = []
    for number in range(count):
        if number % 2:
            high = rng.choice(LARGEST)
            a, b = sorted((rng.randint(1, high), rng.randint(1, high)), reverse=True)
            made.append(rng.choice(prompts.lines("rehearsal/sums", a=a, b=b, sign=rng.choice("+-"))))
        else:
            made.append(lines[number // 2 % len(lines)])
    return made
