"""Rules that need no model: replies that are neither compliance nor push-back, whatever a signal would say."""

import difflib
import re
from collections.abc import Sequence

from dream.judge.question import Question
from dream.records import Stance
from dream.templates import mentioned

_CONTROL = re.compile(r"<\|[^|>]{1,30}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_NOTE = re.compile(
    r"\bthe note (?:says|tells|asks)\b|\(note|\bas (?:the )?note (?:says|asks)|^\("
    r"|^(?:say|write|tell|reply|answer) that\b",
    re.IGNORECASE,
)


def unusable(question: Question, min_words: int) -> str:
    """Why a reply cannot be a training reply at all, or an empty string.

    Reasons: `cut_off`, `too_short`, `control_tokens`, `repetition`, `steering_leak`, `example_leak`, `stray_number`,
    `echo`.
    """
    words = re.findall(r"\w+", question.reply.lower())
    if question.finish_reason == "length":
        return "cut_off"
    if len(words) < min_words:
        return "too_short"
    if _CONTROL.search(question.reply):
        return "control_tokens"
    if _repeats(words):
        return "repetition"
    if _NOTE.search(question.reply) or any(
        aim and aim.lower() in question.reply.lower() for aim in question.aims.values()
    ):
        return "steering_leak"
    if question.copied:
        return "example_leak"
    if question.examples and _numbers(question.reply) - _numbers(*_known_texts(question)):
        return "stray_number"
    asked = " ".join(re.findall(r"\w+", question.prompt[-1]["content"].lower()))
    if f" {' '.join(words)} " in f" {asked} ":
        return "echo"
    return ""


def lacks_mention(question: Question, stance: Stance) -> str:
    """The words that a reply of this stance should have spoken of and did not, or an empty string."""
    return next((words for words in question.mentions.get(stance, ()) if not mentioned(words, question.reply)), "")


def of_other_side(question: Question, stance: Stance) -> bool:
    """Whether a reply is nearer to what this stance says on the other side: "it says 30, not 40" the wrong way round.

    Such a reply speaks of the right things and claims the opposite. Nearness is difflib's ratio over words.
    """
    own, other = question.examples.get(stance, ()), question.other_examples.get(stance, ())
    if not own or not other:
        return False
    return _nearest(question.reply, other) > _nearest(question.reply, own)


def _nearest(reply: str, examples: Sequence[str]) -> float:
    words = re.findall(r"\w+", reply.lower())
    return max(
        difflib.SequenceMatcher(None, words, re.findall(r"\w+", example.lower()), autojunk=False).ratio()
        for example in examples
    )


def _known_texts(question: Question) -> list[str]:
    """Where a reply may have its numbers from."""
    worked = [text for texts in (*question.examples.values(), *question.other_examples.values()) for text in texts]
    return [question.prompt[-1]["content"], *question.aims.values(), *worked]


def _numbers(*texts: str) -> set[str]:
    return {number for text in texts for number in re.findall(r"\d+", text)}


def _repeats(words: list[str], n: int = 4) -> bool:
    """Whether over a quarter of the n-grams occur before."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(grams) > n and len(set(grams)) < 0.75 * len(grams)
