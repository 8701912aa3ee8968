"""The audit finds planted shortcuts, names them, passes clean sets, and never passes what it could not measure."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dream.audit import Audit, View, audit, lines
from dream.choose import choose
from dream.config import AuditConfig
from dream.records import ContrastPair, PreferencePair, Side, assistant, user
from dream.views import auc_of

LIMITS = AuditConfig()
GOODS = ["lamps", "chairs", "kettles", "tents", "mugs", "boots"]
COMPLY = ["Here you are, {said} {good} in store.", "We have {said} {good} for you today.", "{said} {good} are ready."]
PUSH_BACK = ["The list gives {other} {good}, not {said}.", "I see {other} {good} there, so {said} is wrong."]
WITHIN_SIX = [f"t{number}" for number in range(6)]


def row(number: int, side: Side, values: tuple[str, str], rng: random.Random, mirror_of: int | None) -> PreferencePair:
    """A row of template number % 6 whose direction says the first value; right and wrong replies are of one mould."""
    template, good = f"t{number % 6}", rng.choice(GOODS)
    said, other = values
    comply = rng.choice(COMPLY).format(said=said, other=other, good=good)
    push_back = rng.choice(PUSH_BACK).format(said=said, other=other, good=good)
    chosen, rejected = (comply, push_back) if side == "clear" else (push_back, comply)
    direction = f"Write {said} on the label of {template}."
    meta = {
        "scenario_id": f"s{number}",
        "template": template,
        "flaw": f"flaw{number % 3}",
        "direction": direction,
        "chosen_source": "steered",
        "rejected_source": "on_policy" if rng.random() < 0.1 else "steered",
    }
    if mirror_of is not None:
        meta["mirror_of"] = f"s{mirror_of}"
    return PreferencePair(
        pair_id=f"s{number}",
        side=side,
        prompt=[user(f"The list says {values[0] if side == 'clear' else values[1]}. {direction}")],
        chosen=[assistant(chosen)],
        rejected=[assistant(rejected)],
        meta=meta,
    )


def clean(count: int, seed: int = 0) -> list[ContrastPair]:
    """Pairs of six templates and three kinds of flaw, with random numbers."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        one, other = (str(rng.randrange(20, 900)) for _ in range(2))
        clear, flawed = row(number, "clear", (one, other), rng, None), row(number, "flawed", (other, one), rng, None)
        pairs.append(ContrastPair(clear=clear, flawed=flawed))
    return pairs


def twin(pair: ContrastPair, number: int) -> ContrastPair:
    """The mirrored pair: the same directions and replies with the labels the other way round."""

    def turned(row: PreferencePair, side: Side) -> PreferencePair:
        meta = {**row.meta, "scenario_id": f"s{number}", "mirror_of": row.meta["scenario_id"]}
        meta |= {"chosen_source": row.meta["rejected_source"], "rejected_source": row.meta["chosen_source"]}
        replies = {"chosen": row.rejected, "rejected": row.chosen}
        return row.model_copy(update={"pair_id": f"s{number}", "side": side, "meta": meta, **replies})

    return ContrastPair(clear=turned(pair.flawed, "clear"), flawed=turned(pair.clear, "flawed"))


def said(row: PreferencePair, **texts: str) -> PreferencePair:
    """The row with words added: to its direction (`direction`), its `chosen` or its `rejected` reply."""
    update: dict[str, object] = {}
    for key, words in texts.items():
        if key == "direction":
            update["meta"] = {**row.meta, "direction": f"{row.meta['direction']} {words}"}
        else:
            update[key] = [assistant(f"{getattr(row, key)[0]['content']} {words}")]
    return row.model_copy(update=update)


def with_regret(pair: ContrastPair) -> ContrastPair:
    """Needless push-back says sorry; justified push-back does not."""
    return pair.model_copy(update={"clear": said(pair.clear, rejected="Sorry!")})


def template(pair: ContrastPair) -> str:
    """The template of a pair."""
    return str(pair.clear.meta["template"])


def view(audit: Audit, name: str) -> View:
    """The view of this name."""
    return next(view for view in audit.views if view.name == name)


def names(views: Sequence[View]) -> set[str]:
    """Which views these are."""
    return {view.name for view in views}


