"""dream/engine.py: an engine beside which a judge's own rests."""

import asyncio
from pathlib import Path

from dream.engine import Sampling, ScriptedEngine, WithSecond
from dream.records import user


class Told(ScriptedEngine):
    """Remembers when it was to rest."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda messages, number: name)

    async def rest(self) -> None:
        if self.loaded[-1:] != ["rest"]:
            self.loaded.append("rest")  # type: ignore[arg-type]


def test_second_engine_rests_and_comes_back_with_the_first() -> None:
    """While a step trains neither holds memory; afterwards the judge's has its own weights, and the policy's the new
    ones. New weights by themselves are no matter of the judge's."""
    policy, judge = Told("policy"), Told("judge")
    both = WithSecond(policy, judge)

    async def go() -> str:
        await both.load_weights(Path("old"))
        for _ in range(2):
            await both.rest()
        await both.load_weights(Path("new"))
        await both.load_weights(Path("newer"))
        return (await both.generate([user("who")], Sampling()))[0].text

    assert asyncio.run(go()) == "policy"
    assert policy.loaded == [Path("old"), "rest", Path("new"), Path("newer")]
    assert judge.loaded == ["rest", None]
