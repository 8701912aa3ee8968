"""What a training step is given: its rows in training order, its specification, and its token layout. No torch here.

Not covered: images and tools in prompts.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from dream.config import TrainConfig
from dream.records import ContrastPair, Message, PreferencePair, Record, assistant

Pair = tuple[PreferencePair, PreferencePair]


class Probe(Record):
    """A text whose likelihood is compared between the saved weights and the engine: is what was trained served?"""

    messages: list[Message]
    reply: str
    served_before: float | None = None
    """Its mean-token log-probability in the engine before the step, in nats."""


class Rehearsed(Record):
    """A request with an answer, the policy's own or a right one, and whether the answer came to its end."""

    messages: list[Message]
    reply: str
    finished: bool


class Drift(Record):
    """Distances after an optimiser step: KL to the policy before the round and to the initial model, in nats a token
    over the held-out texts, and the norm of the weights' change over the norm of the weights."""

    step: int
    kl_previous: float
    kl_initial: float
    displacement: float


class StepSpec(Record):
    """Everything `python -P -m train.step SPEC.json` needs to know."""

    model: str
    """The initial policy: a folder or a Hugging Face id."""
    adapter: str | None = None
    """Adapter folder of the current policy (`method: lora`); None begins a new adapter."""
    weights: str | None = None
    """Folder of the current policy's full weights (`method: full`), best its float32 masters; None is `model`."""
    rows: str
    """JSON Lines of `PreferencePair`, in training order (`round_rows`)."""
    out: str
    """The folder to make; it appears only when it is complete."""
    train: TrainConfig
    flip_probability: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a row's label is wrong."""
    seed: int = 1
    served_dtype: str = Field("bfloat16", pattern="^(bfloat16|float16|float32)$")
    """Precision in which the engine serves the policy."""
    trust_remote_code: bool = False
    probes: list[Probe] = []
    """Texts that must score in the engine as they do here."""
    heldout: list[Probe] = []
    """Texts that are not trained on, on which KL is measured."""
    rehearsed: list[Rehearsed] = []
    """Texts of which the policy is to think as the initial model, `train.rehearsal` of them in each step."""
    repaired: list[Rehearsed] = []
    """Those of the steps after the pairs, `train.batch_size` in each."""
    sft: bool = False
    """Whether a warm-up goes before."""
    ray_address: str | None = None
    """The Ray cluster in which several workers train; None starts one on this machine."""