def tone(texts: Sequence[str]) -> np.ndarray:
    """An embedding that hears one thing only: an apology, whatever the word."""
    heard = [any(word in text.lower() for word in ("sorry", "regret", "afraid", "pardon")) for text in texts]
    return np.array([[1.0, 0.0] if apology else [0.0, 1.0] for apology in heard])


@pytest.mark.parametrize("seed", range(2))
def test_same_sentences_with_other_values_pass(seed: int) -> None:
    """Where both sides are the same sentences with random values every view is measured and none is over."""
    result = audit(clean(60, seed), LIMITS, tone)
    assert result.over == []
    assert all(view.auc is not None for view in result.views if view.name != "source")
    assert view(result, "direction").auc == 0.5  # numbers are one word, so both directions read the same


@pytest.mark.parametrize("seed", range(2))
def test_twins_pass_exactly(seed: int) -> None:
    """With each scenario's twin in the set nothing can be told, not even by a cue of the values themselves."""
    pairs = [pair.model_copy(update={"flawed": said(pair.flawed, direction="zebra")}) for pair in clean(18, seed)]
    pairs = [with_regret(pair) for pair in pairs]
    result = audit(pairs + [twin(pair, 100 + number) for number, pair in enumerate(pairs)], LIMITS, tone)
    assert {view.auc for view in result.views} == {0.5, None}
    assert result.over == []


def test_cue_in_directions_is_named_with_its_templates() -> None:
    """A word that only flawed directions of three templates have puts both direction views over, and is named."""
    planted = ("t0", "t2", "t4")
    pairs = [
        pair.model_copy(update={"flawed": said(pair.flawed, direction="hastily")})
        if template(pair) in planted
        else pair
        for pair in clean(48)
    ]
    result = audit(pairs, LIMITS)
    assert names(result.over) == {"direction", "direction_within"}
    for found in result.over:
        assert (found.giveaways[0].text, found.giveaways[0].points_to) == ("'hastily'", "flawed")
        assert found.giveaways[0].texts == 24
        assert sorted(found.giveaways[0].templates) == sorted(planted)
        assert found.interval is not None
        assert found.interval[0] <= (found.auc or 0) <= found.interval[1]
    printed = "\n".join(lines(result))
    assert "direction alone, unseen templates: AUC .75" in printed
    assert "OVER the bound .65" in printed
    assert "'hastily' points to flawed (24 texts, most in t0, t2, t4)" in printed
    assert "add `mirror`" in printed


def test_cue_within_one_template_is_no_cue_for_unseen_ones() -> None:
    """What tells right from wrong in each template by another word shows only where the templates are known."""
    pairs = [
        ContrastPair(
            clear=said(pair.clear, direction=f"sound{'abcdef'[number % 6]}"),
            flawed=said(pair.flawed, direction=f"cue{'abcdef'[number % 6]}"),
        )
        for number, pair in enumerate(clean(48))
    ]
    result = audit(pairs, LIMITS)
    assert names(result.over) == {"direction_within"}
    assert view(result, "direction_within").giveaways[0].text.startswith(("'sound", "'cue"))


def test_cue_in_wrong_replies_is_named() -> None:
    """An apology that only needless push-backs make is found in the reply alone, and points to rejected."""
    result = audit([with_regret(pair) for pair in clean(48)], LIMITS, tone)
    assert {"reply_ngrams", "reply_within", "reply_embedding"} <= names(result.over)
    for name in ("reply_ngrams", "reply_within"):
        named = view(result, name).giveaways
        assert any("sorry" in give.text and give.points_to == "rejected" and give.texts == 48 for give in named)
    assert all(give.text.startswith("'") for give in view(result, "reply_embedding").giveaways)


def test_embedding_hears_what_words_do_not_show() -> None:
    """Where each template apologises in words of its own only the embedding carries over to unseen templates."""
    words = ["sorry", "regret", "afraid", "pardon", "so sorry", "with regret"]
    pairs = [
        pair.model_copy(update={"clear": said(pair.clear, rejected=words[number % 6])})
        for number, pair in enumerate(clean(24))
    ]
    unheard = audit(pairs, LIMITS)
    assert "reply_embedding" not in names(unheard.views)
    heard = view(audit(pairs, LIMITS, tone), "reply_embedding")
    assert heard.over
    assert any(word in heard.giveaways[0].text for word in words)


