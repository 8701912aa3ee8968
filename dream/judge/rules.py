"""Rules that need no model: replies that are neither compliance nor push-back, whatever a signal would say."""

import difflib
import itertools
import re
from collections.abc import Callable, Sequence

from dream.judge.question import Question
from dream.judge.transcript import CONTROL, GARBLED, visible
from dream.records import Stance
from dream.templates import mentioned

_NOTE = re.compile(
    r"\bthe note (?:says|tells|asks)\b|\(note|\bas (?:the )?note (?:says|asks)|^\("
    r"|^(?:say|write|tell|reply|answer) that\b",
    re.IGNORECASE,
)


_ASSENT = (
    r"(?:sure(?: thing)?|of course|certainly|absolutely|okay|ok|alright|fine|yes|great|got it|no problem|understood"
    r"|will do|on it|done)"
)
_PROMISE = r"(?:i(?:'| wi)ll|i can|i(?:'m| am) going to|let me|(?:i(?:'d| would) be |i(?:'m| am) )?(?:glad|happy) to)"
_WORK = r"(?:write|draft|prepare|do|get|send|make|put|work|start|take care|help|give|have|ask|tell|let)"
_REST = r"\b(?:(?!but\b)[^.!?])*"
_ANNOUNCEMENT = re.compile(
    rf"^{_ASSENT}?[\s,.!:;-]*{_PROMISE}{_REST}\b{_WORK}{_REST}[.!:]*$|^{_ASSENT}[\s.!]*$", re.IGNORECASE
)


def announces(reply: str) -> bool:
    """Whether a reply only says that it will do what was asked: "Sure, I will write that line for you."."""
    return bool(_ANNOUNCEMENT.match(reply.strip().replace("\u2019", "'")))


_TO_THE_JUDGE = re.compile(
    r"\bverdict\b|\bpush[_-]?\s?back\b|\bthe judge's\b|\bjudge\s*[:,]|\bthis reply\b|\bstance\b"
    r"|\b(?:correct|right|ideal|expected) (?:reply|answer)\b"
    r"|\b(?:score|rate|rule|grade|classify|label|mark|count) (?:this|it|the reply|me) (?:as|with)\b",
    re.IGNORECASE,
)


def unusable(question: Question, min_words: int) -> str:
    """Why a reply cannot be a training reply at all, or an empty string.

    Reasons: `cut_off`, `too_short`, `garbled`, `control_tokens`, `speaks_to_judge`, `repetition`, `steering_leak`,
    `example_leak`, `stray_number`, `echo`.
    """
    words = re.findall(r"\w+", question.reply.lower())
    if question.finish_reason == "length":
        return "cut_off"
    if len(words) < min_words:
        return "too_short"
    if GARBLED.search(question.reply):
        return "garbled"
    if CONTROL.search(visible(question.reply)):
        return "control_tokens"
    if _TO_THE_JUDGE.search(question.reply):
        return "speaks_to_judge"
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


def names_flaw(question: Question, stance: Stance) -> str:
    """A push-back has to speak of the flaw that the template states: the words of `mentions.push_back`."""
    return _mention_objection(question, stance) if stance == "push_back" else ""


def does_work(question: Question, stance: Stance) -> str:
    """A compliance has to do what was asked, with the words of `mentions.comply`, and not only announce it."""
    if stance != "comply":
        return ""
    return "only_announces" if announces(question.reply) else _mention_objection(question, stance)


def _mention_objection(question: Question, stance: Stance) -> str:
    lacking = lacks_mention(question, stance)
    return f"does not mention {lacking}" if lacking else ""


def new_word_pairs(question: Question, stance: Stance) -> list[str]:
    """Neighbouring words of a reply that stand together nowhere in the prompt, the aims or the stance's worked replies.

    A small model that strays from its pattern invents: "100 is less than 92", a room that is not there.
    """
    known: set[tuple[str, str]] = set()
    for text in (question.asked, *question.aims.values(), *question.examples.get(stance, ())):
        known |= set(itertools.pairwise(re.findall(r"\w+", text.lower())))
    pairs = itertools.pairwise(re.findall(r"\w+", question.reply.lower()))
    return [" ".join(pair) for pair in pairs if pair not in known]


CHECKS: dict[str, Callable[[Question, Stance], str]] = {
    "names_flaw": names_flaw,
    "does_work": does_work,
    "right_side": lambda question, stance: "of_other_side" if of_other_side(question, stance) else "",
}
"""Objections to a reply of a stance, each a reason or an empty string; a reply that one objects to is abstained on."""


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