def round_rows(
    pairs: list[ContrastPair],
    general: list[PreferencePair],
    replay: list[ContrastPair],
    *,
    batch_size: int,
    general_share: float,
    replay_share: float,
    seed: int,
    sides: Literal["both", "clear", "flawed"] = "both",
) -> list[PreferencePair]:
    """The rows of one round in training order; every `batch_size` consecutive rows are one optimiser step.

    All own pairs, `replay_share` times as many replayed ones, and general rows up to `general_share` of all rows (an
    even number of them). Both rows of a contrast pair stand in the same step, so every step holds as many flawed as
    contrasting clear directions and the unconditional part of the gradient cancels within it. A pair and its mirror
    follow each other, so that where a step's end does not part them the direction's words cancel, too. General rows are
    spread evenly. The last step may be short. The same seed gives the same rows. `sides` leaves out the rows of one
    side (a general row has a clear direction), which is what pairs are there to prevent.
    """
    rng = random.Random(seed)
    contrast = pairs + rng.sample(replay, min(len(replay), round(replay_share * len(pairs))))
    families: dict[str, list[ContrastPair]] = {}
    for pair in contrast:
        families.setdefault(pair.clear.meta.get("mirror_of") or pair.clear.pair_id, []).append(pair)
    contrast = [pair for family in rng.sample(list(families.values()), len(families)) for pair in family]
    # g <= share * (2c + g); the small number keeps 0.25 * 24 / 0.75 from becoming 7.999...
    wanted = int(general_share * 2 * len(contrast) / (1 - general_share) + 1e-9)
    plain = rng.sample(general, min(len(general), wanted) // 2 * 2)
    twos: list[Pair] = [(pair.clear, pair.flawed) for pair in contrast]
    others: list[Pair] = list(zip(plain[::2], plain[1::2], strict=True))
    return [row for two in _spread(others, twos) for row in two if sides in ("both", row.side)]


def _spread(few: list[Pair], many: list[Pair]) -> list[Pair]:
    """Both lists merged in their own order, `few` at even distances (Bresenham's line)."""
    total = len(few) + len(many)
    first, second = iter(few), iter(many)
    return [next(first if (i + 1) * len(few) // total > i * len(few) // total else second) for i in range(total)]


class Encoded(NamedTuple):
    """Token ids of one preference pair; `chosen` and `rejected` follow `prompt`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    others: tuple[list[int], ...] = ()
    """Chosen and rejected of the scenario's other side, where the two sides are compared (`with_other_sides`)."""

    @property
    def replies(self) -> list[list[int]]:
        """All that is scored under the prompt: chosen, rejected, and then `others`."""
        return [self.chosen, self.rejected, *self.others]


def chat_ids(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    """Token ids of a chat by its model's template."""
    rendered = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(rendered["input_ids"])


def _shared(*texts: Sequence[int]) -> int:
    """How many tokens these begin with in common.

    Where a template renders a prompt alone in another way than the prompt with a reply, the reply begins at the first
    difference.
    """
    same = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def encode(tokenizer: Any, row: PreferencePair) -> Encoded:
    """A row through the chat template, as TRL does it: a reply is what follows the prompt (`_shared`), its end-of-turn
    included."""
    prompt, chosen, rejected = (
        chat_ids(tokenizer, [*row.prompt, *reply], add_generation_prompt=not reply)
        for reply in ([], row.chosen, row.rejected)
    )
    start = _shared(prompt, chosen, rejected)
    return Encoded(prompt[:start], chosen[start:], rejected[start:])


def other_sides(rows: Sequence[PreferencePair], batch_size: int) -> list[int]:
    """For each row, in training order, the index of the other side of its scenario within its step of `batch_size`
    rows; its own where there is none, as for a general row."""
    found = list(range(len(rows)))
    for start in range(0, len(rows), batch_size):
        first: dict[str, int] = {}
        for i in range(start, min(start + batch_size, len(rows))):
            j = first.setdefault(rows[i].pair_id, i)
            if rows[i].side != rows[j].side:
                found[i], found[j] = j, i
    return found


def with_other_sides(
    encoded: Sequence[Encoded], rows: Sequence[PreferencePair], train: TrainConfig
) -> tuple[list[Encoded], list[int]]:
    """The encoded rows, each with the replies of its other side, and `other_sides` of the rows.

    Where `train.crossed_weight` is 0 sides are not compared: the rows stay as they are, each its own other side.
    """
    if not train.crossed_weight:
        return list(encoded), list(range(len(rows)))
    others = other_sides(rows, train.batch_size)
    return [
        ids if i == j else ids._replace(others=(encoded[j].chosen, encoded[j].rejected))
        for i, (ids, j) in enumerate(zip(encoded, others, strict=True))
    ], others


def encode_rehearsed(tokenizer: Any, text: Rehearsed) -> tuple[list[int], list[int]]:
    """Token ids of request and answer, the end of turn included where the answer came to its end."""
    prompt = chat_ids(tokenizer, text.messages, add_generation_prompt=True)
    if not text.finished:
        return prompt, list(tokenizer(text.reply, add_special_tokens=False)["input_ids"])
    whole = chat_ids(tokenizer, [*text.messages, assistant(text.reply)], add_generation_prompt=False)
    start = _shared(prompt, whole)
    return whole[:start], whole[start:]


class Layout(NamedTuple):
    """A batch as lists: B sequences padded to T positions, N reply tokens in R replies.

    `sources` are flat indices into B*T: the position whose hidden state predicts the token. `segments` is 0 for the
    prompt (and padding) and k for the k-th reply of its sequence.
    """

    ids: list[list[int]]
    positions: list[list[int]]
    segments: list[list[int]]
    sources: list[int]
    tokens: list[int]
    replies: list[int]


def lay_out(sequences: Sequence[tuple[list[int], Sequence[list[int]]]]) -> Layout:
    """Prompts with one or more replies each, padded on the right.

    With several replies the prompt stands there once and each reply continues it at the same positions; the attention
    mask must then keep the replies apart. Padding stands behind every token that is read, so a causal model needs no
    mask for it.
    """
    width = max(len(prompt) + sum(map(len, replies)) for prompt, replies in sequences)
    ids, positions, segments = [], [], []
    sources: list[int] = []
    tokens: list[int] = []
    which: list[int] = []
    reply_number = 0
    for line, (prompt, replies) in enumerate(sequences):
        seq, place, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, reply in enumerate(replies, 1):
            start = line * width + len(seq)
            sources += [line * width + len(prompt) - 1, *range(start, start + len(reply) - 1)][: len(reply)]
            tokens += reply
            which += [reply_number] * len(reply)
            reply_number += 1
            seq += reply
            place += range(len(prompt), len(prompt) + len(reply))
            segment += [k] * len(reply)
        room = [0] * (width - len(seq))
        ids.append(seq + room)
        positions.append(place + room)
        segments.append(segment + room)
    return Layout(ids, positions, segments, sources, tokens, which)