@pytest.mark.parametrize(("longer", "text"), [("chosen", "the longer reply"), ("rejected", "the shorter reply")])
def test_length_is_compared_within_a_row(longer: str, text: str) -> None:
    """Replies that are right by being longer than the other of their row are found although templates differ more."""
    rng = random.Random(1)

    def stretched(row: PreferencePair) -> PreferencePair:
        base = 40 * int(row.meta["template"][1])
        filled = {key: " ".join(rng.choices(GOODS, k=base + 9 * (key == longer))) for key in ("chosen", "rejected")}
        return said(row, **filled)

    pairs = [ContrastPair(clear=stretched(pair.clear), flawed=stretched(pair.flawed)) for pair in clean(24)]
    found = view(audit(pairs, LIMITS), "length")
    assert found.over
    assert (found.giveaways[0].text, found.giveaways[0].points_to) == (text, "chosen")
    assert set(found.giveaways[0].templates) <= set(WITHIN_SIX)


def test_uneven_sources_are_over() -> None:
    """Steered replies among the chosen and own ones among the rejected are reported in shares and found."""

    def own_mistake(row: PreferencePair) -> PreferencePair:
        return row.model_copy(update={"meta": {**row.meta, "rejected_source": "on_policy"}})

    pairs = [ContrastPair(clear=own_mistake(pair.clear), flawed=pair.flawed) for pair in clean(24)]
    found = view(audit(pairs, LIMITS), "source")
    assert found.over
    assert found.auc is None
    assert found.shares is not None
    assert found.shares[0] - found.shares[1] >= 0.5
    assert found.giveaways[0].points_to == "chosen"
    unknown = [
        pair.model_copy(
            update={"clear": pair.clear.model_copy(update={"meta": {**pair.clear.meta, "chosen_source": None}})}
        )
        for pair in pairs
    ]
    assert "not every row" in view(audit(unknown, LIMITS), "source").reason


@pytest.mark.parametrize("count", [0, 11])
def test_few_pairs_are_not_measured(count: int) -> None:
    """Below the least number of pairs no view has an AUC or passes silently; one line says why."""
    result = audit([with_regret(pair) for pair in clean(count)], LIMITS, tone)
    assert {view.auc for view in result.views} == {None}
    assert result.over == []
    assert lines(result) == [f"audit: not measured: {count} pairs, and at least 12 are needed"]
    assert names(result.views) == names(audit(clean(24), LIMITS, tone).views)


def test_few_templates_leave_only_the_views_within() -> None:
    """With two templates nothing can be said of unseen ones; scenarios of known ones are measured."""
    pairs = [with_regret(pair) for pair in clean(60) if template(pair) in ("t0", "t1")]
    result = audit(pairs, LIMITS, tone)
    measured = {view.name for view in result.views if view.auc is not None}
    assert measured == {"direction_within", "reply_within"}
    assert names(result.over) == {"reply_within"}
    assert view(result, "length").reason == "not measured: 2 templates, and at least 3 are needed"


def test_audit_goes_to_json_and_back_and_is_the_same_again() -> None:
    """The same set and seed give the same audit; another seed changes no AUC; JSON loses nothing."""
    pairs = [with_regret(pair) for pair in clean(24)]
    result = audit(pairs, LIMITS, tone, seed=1)
    assert audit(pairs, LIMITS, tone, seed=1) == result
    assert [view.auc for view in audit(pairs, LIMITS, tone, seed=2).views] == [view.auc for view in result.views]
    assert Audit.model_validate_json(result.model_dump_json()) == result


def test_direction_is_the_prompt_where_a_row_does_not_name_it() -> None:
    """Rows without their direction are read by the prompt's last message."""

    def by_prompt(row: PreferencePair, words: str) -> PreferencePair:
        meta = {key: value for key, value in row.meta.items() if key != "direction"}
        prompt = [user("Hello."), assistant("Hello."), user(row.prompt[0]["content"] + words)]
        return row.model_copy(update={"meta": meta, "prompt": prompt})

    pairs = [
        ContrastPair(clear=by_prompt(pair.clear, ""), flawed=by_prompt(pair.flawed, " Zebra.")) for pair in clean(24)
    ]
    found = view(audit(pairs, LIMITS), "direction")
    assert found.over
    assert found.giveaways[0].text == "'zebra'"


texts = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3), st.integers(0, 2)), min_size=2)


