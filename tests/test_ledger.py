"""train/ledger.py: the figures of a step, by hand."""

import pytest
import torch

from dream.config import TrainConfig
from train.data import Encoded
from train.ledger import ChangeMeter, group, preference_figures


def test_change_is_that_of_the_weights_and_of_what_is_served() -> None:
    """Norms are of the float32 values; a value that bfloat16 serves as before has not changed; both also per row."""
    meter = ChangeMeter(torch.bfloat16)
    before, norm = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    meter.add("model.layers.0.self_attn.q_proj.weight", before, before + torch.tensor([1.0, 2.0**-20]))
    meter.add("model.norm.weight", norm, norm)  # the same object: not touched
    assert {name: pytest.approx(figures) for name, figures in meter.report(rows=3).items()} == {
        "all": {
            "values": 3, "norm": 13, "change_norm": 1, "relative_change": 1 / 13, "relative_change_per_row": 1 / 39,
            "changed_share": 1 / 3, "changed_share_per_row": 1 / 9,
        },
        "attention q": {
            "values": 2, "norm": 5, "change_norm": 1, "relative_change": 1 / 5, "relative_change_per_row": 1 / 15,
            "changed_share": 1 / 2, "changed_share_per_row": 1 / 6,
        },
        "norms": {
            "values": 1, "norm": 12, "change_norm": 0, "relative_change": 0, "relative_change_per_row": 0,
            "changed_share": 0, "changed_share_per_row": 0,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention q"),
        ("model.layers.0.self_attn.k_proj.weight", "attention k"),
        ("model.layers.0.self_attn.v_proj.bias", "attention v"),
        ("model.layers.0.self_attn.o_proj.weight", "attention o"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attention"),
        ("gpt_neox.layers.0.attention.dense.weight", "attention o"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "mlp"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("multi_modal_projector.linear_1.weight", "other"),
    ],
)
def test_parameters_are_grouped_by_what_they_do(name: str, wanted: str) -> None:
    """Names as Llama, Mixtral, GPT-2 and GPT-NeoX have them."""
    assert group(name) == wanted


def test_preference_figures_are_means_over_the_rows_that_count() -> None:
    """By hand: each reply by its own length, rewards against the reference; a tie is not right."""
    rows = [Encoded([1], [1] * 2, [1] * 4), Encoded([1], [1] * 5, [1]), Encoded([1], [1], [1])]
    reference = [(-4.0, -8.0), (-10.0, -3.0), (-1.0, -1.0)]
    after = [(-2.0, -12.0), (-15.0, -8.0), (-50.0, -1.0)]
    figures = preference_figures(reference, after, reference, rows, [0, 1, 2], kept=[0, 1], train=TrainConfig(beta=0.5))
    assert figures["before"] == figures["reference"]
    assert (figures["before"]["margin"], figures["before"]["accuracy"]) == (0, 0)
    assert figures["after"] == {
        "chosen": {"logp_sum": (-2 - 15) / 2, "logp_token": (-2 / 2 - 15 / 5) / 2},
        "rejected": {"logp_sum": (-12 - 8) / 2, "logp_token": (-12 / 4 - 8 / 1) / 2},
        "margin": (0.5 * (10 - 4) + 0) / 2,
        "accuracy": 0.5,
    }
