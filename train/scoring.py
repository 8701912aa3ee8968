"""Log-probabilities of replies, computed only where a reply token is predicted; the trainer's and the ledger's eyes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from train.data import Encoded, Probe, chat_ids, lay_out

Scores = list[tuple[float, ...]]
"""Summed log-probabilities of the replies of rows under their own prompts: chosen, rejected, and `Encoded.others`."""
Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of a reply to it."""
LIKELIEST = 64
"""Tokens whose probabilities are remembered one by one; the others count together."""


def tensors(
    sequences: Sequence[tuple[list[int], Sequence[list[int]]]], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """`lay_out` as tensors, with `lengths`, the tokens of each reply; on the CPU where no device is named."""
    batch = {name: torch.tensor(value, device=device) for name, value in lay_out(sequences)._asdict().items()}
    batch["lengths"] = torch.tensor([len(reply) for _, replies in sequences for reply in replies], device=device)
    return batch


def pair_sequences(rows: Sequence[Encoded], shared: bool) -> list[tuple[list[int], list[list[int]]]]:
    """The `Encoded.replies` of each row behind one prompt (`shared`), or as a sequence each; in that order."""
    if shared:
        return [(row.prompt, row.replies) for row in rows]
    return [(row.prompt, [reply]) for row in rows for reply in row.replies]


def tokens(row: Encoded) -> int:
    """Positions that a row takes behind one prompt."""
    return len(row.prompt) + sum(map(len, row.replies))


def reply_logps(model: torch.nn.Module, head: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each reply under its prompt, summed over its tokens, in nats; shape (replies,), float32."""
    logps = -F.cross_entropy(reply_logits(model, head, batch), batch["tokens"], reduction="none")
    return logps.new_zeros(len(batch["lengths"])).index_add(0, batch["replies"], logps)


def reply_logits(model: torch.nn.Module, head: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits where a reply token is predicted, shape (reply tokens, vocabulary), float32.

    Only these positions go through `head`, the vocabulary projection: on a CPU the projection of every position costs
    more than the transformer. The model's own forward runs, so that its logit scaling applies.
    """
    segments = batch["segments"]
    mask = None
    if int(segments.max()) > 1:
        own = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        mask = own.tril()[:, None]
    with _head_only_at(head, batch["sources"]):
        output = model(input_ids=batch["ids"], attention_mask=mask, position_ids=batch["positions"], use_cache=False)
    logits: torch.Tensor = output.logits.float()
    return logits


@contextmanager
def _head_only_at(head: torch.nn.Module, sources: torch.Tensor) -> Iterator[None]:
    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[sources.to(hidden.device)],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def autocast(model: torch.nn.Module, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16, parameters as they are."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16)


def batches_of_like_length(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """All indices of `lengths`, at most `batch` at a time, the shortest first, so that little is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


@torch.no_grad()
def score_pairs(model: PreTrainedModel, rows: Sequence[Encoded], *, shared: bool, bf16: bool, batch: int) -> Scores:
    """Summed log-probabilities of each row's replies, in the rows' order."""
    model.eval()
    scores: dict[int, tuple[float, ...]] = {}
    for part in batches_of_like_length([tokens(row) for row in rows], batch):
        inputs = tensors(pair_sequences([rows[i] for i in part], shared), model.device)
        with autocast(model, bf16):
            logps = iter(reply_logps(model, model.get_output_embeddings(), inputs).tolist())
        scores |= {i: tuple(islice(logps, len(rows[i].replies))) for i in part}
    return [scores[i] for i in range(len(rows))]


def prompts_can_be_shared(model: PreTrainedModel, rows: Sequence[Encoded], bf16: bool) -> bool:
    """Whether replies behind one prompt score as sequences of their own do: tried on a few rows, not assumed.

    It does not hold for models with recurrent layers, or with attention that takes no mask of our own.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    few = sorted(rows, key=tokens)[:2]
    apart, together = (score_pairs(model, few, shared=shared, bf16=bf16, batch=2) for shared in (False, True))
    return all(
        abs(a - b) / max(1, len(reply)) < 0.05
        for first, second, row in zip(apart, together, few, strict=True)
        for a, b, reply in zip(first, second, row.replies, strict=True)
    )


def probe_ids(tokenizer: Any, probe: Probe) -> Text:
    """Token ids of a probe's prompt and reply."""
    head = chat_ids(tokenizer, probe.messages, add_generation_prompt=True)
    return head, list(tokenizer(probe.reply, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def probe_scores(model: PreTrainedModel, tokenizer: Any, probes: Sequence[Probe]) -> list[float]:
    """Mean log-probability per reply token of each probe, computed in the model's own precision as an engine does."""
    scores = []
    for probe in probes:
        head, reply = probe_ids(tokenizer, probe)
        inputs = tensors([(head, [reply])], model.device)
        scores.append(float(reply_logps(model, model.get_output_embeddings(), inputs)) / max(1, len(reply)))
    return scores


@torch.no_grad()
def reply_distributions(model: PreTrainedModel, texts: Sequence[Text]) -> list[torch.Tensor]:
    """Log-probabilities over the vocabulary for every token of each (prompt, reply), shape (tokens, vocabulary), on
    the CPU in float32."""
    model.eval()
    found = []
    for prompt, reply in texts:
        batch = tensors([(prompt, [reply])], model.device)
        found.append(reply_logits(model, model.get_output_embeddings(), batch).log_softmax(-1).cpu())
    return found


class Remembered(NamedTuple):
    """A text and what a model thought of each of its reply tokens.

    `likeliest` are the ids of the likeliest tokens, shape (tokens, LIKELIEST); `logps` their log-probabilities and, in
    the last column, that of all others together.
    """

    text: Text
    likeliest: torch.Tensor
    logps: torch.Tensor


@torch.no_grad()
def remember(model: PreTrainedModel, texts: Sequence[Text], *, bf16: bool, batch: int) -> list[Remembered]:
    """The texts as the model sees them now, in their order."""
    model.eval()
    found: dict[int, Remembered] = {}
    for part in batches_of_like_length([sum(map(len, text)) for text in texts], batch):
        inputs = tensors([(prompt, [reply]) for prompt, reply in (texts[i] for i in part)], model.device)
        with autocast(model, bf16):
            logits = reply_logits(model, model.get_output_embeddings(), inputs)
        likeliest = logits.topk(min(LIKELIEST, logits.shape[-1] - 1)).indices
        sizes = inputs["lengths"].tolist()
        each = zip(
            part, *(torch.split(both, sizes) for both in (likeliest, coarse_logps(logits, likeliest))), strict=True
        )
        found |= {i: Remembered(texts[i], ids, logps) for i, ids, logps in each}
    return [found[i] for i in range(len(texts))]


def coarse_logps(logits: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens `likeliest` and of all others together, shape (tokens, LIKELIEST + 1)."""
    kept = logits.log_softmax(-1).gather(-1, likeliest)
    others = torch.log1p(-kept.logsumexp(-1, keepdim=True).exp().clamp(max=1 - 1e-6))
    return torch.cat([kept, others], dim=-1)


def forgotten(model: torch.nn.Module, head: torch.nn.Module, texts: Sequence[Remembered]) -> torch.Tensor:
    """KL divergence of the model's view of the texts from the remembered one, in nats a token, the mean over texts.

    It is that of distributions over the likeliest tokens and the rest, so at most that over the vocabulary. Each text
    counts alike: in a mean over all tokens an answer that is a number would be lost among those that are essays.
    """
    batch = tensors([(prompt, [reply]) for (prompt, reply), _, _ in texts], texts[0].logps.device)
    then, likeliest = torch.cat([one.logps for one in texts]), torch.cat([one.likeliest for one in texts])
    now = coarse_logps(reply_logits(model, head, batch), likeliest)
    each = torch.split((then.exp() * (then - now)).sum(-1), [len(one.likeliest) for one in texts])
    return torch.stack([tokens.mean() for tokens in each]).mean()


def divergence(of: Sequence[torch.Tensor], against: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence of two lists of `reply_distributions`, in nats a token: sum p (log p - log q), averaged over
    all tokens."""
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(of, against, strict=True)]
    return float(torch.cat(each).mean()) if each else 0.0
