"""A two-layer Llama of 31 words, its preference rows, and a training step on them: seconds instead of minutes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dream.config import TrainConfig
from dream.records import PreferencePair, assistant, user
from dream.store import Log
from train.data import Probe, Rehearsed, StepSpec

HELDOUT = Probe(messages=[user("z w")], reply="a b c")
"""The text on which `train_toy` measures KL."""


def build_toy(folder: Path, tied: bool = False) -> None:
    """Writes the model, random weights and a word tokenizer with a chat template, into a Hugging Face folder; `tied`:
    the embedding is the vocabulary projection too."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=tied, **shape)).save_pretrained(folder)


def toy_rows(count: int = 8, clear_confidence: float = 0.9, flawed_confidence: float = 0.9) -> list[PreferencePair]:
    """Rows in which the prompt decides which of the same two replies is chosen."""
    made = []
    for number in range(count):
        for side, letter, chosen, rejected, confidence in (
            ("clear", "x", "a b c", "d e", clear_confidence),
            ("flawed", "y", "d e", "a b c", flawed_confidence),
        ):
            made.append(
                PreferencePair(
                    pair_id=f"p{number}", side=side, prompt=[user(f"{letter} w")],
                    chosen=[assistant(chosen)], rejected=[assistant(rejected)], meta={"judge_confidence": confidence},
                )
            )  # fmt: skip
    return made


def train_toy(
    model: Path,
    out: Path,
    *,
    rows: Sequence[PreferencePair] | None = None,
    flip: float = 0.0,
    sft: bool = False,
    served_dtype: str = "float32",
    rehearsed: Sequence[Rehearsed] = (),
    repaired: Sequence[Rehearsed] = (),
    weights: Path | None = None,
    adapter: Path | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Runs one training step on `rows`, by default the toy rows, KL measured on an unseen prompt; what it reported."""
    from train.step import run  # torch and trl take seconds to import

    path = out.with_suffix(".jsonl")
    log = Log(path)
    log.append(*(toy_rows() if rows is None else rows))
    log.close()
    config = TrainConfig(**{"batch_size": 4, "micro_batch_size": 2, "bf16": False, "learning_rate": 1e-2, **settings})
    reports: list[dict[str, Any]] = []
    spec = StepSpec(
        model=str(model), rows=str(path), out=str(out), train=config, flip_probability=flip, served_dtype=served_dtype,
        sft=sft, rehearsed=list(rehearsed), repaired=list(repaired), weights=str(weights) if weights else None,
        adapter=str(adapter) if adapter else None, probes=[Probe(messages=[user("x w")], reply="a b c")],
        heldout=[HELDOUT],
    )  # fmt: skip
    run(spec, reports.append)
    return reports
