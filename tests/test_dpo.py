"""train/dpo.py: the loss and its gradient by hand, and one whole step on a toy model."""

import json
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import HELDOUT, toy_rows, train_toy

from dream.config import TrainConfig
from dream.errors import TrainingError
from dream.records import assistant, user
from train.checkpoints import load_model, load_tokenizer
from train.data import Encoded, Rehearsed, encode, encode_rehearsed, lay_out, other_sides, with_other_sides
from train.dpo import compared, conservative_loss, row_weights, training_order
from train.ledger import rewarded
from train.optim import rate_factor
from train.scoring import (
    coarse_logps,
    divergence,
    forgotten,
    probe_ids,
    prompts_can_be_shared,
    remember,
    reply_distributions,
    score_pairs,
)


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("delta", [-8.0, -0.5, 0.0, 2.0, 30.0])
def test_gradient_is_that_of_conservative_dpo(flip: float, delta: float) -> None:
    """dL/ddelta is -beta ((1 - e) sigmoid(-beta delta) - e sigmoid(beta delta))."""
    beta, x = 0.1, torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    conservative_loss(x, beta, torch.tensor(flip, dtype=torch.float64)).backward()
    sure = torch.sigmoid(torch.tensor(beta * delta, dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(float(-beta * ((1 - flip) * (1 - sure) - flip * sure)), abs=1e-12)


def test_rate_rises_and_falls_and_is_never_zero() -> None:
    """The first step already moves; after the warm-up the rate falls as a cosine."""
    factors = [rate_factor(step, 10, TrainConfig(warmup=0.2)) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(a > b for a, b in pairwise(factors[2:]))
    assert factors[-1] > 0


def test_prompt_stands_once_before_both_replies() -> None:
    """Replies continue the prompt at the same positions, in segments of their own."""
    layout = lay_out([([1, 2, 3], [[4, 5], [6]])])
    assert layout.ids == [[1, 2, 3, 4, 5, 6]]
    assert layout.positions == [[0, 1, 2, 3, 4, 3]]
    assert layout.segments == [[0, 0, 0, 1, 1, 2]]
    assert layout.sources == [2, 3, 2]
    assert layout.tokens == [4, 5, 6]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_step_teaches_the_condition_and_leaves_a_whole_folder(toy_model: Path, tmp_path: Path, method: str) -> None:
    """After training, the prompt decides: each reply is likelier under the prompt it was chosen under."""
    reports = train_toy(toy_model, tmp_path / "out", method=method)
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"weights", "ledger.json", "probes.json"} <= made
    assert ("adapter" in made) == (method == "lora")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["preference"]["after"]["margin"] > ledger["preference"]["before"]["margin"] == 0
    assert ledger["weights"]["all"]["relative_change"] > 0
    assert ledger["prompts_shared"] is True


def test_same_seed_gives_the_same_losses(toy_model: Path, tmp_path: Path) -> None:
    """Training is reproducible, so a killed step that is begun again ends alike."""
    first, second = (train_toy(toy_model, tmp_path / name) for name in ("one", "two"))
    assert [report["loss"] for report in first] == [report["loss"] for report in second]


def test_shared_prompt_scores_as_two_sequences_do(toy_model: Path) -> None:
    """The mask keeps the two replies behind one prompt apart."""
    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    encoded = [encode(tokenizer, row) for row in toy_rows(2)]
    together, apart = (score_pairs(model, encoded, shared=shared, bf16=False, batch=3) for shared in (True, False))
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("attention", "shift", "wanted"),
    [("sdpa", 0, True), ("flash_attention_2", 0, False), ("sdpa", 0.04, True), ("sdpa", 0.06, False)],
)
def test_prompts_are_shared_only_where_scores_stay_the_same(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, attention: str, shift: float, wanted: bool
) -> None:
    """With attention that takes our mask, and if no reply behind a shared prompt scores .05 nats a token otherwise."""

    def shifted(model: Any, rows: list[Encoded], *, shared: bool, **settings: Any) -> list[tuple[float, ...]]:
        first, *others = score_pairs(model, rows, shared=shared, **settings)
        return [(first[0] + shared * shift * len(rows[0].chosen), *first[1:]), *others]

    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    monkeypatch.setattr("train.scoring.score_pairs", shifted)
    assert prompts_can_be_shared(model, [encode(tokenizer, row) for row in toy_rows(2)], bf16=False) is wanted


def test_losses_are_those_of_trl(toy_model: Path, tmp_path: Path) -> None:
    """Without smoothing and NLL, the losses and reward margins are those of TRL's own trainer on the same batches."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    settings = {"nll_weight": 0.0, "method": "full", "warmup": 0.0, "learning_rate": 1e-9}
    ours = train_toy(toy_model, tmp_path / "ours", **settings)
    columns = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in toy_rows()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(toy_model),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, num_train_epochs=1, beta=0.1, use_cpu=True,
            learning_rate=1e-9, bf16=False, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=load_tokenizer(str(toy_model), trust_remote_code=False),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [report["loss"] for report in ours] == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_rewards_are_what_the_settings_say(weight: float, normalized: bool, clip: bool) -> None:
    """Log-ratios of chosen minus rejected, the reference weighed, by token where asked: by hand. By token the reference
    prefers the rejected reply, which counts as undecided where it is clipped."""
    settings = TrainConfig(reference_weight=weight, length_normalized=normalized, clip_reference=clip, beta=3)
    policy, reference = (-4 / 2 + 8 / 4, -6 / 2 + 9 / 4) if normalized else (-4 + 8, -6 + 9)
    wanted = policy - weight * (0 if clip and reference < 0 else reference)
    row = Encoded([1], [1, 2], [1, 2, 3, 4])
    own, crossed = rewarded([(-4.0, -8.0)], [(-6.0, -9.0)], [row], [0], settings)
    assert own == pytest.approx([3 * wanted])
    assert crossed == [0]  # there is no other side


def test_sides_are_compared_with_the_same_replies() -> None:
    """What is compared is how much more chosen is preferred under its own prompt than under the other one, by token."""
    clear, flawed = Encoded([1], [1, 2], [3]), Encoded([2], [4, 5, 6, 7], [8, 9])
    rows = [clear._replace(others=(flawed.chosen, flawed.rejected)),
            flawed._replace(others=(clear.chosen, clear.rejected))]  # fmt: skip
    scores = [(-2.0, -3.0, -8.0, -5.0), (-4.0, -6.0, -7.0, -1.5)]
    own, crossed = compared(scores, rows, [1, 0], TrainConfig(length_normalized=True))
    assert own.tolist() == pytest.approx([-2 / 2 + 3, -4 / 4 + 6 / 2])
    assert crossed.tolist() == pytest.approx([2 - (-7 / 2 + 1.5), 2 - (-8 / 4 + 5 / 2)])


@given(shift=st.floats(-5, 5), logps=st.lists(st.floats(-9, -1), min_size=8, max_size=8))
def test_what_is_thought_of_a_reply_whatever_the_prompt_does_not_count(shift: float, logps: list[float]) -> None:
    """A reply that becomes likelier under both prompts changes nothing in the comparison of the sides."""
    clear, flawed = Encoded([1], [1], [2], ([3], [4])), Encoded([2], [3], [4], ([1], [2]))
    before = [tuple(logps[:4]), tuple(logps[4:])]
    after = [(logps[0] + shift, *logps[1:4]), (*logps[4:6], logps[6] + shift, logps[7])]
    then, now = (compared(scores, [clear, flawed], [1, 0], TrainConfig())[1] for scores in (before, after))
    assert now.tolist() == pytest.approx(then.tolist())


def test_other_side_is_in_the_same_step() -> None:
    """Rows of one pair in a step are each other's; general rows, and rows that a step's end parts, have none."""
    rows = [row.model_copy(update={"pair_id": name, "side": side})
            for row, (name, side) in zip(toy_rows(), [("a", "clear"), ("a", "flawed"), ("g", "clear"), ("b", "clear"),
                                                      ("b", "flawed")], strict=False)]  # fmt: skip
    assert other_sides(rows, 4) == [1, 0, 2, 3, 4]
    assert other_sides(rows, 6) == [1, 0, 2, 4, 3]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), step=st.sampled_from([2, 4, 6]), data=st.data())
def test_micro_batches_hold_both_sides(lengths: list[int], step: int, data: st.DataObject) -> None:
    """Whatever the lengths, every step keeps its rows and the sides of a scenario follow each other at even places."""
    rows = [Encoded([0] * length, [1], [2]) for length in lengths]
    others = list(range(len(rows)))
    for start in range(0, len(rows) - 1, 2):
        if start // step == (start + 1) // step and data.draw(st.booleans()):
            others[start], others[start + 1] = start + 1, start
    order = training_order(rows, others, step)
    for start in range(0, len(rows), step):
        assert sorted(order[start : start + step]) == list(range(start, min(start + step, len(rows))))
    for place, i in enumerate(order):
        if others[i] != i:
            assert others[i] == order[place ^ 1]


@pytest.mark.parametrize("long", [(5, 3, 3), (2, 6, 3), (2, 3, 6)])
def test_a_row_counts_as_the_judge_is_sure_and_a_long_one_takes_its_pair_along(long: tuple[int, int, int]) -> None:
    """Weights are the confidences over their mean among the rows that are kept; prompt and longer reply must fit."""
    encoded = [Encoded([1] * 2, [1] * 3, [1] * 5)] * 6
    rows = toy_rows(3, clear_confidence=0.5, flawed_confidence=1.0)
    one_long = [*encoded[:3], Encoded(*([1] * size for size in long)), *encoded[4:]]
    assert row_weights(rows, one_long, 7) == pytest.approx([2 / 3, 4 / 3, 0, 0, 2 / 3, 4 / 3])
    with pytest.raises(TrainingError, match=r"train\.max_length \(6 tokens\)"):
        row_weights(rows, encoded, 6)


def test_a_pair_with_a_long_row_is_left_out_of_the_step(toy_model: Path, tmp_path: Path) -> None:
    """Neither of its sides is in the loss of its step, and the ledger counts and divides by the others."""
    rows = toy_rows()
    rows[3] = rows[3].model_copy(update={"rejected": [assistant(" ".join("a" * 64))]})
    reports = train_toy(toy_model, tmp_path / "out", rows=rows, max_length=64, nll_weight=0.0)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert reports[0]["loss"] == pytest.approx(2 * log(2) / 4, abs=1e-4)  # the other two of four, as yet undecided
    assert (ledger["rows"], ledger["left_out"]) == (14, 2)
    moved = ledger["weights"]["all"]
    assert moved["relative_change_per_row"] == pytest.approx(moved["relative_change"] / 14)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_sides_compared_alone_teach_the_condition(toy_model: Path, tmp_path: Path, method: str) -> None:
    """Without the rows' own comparison the crossed margin rises all the same, and the ledger and its line say so."""
    settings = {"row_weight": 0.0, "crossed_weight": 1.0, "nll_weight": 0.0}
    train_toy(toy_model, tmp_path / "out", method=method, **settings)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    before, after = (ledger["preference"][when]["crossed"] for when in ("before", "after"))
    assert after["margin"] > before["margin"] == 0
    assert "(crossed +0.000 -> " in ledger["summary"]


def test_scores_and_trainer_compare_the_same(toy_model: Path, tmp_path: Path) -> None:
    """The loss of the first step, at a rate of next to nothing, is the loss of the scores that the ledger has: with
    labels smoothed, rows weighed, and the chosen reply's likelihood a token."""
    settings = {"row_weight": 0.5, "crossed_weight": 2.0, "nll_weight": 0.3, "reference_weight": 0.0, "beta": 1.0,
                "batch_size": 16, "micro_batch_size": 4, "learning_rate": 1e-9, "length_normalized": True}  # fmt: skip
    rows = toy_rows(clear_confidence=0.5, flawed_confidence=1.0)
    (report,) = train_toy(toy_model, tmp_path / "out", rows=rows, flip=0.2, **settings)
    train = TrainConfig(**settings)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    encoded, others = with_other_sides([encode(tokenizer, row) for row in rows], rows, train)
    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    scores = score_pairs(model, encoded, shared=False, bf16=False, batch=3)
    own, crossed = compared(scores, encoded, others, train)
    flip, weights = torch.full_like(own, 0.2), torch.tensor([0.5, 1.0] * 8) / 0.75
    nll = torch.tensor([-score[0] / len(ids.chosen) for score, ids in zip(scores, encoded, strict=True)])
    assert len(own) == len(rows) == sum(i != j for i, j in enumerate(others))
    wanted = 0.5 * conservative_loss(own, 1.0, flip) + 2 * conservative_loss(crossed, 1.0, flip) + 0.3 * nll
    assert report["loss"] == pytest.approx(float((weights * wanted).mean()), abs=1e-4)
    assert report["margin"] == pytest.approx(float(crossed.mean()), abs=1e-4)  # of what mostly is compared


def test_what_is_rehearsed_stays_as_it_was(toy_model: Path, tmp_path: Path) -> None:
    """Beside the same rows, with the same steps, the policy goes far less far from what it thought of a rehearsed text;
    before training it has forgotten nothing."""
    text = Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    ids = encode_rehearsed(tokenizer, text)
    assert tokenizer.decode(ids[1][-1:]) == "<eos>"
    initial = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    remembered = remember(initial, [ids], bf16=False, batch=1)
    lost = {}
    for weight in (0.0, 50.0):
        out = tmp_path / f"weight_{weight:g}"
        train_toy(toy_model, out, rehearsed=[text], rehearsal=2, rehearsal_weight=weight)
        model = load_model(str(out / "weights"), torch.float32, trust_remote_code=False)
        lost[weight] = forgotten(model, model.get_output_embeddings(), remembered).item()
    assert forgotten(initial, initial.get_output_embeddings(), remembered).item() == pytest.approx(0, abs=1e-6)
    assert 0 < lost[50.0] < lost[0.0] / 2


def test_rehearsed_answer_is_whole_where_the_prompt_alone_is_rendered_otherwise() -> None:
    """A template that opens a thought in a generation prompt only: nothing of the answer is lost."""

    class Thinking:
        def apply_chat_template(self, messages: list[Any], add_generation_prompt: bool, **_: Any) -> dict[str, Any]:
            said = [ord(letter) for turn in messages for letter in turn["content"]]
            return {"input_ids": [*said, 1, 2] if add_generation_prompt else [*said, 0]}

    text = Rehearsed(messages=[user("hi")], reply="x", finished=True)
    assert encode_rehearsed(Thinking(), text) == ([*b"hi"], [*b"x", 0])


def two_rounds(model: Path, folder: Path, method: str, **settings: Any) -> None:
    """Trains `first` in the folder, and `second` from where that ended; the settings are the second's."""
    train_toy(model, folder / "first", method=method)
    kind = "adapter" if method == "lora" else "weights"
    train_toy(model, folder / "second", method=method, **{kind: folder / "first" / kind}, **settings)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_rehearsed_is_held_to_the_initial_model(toy_model: Path, tmp_path: Path, method: str) -> None:
    """A second round brings a policy that has gone far back towards the model as it came, not towards its last self."""
    text = Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    initial = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    remembered = remember(initial, [encode_rehearsed(tokenizer, text)], bf16=False, batch=1)
    two_rounds(toy_model, tmp_path, method, rehearsed=[text], rehearsal=2, rehearsal_weight=50)
    lost = []
    for name in ("first", "second"):
        model = load_model(str(tmp_path / name / "weights"), torch.float32, trust_remote_code=False)
        lost.append(forgotten(model, model.get_output_embeddings(), remembered).item())
    assert lost[1] < lost[0] / 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_second_round_begins_where_the_first_ended(toy_model: Path, tmp_path: Path, method: str) -> None:
    """What is served before a round is what was served after the one before."""
    two_rounds(toy_model, tmp_path, method)
    one, two = (json.loads((tmp_path / name / "probes.json").read_text()) for name in ("first", "second"))
    assert one["after"] != pytest.approx(one["before"], abs=1e-2)
    assert two["before"] == pytest.approx(one["after"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_second_round_knows_the_last_policy_and_the_initial_model(
    toy_model: Path, tmp_path: Path, method: str
) -> None:
    """Its two KLs are those between the folders, and `reference: initial` compares with the model as it came."""
    two_rounds(toy_model, tmp_path, method, reference="initial")
    ledger = json.loads((tmp_path / "second" / "ledger.json").read_text())
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    text = probe_ids(tokenizer, HELDOUT)
    encoded = [encode(tokenizer, row) for row in toy_rows()]
    seen, scored = [], []
    for folder in (toy_model, tmp_path / "first" / "weights", tmp_path / "second" / "weights"):
        model = load_model(str(folder), torch.float32, trust_remote_code=False)
        seen.append(reply_distributions(model, [text]))
        scored.append(torch.tensor(score_pairs(model, encoded, shared=False, bf16=False, batch=8)).mean(0).tolist())
    initial, first, second = seen
    drift = ledger["drift"][-1]
    assert drift["kl_previous"] == pytest.approx(divergence(second, first), rel=1e-2)
    assert drift["kl_initial"] == pytest.approx(divergence(second, initial), rel=1e-2)
    assert drift["kl_initial"] != pytest.approx(drift["kl_previous"], rel=0.1)
    for when, wanted in zip(("reference", "before", "after"), scored, strict=True):
        logps = [ledger["preference"][when][reply]["logp_sum"] for reply in ("chosen", "rejected")]
        assert logps == pytest.approx(wanted, abs=1e-3)
    assert scored[0] != pytest.approx(scored[1], abs=0.1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_repair_gives_back_what_the_pairs_took(toy_model: Path, tmp_path: Path, method: str) -> None:
    """After the same steps on pairs, steps of rehearsal alone bring a text back, and are in the ledger: the KL of each
    step and the drift after the last."""
    text = Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    initial = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    remembered = remember(initial, [encode_rehearsed(tokenizer, text)], bf16=False, batch=1)
    lost, ledgers = [], []
    for steps in (0, 5):
        out = tmp_path / f"steps_{steps}"
        settings = {"repair_steps": steps, "repair_learning_rate": 1e-2, "method": method, "budget_steps": 1}
        reports = train_toy(toy_model, out, repaired=[text] * 4 * steps, **settings)
        assert ["repair_kl" in report for report in reports] == [False] * 4 + [True] * steps
        model = load_model(str(out / "weights"), torch.float32, trust_remote_code=False)
        lost.append(forgotten(model, model.get_output_embeddings(), remembered).item())
        ledgers.append(json.loads((out / "ledger.json").read_text()))
    without, repaired = ledgers
    assert 0 < lost[1] < lost[0] / 2
    assert without["repair_kl"] is None
    assert len(repaired["repair_kl"]) == 5
    assert repaired["repair_kl"][0] == pytest.approx(lost[0], rel=0.01)  # a mean over the step's texts
    assert repaired["repair_kl"][-1] < repaired["repair_kl"][0]
    assert [drift["step"] for drift in repaired["drift"]] == [1, 2, 3, 4, 9]
    assert repaired["drift"][:4] == without["drift"]


def test_repair_that_leaves_the_finite_numbers_is_an_error(toy_model: Path, tmp_path: Path) -> None:
    """The message names the key to lower, and nothing is left of the step."""
    text = Rehearsed(messages=[user("q r s")], reply="m n o p", finished=True)
    settings = {"method": "full", "repair_steps": 3, "repair_learning_rate": 1e30}
    with pytest.raises(TrainingError, match=r"repair.*train\.repair_learning_rate"):
        train_toy(toy_model, tmp_path / "out", repaired=[text] * 12, **settings)
    assert not (tmp_path / "out").exists()


def test_texts_are_remembered_together_as_one_by_one(toy_model: Path) -> None:
    """Whatever their lengths, in their order."""
    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    texts = [(list(range(3, 3 + head)), list(range(4, 4 + tail))) for head, tail in ((5, 2), (1, 7), (4, 4), (2, 1))]
    together, apart = (remember(model, texts, bf16=False, batch=batch) for batch in (3, 1))
    assert [one.text for one in together] == texts
    for one, other in zip(together, apart, strict=True):
        assert one.likeliest.shape == other.likeliest.shape
        assert torch.allclose(one.logps, other.logps, atol=1e-5)


def test_a_short_text_counts_as_much_as_a_long_one(toy_model: Path) -> None:
    """What is forgotten of a number is not lost beside what is kept of an essay."""
    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    number, essay = remember(model, [([3, 4], [5]), ([3, 5], list(range(4, 20)))], bf16=False, batch=2)
    number = number._replace(logps=number.logps.roll(1, dims=-1))
    alone, both = (forgotten(model, model.get_output_embeddings(), texts) for texts in ([number], [number, essay]))
    assert alone.item() > 0.001
    assert both.item() == pytest.approx(alone.item() / 2, abs=1e-5)


def test_the_rest_of_the_vocabulary_counts_together() -> None:
    """Coarse log-probabilities are those of the chosen tokens and of all the others, and sum to one."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    likeliest = logits.topk(4).indices
    coarse = coarse_logps(logits, likeliest).exp()
    assert coarse.sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert torch.allclose(coarse[:, :4], logits.softmax(-1).gather(-1, likeliest))


def test_warm_up_raises_the_chosen_replies_before_dpo(toy_model: Path, tmp_path: Path) -> None:
    """One supervised pass in the same step; the reference `previous` is the policy after it."""
    train_toy(toy_model, tmp_path / "without", learning_rate=1e-9)
    train_toy(toy_model, tmp_path / "with", learning_rate=1e-9, sft=True, sft_learning_rate=1e-2)
    without, warmed = (json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("without", "with"))
    assert without["sft_loss"] is None
    assert warmed["sft_loss"] > 0
    before, after = (warmed["preference"][when]["chosen"]["logp_token"] for when in ("before", "after"))
    assert after > before + 0.1
    assert warmed["preference"]["reference"]["chosen"]["logp_token"] == pytest.approx(after, abs=1e-4)
    assert without["preference"]["after"]["chosen"]["logp_token"] == pytest.approx(before, abs=1e-4)


def test_apollo_trains_all_weights(toy_model: Path, tmp_path: Path) -> None:
    """`optim: apollo_adamw` with its own keys moves the masters and teaches the rows."""
    settings = {"method": "full", "optim": "apollo_adamw", "apollo_rank": 4, "apollo_update_gap": 2}
    train_toy(toy_model, tmp_path / "out", **settings)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["weights"]["mlp"]["changed_share"] > 0.9
    assert ledger["preference"]["after"]["margin"] > 0
