"""The records that pass between the stages; nothing else does. All are frozen and go to JSON and back.

Words are those of docs/ARCHITECTURE.md: a *scenario* has two *sides* (clear, flawed); a reply has a *stance* (comply,
push_back, neither); a *contrast pair* is the two preference pairs of one scenario and is kept or dropped whole.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

Side = Literal["clear", "flawed"]
Stance = Literal["comply", "push_back", "neither"]
Source = Literal["on_policy", "steered"]

SIDES: tuple[Side, Side] = ("clear", "flawed")
RIGHT_STANCE: dict[Side, Stance] = {"clear": "comply", "flawed": "push_back"}
WRONG_STANCE: dict[Side, Stance] = {"clear": "push_back", "flawed": "comply"}


class Message(TypedDict):
    """One chat turn in the form that chat templates, TRL and OpenAI-style logs share."""

    role: str
    content: str


class Record(BaseModel):
    """Base of all records: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


class SideText(Record):
    """What one side of a scenario says and asks for.

    `aims` tells, per stance, what a good reply does; `mentions`, per stance, the words one must contain to speak of
    this very situation (matching ignores case); `examples`, per stance, are the template's worked replies.
    """

    direction: str
    aims: dict[Stance, str]
    mentions: dict[Stance, list[str]]
    examples: dict[Stance, list[str]] = {}


class Scenario(Record):
    """One situation with a clear and a flawed direction, a minimal edit apart."""

    scenario_id: str
    template: str
    template_hash: str
    flaw: str
    domain: str
    split: Literal["train", "heldout"]
    seed: int
    slots: dict[str, Any]
    mirror_of: str = ""
    """The scenario that this one mirrors: the same directions, right and wrong the other way round."""
    background: str = ""
    situation: str
    clear: SideText
    flawed: SideText | None
    """None in a general scenario, which has nothing to push back on."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """Both sides, or only `clear` in a general scenario."""
        return SIDES if self.flawed else ("clear",)

    def side(self, side: Side) -> SideText:
        """The text of one side."""
        text = self.clear if side == "clear" else self.flawed
        assert text is not None, "a general scenario has no flawed side"
        return text

    def prompt(self, side: Side) -> list[Message]:
        """The prompt that is trained on: background, situation and direction in one user turn, no steering."""
        return [user(" ".join(part for part in (self.background, self.situation, self.side(side).direction) if part))]


class Reply(Record):
    """One sampled reply. `asked` is the stance that the steering asked for; None when the reply is on-policy.

    `copied` is a word that it took from a worked example of another draw, where it belongs and here it does not.
    """

    reply_id: str
    scenario_id: str
    side: Side
    source: Source
    asked: Stance | None
    text: str
    tokens: int
    finish_reason: str
    policy: str
    copied: str = ""


class Verdict(Record):
    """The judge's ruling on one reply.

    `score` is the probability that the reply pushes back; `confidence` the probability of the ruling; `signals` what
    each judge said. `abstain` means that the reply must not be trained on.
    """

    reply_id: str
    stance: Stance
    score: float
    confidence: float
    abstain: bool
    reason: str = ""
    signals: dict[str, float] = {}


class PreferencePair(Record):
    """One row of pairs.jsonl: TRL's conversational preference format with its provenance in `meta`."""

    pair_id: str
    side: Side
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)
    meta: dict[str, Any]


class ContrastPair(Record):
    """The two preference pairs of one scenario: the unit that is counted, kept or dropped."""

    clear: PreferencePair
    flawed: PreferencePair


class Dropped(Record):
    """Something that was not kept, and why. `reason` is one of a small fixed set of words; `detail` is for people."""

    scenario_id: str
    template: str
    stage: str
    reason: str
    detail: str = ""


class EvalPair(Record):
    """One side of an evaluation pair: a prompt and one reply of each stance.

    The rest helps the judge with sampled replies and is known for pairs made from templates: see `SideText`.
    """

    pair_id: str
    side: Side
    prompt: list[Message] = Field(min_length=1)
    comply: str = Field(min_length=1)
    push_back: str = Field(min_length=1)
    aims: dict[Stance, str] = {}
    mentions: dict[Stance, list[str]] = {}
    examples: dict[Stance, list[str]] = {}
    other_examples: dict[Stance, list[str]] = {}
