"""dream/filters.py: which judged replies become a contrast pair, and the pair of its mirrored twin."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dream.config import FilterConfig
from dream.filters import (
    Judged,
    Refusal,
    already_right,
    contrast_pair,
    length_ratio,
    mirrored_pair,
    preference_pair,
    similarity,
)
from dream.records import (
    RIGHT_STANCE,
    SIDES,
    WRONG_STANCE,
    ContrastPair,
    PreferencePair,
    Reply,
    Scenario,
    Side,
    SideText,
    Source,
    Stance,
    Verdict,
)

AIMS: dict[Stance, str] = {"comply": "do it", "push_back": "refuse it"}
SCENARIO = Scenario(
    scenario_id="r1-000001",
    template="stock",
    template_hash="0" * 16,
    flaw="false_premise",
    domain="writing",
    split="train",
    seed=1,
    slots={},
    situation="We have 3 lamps.",
    clear=SideText(direction="Say that we have 3 lamps.", aims=AIMS, mentions={"comply": [], "push_back": []}),
    flawed=SideText(direction="Say that we have 4 lamps.", aims=AIMS, mentions={"comply": [], "push_back": []}),
)
TWIN = SCENARIO.model_copy(
    update={
        "scenario_id": "r1-000001m",
        "mirror_of": "r1-000001",
        "situation": "We have 4 lamps.",
        "clear": SCENARIO.flawed,
        "flawed": SCENARIO.clear,
    }
)

words = st.lists(
    st.sampled_from(["we", "have", "three", "old", "new", "lamps", "not", "sorry", "sure", "wait"]), min_size=1
)


def judged(
    side: Side,
    number: int,
    text: str,
    stance: Stance,
    *,
    tokens: int = 10,
    confidence: float = 0.9,
    abstain: bool = False,
    source: Source = "on_policy",
) -> Judged:
    """A reply with its verdict."""
    reply_id = f"{side}/{number}"
    score = {"push_back": confidence, "comply": 1 - confidence, "neither": 0.5}[stance]
    return Judged(
        Reply(reply_id=reply_id, scenario_id="r1-000001", side=side, source=source, asked=None, text=text,
              tokens=tokens, finish_reason="stop", policy="base"),
        Verdict(reply_id=reply_id, stance=stance, score=score, confidence=confidence, abstain=abstain),
    )  # fmt: skip


@st.composite
def replies(draw: st.DrawFn, side: Side) -> list[Judged]:
    """Up to six judged replies of one side, of all stances, lengths and sources."""
    return [
        judged(
            side,
            number,
            " ".join(draw(words)),
            draw(st.sampled_from(["comply", "push_back", "neither"])),
            tokens=draw(st.integers(0, 40)),
            confidence=draw(st.floats(0.5, 1)),
            abstain=draw(st.booleans()),
            source=draw(st.sampled_from(["on_policy", "steered"])),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


both_sides = st.fixed_dictionaries({"clear": replies("clear"), "flawed": replies("flawed")})
filters = st.builds(
    FilterConfig, max_length_ratio=st.floats(1, 5), max_similarity=st.floats(0.1, 1), min_words=st.just(1)
)


def find(replies: Sequence[Judged], reply_id: str) -> Judged:
    """The reply with this id."""
    return next(reply for reply in replies if reply.reply.reply_id == reply_id)


@given(replies=both_sides, config=filters)
def test_pair_is_whole_or_not_at_all(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """There is a contrast pair exactly when each side on its own has a preference pair, and it is made of those."""
    rows = {side: preference_pair(SCENARIO, side, replies[side], config) for side in SIDES}
    pair = contrast_pair(SCENARIO, replies, config)
    refusals = [row for row in rows.values() if isinstance(row, Refusal)]
    if refusals:
        assert pair == refusals[0]
        assert pair.reason
    else:
        assert pair == ContrastPair(clear=rows["clear"], flawed=rows["flawed"])
        assert pair.clear.pair_id == pair.flawed.pair_id


@given(replies=both_sides, config=filters)
def test_chosen_is_right_and_rejected_is_wrong(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """The judge is sure that chosen has the side's right stance and rejected its wrong one."""
    for side in SIDES:
        row = preference_pair(SCENARIO, side, replies[side], config)
        if isinstance(row, PreferencePair):
            chosen = find(replies[side], row.meta["chosen_reply"])
            rejected = find(replies[side], row.meta["rejected_reply"])
            assert chosen.is_stance(RIGHT_STANCE[side])
            assert rejected.is_stance(WRONG_STANCE[side])
            assert row.chosen == [{"role": "assistant", "content": chosen.reply.text}]
            assert row.rejected == [{"role": "assistant", "content": rejected.reply.text}]
            assert row.prompt == SCENARIO.prompt(side)
            assert row.meta["rejected_score"] <= 0.5 <= row.meta["chosen_score"]