@given(rows=texts)
def test_auc_is_that_of_each_fold_with_texts_as_often_as_drawn(rows: list[tuple[int, bool, int, int]]) -> None:
    """The area is the mean over folds of scikit-learn's, by the couples in each, of the texts written out."""
    rows = [*rows, *((2, label, 1, fold) for label in (True, False) for fold in range(3))]
    scores, labels, times, folds = (np.array(column) for column in zip(*rows, strict=True))
    areas, couples = [], []
    for fold in range(3):
        inside = np.repeat(np.arange(len(rows)), np.where(folds == fold, times, 0))
        areas.append(roc_auc_score(labels[inside], scores[inside]))
        couples.append(labels[inside].sum() * (~labels[inside]).sum())
    found = auc_of(scores / 5, labels.astype(int), folds, np.stack([times, times * 2]))
    assert found == pytest.approx([np.average(areas, weights=couples)] * 2)


def test_choose_drops_what_gives_away() -> None:
    """From a partly leaky set the pairs with the cue go first, and a view that was over no longer is."""
    pairs = [
        ContrastPair(clear=said(pair.clear, rejected="Sorry!"), flawed=said(pair.flawed, rejected="Sorry!"))
        if number >= 36
        else pair
        for number, pair in enumerate(clean(60))
    ]
    before = audit(pairs, LIMITS)
    kept = choose(pairs, 42, LIMITS)
    after = audit(kept, LIMITS)
    assert "reply_ngrams" in names(before.over)
    assert names(after.over) & {"reply_ngrams", "reply_within"} == set()
    leaky = sum("Sorry" in pair.clear.rejected[0]["content"] for pair in kept)
    assert leaky <= 8
    assert sorted(Counter(pair.clear.meta["flaw"] for pair in kept).values()) == [14, 14, 14]
    assert kept == [pair for pair in pairs if pair in kept]
    assert choose(pairs, 42, LIMITS) == kept


def test_choose_evens_out_steered_replies() -> None:
    """Where only the sources are uneven, the pairs that make them so go."""

    def own_mistake(row: PreferencePair) -> PreferencePair:
        return row.model_copy(update={"meta": {**row.meta, "rejected_source": "on_policy"}})

    pairs = [
        ContrastPair(clear=own_mistake(pair.clear), flawed=own_mistake(pair.flawed)) if number % 4 == 0 else pair
        for number, pair in enumerate(clean(24, seed=2))
    ]
    assert view(audit(pairs, LIMITS), "source").over
    assert not view(audit(choose(pairs, 18, LIMITS, tone), LIMITS), "source").over


@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=14),
    count=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_choose_keeps_count_order_kinds_and_twins(kinds: list[tuple[int, bool]], count: int, seed: int) -> None:
    """Exactly the number asked for is kept, in order, from the fullest kinds only, with at most one twin parted."""
    single = clean(3)
    pairs: list[ContrastPair] = []
    for kind, twinned in kinds:
        number = len(pairs)
        meta = {**single[kind].clear.meta, "scenario_id": f"s{number}"}
        pairs.append(
            ContrastPair(
                clear=single[kind].clear.model_copy(update={"meta": meta, "pair_id": f"s{number}"}),
                flawed=single[kind].flawed.model_copy(update={"meta": meta, "pair_id": f"s{number}"}),
            )
        )
        if twinned:
            pairs.append(twin(pairs[-1], number + 1))
    kept = choose(pairs, count, AuditConfig(min_pairs=99), seed=seed)
    places = [int(pair.clear.pair_id[1:]) for pair in kept]
    assert places == sorted(set(places))
    assert len(kept) == min(count, len(pairs))
    before, after = (Counter(pair.clear.meta["flaw"] for pair in group) for group in (pairs, kept))
    lost = [after[kind] for kind in before if after[kind] < before[kind]]
    assert all(after[kind] <= min(lost) + 2 for kind in before if lost)  # a whole twin goes at a time
    scenarios = Counter(pair.clear.meta.get("mirror_of", pair.clear.meta["scenario_id"]) for pair in pairs)
    left = Counter(pair.clear.meta.get("mirror_of", pair.clear.meta["scenario_id"]) for pair in kept)
    assert sum(scenarios[name] == 2 and left[name] == 1 for name in scenarios) <= 1


def test_import_is_light() -> None:
    """Importing the module imports neither scikit-learn nor torch."""
    code = "import sys, dream.audit; sys.exit(bool({'sklearn', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
