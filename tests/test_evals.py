"""train/evals.py: figures on hand-made scores, and evaluation files that people write."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dream.engine import ScriptedEngine
from dream.errors import DataError
from dream.records import EvalPair, user
from dream.scenarios import eval_pairs
from train.evals import Evaluation, crossed_scores, evaluate, evaluate_round, figures, interval, joined, read_eval_pairs

NOTHING_SAMPLED = {"clear": [], "flawed": []}
RIGHT, HALF, WRONG = ([[-1, -2], [3, 1]], [[-1, 1], [1, 2]], [[2, -1], [1, -3]])
"""One pair each: d under the clear and the flawed prompt, of the clear side's replies and of the flawed side's."""

score_arrays = st.integers(1, 12).flatmap(lambda n: arrays(float, (n, 2, 2), elements=st.integers(-40, 40)))


def of(*pairs: list, stances: dict | None = None) -> Evaluation:
    """The figures of pairs."""
    return figures(np.array(pairs, dtype=float), stances or NOTHING_SAMPLED, [], seed=1)


def test_figures_by_hand() -> None:
    """A pair right with both reply sets, one right with one of them, and one wrong with both."""
    found = of(RIGHT, HALF, WRONG)
    assert found.pairs == 3
    assert found.items["pair_right"] == [1, 0.5, 0]
    assert found.pair_accuracy == pytest.approx(1 / 2)
    assert found.ranked_accuracy == pytest.approx(4 / 6)
    assert found.own_pair_accuracy == pytest.approx(2 / 3)
    assert found.items["margin"] == [3.5, 1.5, -1.5]
    assert found.margin == pytest.approx(3.5 / 3)
    assert (found.clear.accuracy, found.clear.margin) == (pytest.approx(2 / 3), pytest.approx(0))
    assert (found.flawed.accuracy, found.flawed.margin) == (pytest.approx(2 / 3), pytest.approx(0))


def test_undecided_is_not_right() -> None:
    """A model that prefers nothing (d = 0) is right nowhere."""
    found = of([[0, 0], [0, 0]])
    assert (found.pair_accuracy, found.ranked_accuracy, found.own_pair_accuracy) == (0, 0, 0)
    assert (found.clear.accuracy, found.flawed.accuracy) == (0, 0)


@given(scores=score_arrays, shift=st.integers(-100, 100))
def test_general_shift_wins_nothing(scores: np.ndarray, shift: int) -> None:
    """A model that pushes back more (or less) whatever is asked has the margin and the ranks it had before."""
    before, after = (figures(array, NOTHING_SAMPLED, [], seed=1) for array in (scores, scores + shift))
    assert after.margin == pytest.approx(before.margin, abs=1e-9)
    assert after.ranked_accuracy == before.ranked_accuracy


@given(scores=score_arrays)
def test_figures_keep_their_order(scores: np.ndarray) -> None:
    """Being strictly right implies being ranked right, and the accuracy's interval contains it."""
    found = figures(scores, NOTHING_SAMPLED, [], seed=1)
    assert found.pair_accuracy <= found.ranked_accuracy
    for value, (low, high) in ((found.pair_accuracy, found.pair_accuracy_ci), (found.margin, found.margin_ci)):
        assert low - 1e-9 <= value <= high + 1e-9


def test_wording_alone_wins_own_pairs_only() -> None:
    """Liking the sound of the right replies gives perfect own pairs, and chance where the pairs are crossed."""
    noise = np.random.default_rng(1).normal(size=(1000, 2, 2))
    found = figures(noise + np.array([-10, 10]), NOTHING_SAMPLED, [], seed=1)
    assert found.own_pair_accuracy == 1
    assert found.ranked_accuracy == pytest.approx(0.5, abs=0.05)
    assert found.pair_accuracy < 0.01
    low, high = found.margin_ci
    assert low < 0 < high


def test_interval_narrows_and_repeats() -> None:
    """The interval contains the mean, is narrower with more values, and is the same for the same seed."""
    values = np.random.default_rng(2).normal(3, 1, 400)
    low, high = interval(values, seed=1)
    assert low < values.mean() < high
    assert (low, high) == interval(values, seed=1)
    wide = interval(values[:20], seed=1)
    assert high - low < wide[1] - wide[0]
    assert interval(np.full(5, 2.0), seed=1) == (2, 2)


def test_stance_rates_are_shares() -> None:
    """The sampled stances are given as shares a side, abstentions among them, and item by item."""
    stances = {"clear": ["comply", "comply", "push_back", "abstain"], "flawed": ["push_back", "neither"] * 2}
    found = figures(np.array([RIGHT] * 4, dtype=float), stances, [4, 6], seed=1)
    assert found.clear.stance_rates == {"comply": 0.5, "push_back": 0.25, "neither": 0, "abstain": 0.25}
    assert found.flawed.stance_rates == {"comply": 0, "push_back": 0.5, "neither": 0.5, "abstain": 0}
    assert found.items["clear_right"] == [1, 1, 0, 0]
    assert found.items["flawed_right"] == [1, 0, 1, 0]
    assert found.reply_tokens == 5


@pytest.fixture
def pairs(tiny_templates) -> list[tuple[EvalPair, EvalPair]]:
    """Six held-out pairs."""
    return joined(eval_pairs([t for t in tiny_templates if t.front.split == "heldout"], 6, seed=1))


