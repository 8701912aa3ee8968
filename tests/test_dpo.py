"""train/dpo.py: the loss and its gradient by hand, and one whole step on a toy model."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dream.config import TrainConfig
from dream.records import PreferencePair, assistant, user
from dream.store import Log
from train.data import DpoSpec, encode, lay_out
from train.dpo import conservative_loss, load_tokenizer, rate_factor, run, score_pairs


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
    factors = [rate_factor(step, 10, 0.2) for step in range(10)]
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


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a word tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("toy")
    words = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def rows(count: int = 8) -> list[PreferencePair]:
    """Rows in which the prompt decides which of the same two replies is chosen."""
    made = []
    for number in range(count):
        for side, letter, chosen, rejected in (("clear", "x", "a b c", "d e"), ("flawed", "y", "d e", "a b c")):
            made.append(
                PreferencePair(
                    pair_id=f"p{number}", side=side, prompt=[user(f"{letter} w")],
                    chosen=[assistant(chosen)], rejected=[assistant(rejected)], meta={"judge_confidence": 0.9},
                )
            )  # fmt: skip
    return made


def train(model: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Runs one step on the toy rows; what it reported."""
    path = out.with_suffix(".jsonl")
    log = Log(path)
    log.append(*rows())
    log.close()
    config = TrainConfig(**{"batch_size": 4, "micro_batch_size": 2, "bf16": False, "learning_rate": 1e-2, **settings})
    reports: list[dict[str, Any]] = []
    spec = DpoSpec(model=str(model), rows=str(path), out=str(out), train=config, served_dtype="float32")
    run(spec, reports.append)
    return reports


@pytest.mark.parametrize("method", ["lora", "full"])
def test_step_teaches_the_condition_and_leaves_a_whole_folder(toy_model: Path, tmp_path: Path, method: str) -> None:
    """After training, the prompt decides: each reply is likelier under the prompt it was chosen under."""
    reports = train(toy_model, tmp_path / "out", method=method)
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"weights", "ledger.json", "probes.json"} <= made
    assert ("adapter" in made) == (method == "lora")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["preference"]["after"]["margin"] > ledger["preference"]["before"]["margin"] == 0
    assert ledger["weights"]["all"]["relative_change"] > 0


def test_same_seed_gives_the_same_losses(toy_model: Path, tmp_path: Path) -> None:
    """Training is reproducible, so a killed step that is begun again ends alike."""
    first, second = (train(toy_model, tmp_path / name) for name in ("one", "two"))
    assert [report["loss"] for report in first] == [report["loss"] for report in second]


def test_shared_prompt_scores_as_two_sequences_do(toy_model: Path) -> None:
    """The mask keeps the two replies behind one prompt apart."""
    from train.checkpoints import load_model

    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    encoded = [encode(tokenizer, row) for row in rows(2)]
    together, apart = (score_pairs(model, encoded, shared=shared, bf16=False, batch=3) for shared in (True, False))
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_losses_are_those_of_trl(toy_model: Path, tmp_path: Path) -> None:
    """Without smoothing and NLL, the losses and reward margins are those of TRL's own trainer on the same batches."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    settings = {"nll_weight": 0.0, "method": "full", "warmup": 0.0, "learning_rate": 1e-9}
    ours = train(toy_model, tmp_path / "ours", **settings)
    columns = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows()]
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