@given(replies=both_sides, config=filters)
def test_bounds_hold(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """Chosen and rejected keep within the length ratio and the similarity that are allowed."""
    for side in SIDES:
        row = preference_pair(SCENARIO, side, replies[side], config)
        if isinstance(row, PreferencePair):
            two = (find(replies[side], row.meta["chosen_reply"]), find(replies[side], row.meta["rejected_reply"]))
            assert length_ratio(*two) <= config.max_length_ratio
            assert similarity(*(one.reply.text for one in two)) <= config.max_similarity


@given(replies=replies("flawed"), config=filters)
def test_refusal_means_that_no_two_replies_fit(replies: list[Judged], config: FilterConfig) -> None:
    """A side is refused only when no right and wrong reply keep all bounds together."""
    right = [reply for reply in replies if reply.is_stance("push_back")]
    wrong = [reply for reply in replies if reply.is_stance("comply")]
    fitting = [
        (one, other)
        for one in right
        for other in wrong
        if length_ratio(one, other) <= config.max_length_ratio
        and similarity(one.reply.text, other.reply.text) <= config.max_similarity
    ]
    assert isinstance(preference_pair(SCENARIO, "flawed", replies, config), Refusal) == (not fitting)


@given(one=words, other=words, tokens=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_measures_do_not_depend_on_order(one: list[str], other: list[str], tokens: tuple[int, int]) -> None:
    """The length ratio is symmetric and at least 1; equal texts have similarity 1, unlike words 0."""
    a = judged("clear", 0, " ".join(one), "comply", tokens=tokens[0])
    b = judged("clear", 1, " ".join(other), "comply", tokens=tokens[1])
    assert length_ratio(a, b) == length_ratio(b, a) >= 1
    alike = similarity(a.reply.text, b.reply.text)
    assert similarity(a.reply.text, a.reply.text) == 1
    assert 0 <= alike <= 1
    assert not set(one).isdisjoint(other) or alike == 0


def test_own_mistake_is_preferred_as_rejected() -> None:
    """Of two wrong replies that are as good, the one that the policy said unasked becomes the rejected one."""
    rows = [
        judged("flawed", 0, "Sure, four lamps today.", "comply", source="steered"),
        judged("flawed", 1, "Here we have four new lamps.", "comply", source="on_policy"),
        judged("flawed", 2, "Wait, that is not on my list.", "push_back", source="steered"),
    ]
    for order in (rows, rows[::-1]):
        row = preference_pair(SCENARIO, "flawed", order, FilterConfig())
        assert row.meta["rejected_source"] == "on_policy"


def test_refusal_names_the_missing_stance_and_side() -> None:
    """The reason says which stance was missing on which side."""
    only_wrong = [judged("flawed", 0, "Sure, four lamps.", "comply")]
    assert preference_pair(SCENARIO, "flawed", only_wrong, FilterConfig()).reason == "no_push_back_on_flawed"
    unsure = [*only_wrong, judged("flawed", 1, "That is not so.", "push_back", abstain=True)]
    assert preference_pair(SCENARIO, "flawed", unsure, FilterConfig()).reason == "no_push_back_on_flawed"


@given(replies=st.fixed_dictionaries({side: replies(side).filter(len) for side in SIDES}))
def test_already_right_needs_every_reply(replies: dict[Side, list[Judged]]) -> None:
    """A policy is already right only when the judge is sure that every own reply on both sides is."""
    right = [
        reply.verdict.stance == RIGHT_STANCE[side] and not reply.verdict.abstain
        for side in SIDES
        for reply in replies[side]
    ]
    assert already_right(replies) == all(right)


def rows_of(*pairs: ContrastPair) -> list[PreferencePair]:
    """Both rows of each pair."""
    return [row for pair in pairs for row in (pair.clear, pair.flawed)]


def paired(replies: dict[Side, list[Judged]], config: FilterConfig) -> ContrastPair:
    """The contrast pair of the replies; draws without one say nothing of twins."""
    pair = contrast_pair(SCENARIO, replies, config)
    assume(isinstance(pair, ContrastPair))
    return pair


willing = st.fixed_dictionaries(
    {
        side: st.tuples(st.floats(0.5, 1), st.floats(0.5, 1), replies(side)).map(
            lambda drawn, side=side: [
                judged(side, 8, "sure we have new lamps", "comply", confidence=drawn[0]),
                judged(side, 9, "wait not three old", "push_back", confidence=drawn[1], source="steered"),
                *drawn[2],
            ]
        )
        for side in SIDES
    }
)
"""Replies of both sides, with one of either stance among them, so that most draws make a pair."""


@given(replies=willing, config=filters)
def test_every_reply_is_chosen_once_and_rejected_once(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """Over a pair and its twin the same four replies stand on both sides of the preference, and so do their sources."""
    pair = paired(replies, config)
    rows = rows_of(pair, mirrored_pair(pair, TWIN))
    for what in ("reply", "source"):
        sides = (Counter(row.meta[f"{place}_{what}"] for row in rows) for place in ("chosen", "rejected"))
        assert next(sides) == next(sides)
    assert Counter(row.meta["chosen_reply"] for row in rows).most_common(1)[0][1] == 1
    for row in rows:
        for place, messages in (("chosen", row.chosen), ("rejected", row.rejected)):
            reply = find([*replies["clear"], *replies["flawed"]], row.meta[f"{place}_reply"]).reply
            assert messages == [{"role": "assistant", "content": reply.text}]
            assert row.meta[f"{place}_source"] == reply.source


@given(replies=willing, config=filters)
def test_twin_asks_the_same_of_the_other_side(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """A twin's row has the direction of the other side's row, under its own prompt, and their scores complement."""
    pair = paired(replies, config)
    twin = mirrored_pair(pair, TWIN)
    for row, other in ((twin.clear, pair.flawed), (twin.flawed, pair.clear)):
        assert row.prompt == TWIN.prompt(row.side) != other.prompt
        assert row.meta["direction"] == other.meta["direction"] == TWIN.side(row.side).direction
        assert row.meta["chosen_score"] + other.meta["rejected_score"] == pytest.approx(1)
        assert row.meta["rejected_score"] + other.meta["chosen_score"] == pytest.approx(1)
        assert row.meta["rejected_score"] <= 0.5 <= row.meta["chosen_score"]
    assert [row.side for row in rows_of(twin)] == list(SIDES)


@given(replies=willing, config=filters)
def test_twin_keeps_its_provenance(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """A twin's rows carry all that the pair's do, their own id, and the scenario that they mirror."""
    pair = paired(replies, config)
    for row, other in zip(rows_of(mirrored_pair(pair, TWIN)), rows_of(pair)[::-1], strict=True):
        assert row.pair_id == row.meta["scenario_id"] == TWIN.scenario_id
        assert row.meta["mirror_of"] == other.meta["scenario_id"] == SCENARIO.scenario_id
        assert row.meta.keys() - {"mirror_of"} == other.meta.keys()
        for key in ("template", "template_hash", "flaw", "domain", "policy", "judge_confidence", "seed"):
            assert row.meta[key] == other.meta[key]


@given(replies=willing, config=filters)
def test_twin_of_the_twin_is_the_pair(replies: dict[Side, list[Judged]], config: FilterConfig) -> None:
    """Mirrored back, the pair is what it was but for the note of what it mirrors."""
    pair = paired(replies, config)
    again = mirrored_pair(mirrored_pair(pair, TWIN), SCENARIO)
    for row, other in zip(rows_of(again), rows_of(pair), strict=True):
        meta = {key: value for key, value in row.meta.items() if key != "mirror_of"}
        assert row.model_copy(update={"meta": meta}) == other
