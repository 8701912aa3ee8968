"""train/data.py: the order of a round's rows and the layout of a batch."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import lay_out, round_rows

shares = st.floats(0, 0.95)
tokens = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@st.composite
def rounds(draw: st.DrawFn) -> dict:
    """Sizes and settings of a round."""
    return {
        "pairs": draw(st.integers(0, 12)),
        "general": draw(st.integers(0, 30)),
        "replay": draw(st.integers(0, 12)),
        "batch_size": 2 * draw(st.integers(1, 8)),
        "general_share": draw(shares),
        "replay_share": draw(shares),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.fixture(scope="session")
def arrange(make_row, make_pair):
    """The rows of a round, with ids own-*, general-* and replay-*."""

    def build(pairs: int, general: int, replay: int, **settings):
        return round_rows(
            [make_pair(f"own-{n}") for n in range(pairs)],
            [make_row(f"general-{n}") for n in range(general)],
            [make_pair(f"replay-{n}") for n in range(replay)],
            **settings,
        )

    return build


@given(setup=rounds())
def test_both_rows_of_a_pair_share_a_step(arrange, setup: dict) -> None:
    """Both rows of every contrast pair stand in the same optimiser step, once."""
    rows = arrange(**setup)
    steps = [rows[start : start + setup["batch_size"]] for start in range(0, len(rows), setup["batch_size"])]
    for step in steps:
        sides = Counter((row.pair_id, row.side) for row in step if not row.pair_id.startswith("general"))
        assert all(count == 1 for count in sides.values())
        assert {(pair_id, "flawed") for pair_id, _ in sides} | {(pair_id, "clear") for pair_id, _ in sides} == set(
            sides
        )
    assert max(Counter((row.pair_id, row.side) for row in rows).values(), default=1) == 1


@given(setup=rounds())
def test_shares_are_respected(arrange, setup: dict) -> None:
    """All own pairs are there, replayed ones as their share says, and general rows never over theirs."""
    rows = arrange(**setup)
    kinds = Counter(row.pair_id.split("-")[0] for row in rows)
    assert kinds["own"] == 2 * setup["pairs"]
    assert kinds["replay"] == 2 * min(setup["replay"], round(setup["replay_share"] * setup["pairs"]))
    assert kinds["general"] <= setup["general_share"] * len(rows) + 1e-6
    assert kinds["general"] % 2 == 0
    # Two more would be too many, or there are no two more.
    more = kinds["general"] + 2
    assert more > setup["general"] or more > setup["general_share"] * (len(rows) + 2) - 1e-6


def test_mirrored_pairs_follow_each_other(make_row, make_pair) -> None:
    """Wherever the shuffle puts them, also when a mirror is stored apart from its twin."""
    mirrors = [make_pair(f"own-{n}m") for n in range(6)]
    mirrors = [
        pair.model_copy(update={"clear": pair.clear.model_copy(update={"meta": {"mirror_of": f"own-{n}"}})})
        for n, pair in enumerate(mirrors)
    ]
    pairs = [*(make_pair(f"own-{n}") for n in range(6)), *mirrors]
    rows = round_rows(pairs, [], [], batch_size=8, general_share=0, replay_share=0, seed=3)
    names = [row.pair_id for row in rows[::2]]
    assert [f"{name}m" for name in names[::2]] == names[1::2]
    assert names[::2] != sorted(names[::2])


@given(setup=rounds())
def test_same_seed_same_rows(arrange, setup: dict) -> None:
    """The same seed gives the same rows in the same order."""
    assert arrange(**setup) == arrange(**setup)


@given(setup=rounds())
def test_general_rows_are_spread(arrange, setup: dict) -> None:
    """Any two stretches of a round of one length hold the same number of general rows, give or take two."""
    rows = arrange(**setup)
    general = [row.pair_id.startswith("general") for row in rows]
    counts = [sum(general[start : start + 8]) for start in range(0, max(0, len(rows) - 7), 2)]
    assert max(counts, default=0) - min(counts, default=0) <= 2


def test_seed_changes_the_order(arrange) -> None:
    """Another seed gives another order."""
    settings = {"batch_size": 4, "general_share": 0.25, "replay_share": 0.25}
    assert arrange(12, 8, 8, seed=1, **settings) != arrange(12, 8, 8, seed=2, **settings)


def test_exact_share_is_reached(arrange) -> None:
    """Where the shares divide evenly they are met exactly, whatever floating point makes of them."""
    kinds = Counter(
        row.pair_id.split("-")[0]
        for row in arrange(12, 99, 99, batch_size=4, general_share=0.25, replay_share=0.25, seed=1)
    )
    assert kinds == {"own": 24, "replay": 6, "general": 10}
    assert len(arrange(12, 99, 0, batch_size=4, general_share=0.25, replay_share=0, seed=1)) == 32


@given(setup=rounds())
def test_one_side_alone(arrange, setup: dict) -> None:
    """`sides` keeps exactly the rows of that side, in their order; general rows have a clear direction."""
    both, clear, flawed = (arrange(**setup, sides=sides) for sides in ("both", "clear", "flawed"))
    assert clear == [row for row in both if row.side == "clear"]
    assert flawed == [row for row in both if row.side == "flawed"]
    assert not any(row.pair_id.startswith("general") for row in flawed)


@given(sequences=st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_every_reply_token_has_its_source(sequences: list[tuple[list[int], list[list[int]]]]) -> None:
    """Each reply token is listed once, in order, with its reply's number and the place of the token before it."""
    layout = lay_out(sequences)
    ids, positions, segments = ([v for line in lines for v in line] for lines in layout[:3])
    assert layout.tokens == [token for _, replies in sequences for reply in replies for token in reply]
    number, at = 0, 0
    for line, (prompt, replies) in enumerate(sequences):
        base = line * len(layout.ids[0])
        for k, reply in enumerate(replies, 1):
            before = [prompt[-1], *reply]
            for offset in range(len(reply)):
                source = layout.sources[at]
                assert base <= source < base + len(layout.ids[0])
                assert ids[source] == before[offset]
                assert positions[source] == len(prompt) + offset - 1
                assert segments[source] == (0 if offset == 0 else k)
                assert layout.replies[at] == number
                at += 1
            number += 1
    assert at == len(layout.sources) == len(layout.replies)


@given(sequences=st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_layout_is_a_rectangle_padded_on_the_right(sequences: list[tuple[list[int], list[list[int]]]]) -> None:
    """Every line holds its prompt once, then its replies, then zeros up to the longest line."""
    layout = lay_out(sequences)
    width = max(len(prompt) + sum(map(len, replies)) for prompt, replies in sequences)
    for ids, positions, segments, (prompt, replies) in zip(*layout[:3], sequences, strict=True):
        full = [*prompt, *(token for reply in replies for token in reply)]
        assert ids == full + [0] * (width - len(full))
        assert len(positions) == len(segments) == width
        assert positions[: len(prompt)] == list(range(len(prompt)))
        assert Counter(segments[len(prompt) : len(full)]) == {k: len(reply) for k, reply in enumerate(replies, 1)}
