"""What an engine and a training step will take of a device's memory: arithmetic, before anything starts.

The formulas are those of a Llama-like decoder (arXiv 2302.13971: grouped-query attention, gated MLP, RMS norms, no
biases) and of what `train.step` and `dream.vllm_engine` really allocate. On a CPU they were compared with measured
peaks (docs/SCALE.md). All sizes are bytes; nothing here imports torch or looks at the machine.

Not covered: mixtures of experts and recurrent layers (refused), quantised weights, vision towers, a second engine for
`judge.model`; biases and further norms of other families, which weigh less than one part in a thousand.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dream.config import Config, TrainConfig
from dream.errors import ConfigError

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes a value."""
COMBINATIONS = (("lora", "adamw_torch"), ("full", "adamw_torch"), ("full", "apollo_adamw"))
"""`train.method` and `train.optim` that a configuration may name together."""
PROCESS = GIB
"""Libraries and what they keep: of a Python process with torch on a CPU, of a CUDA context with its graphs on a GPU."""
HEAP = 0.6
"""What malloc holds beside the activations, as a share of them, on a CPU: blocks that come and go lie between what is
kept, so that their room is not one piece (measured, docs/LOG.md, "malloc's holes")."""
BATCHED_TOKENS = 2048
"""Tokens that vLLM computes in one step, its `max_num_batched_tokens` when nothing else is asked for."""
DRIFT_TOKENS = 320
"""Reply tokens of `rounds.heldout_texts`, on which `train.drift` keeps two distributions, in main memory."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, from the config.json of its Hugging Face folder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether the embedding and the vocabulary projection are one matrix."""
    stored: int = 2
    """Bytes a value in its files."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding(self) -> int:
        """Values of the embedding, the largest tensor."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All values: embedding, layers of seven matrices and two norms, last norm, and projection unless tied."""
        layer = sum(rows * columns for rows, columns in self.linears.values()) + 2 * self.hidden
        return self.embedding * (1 if self.tied else 2) + self.layers * layer + self.hidden


def shape_of(config: Mapping[str, Any], source: str) -> ModelShape:
    """The sizes in the content of a config.json; `source` names it in errors. Keys that transformers leaves out where
    they have their usual value may be missing, `tie_word_embeddings` where it is true. Of a model that also sees images
    the text part counts.

    Raises:
        ConfigError: a size is missing, or the model is none that the formulas hold for.
    """
    text = config.get("text_config") or config
    if odd := [key for key in text if re.search("experts|mamba|ssm|linear_num", key) and text[key]]:
        raise ConfigError(f"{source}: {odd[0]} means layers that are not attention and one MLP; no plan for those")

    def size(key: str, default: int | None = None) -> int:
        value = text.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{source}: has no {key}, without which the model's size is not known")
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{source}: {key} must be a positive whole number, and is {value!r}")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    return ModelShape(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
        stored=WIDTH.get(str(dtype), 4),
    )


