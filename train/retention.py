"""What the policy must not forget. A first check: arithmetic, the skill that preference training loses first.

Not covered yet: facts, instruction format, perplexity of neutral text.
"""

import asyncio
import random
import re

from dream import prompts
from dream.engine import Engine, Sampling
from dream.records import user


def questions(count: int, seed: int) -> list[tuple[str, int]]:
    """`count` sums and differences of small numbers, as (question, answer), of growing size."""
    rng = random.Random(f"arithmetic/{seed}")
    made = []
    for number in range(count):
        high = (9, 20, 50)[number % 3]
        a, b = rng.randint(1, high), rng.randint(1, high)
        a, b = max(a, b), min(a, b)
        sign = rng.choice("+-")
        made.append((prompts.render("retention/arithmetic", a=a, b=b, sign=sign), a + b if sign == "+" else a - b))
    return made


async def retention(engine: Engine, count: int, seed: int) -> list[float]:
    """1.0 or 0.0 for each question, answered greedily."""
    asked = questions(count, seed)
    sampling = Sampling(1, max_tokens=16, temperature=0.0)
    answers = await asyncio.gather(*(engine.generate([user(question)], sampling) for question, _ in asked))
    return [float(stated(replies[0].text) == answer) for replies, (_, answer) in zip(answers, asked, strict=True)]


def stated(text: str) -> int | None:
    """The number a reply gives: the last one of its first line, None when there is none."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.strip().splitlines()[0]) if text.strip() else []
    return int(float(found[-1])) if found and float(found[-1]).is_integer() else None