def test_scores_are_clear_first(run, pairs) -> None:
    """`crossed_scores` has the prompts on its second axis and the reply sets on its third, clear first on both."""
    prompt_value = {pair[place].prompt[0]["content"]: 10 * place for pair in pairs for place in (0, 1)}
    reply_value = {pair[place].push_back: 1 + place for pair in pairs for place in (0, 1)}

    def score(messages, reply: str) -> float:
        return prompt_value[messages[0]["content"]] + reply_value[reply] if reply in reply_value else 0.0

    scores = run(crossed_scores(ScriptedEngine(lambda messages, number: "", score), pairs))
    assert scores.tolist() == [[[1, 2], [11, 12]]] * 6


def test_sampled_replies_are_judged(run, engine, judge, settings_with, pairs) -> None:
    """A policy that always complies is right on clear and wrong on flawed, by its sampled replies."""
    found = run(evaluate(engine, pairs, judge, settings_with(), sampled=4))
    assert found.clear.stance_rates["comply"] == 1
    assert found.flawed.stance_rates["push_back"] == 0
    assert found.items["flawed_right"] == [0, 0, 0, 0]
    assert found.reply_tokens > 1
    assert run(evaluate(engine, pairs, judge, settings_with())).clear.stance_rates == {}


def test_round_without_heldout_templates_is_refused(run, engine, judge, settings_with, tiny_templates) -> None:
    """Nothing to evaluate on is the user's error."""
    trained = [template for template in tiny_templates if template.front.split == "train"]
    with pytest.raises(DataError, match="held-out"):
        run(evaluate_round(engine, judge, trained, settings_with()))


def row(pair_id: str = "a", side: str = "clear", **changes: object) -> dict:
    """A row of an evaluation file."""
    return {"pair_id": pair_id, "side": side, "prompt": "Do it.", "comply": "Done.", "push_back": "No.", **changes}


def test_rows_join_in_the_order_of_their_first() -> None:
    """Rows may stand in any order; each pair is (clear, flawed)."""
    rows = [EvalPair.model_validate(row(i, s, prompt=[])) for i, s in ("bf", "ac", "bc", "af") for s in [
        {"c": "clear", "f": "flawed"}[s]]]  # fmt: skip
    assert [(clear.pair_id, clear.side, flawed.side) for clear, flawed in joined(rows)] == [
        ("b", "clear", "flawed"),
        ("a", "clear", "flawed"),
    ]


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (["clear"], "'a' has no flawed row"),
        (["flawed"], "'a' has no clear row"),
        (["clear", "clear"], "'a' has two rows for its clear side"),
        (["clear", "flawed", "flawed"], "'a' has two rows for its flawed side"),
    ],
)
def test_pair_needs_one_row_a_side(tmp_path: Path, sides: list[str], words: str) -> None:
    """A missing side and a doubled side are refused with the pair's id, in a file with its name too."""
    with pytest.raises(DataError, match=words):
        joined([EvalPair.model_validate(row(side=side, prompt=[user("Do it.")])) for side in sides])
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row(side=side)) + "\n" for side in sides))
    with pytest.raises(DataError, match=rf"mine\.jsonl: pair {words}"):
        read_eval_pairs(path)


def test_prompt_is_a_text_or_messages(tmp_path: Path) -> None:
    """A prompt given as a text is one user turn; messages stay as they are; blank lines do not matter."""
    chat = [{"role": "system", "content": "Be brief."}, user("Do it.")]
    path = tmp_path / "mine.jsonl"
    path.write_text(f"\n{json.dumps(row())}\n\n{json.dumps(row(side='flawed', prompt=chat))}\n")
    [(clear, flawed)] = read_eval_pairs(path)
    assert clear.prompt == [user("Do it.")]
    assert flawed.prompt == chat


def test_line_separators_within_a_text_are_no_line_ends(tmp_path: Path) -> None:
    """JSON allows U+2028, U+0085 and their like unescaped in a text; only a newline ends a row."""
    texts = {"comply": "Done.\u2028Anything else?", "push_back": "No.\u0085Why?"}
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(json.dumps(row(side=side, **texts), ensure_ascii=False) + "\n" for side in ("clear", "flawed"))
    )
    [(clear, _)] = read_eval_pairs(path)
    assert (clear.comply, clear.push_back) == tuple(texts.values())


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"side": "middle"}, "side"),
        ({"comply": 3}, "comply"),
        ({"comply": ""}, "comply"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt.0.content"),
        ({"pushback": "No."}, "pushback"),
    ],
)
def test_bad_row_names_file_line_and_key(tmp_path: Path, bad: dict, key: str) -> None:
    """A row with a wrong value is refused with the file, its line and the key."""
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(row())}\n\n{json.dumps(row(side='flawed') | bad)}\n")
    with pytest.raises(DataError) as caught:
        read_eval_pairs(path)
    assert str(caught.value).startswith(f"{path}:3: {key}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"pair_id": "a"\n', ":1: not JSON"),
        ("[1]\n", ":1: expected a JSON object"),
        ("", ": no rows"),
        ("\n \n", ": no rows"),
        ("{}\n", ":1: pair_id: "),
    ],
)
def test_file_that_is_no_such_file(tmp_path: Path, text: str, words: str) -> None:
    """A file of another kind is refused with its name and, where there is one, the line."""
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_eval_pairs(path)
    assert str(caught.value).startswith(f"{path}{words}")
    assert "\n" not in str(caught.value)


def test_unreadable_file_names_itself(tmp_path: Path) -> None:
    """A file that is missing, a folder, or not UTF-8 is refused with its name."""
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    for name in ("absent.jsonl", ".", "latin.jsonl"):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            read_eval_pairs(tmp_path / name)
