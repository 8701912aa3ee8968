"""The trust ledger: how far one training step moved the policy, per example, and what it bought.

The learning rate is trust per example; these are the figures that show how much trust was
really given. Nothing here reads files or models.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from dream.config import TrainConfig
from dream.engine import mean
from train.checkpoints import as_served
from train.data import Encoded
from train.dpo import compared, preference
from train.scoring import Scores

GROUPS: tuple[tuple[str, str], ...] = (
    ("attention q", r"\.(q_proj|wq|query)\b"),
    ("attention k", r"\.(k_proj|wk|key)\b"),
    ("attention v", r"\.(v_proj|wv|value)\b"),
    ("attention o", r"\.(o_proj|wo|out_proj|dense)\b"),
    ("attention", r"\b(self_attn|attn|attention|linear_attn)\b"),
    ("norms", r"norm"),
    ("mlp", r"\b(mlp|feed_forward|ffn|experts|block_sparse_moe)\b"),
    ("embeddings", r"embed|lm_head|\bwte\b"),
)
"""Parameter groups: the first pattern found in a parameter's name decides."""


def group(name: str) -> str:
    """The group of a parameter, `other` when no pattern fits."""
    return next((label for label, pattern in GROUPS if re.search(pattern, name)), "other")


class ChangeMeter:
    """Sums the change of weights, tensor by tensor, so that no second copy of a model is needed."""

    def __init__(self, served: torch.dtype) -> None:
        self._served = served
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """One parameter before and after, in float32 (the same object twice means that it was not touched)."""
        squares, moved, changed = self._square(before), 0.0, 0
        if after is not before:
            moved = self._square(after - before)
            changed = int((as_served(name, after, self._served) != as_served(name, before, self._served)).sum())
        sums = self._sums.setdefault(group(name), [0.0, 0.0, 0.0, 0.0])
        for place, value in enumerate((squares, moved, changed, before.numel())):
            sums[place] += value

    def report(self, rows: int) -> dict[str, dict[str, float]]:
        """Per group and for `all`: Frobenius norms and shares, see `change_figures`."""
        total = [sum(column) for column in zip(*self._sums.values(), strict=True)] if self._sums else [0.0] * 4
        groups = {"all": total, **dict(sorted(self._sums.items()))}
        return {
            name: change_figures(squares, moved, changed, count, rows)
            for name, (squares, moved, changed, count) in groups.items()
        }

    @staticmethod
    def _square(tensor: torch.Tensor) -> float:
        return float(tensor.double().square().sum()) if tensor.numel() < 1 << 22 else float(tensor.float().norm()) ** 2


def change_figures(squares: float, moved: float, changed: float, count: float, rows: int) -> dict[str, float]:
    """Figures of one group from its sums of squares (weights, change) and counts (changed, all).

    `relative_change`: norm of the change over the norm of the weights before. `changed_share`: share of the values
    that differ once rounded to the served precision; what does not differ there is not served. Both also per row.
    """
    relative = (moved / squares) ** 0.5 if squares else 0.0
    share = changed / count if count else 0.0
    return {
        "values": int(count),
        "norm": squares**0.5,
        "change_norm": moved**0.5,
        "relative_change": relative,
        "relative_change_per_row": relative / rows,
        "changed_share": share,
        "changed_share_per_row": share / rows,
    }


def preference_figures(
    before: Scores,
    after: Scores,
    reference: Scores,
    rows: Sequence[Encoded],
    others: Sequence[int],
    kept: Sequence[int],
    train: TrainConfig,
) -> dict[str, Any]:
    """Log-probabilities, reward margin and accuracy over the rows that were trained on, before and after training.

    Scores are summed log-probabilities in nats of `rows`, `others` their `data.other_sides`, `kept` the indices of
    those that count. The reward of a reply is beta * (log p - log p_reference) (DPO, arXiv 2305.18290, equation 5), or
    what the settings make of that (`dpo.preference`); a row is right when chosen's reward is the larger one. `crossed`
    says the same of the comparison with the other side (`dpo.compared`), over the rows that have one. A falling
    `chosen` mean is likelihood displacement (arXiv 2410.08847).
    """
    figures: dict[str, Any] = {}
    pairs = [i for i in kept if others[i] != i]
    for label, scores in (("reference", reference), ("before", before), ("after", after)):
        own, crossed = rewarded(scores, reference, rows, others, train)
        figures[label] = {
            **{
                side: {
                    "logp_sum": mean([scores[i][place] for i in kept]),
                    "logp_token": mean([scores[i][place] / max(1, len(rows[i].replies[place])) for i in kept]),
                }
                for place, side in enumerate(("chosen", "rejected"))
            },
            **_rewards([own[i] for i in kept]),
            **({"crossed": _rewards([crossed[i] for i in pairs])} if pairs else {}),
        }
    return figures


def rewarded(
    scores: Scores, reference: Scores, rows: Sequence[Encoded], others: Sequence[int], train: TrainConfig
) -> tuple[list[float], list[float]]:
    """How much larger chosen's reward is than rejected's, row by row; and how much of that is lost under the prompt of
    the other side."""
    ours, theirs = (compared(one, rows, others, train) for one in (scores, reference))
    own, crossed = (
        (train.beta * preference(one, other, train)).tolist() for one, other in zip(ours, theirs, strict=True)
    )
    return own, crossed


def _rewards(rewards: Sequence[float]) -> dict[str, float]:
    return {"margin": mean(rewards), "accuracy": mean([float(reward > 0) for reward in rewards])}


def summary(ledger: dict[str, Any]) -> str:
    """One line for people."""
    moved, figures = ledger["weights"]["all"], ledger["preference"]
    before, after = figures["before"], figures["after"]
    crossed = ""
    if "crossed" in after:
        crossed = f" (crossed {before['crossed']['margin']:+.3f} -> {after['crossed']['margin']:+.3f})"
    drift = ledger["drift"][-1] if ledger["drift"] else None
    kl = (
        f"KL {drift['kl_previous']:.3f} to the policy before, {drift['kl_initial']:.3f} to the model; " if drift else ""
    )
    kl_texts = ledger["repair_kl"]
    repaired = f"; repaired {kl_texts[0]:.3f} -> {kl_texts[-1]:.3f} nats a token of KL" if kl_texts else ""
    early = f"; ended after {ledger['steps']} of {ledger['planned_steps']} steps: {ledger['ended_early']}"
    return (
        f"{ledger['rows']} rows in {ledger['steps']} steps at {ledger['learning_rate']:g}: weights moved "
        f"{moved['relative_change']:.2e} of their norm ({moved['relative_change_per_row']:.1e} a row), "
        f"{moved['changed_share']:.1%} of values changed as served; {kl}reward margin "
        f"{before['margin']:+.3f} -> {after['margin']:+.3f}{crossed}, {after['accuracy']:.0%} of rows right, "
        f"chosen log p a token {before['chosen']['logp_token']:.3f} -> {after['chosen']['logp_token']:.3f}"
        f"{repaired}{early if ledger['ended_early'] else ''}"
    )