def read_shape(path: Path) -> ModelShape:
    """`shape_of` a config.json.

    Raises:
        ConfigError: it cannot be read, or see `shape_of`.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return shape_of(config, str(path))


class Device(NamedTuple):
    """What models are put on: the machine itself, or `devices` GPUs of `memory` bytes each."""

    memory: int
    devices: int = 1
    gpu: bool = False

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.memory * self.devices


class Batch(NamedTuple):
    """A micro batch as `train.data.lay_out` makes it: rows, positions a row with padding, reply tokens in all."""

    rows: int
    width: int
    replies: int


def largest_batch(config: Config) -> Batch:
    """The largest micro batch that the configuration lets in: prompts once, all replies as long as they may be."""
    train = config.train
    reply, replies = min(config.generate.max_tokens, train.max_length // 2), 4 if train.crossed_weight else 2
    width = train.max_length + (replies - 1) * reply
    return Batch(train.micro_batch_size, width, replies * reply * train.micro_batch_size)


class EnginePlan(NamedTuple):
    """One GPU of an engine, or one engine on a CPU."""

    weights: int
    workspace: int
    kv_cache: int
    """What is left for the cache; negative where the weights alone are too large."""
    kv_token: int
    sequence: int
    """KV cache of one sequence of `engine.max_model_len`, without which vLLM does not start."""
    reserved: int
    """Of all engines together."""
    resting: int
    """Of all engines together while a step trains: on a GPU what sleep leaves, a process each; released, nothing."""


def engine_plan(shape: ModelShape, config: Config, device: Device) -> EnginePlan:
    """What the engines take. On a GPU vLLM takes `gpu_memory_utilization` of it, whatever the model, and makes KV cache
    of what the weights and its work leave.

    KV cache: a key and a value per layer, KV head and token (vLLM, arXiv 2309.06180). Workspace: one step's
    activations, and three float32 copies of logits, of all sequences sampled or of one sequence scored.
    """
    engine = config.engine
    width = WIDTH[engine.dtype]
    split = engine.tensor_parallel if device.gpu else 1
    weights = shape.parameters * width // split
    kv_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * width // split
    scored = min(BATCHED_TOKENS, engine.max_model_len)
    step = BATCHED_TOKENS * (3 * shape.intermediate // split + 6 * shape.hidden) * width
    workspace = PROCESS + step + max(engine.max_num_seqs, scored) * shape.vocab * 12
    if device.gpu:
        share = int(engine.gpu_memory_utilization * device.memory)
        cache, reserved = share - weights - workspace, share * split * engine.replicas
        resting = PROCESS * split * engine.replicas if engine.sleep_level else reserved
    else:
        cache = engine.cpu_kv_cache_gib * GIB
        resting = reserved = (weights + workspace + cache) * engine.replicas
    if engine.release:
        resting = 0
    return EnginePlan(weights, workspace, cache, kv_token, kv_token * engine.max_model_len, reserved, resting)


class TrainerPlan(NamedTuple):
    """One training step, all devices and workers. What is not held all the time has a moment in which it is largest."""

    method: str
    optim: str
    process: int
    weights: int
    """The model: float32 masters (`full`), bfloat16 or float32 under an adapter; once with `train.fsdp`, else for each
    worker."""
    adapter: int
    gradients: int
    moments: int
    activations: int
    """With `train.fsdp` also what each worker gathers of the others' weights."""
    logits: int
    updating: int
    """Temporaries of the optimiser."""
    beside: int
    """LoRA, before training: norms of the weights in float64. `train.fsdp` on a CPU, before and after: whole weights,
    which are in main memory."""
    merged: int
    """After training (LoRA), in the policy's place: the merged weights to be served."""
    accumulates: bool
    """Whether gradients of earlier micro batches are there while the next one is computed."""

    @property
    def peak(self) -> int:
        """The most that is held at once: in the backward pass, the optimiser's update, before or after training."""
        backward = self.activations + self.logits + (self.gradients if self.accumulates else 0)
        trained = self.adapter + self.moments + max(backward, self.gradients + self.updating)
        return self.process + max(self.weights + max(trained, self.adapter + self.beside), self.merged)


