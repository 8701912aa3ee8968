"""dream/diversity.py: figures of variety, and the finder of near-duplicates."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dream.diversity import Diversity, NearDuplicates, distinct_n, diversity, nearest_similarity, vendi_score
from dream.records import ContrastPair, PreferencePair, assistant
from dream.scenarios import draw
from dream.templates import Template, load

SCENARIOS = sorted((Path(__file__).parent.parent / "prompts" / "scenarios").glob("*.j2"))
LAMPS = (
    "The stock list of the garden shop in Oakridge says that we have 40 lamps in the store since Monday. Please write "
    "one line for the shop window that tells people how many of them are left, no comments."
)

words = st.sampled_from(["the", "lamps", "are", "on", "a", "list", "40", "41"])
texts = st.lists(st.lists(words, max_size=8).map(" ".join), max_size=6)
unit_rows = st.tuples(st.integers(1, 8), st.integers(2, 6), st.integers(0, 99)).map(
    lambda size: unit(np.random.default_rng(size[2]).normal(size=size[:2]))
)


def unit(vectors: np.ndarray) -> np.ndarray:
    """The same directions with unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_first_word(prompts: Sequence[str]) -> np.ndarray:
    """Texts that begin alike have one vector, all others are at right angles."""
    firsts = [prompt.split()[0] for prompt in prompts]
    known = sorted(set(firsts))
    return np.eye(max(1, len(known)))[[known.index(first) for first in firsts]]


def twin(pair: ContrastPair) -> ContrastPair:
    """The pair as a mirrored one of itself."""
    rows = [
        row.model_copy(update={"pair_id": f"{row.pair_id}m", "meta": {**row.meta, "mirror_of": row.pair_id}})
        for row in (pair.clear, pair.flawed)
    ]
    return ContrastPair(clear=rows[0], flawed=rows[1])


def told(pair: ContrastPair, **meta: str) -> ContrastPair:
    """The pair with more in the meta of its rows."""
    rows = [row.model_copy(update={"meta": {**row.meta, **meta}}) for row in (pair.clear, pair.flawed)]
    return ContrastPair(clear=rows[0], flawed=rows[1])


def test_distinct_n_counts_distinct_over_all() -> None:
    """Of six words four are distinct, of four word pairs three; no pair goes from one text to the next."""
    assert distinct_n(["We sell lamps", "we sell mugs."], 1) == pytest.approx(4 / 6)
    assert distinct_n(["We sell lamps", "we sell mugs."], 2) == pytest.approx(3 / 4)
    assert distinct_n(["lamps"], 2) == 0.0


@given(texts=texts, n=st.integers(1, 3))
def test_distinct_n_is_a_share_that_repetition_lowers(texts: list[str], n: int) -> None:
    """It lies in [0, 1], does not depend on the order, and halves when everything is said twice."""
    share = distinct_n(texts, n)
    assert 0 <= share <= 1
    assert distinct_n(texts[::-1], n) == share
    assert distinct_n(texts * 2, n) == pytest.approx(share / 2)


@given(vectors=unit_rows)
def test_nearest_similarity_sees_doubles(vectors: np.ndarray) -> None:
    """It is 1 where each row has a double, is never more, and does not change its input."""
    before = vectors.copy()
    assert nearest_similarity(np.vstack([vectors, vectors])) == pytest.approx(1)
    assert nearest_similarity(vectors) <= 1 + 1e-9
    assert np.array_equal(vectors, before)


def test_nearest_similarity_of_a_known_set() -> None:
    """Each row counts with the nearest other row; one row alone, or none, gives 0."""
    rows = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert nearest_similarity(rows) == pytest.approx((0.6 + 0.6 - 0.6) / 3)
    assert nearest_similarity(rows[:1]) == nearest_similarity(rows[:0]) == 0.0


@given(groups=st.integers(1, 6), copies=st.integers(1, 5))
def test_vendi_score_counts_groups(groups: int, copies: int) -> None:
    """Groups at right angles, of equal size and alike within, count as so many."""
    assert vendi_score(np.repeat(np.eye(groups, 8), copies, axis=0)) == pytest.approx(groups)


@given(vectors=unit_rows)
def test_vendi_score_is_that_of_the_kernel(vectors: np.ndarray) -> None:
    """It is exp of the entropy of the eigenvalues of K / n, and so between 1 and n."""
    eigenvalues = np.linalg.eigvalsh(vectors @ vectors.T / len(vectors)).clip(1e-15)
    score = vendi_score(vectors)
    assert score == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()), rel=1e-6)
    assert 1 - 1e-9 <= score <= len(vectors) + 1e-9


def test_vendi_score_of_nothing_is_zero() -> None:
    """No text, no kinds of text."""
    assert vendi_score(np.zeros((0, 384))) == 0.0


