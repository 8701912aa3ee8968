"""Conversation logs are free pairs: what the model said where it routed wrong is the rejected reply.

A log does not say whether a direction was clear or flawed; the user's next turn is the evidence (`dream.evidence`), and
where that says nothing the exchange is *undecided* and not used. The chosen reply is steered. A log shows one side of a
situation only, so a row comes out that TRL can train on, and no contrast pair; `dream train --data` takes only those.

Not covered: a user who insists on a flawed direction and never learns of it; people should look through the rows.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from dream.config import Config
from dream.conversations import Exchange, check_log, exchanges, read_conversations
from dream.engine import Engine, Sampling
from dream.errors import CallRefused, DataError
from dream.evidence import evidence, gives_direction
from dream.filters import agreement, similarity
from dream.judge.combined import Judge
from dream.judge.question import Question
from dream.masking import marks, mask
from dream.records import RIGHT_STANCE, WRONG_STANCE, Message, PreferencePair, Record, Side, Verdict, assistant
from dream.selfplay import steering
from dream.stop import Stop
from dream.store import Log, owned, read_log

ATTEMPTS = 3
"""How often a chosen reply is asked for."""
FINISHING = "stopping: no exchange is begun, those under way are finished and stored; a second signal stops at once"
SHOWN = 20
"""Malformed lines that the summary names."""
STEERING_TOKENS = 256
"""Room for the notes of steering and judge beside a prompt and a reply."""


class ImportSummary(Record):
    """What an import found. `turns` are messages; `already_there` are pairs that the file held, or that came twice."""

    conversations: int = 0
    turns: int = 0
    exchanges: int = 0
    no_direction: int = 0
    undecided: int = 0
    wrong: int = 0
    pairs: int = 0
    already_there: int = 0
    not_usable: dict[str, int] = {}
    malformed: int = 0
    malformed_lines: list[str] = []
    masked: dict[str, int] = {}


def check_paths(logs: Sequence[Path], out: Path) -> set[str]:
    """Looks at the logs and at the file that rows are added to, before any work; the ids of the rows that are there.

    A last row without a line end, as some editors leave it, gets one. Half a row of ours is left for `Log` to cut off.

    Raises:
        DataError: a log cannot be read, is `out` as well, or `out` holds something else than preference rows.
    """
    for log in logs:
        check_log(log)
        if log.resolve() == out.resolve():
            raise DataError(f"{log}: is a log and --out at once; choose another --out")
    try:
        *lines, tail = out.read_bytes().split(b"\n") if out.exists() else [b""]
        if tail.strip():
            try:
                PreferencePair.model_validate_json(tail)
            except ValidationError as error:
                if not tail.startswith(b'{"pair_id":'):
                    raise DataError(
                        f"{out}:{len(lines) + 1}: not a preference row; choose another --out, or remove that line"
                    ) from error
            else:
                with out.open("ab") as file:
                    file.write(b"\n")
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}; choose another --out") from error
    return {row.pair_id for row in read_log(out, PreferencePair)}


class LogImporter:
    """Makes preference rows from logs. `run` can be called again after a kill: rows that are there are not made again.

    Exchanges are worked on by `generate.concurrency` workers that read the logs as they go, so memory is bounded.
    """

    def __init__(
        self, engine: Engine, judge: Judge, out: Path, config: Config, *, policy: str, stop: Stop | None = None
    ) -> None:
        self._engine, self._judge, self._out = engine, judge, out
        self._config, self._policy, self._stop = config, policy, stop or Stop()
        self._counts: Counter[str] = Counter()
        self._not_usable: Counter[str] = Counter()
        self._masked: Counter[str] = Counter()
        self._malformed_lines: list[str] = []

    async def run(self, logs: Sequence[Path]) -> ImportSummary:
        """Imports all logs into the file of preference rows.

        Raises:
            DataError: a log cannot be read (nothing is written then), or the file holds something else.
            RunError: another process is adding to the file.
            StorageError: the file cannot be written.
            Stopped: `stop` was asked for, and what was under way is stored.
        """
        check_paths(logs, self._out)
        with owned(self._out):
            await self._import(logs)
        return self.summary()

    async def _import(self, logs: Sequence[Path]) -> None:
        self._known = check_paths(logs, self._out)
        self._file = Log(self._out)
        source = self._read(logs)

        async def work() -> None:
            for log, line, exchange in source:
                if self._stop.asked is not None:
                    return
                await self._one(log, line, exchange)

        workers = [asyncio.create_task(work()) for _ in range(self._config.generate.concurrency)]
        try:
            with self._stop.gently(FINISHING):
                await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._file.close()

    def summary(self) -> ImportSummary:
        """What was found so far."""
        return ImportSummary(
            **self._counts,
            not_usable=dict(self._not_usable.most_common()),
            malformed_lines=self._malformed_lines,
            masked=dict(self._masked.most_common()),
        )

    def _read(self, logs: Sequence[Path]) -> Iterator[tuple[Path, int, Exchange]]:
        """All masked exchanges with their file and line."""
        for log in logs:
            for line, messages in read_conversations(log, self._bad):
                self._counts["conversations"] += 1
                self._counts["turns"] += len(messages)
                for exchange in exchanges([self._mask(message) for message in messages]):
                    self._counts["exchanges"] += 1
                    yield log, line, exchange

    def _mask(self, message: Message) -> Message:
        content, counts = mask(message["content"])
        self._masked += counts
        return {"role": message["role"], "content": content}

    def _bad(self, path: Path, number: int, why: str) -> None:
        self._counts["malformed"] += 1
        if len(self._malformed_lines) < SHOWN:
            self._malformed_lines.append(f"{path.name}:{number} {why}")

    async def _one(self, log: Path, line: int, exchange: Exchange) -> None:
        try:
            await self._pair(log, line, exchange)
        except CallRefused:  # a text that is longer in tokens than it looks, most likely
            self._not_usable["engine_refused"] += 1

    async def _pair(self, log: Path, line: int, exchange: Exchange) -> None:
        """One exchange, from its evidence to its row. The judge is asked only where there is evidence."""
        if not gives_direction(exchange.direction):
            self._counts["no_direction"] += 1
            return
        rules = evidence(exchange.direction, exchange.following)
        if not rules:
            self._counts["undecided"] += 1
            return
        if self._too_long(exchange):
            self._not_usable["too_long"] += 1
            return
        if exchange.pair_id in self._known:
            self._counts["already_there"] += 1
            return
        self._known.add(exchange.pair_id)
        said = await self._verdict(exchange, exchange.reply)
        if said.abstain or said.stance == "neither":
            self._not_usable[f"reply_{_word(said.reason)}"] += 1
            return
        side = next((side for side in rules if WRONG_STANCE[side] == said.stance), None)
        if side is None:
            self._counts["undecided"] += 1
            return
        self._counts["wrong"] += 1
        chosen = await self._chosen(exchange, side)
        if isinstance(chosen, str):
            self._not_usable[f"chosen_{chosen}"] += 1
            return
        self._file.append(self._row(log, line, exchange, side, rules[side], said, *chosen))
        self._counts["pairs"] += 1

    async def _verdict(self, exchange: Exchange, reply: str, finish_reason: str = "stop") -> Verdict:
        question = Question(exchange.prompt, reply, finish_reason)
        return (await self._judge.rule([exchange.pair_id], [question]))[0]

    async def _chosen(self, exchange: Exchange, side: Side) -> tuple[str, Verdict] | str:
        """A reply that is steered to the right stance, with its verdict, or why there was none at the last attempt."""
        generate, filters = self._config.generate, self._config.filters
        sampling = Sampling(1, generate.max_tokens, generate.temperature, generate.top_p, generate.min_p)
        reason = ""
        for _ in range(ATTEMPTS):
            completion = (await self._engine.generate(steered_prompt(exchange.prompt, side), sampling))[0]
            reply, _ = mask(completion.text)
            verdict = await self._verdict(exchange, reply, completion.finish_reason)
            if verdict.abstain or verdict.stance == "neither":
                reason = _word(verdict.reason)
            elif verdict.stance != RIGHT_STANCE[side]:
                reason = f"judged_{verdict.stance}"
            elif _length_ratio(reply, exchange.reply) > filters.max_length_ratio:
                reason = "length_ratio"
            elif similarity(reply, exchange.reply) > filters.max_similarity:
                reason = "too_alike"
            else:
                return reply, verdict
        return reason

    def _too_long(self, exchange: Exchange) -> bool:
        """Whether prompt and reply, with the notes around them, may not fit into the engine."""
        prompt = sum(_most_tokens(message["content"]) for message in exchange.prompt)
        reply = max(_most_tokens(exchange.reply), self._config.generate.max_tokens)
        return prompt + reply + STEERING_TOKENS > self._config.engine.max_model_len

    def _row(
        self, log: Path, line: int, exchange: Exchange, side: Side, rule: str, said: Verdict, reply: str, right: Verdict
    ) -> PreferencePair:
        return PreferencePair(
            pair_id=exchange.pair_id,
            side=side,
            prompt=exchange.prompt,
            chosen=[assistant(reply)],
            rejected=[assistant(exchange.reply)],
            meta={
                "source": "log",
                "log": mask(log.name)[0],
                "line": line,
                "turn": exchange.turn,
                "side_evidence": rule,
                "scenario_id": exchange.pair_id,
                "template": "log",
                "flaw": "from_log",
                "domain": "log",
                "policy": self._policy,
                "chosen_score": agreement(right, RIGHT_STANCE[side]),
                "rejected_score": agreement(said, RIGHT_STANCE[side]),
                "judge_confidence": round(right.confidence * said.confidence, 4),
                "chosen_source": "steered",
                "rejected_source": "log",
                "seed": self._config.seed,
                "masked": marks(*(message["content"] for message in exchange.prompt), exchange.reply),
            },
        )


def steered_prompt(prompt: Sequence[Message], side: Side) -> list[Message]:
    """The chat that asks for the side's right stance: steering around the last turn, with the turns before it."""
    steer, note = steering(RIGHT_STANCE[side], prompt[-1]["content"], "")
    system = [message["content"] for message in prompt if message["role"] == "system"]
    history = [message for message in prompt[:-1] if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*system, steer["content"]])}, *history, note]


def _word(reason: str) -> str:
    """The judge's reason as one word that can be counted."""
    return reason.split(" ")[0] or "unsure"


def _most_tokens(text: str) -> int:
    """More tokens than nearly any tokenizer makes: one for two letters, one for each other byte but spaces."""
    return len(re.findall(rb"[A-Za-z]{1,2}|[^A-Za-z ]", text.encode()))


def _length_ratio(one: str, other: str) -> float:
    """Longer over shorter, in words: the tokens of a log's reply were never counted."""
    low, high = sorted(max(1, len(re.findall(r"\w+", text))) for text in (one, other))
    return high / low
