"""What a judge is asked, and what a judge is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from dream.records import Message, Reply, Scenario, Side, Stance

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Question:
    """One reply to rule on.

    All but the prompt and the reply are known for scenarios and empty for replies from elsewhere: `aims` (what a reply
    of each stance would do here), `mentions`, the worked replies of this side and of the other (`examples`,
    `other_examples`), and `copied` (see `Reply`).
    """

    prompt: Sequence[Message]
    reply: str
    finish_reason: str = "stop"
    aims: Mapping[Stance, str] = field(default_factory=dict)
    mentions: Mapping[Stance, Sequence[str]] = field(default_factory=dict)
    examples: Mapping[Stance, Sequence[str]] = field(default_factory=dict)
    other_examples: Mapping[Stance, Sequence[str]] = field(default_factory=dict)
    copied: str = ""

    @classmethod
    def about(cls, scenario: Scenario, reply: Reply) -> "Question":
        """The question that a reply of the loop raises."""
        return replace(
            cls.unanswered(scenario, reply.side),
            reply=reply.text,
            finish_reason=reply.finish_reason,
            copied=reply.copied,
        )

    @classmethod
    def unanswered(cls, scenario: Scenario, side: Side) -> "Question":
        """The question that any reply to this side will raise, still without the reply."""
        text = scenario.side(side)
        others = [scenario.side(name).examples for name in scenario.sides if name != side]
        return cls(
            scenario.prompt(side),
            "",
            aims=text.aims,
            mentions=text.mentions,
            examples=text.examples,
            other_examples=others[0] if others else {},
        )

    @property
    def informed(self) -> bool:
        """Whether a template tells what replies of each stance would say here."""
        return bool(self.examples)

    @property
    def bare(self) -> "Question":
        """The same question as if the reply came from elsewhere."""
        return Question(self.prompt, self.reply, self.finish_reason)

    @property
    def asked(self) -> str:
        """What the user said, all turns together."""
        return "\n\n".join(message["content"] for message in self.prompt if message["role"] == "user")


@dataclass(frozen=True)
class Labelled:
    """A question whose answer is known; `group` keeps replies of one origin on one side of a split."""

    question: Question
    label: Stance
    group: str


class Signal(Protocol):
    """One judge among those that are combined: some numbers a reply, whose meaning is learned in calibration."""

    @property
    def name(self) -> str:
        """Its name in `judge.signals`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What each number is."""

    @property
    def learns(self) -> bool:
        """Whether `fit` does anything; such a signal is measured on replies that it was not fitted on."""

    def fit(self, examples: Sequence[Labelled]) -> None:
        """Learns from labelled replies; signals that have nothing to learn ignore it."""

    async def measure(self, questions: Sequence[Question]) -> "np.ndarray":
        """What it sees in each reply, shape (questions, columns)."""