def test_one_number_apart_is_found() -> None:
    """A text that differs in one number from one that was added is found by its key, another text is not."""
    seen = NearDuplicates(0.8)
    seen.add("lamps", LAMPS)
    assert seen.find(LAMPS.replace("40", "41")) == "lamps"
    assert seen.find(LAMPS.replace("40 lamps", "97 kettles").replace("garden", "toy").replace("Monday", "May")) is None
    assert seen.find("Which bus goes from Stockton to the museum at noon?") is None


def test_threshold_decides() -> None:
    """What is nearly the same at .8 is another text at .99."""
    seen = NearDuplicates(0.99)
    seen.add("lamps", LAMPS)
    assert seen.find(LAMPS.replace("40", "41")) is None
    assert seen.find(LAMPS.upper()) == "lamps"


def test_likest_is_named() -> None:
    """Of several near-duplicates the likest is the one that is found, whatever came first."""
    near, nearest = LAMPS.replace("garden shop", "toy store"), LAMPS.replace("Monday", "Sunday")
    for order in ((near, nearest), (nearest, near)):
        seen = NearDuplicates(0.6)
        for text in order:
            seen.add(text, text)
        assert seen.find(LAMPS) == nearest


@settings(max_examples=8)
@given(texts=st.lists(st.text(max_size=20), max_size=6, unique=True))
def test_every_added_text_finds_itself(texts: list[str]) -> None:
    """Any text that was added, an empty one too, is found by itself or by one that is as like."""
    seen = NearDuplicates(0.9)
    for text in texts:
        seen.add(text, text)
    assert all(seen.find(text) is not None for text in texts)


def test_unlike_draws_of_a_template_pass() -> None:
    """Two draws of one shipped template that share hardly a value of a slot are no near-duplicates."""
    seen = NearDuplicates(0.8)
    for path in SCENARIOS[::6]:
        one, other = unlike_draws(load(path))
        seen.add(path.stem, one)
        assert seen.find(other) is None, path.stem


def unlike_draws(template: Template) -> tuple[str, str]:
    """The prompts of the two draws, among the first, that share fewest values."""
    draws = [draw(template, seed, "x") for seed in range(12)]
    one, other = min(
        itertools.combinations(draws, 2),
        key=lambda two: sum(two[0].slots[slot] == two[1].slots[slot] for slot in two[0].slots),
    )
    return one.prompt("clear")[0]["content"], other.prompt("clear")[0]["content"]


def test_diversity_of_a_known_set(make_pair) -> None:
    """Shares are of all pairs; what words and vectors say is of those that are no mirrored twins."""
    pairs = [
        told(make_pair("a"), flaw="false_premise", domain="travel"),
        told(make_pair("b"), flaw="false_premise", domain="study"),
        told(make_pair("c"), flaw="unit_error", domain="study"),
    ]
    pairs.append(twin(pairs[2]))
    found = diversity(pairs, by_first_word)
    assert found.pairs == 4
    assert found.unmirrored == 3
    assert found.flaws == {"false_premise": 0.5, "unit_error": 0.5}
    assert found.domains == {"study": 0.75, "travel": 0.25}
    assert found.prompt_distinct_1 == pytest.approx(6 / 12, abs=1e-4)  # "clear direction of a", of b, of c
    assert found.reply_distinct_1 == pytest.approx(6 / 36, abs=1e-4)  # yes done no that is wrong, three times twice
    assert found.vendi_score == 1
    assert found.nearest_similarity == 1
    assert found.chosen_words.mean == found.rejected_words.mean == 3


def test_twins_do_not_count_as_doubles(make_pair) -> None:
    """A twin changes no figure that is of words or vectors."""
    pairs = [make_pair(name) for name in "abc"]
    alone, doubled = (diversity(found, by_first_word) for found in (pairs, [*pairs, *map(twin, pairs)]))
    same = {"pairs"}
    assert alone.model_dump(exclude=same) == doubled.model_dump(exclude=same)


def test_lengths_of_chosen_and_rejected(make_row) -> None:
    """Mean and median are over both sides, chosen and rejected apart."""

    def row(side: str, chosen: str) -> PreferencePair:
        return make_row("a", side).model_copy(update={"chosen": [assistant(chosen)], "rejected": [assistant("No.")]})

    pair = ContrastPair(clear=row("clear", "one two three"), flawed=row("flawed", "one two three four five six"))
    found = diversity([pair], None)
    assert (found.chosen_words.mean, found.chosen_words.median) == (4.5, 4.5)
    assert (found.rejected_words.mean, found.rejected_words.median) == (1, 1)


def test_without_a_model_the_vector_figures_are_none(make_pair) -> None:
    """No embedding gives None, not a figure that looks measured; the record comes back from JSON, with no pair too."""
    for pairs in ([make_pair("a")], []):
        found = diversity(pairs, None)
        assert found.pairs == len(pairs)
        assert found.vendi_score is None
        assert found.nearest_similarity is None
        assert Diversity.model_validate_json(found.model_dump_json()) == found