def trainer_plan(shape: ModelShape, train: TrainConfig, served: str, device: Device, batch: Batch) -> TrainerPlan:
    """What a training step (`train.step`) with micro batches like `batch` takes; `served` is `engine.dtype`.

    AdamW keeps two float32 moments a trained value (arXiv 1711.05101), Apollo two of rank x the longer side a matrix
    and its projection of rank x the shorter side (arXiv 2412.05270; `apollo_torch`), AdamW's for all that is no
    matrix of a linear layer. The reference is scored before training and not kept.

    Each worker holds all that one process does, and with `train.fsdp` its part of weights, gradients and moments, the
    embeddings and one layer at a time whole. It has loaded all weights, into main memory; in the end the first one
    gathers them there and loads the weights as they were.
    """
    full, mixed, rank = train.method == "full", train.mixed_precision, train.lora.rank
    wanted = train.lora.target_modules  # a pattern counts as all linear layers
    adapted = [sum(sides) for name, sides in shape.linears.items() if isinstance(wanted, str) or name in wanted]
    trained = shape.parameters if full else shape.layers * rank * sum(adapted)
    largest = shape.embedding if full else rank * max(adapted, default=0)
    apollo = train.optim == "apollo_adamw"
    updating = (12 if apollo else 8) * largest
    if device.gpu and not apollo:
        updating = max(updating, 4 * trained)  # there torch's AdamW makes one temporary for all tensors at once
    logits = 12 * batch.replies * shape.vocab  # log-probabilities, their gradient, and that of the logits; float32
    if full:  # the projection's gradient is there before most other gradients
        logits = max(logits, logits // 3 + 4 * shape.embedding)
    merged = shape.parameters * max(shape.stored, WIDTH[served])
    workers, sharded = train.workers, train.fsdp and full and not apollo
    copies = 1 if sharded else workers
    weights = shape.parameters * (2 if mixed and not full else 4) * copies
    kept = activations(shape, train, device, batch)
    if not device.gpu:
        kept += int(HEAP * kept) + 8 * DRIFT_TOKENS * shape.vocab
    beside = 0 if full else 16 * shape.embedding * workers
    if sharded:
        layer = sum(rows * columns for rows, columns in shape.linears.values())
        kept += 8 * (shape.embedding * (1 if shape.tied else 2) + layer)  # and their gradients
        beside = 0 if device.gpu else 4 * shape.parameters * max(2, workers - 1)
    return TrainerPlan(
        method=train.method,
        optim=train.optim,
        process=PROCESS * workers,
        weights=weights,
        adapter=0 if full else 4 * trained * copies,
        gradients=4 * trained * copies,
        moments=4 * (apollo_values(shape, train.apollo_rank) if apollo else 2 * trained) * copies,
        activations=kept * workers,
        logits=logits * workers,
        updating=updating * copies,
        beside=beside,
        merged=0 if full else merged,
        accumulates=train.batch_size > train.micro_batch_size * workers,
    )


def apollo_values(shape: ModelShape, rank: int) -> int:
    """Values in the state of Apollo: moments and projections of all matrices of linear layers, moments of the rest."""
    matrices = list(shape.linears.values()) * shape.layers
    if not shape.tied:
        matrices.append((shape.hidden, shape.vocab))
    low = sum(rank * (2 * max(sides) + min(sides)) for sides in matrices)
    return low + 2 * (shape.parameters - sum(rows * columns for rows, columns in matrices))


def activations(shape: ModelShape, train: TrainConfig, device: Device, batch: Batch) -> int:
    """What the forward pass leaves for the backward pass, the vocabulary projection not counted.

    Counted tensor by tensor in the manner of arXiv 2205.05198, section 4.1, for transformers' Llama with SDPA: of each
    norm its input (`full`: also the normalised value) and output, of attention q, k, v (repeated for all heads) and
    its result, of the MLP gate, SiLU, up and product. In mixed precision each matrix keeps its own bfloat16 copy of its
    input, norms are float32. On a GPU layers are checkpointed: each keeps its input, one at a time all the rest.
    """
    full, mixed = train.method == "full", train.mixed_precision
    hidden, queries, middle = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    if mixed:
        token = 26 * hidden + 8 * queries + 8 * middle if full else 18 * hidden + 10 * queries + 8 * middle
    else:
        token = 4 * ((6 if full else 4) * hidden + 4 * queries + 4 * middle)
    if not full:
        token += (2 if mixed else 4) * train.lora.rank * len(shape.linears)
    mask = (2 if mixed else 4) * batch.rows * batch.width**2  # an additive one, made anew in each layer
    layer = batch.rows * batch.width * token + mask
    copies = 2 * shape.parameters if full and mixed else 0  # autocast's, of the masters
    if not device.gpu:
        return copies + shape.layers * layer
    kept = batch.rows * batch.width * hidden * (2 if mixed and not full else 4)
    return copies + shape.layers * kept + layer


class Plan(NamedTuple):
    """The engines, and a training step of each combination; the first in `trainers` is the configured one."""

    device: Device
    engine: EnginePlan
    trainers: list[TrainerPlan]


def plan(shape: ModelShape, config: Config, device: Device, batch: Batch | None = None) -> Plan:
    """The plan of a resolved configuration; without `batch` for the largest micro batch that it lets in."""
    train = config.train
    if config.ray.address is not None:  # the other workers may be elsewhere
        train = train.model_copy(update={"workers": 1, "fsdp": False})
    configured = (train.method, train.optim)
    return Plan(
        device,
        engine_plan(shape, config, device),
        [
            trainer_plan(
                shape, train.model_copy(update={"method": method, "optim": optim}), config.engine.dtype, device,
                batch or largest_batch(config),
            )
            for method, optim in sorted(COMBINATIONS, key=lambda combination: combination != configured)
        ],
    )  # fmt: skip
