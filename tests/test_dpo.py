"""train/dpo.py: the loss and its gradient by hand, and one whole step on a toy model."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toy import toy_rows, train_toy

from dream.config import TrainConfig
from train.checkpoints import load_tokenizer
from train.data import encode, lay_out
from train.dpo import conservative_loss, preference
from train.ledger import rewarded
from train.optim import rate_factor
from train.scoring import score_pairs


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


def test_same_seed_gives_the_same_losses(toy_model: Path, tmp_path: Path) -> None:
    """Training is reproducible, so a killed step that is begun again ends alike."""
    first, second = (train_toy(toy_model, tmp_path / name) for name in ("one", "two"))
    assert [report["loss"] for report in first] == [report["loss"] for report in second]


def test_shared_prompt_scores_as_two_sequences_do(toy_model: Path) -> None:
    """The mask keeps the two replies behind one prompt apart."""
    from train.checkpoints import load_model

    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    encoded = [encode(tokenizer, row) for row in toy_rows(2)]
    together, apart = (score_pairs(model, encoded, shared=shared, bf16=False, batch=3) for shared in (True, False))
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


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
def test_preference_is_what_the_settings_say(weight: float, normalized: bool, clip: bool) -> None:
    """Log-ratios of chosen minus rejected, the reference weighed, by token where asked: by hand. By token the reference
    prefers the rejected reply, which counts as undecided where it is clipped."""
    batch = {
        "ref_chosen_logps": torch.tensor([-6.0]),
        "ref_rejected_logps": torch.tensor([-9.0]),
        "lengths": torch.tensor([2, 4]),
    }
    settings = TrainConfig(reference_weight=weight, length_normalized=normalized, clip_reference=clip, beta=3)
    policy, reference = (-4 / 2 + 8 / 4, -6 / 2 + 9 / 4) if normalized else (-4 + 8, -6 + 9)
    wanted = policy - weight * (0 if clip and reference < 0 else reference)
    assert preference(torch.tensor([-4.0, -8.0]), batch, settings).item() == pytest.approx(wanted)
    assert rewarded([(-4, -8)], [(-6, -9)], [(2, 4)], settings) == pytest.approx(
        [3 * wanted]
    )  # the ledger says the same


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
