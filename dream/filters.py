"""From judged replies to a contrast pair: both sides or nothing. Pure functions; every refusal has a reason."""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dream.config import FilterConfig
from dream.records import (
    RIGHT_STANCE,
    WRONG_STANCE,
    ContrastPair,
    PreferencePair,
    Reply,
    Scenario,
    Side,
    Stance,
    Verdict,
    assistant,
)


@dataclass(frozen=True)
class Judged:
    """A reply with its verdict."""

    reply: Reply
    verdict: Verdict

    def is_stance(self, stance: Stance) -> bool:
        """Whether the judge is sure that the reply has this stance."""
        return not self.verdict.abstain and self.verdict.stance == stance


@dataclass(frozen=True)
class Refusal:
    """Why there is no pair."""

    reason: str
    detail: str = ""


def already_right(on_policy: Mapping[Side, Sequence[Judged]]) -> bool:
    """Whether the policy routes right in all of its own samples on both sides; such a scenario teaches little."""
    return all(judged.is_stance(RIGHT_STANCE[side]) for side, replies in on_policy.items() for judged in replies)


def contrast_pair(
    scenario: Scenario, replies: Mapping[Side, Sequence[Judged]], config: FilterConfig
) -> ContrastPair | Refusal:
    """The contrast pair of a scenario, or why there is none."""
    rows = {}
    for side in scenario.sides:
        row = preference_pair(scenario, side, replies[side], config)
        if isinstance(row, Refusal):
            return row
        rows[side] = row
    return ContrastPair(clear=rows["clear"], flawed=rows["flawed"])


def preference_pair(
    scenario: Scenario, side: Side, replies: Sequence[Judged], config: FilterConfig
) -> PreferencePair | Refusal:
    """The best chosen and rejected reply of one side, or why there are none.

    What the policy itself said is preferred, as the rejected reply and as the chosen one alike, so that steered wording
    is no mark of either; then replies the judge is sure of and that are alike in length.
    """
    right = [judged for judged in replies if judged.is_stance(RIGHT_STANCE[side])]
    wrong = [judged for judged in replies if judged.is_stance(WRONG_STANCE[side])]
    if not right or not wrong:
        missing = RIGHT_STANCE[side] if not right else WRONG_STANCE[side]
        return Refusal(f"no_{missing}_on_{side}", _why_not(replies, missing))
    candidates = list(itertools.product(right, wrong))
    fitting = [pair for pair in candidates if length_ratio(*pair) <= config.max_length_ratio]
    if not fitting:
        return Refusal("length_ratio", f"{side}: {min(length_ratio(*pair) for pair in candidates):.1f} at best")
    alike = [similarity(one.reply.text, other.reply.text) for one, other in fitting]
    distinct = [pair for pair, share in zip(fitting, alike, strict=True) if share <= config.max_similarity]
    if not distinct:
        return Refusal("too_alike", f"{side}: {min(alike):.2f} at best")
    chosen, rejected = max(distinct, key=_preference)
    return PreferencePair(
        pair_id=scenario.scenario_id,
        side=side,
        prompt=scenario.prompt(side),
        chosen=[assistant(chosen.reply.text)],
        rejected=[assistant(rejected.reply.text)],
        meta={
            "scenario_id": scenario.scenario_id,
            "template": scenario.template,
            "template_hash": scenario.template_hash,
            "flaw": scenario.flaw,
            "domain": scenario.domain,
            "policy": chosen.reply.policy,
            "chosen_score": agreement(chosen.verdict, RIGHT_STANCE[side]),
            "rejected_score": agreement(rejected.verdict, RIGHT_STANCE[side]),
            "judge_confidence": round(chosen.verdict.confidence * rejected.verdict.confidence, 4),
            "chosen_source": chosen.reply.source,
            "rejected_source": rejected.reply.source,
            "chosen_reply": chosen.reply.reply_id,
            "rejected_reply": rejected.reply.reply_id,
            "seed": scenario.seed,
            "direction": scenario.side(side).direction,
        },
    )


def mirrored_pair(pair: ContrastPair, twin: Scenario) -> ContrastPair:
    """The contrast pair of a mirrored scenario: the same four replies, each on the other side of its preference.

    What was the right push-back on the flawed direction claims something that is not so in the twin, where that very
    direction is clear; so neither a direction nor a reply alone tells right from wrong.
    """
    return ContrastPair(
        clear=_mirrored_row(pair.flawed, twin, "clear"), flawed=_mirrored_row(pair.clear, twin, "flawed")
    )


def _mirrored_row(row: PreferencePair, twin: Scenario, side: Side) -> PreferencePair:
    meta = row.meta
    return PreferencePair(
        pair_id=twin.scenario_id,
        side=side,
        prompt=twin.prompt(side),
        chosen=row.rejected,
        rejected=row.chosen,
        meta={
            **meta,
            "scenario_id": twin.scenario_id,
            "mirror_of": twin.mirror_of,
            "chosen_score": round(1 - meta["rejected_score"], 4),
            "rejected_score": round(1 - meta["chosen_score"], 4),
            "chosen_source": meta["rejected_source"],
            "rejected_source": meta["chosen_source"],
            "chosen_reply": meta["rejected_reply"],
            "rejected_reply": meta["chosen_reply"],
        },
    )


def length_ratio(one: Judged, other: Judged) -> float:
    """Longer over shorter, in tokens."""
    lengths = sorted((max(1, one.reply.tokens), max(1, other.reply.tokens)))
    return lengths[1] / lengths[0]


def similarity(one: str, other: str) -> float:
    """0 for no words in common, 1 for the same words in the same order (difflib's ratio)."""
    first, second = (re.findall(r"\w+", text.lower()) for text in (one, other))
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def _preference(pair: tuple[Judged, Judged]) -> float:
    chosen, rejected = pair
    own_words = sum(judged.reply.source == "on_policy" for judged in pair)
    confidence = chosen.verdict.confidence + rejected.verdict.confidence
    return confidence + 0.2 * own_words - 0.3 * math.log(length_ratio(*pair))


def agreement(verdict: Verdict, stance: Stance) -> float:
    """The judge's probability that the reply has this stance."""
    return round(verdict.score if stance == "push_back" else 1 - verdict.score, 4)


def _why_not(replies: Sequence[Judged], stance: Stance) -> str:
    """The commonest reason for which replies that were asked for this stance did not count."""
    reasons = [
        judged.verdict.reason.split(" ")[0] or f"judged_{judged.verdict.stance}"
        for judged in replies
        if not judged.is_stance(stance) and judged.reply.asked in (None, stance)
    ]
    return max(set(reasons), key=reasons.count) if reasons else ""
