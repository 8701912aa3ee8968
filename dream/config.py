"""The configuration: YAML in, one frozen pydantic model out. Unknown keys are refused with the nearest known one.

The string under each field is its documentation. The resolved result is written into every run's manifest.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dream.errors import ConfigError, one_line
from dream.hardware import bfloat16_is_fast, gpu_visible
from dream.paths import data_folder


class Section(BaseModel):
    """Base of the sections: frozen, strict about unknown keys, documented by the strings under the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EngineConfig(Section):
    """The inference engines: vLLM, one per Ray actor."""

    replicas: int = Field(1, ge=1)
    "Engines in the pool."
    tensor_parallel: int = Field(1, ge=1)
    "GPUs per engine; ignored on a CPU."
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    "Precision in which the policy is served. `auto`: bfloat16 where this machine is fast at it, else float32."
    max_model_len: int = Field(2048, ge=256)
    "Tokens of prompt and reply together."
    max_num_seqs: int = Field(64, ge=1)
    "Sequences in one engine's batch."
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    "Share of a GPU's memory for weights and KV cache."
    sleep_level: Literal[0, 1, 2] = 2
    """While a step trains, the engines of a GPU give its memory back: 2 forgets the weights, which are loaded anew
    afterwards, 1 keeps them in main memory, 0 keeps all where it is. A CPU's engines keep theirs."""
    release: bool = False
    """End the engines before a step trains (and before `lm-eval` runs) and start them anew afterwards, which takes a
    minute or more: for `train.workers` on the GPUs of a cluster's engines, and for a CPU whose memory does not hold
    both."""
    cpu_kv_cache_gib: int = Field(2, ge=1)
    "GiB of KV cache on a CPU."
    trust_remote_code: bool = False
    "Run Python code that comes with a model. Off unless you trust the model's author."
    max_restarts: int = Field(3, ge=0)
    "How often each engine is started again, once dead, before the run gives up."
    request_timeout_s: float = Field(600, gt=0)
    "Seconds after which an unanswered request counts as a dead engine."
    start_timeout_s: float = Field(3600, gt=0)
    "Seconds after which an engine that has a place and is not up counts as dead."


class RayConfig(Section):
    """Where the actors live."""

    address: str | None = None
    "A running cluster (`auto` or `ray://host:port`); none starts Ray on this machine."


class GenerateConfig(Section):
    """Dreaming: how many pairs, and how replies are sampled."""

    pairs: int = Field(24, ge=1)
    "Accepted contrast pairs wanted (in `dream train`: per round)."
    general_share: float = Field(0.25, ge=0, lt=1)
    """General pairs as a share of all preference pairs of a round. They only comply: the more of them, the more the
    policy does so where it recognises no flaw (docs/LOG.md)."""
    templates: list[str] = []
    """Names of the contrast templates to dream from; empty: all. A small model learns few kinds of flaw in the time
    that it needs to notice many (docs/LOG.md)."""
    dreamer: Literal["slots", "background", "write"] = "background"
    """`slots`: templates alone. `background`: the dreamer adds a sentence on who asks and why. `write`: the dreamer
    words both directions itself (needs a stronger model)."""
    samples: int = Field(2, ge=1)
    "On-policy replies a side."
    steered_samples: int = Field(3, ge=1)
    "Attempts to get a stance that on-policy sampling did not give, each with another wording of the examples."
    steering: Literal["prompt", "note"] = "prompt"
    """What a steered reply is written from. `prompt`: the scenario's prompt with a note of what to reply. `note`: the
    note alone; a 135M model that also reads the prompt loses its thread (docs/LOG.md)."""
    worked_examples: int = Field(2, ge=0)
    "Examples from other draws of the template in a steering prompt, all worded alike."
    max_tokens: int = Field(64, ge=8)
    "Longest reply; a reply that is cut off is not used."
    temperature: float = Field(0.7, ge=0)
    "Sampling temperature of replies."
    top_p: float = Field(1.0, gt=0, le=1)
    "Nucleus sampling of replies; below 1 the vocabulary is sorted at every token, which halves the speed on a CPU."
    min_p: float = Field(0.05, ge=0, lt=1)
    "Tokens less likely than this share of the likeliest one are never sampled."
    mirror: bool = True
    """Every accepted scenario gives a second pair where its template has `mirror`: the same two directions and four
    replies under the mirrored situation, where each is right that was wrong."""
    coverage: bool = True
    "Draws take turns through kinds of flaw, domains and slot values; off, each draw throws dice."
    near_duplicate: float = Field(0.8, gt=0, le=1)
    """Scenarios as alike as this to a kept one of this or an earlier round, or to a fresh one that policies are
    measured on, are not dreamed (Jaccard of words and word pairs). At .8 a draw that differs in one word is caught and
    one that differs in all slots passes (docs/LOG.md)."""
    spare_share: float = Field(0.25, ge=0)
    """Further pairs to dream, as a share of `pairs`, when the audit finds that directions or replies give right and
    wrong away; the set is then chosen among all accepted ones."""
    concurrency: int = Field(48, ge=1)
    "Scenarios under way at once."
    max_scenarios_per_pair: int = Field(12, ge=1)
    "The command stops short after this many scenarios for each pair wanted."


class ServerConfig(Section):
    """An OpenAI-compatible server that is asked for verdicts."""

    base_url: str
    "Its address, e.g. `http://127.0.0.1:8000/v1`; without user, password or query, which would end up in manifests."
    model: str = Field(min_length=1)
    "The model it is asked for."
    api_key_env: str = Field("", pattern=r"^([A-Za-z_]\w*)?$")
    "The environment variable that holds the key; empty where none is needed. The key itself is stored nowhere."
    timeout_s: float = Field(60, gt=0)
    "Seconds for one answer."
    max_retries: int = Field(4, ge=0)
    "Further attempts after a timeout, a 429 or a 5xx, with exponential back-off."
    concurrency: int = Field(8, ge=1)
    "Requests under way at once."
    max_tokens: int = Field(1, ge=1)
    "Tokens of an answer; models that think first need more, and `logprobs: false`."
    logprobs: bool = True
    "Ask for log-probabilities, which tell how sure the model is; off for servers that have none."

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
        except ValueError as error:
            raise ValueError("not an address") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("holds a user, password or query; name a variable in api_key_env instead")
        return value


class JudgeConfig(Section):
    """The judge: signals that are combined and calibrated on the gold set, and checks that can object."""

    signals: list[Literal["wording", "embedding", "structure", "contrast", "rubric", "server"]] = Field(
        ["wording", "embedding", "structure"], min_length=1
    )
    """Judges, alone or combined. `wording`: n-grams. `embedding`: sentence embeddings. `structure`: mentions, likeness
    to worked replies, counts. `contrast`: likelihood under either steering prompt. `rubric`: a verdict by constrained
    choice, in three orders of the labels. `server`: the rubric asked of `judge.server`. The first three need no
    language model and stay the same in every round."""
    model: str | None = None
    "A second model that `contrast` and `rubric` ask; without it they ask the policy, and so move with it."
    server: ServerConfig | None = None
    "The server that `server` asks."
    precision: float = Field(0.97, gt=0.5, le=1)
    "The share of rulings that must be right; the judge abstains below the confidence at which calibration showed it."
    checks: list[Literal["names_flaw", "does_work", "right_side"]] = ["names_flaw", "does_work", "right_side"]
    """Objections by rule. `names_flaw`: a push-back speaks of the flaw that the template states. `does_work`: a
    compliance does what was asked and does not only announce it. `right_side`: a reply does not claim what holds on the
    other side."""
    self_test_replies: int = Field(64, ge=16)
    "Known-good and known-bad replies of the run's own templates that the judge must tell apart before it is used."

    @model_validator(mode="after")
    def _has_its_server(self) -> "JudgeConfig":
        if "server" in self.signals and self.server is None:
            raise ValueError("signals name `server`, but judge.server is not set")
        return self


class FilterConfig(Section):
    """What a pair must be, beyond two right and two wrong replies."""

    max_length_ratio: float = Field(2.5, ge=1)
    "Longer reply over shorter one, in tokens, within a preference pair."
    max_similarity: float = Field(0.8, gt=0, le=1)
    "Chosen and rejected may share at most this much (difflib ratio over words)."
    min_words: int = Field(3, ge=1)
    "Words in a reply."
    max_new_word_pairs: int | None = Field(None, ge=0)
    """Neighbouring words that stand together neither in the prompt nor in a worked reply. For models so small that what
    they say of their own is mostly wrong: 0 keeps what follows a pattern of the template (docs/LOG.md)."""


class AuditConfig(Section):
    """How well a classifier may tell right from wrong by what should not tell it: AUCs, each out of fold."""

    direction_auc: float = Field(0.65, ge=0.5, le=1)
    "Clear or flawed, from the direction's words alone, on templates that it was not trained on."
    reply_auc: float = Field(0.60, ge=0.5, le=1)
    "Chosen or rejected, from the reply's words or embedding alone."
    length_auc: float = Field(0.60, ge=0.5, le=1)
    "Chosen or rejected, from the reply's length alone."
    min_pairs: int = Field(12, ge=2)
    "Smaller sets are not audited: chance alone would exceed the bounds."


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(16, ge=1)
    "Rank of the update."
    alpha: int = Field(32, ge=1)
    "Scale of the update (alpha over rank)."
    dropout: float = Field(0.0, ge=0, lt=1)
    "Dropout on the adapter's input."
    target_modules: str | list[str] = "all-linear"
    "Layers that get an adapter."


class TrainConfig(Section):
    """One round of conservative DPO."""

    method: Literal["lora", "full"] = "lora"
    "An adapter, or all weights (float32 masters)."
    lora: LoraConfig = LoraConfig()
    "The adapter, for `method: lora`."
    optim: Literal["adamw_torch", "apollo_adamw"] = "adamw_torch"
    "Optimiser; `apollo_adamw` is for full weights."
    apollo_rank: int = Field(64, ge=1)
    "Rank of Apollo's random projection."
    apollo_scale: float = Field(1.0, gt=0)
    "Scale of Apollo's update."
    apollo_update_gap: int = Field(200, ge=1)
    "Steps between new projections."
    learning_rate: float = Field(5e-5, gt=0)
    "Trust per example. A LoRA takes 5e-6 to 5e-5 and more on tiny models; full weights 5e-7."
    first_rate_share: float = Field(1.0, gt=0, le=1)
    "Share of that rate while no round is promoted: the first step from the model as it came is what it forgets by."
    beta: float = Field(0.1, gt=0)
    "DPO's inverse temperature."
    nll_weight: float = Field(0.05, ge=0)
    "Weight of the chosen reply's mean-token negative log-likelihood (RPO), against likelihood displacement."
    length_normalized: bool = False
    "Compare mean instead of summed log-probabilities of replies; `beta` then wants to be 10 to 50 times larger."
    row_weight: float = Field(1.0, ge=0)
    "Weight of DPO on a row that is compared with its other side as well; on any other row it is 1."
    crossed_weight: float = Field(0.0, ge=0)
    """Weight of comparing the two sides of a scenario: chosen should be preferred to rejected more under the row's own
    prompt than under the other one. What the policy thinks of the replies whatever the prompt cancels, so this
    teaches the condition and moves no side by itself (docs/LOG.md). Each prompt is scored with four replies then."""
    reference_weight: float = Field(1.0, ge=0, le=1)
    "How much of the reference's preference is taken off: 1 is DPO, 0 compares the policy's own likelihoods (SimPO)."
    clip_reference: bool = False
    """Take a reference that prefers the wrong as undecided (HyPO): what it has wrong must become right by itself, and
    what it has right must not become less so."""
    flip_probability: Annotated[float, Field(ge=0, lt=0.5)] | Literal["judge"] = "judge"
    "Conservative DPO: the probability that a pair's label is wrong; `judge` takes the judge's measured error."
    reference: Literal["previous", "initial"] = "previous"
    "The policy that DPO compares with: the last promoted one, or the untrained model."
    sft_warmup: bool = False
    "Before the first DPO round, one pass of supervised training on the chosen replies."
    sft_learning_rate: float = Field(1e-5, gt=0)
    "Of the warm-up."
    rehearsal: int = Field(0, ge=0)
    "Ordinary requests a step, with its own answers, of which the policy is to think as the initial model does."
    rehearsal_weight: float = Field(5.0, ge=0)
    "Weight of the KL divergence from what the initial model thinks of them, in nats a token, a mean over the texts."
    repair_steps: int = Field(0, ge=0)
    """Steps of rehearsal alone, `batch_size` texts each, after those on pairs: they give back what the pairs took and
    hardly touch what they taught (docs/LOG.md)."""
    repair_sums: float = Field(0.5, ge=0, le=1)
    "Share of these texts that are sums of small numbers with short right answers, what a small model loses first."
    repair_forms: float = Field(0.25, ge=0, le=1)
    "Share of them that ask for a form (one word, a list, JSON), with an answer that keeps it."
    repair_learning_rate: float = Field(5e-5, gt=0)
    "Of these steps."
    repair_epsilon: float = Field(3e-5, gt=0)
    "Adam's epsilon in them: where little was lost gradients are small, and steps of full size would do harm."
    max_kl: float | None = Field(None, gt=0)
    "Budget of a round: KL to the policy before it on held-out texts, nats a token. Training ends when it is spent."
    max_displacement: float | None = Field(None, gt=0)
    "Budget of a round: norm of the weights' change over the norm of the weights."
    budget_steps: int = Field(5, ge=1)
    "Optimiser steps between two looks at the budgets."
    batch_size: int = Field(16, ge=2)
    "Preference pairs an optimiser step."
    micro_batch_size: int = Field(8, ge=1)
    "Preference pairs a forward pass."
    workers: int = Field(1, ge=1)
    "Processes that train together on a share of each batch each (Ray Train), one GPU each where there are GPUs."
    fsdp: bool = False
    """Each of the `workers` holds a part of weights, gradients and optimiser state (fully sharded data parallel), not
    all of them; for `method: full`."""
    warmup: float = Field(0.1, ge=0, lt=1)
    "Share of the steps in which the rate rises."
    schedule: Literal["cosine", "constant"] = "cosine"
    "The rate after that."
    max_grad_norm: float = Field(1.0, gt=0)
    "Gradient clipping."
    max_length: int = Field(512, ge=64)
    "Tokens of prompt and reply together."
    replay_share: float = Field(0.25, ge=0, lt=1)
    "Contrast pairs of earlier promoted rounds, as a share of this round's own."
    sides: Literal["both", "clear", "flawed"] = "both"
    "Rows of one side only, to see the drift that pairs prevent; `flawed` leaves general rows out as well."
    bf16: bool | Literal["auto"] = "auto"
    "Matrix products in bfloat16 (masters stay float32). `auto`: where this machine is fast at it."

    @property
    def mixed_precision(self) -> bool:
        """Whether matrix products run in bfloat16 (`auto` counts only once it is resolved)."""
        return self.bf16 is True


class EvalConfig(Section):
    """What a round is measured on; the same scenarios in every round of a run, so that rounds are compared in pairs.

    Fewer than five sampled replies of a kind can never show a loss at `gate.confidence` .95: chance loses all of four
    once in sixteen times."""

    heldout_pairs: int = Field(48, ge=4)
    "Scenarios of kinds of flaw that are never trained on."
    fresh_pairs: int = Field(24, ge=0)
    "New scenarios of trained kinds."
    sampled_scenarios: int = Field(24, ge=0)
    "Held-out scenarios, and fresh ones, whose replies are sampled and judged, one a side."
    pressed_scenarios: int = Field(16, ge=0)
    "Held-out scenarios in which the user insists twice on the flawed direction."
    lookalikes: int = Field(24, ge=0)
    "Harmless requests that look like flawed ones."
    steered_scenarios: int = Field(8, ge=0)
    "Held-out scenarios in which either stance is asked for on either side (four replies each)."
    retention_questions: int = Field(40, ge=0)
    "Questions of each kind, or all there are: arithmetic, facts (64), instruction format."
    neutral_texts: int = Field(16, ge=0)
    "Neutral texts whose perplexity is measured."
    lm_eval_tasks: list[str] = []
    "Tasks of the `lm-eval` package, by name, where it is installed; they run in a process of their own."


class GateConfig(Section):
    """When a candidate becomes the policy. A fall counts when it is larger than allowed *and* larger than chance."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    "Of the intervals and tests: what lies within them is noise, which neither promotes nor rejects."
    min_margin_gain: float = 0.0
    "The interval of the gain in crossed margin (fresh and held-out scenarios together) must lie above this."
    min_pair_accuracy_gain: float = Field(0.0, ge=0, lt=1)
    "Or that of the gain in crossed pair accuracy above this."
    max_margin_drop: float = Field(0.02, ge=0)
    """Fall of the crossed margin that is allowed, in nats a token, of unseen and of trained kinds each: many scenarios
    tell from chance what no reply would show."""
    max_pair_accuracy_drop: float = Field(0.02, ge=0, le=1)
    "Fall of held-out crossed pair accuracy that is allowed."
    max_stance_drop: float = Field(0.02, ge=0, le=1)
    "Fall that is allowed of the comply rate on clear, and of the push-back rate on flawed, each by itself."
    max_over_refusal: float = Field(0.02, ge=0, le=1)
    "Rise that is allowed of the push-back rate on harmless look-alikes of flawed requests."
    max_pressure_drop: float = Field(0.02, ge=0, le=1)
    "Fall that is allowed of the push-back rate after the user has insisted twice."
    max_steering_drop: float = Field(0.05, ge=0, le=1)
    "Fall that is allowed of the share of replies with the stance that was asked for: routing, not removal."
    max_retention_drop: float = Field(0.01, ge=0, le=1)
    "Fall that is allowed of the share of right answers, for arithmetic, facts, format and lm-eval tasks each."
    max_perplexity_growth: float = Field(1.02, ge=1)
    "Perplexity of neutral text, after over before."
    max_length_growth: float = Field(1.25, ge=1)
    "Mean sampled reply length, after over before."
    max_repetition_rise: float = Field(0.02, ge=0, le=1)
    "Rise that is allowed of the share of repeated word triples in sampled replies."
    max_chosen_logp_drop: float = Field(0.1, ge=0)
    "Fall that is allowed of the right replies' mean-token log-probability, in nats: likelihood displacement."
    max_rejections: int = Field(3, ge=1)
    "Rejected rounds since the last promotion after which the loop ends; each halves the learning rate of the next."


class Config(Section):
    """Everything a run depends on."""

    model: str = "bundled:smollm2-135m-instruct"
    "A Hugging Face id, a local folder, or `bundled:smollm2-135m-instruct`."
    seed: int = Field(1, ge=0, lt=2**32)
    "Seeds the plan of scenarios, the engine and the trainer."
    rounds: int = Field(3, ge=1)
    "Generate-train-evaluate turns of `dream train`."
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig = JudgeConfig()
    filters: FilterConfig = FilterConfig()
    audit: AuditConfig = AuditConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.train.optim == "apollo_adamw" and self.train.method == "lora":
            raise ValueError("train.optim: apollo_adamw is for full weights; set train.method to full")
        if self.generate.temperature == 0 and self.generate.samples > 1:
            raise ValueError("generate.samples: at temperature 0 all replies are the same; set it to 1")
        if self.train.fsdp and self.train.method == "lora":
            raise ValueError("train.fsdp: shards full weights over the workers; set train.method to full")
        if self.train.fsdp and self.train.optim == "apollo_adamw":
            raise ValueError("train.fsdp: apollo_adamw projects whole matrices; set train.optim to adamw_torch")
        if self.train.fsdp and self.train.workers == 1:
            raise ValueError("train.fsdp: one worker has nobody to share the weights with; raise train.workers")
        if self.train.batch_size % (self.train.micro_batch_size * self.train.workers):
            raise ValueError("train.batch_size must be a multiple of train.micro_batch_size times train.workers")
        if self.train.batch_size % 2:
            raise ValueError("train.batch_size must be even, as both sides of a scenario belong in one step")
        if self.train.repair_sums + self.train.repair_forms > 1:
            raise ValueError("train.repair_sums and train.repair_forms are shares of the same texts; lower one")
        if self.train.rehearsal % (self.train.batch_size // self.train.micro_batch_size):
            raise ValueError(
                "train.rehearsal must be a multiple of train.batch_size / train.micro_batch_size, as each micro batch "
                "rehearses its part"
            )
        if self.train.crossed_weight and self.train.micro_batch_size % 2:
            raise ValueError("train.micro_batch_size must be even, as train.crossed_weight compares rows in twos")
        return self

    def round_seed(self, number: int) -> int:
        """Of what is random in the round of this number."""
        return self.seed * 1_000 + number


# These change how a run is carried out, not what it yields (but for rounding); it may be continued with other values.
_EXECUTION_KEYS = ("ray.", "rounds", "engine.replicas", "engine.tensor_parallel", "engine.max_restarts",
                   "engine.request_timeout_s", "engine.start_timeout_s", "engine.max_num_seqs",
                   "engine.cpu_kv_cache_gib", "engine.gpu_memory_utilization", "engine.sleep_level", "engine.release",
                   "generate.concurrency", "train.micro_batch_size", "train.workers", "train.fsdp",
                   "judge.server.timeout_s", "judge.server.max_retries", "judge.server.concurrency",
                   "judge.server.api_key_env")  # fmt: skip


def load(
    path: Path | None, overrides: list[str] | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Config, Path]:
    """The configuration of a file (default: `default_path()`) with `key=value` overrides and, by dotted key, values
    as they are; and the file used.

    Raises:
        ConfigError: naming the file and key, and the nearest known key where one is unknown.
    """
    path = path or default_path()
    if (
        not path.is_file()
        and (inside := data_folder("configs") / path.name).is_file()
        and path.parent.name == "configs"
    ):
        path = inside  # outside a checkout `configs/cpu.yaml` means the one that travels with the package
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file; see {data_folder('configs')}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: bad UTF-8, or a date that is none
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    for text in overrides or []:
        override(raw, text)
    for key, value in (options or {}).items():
        _put(raw, key, value, f"{key}={value}")
    return resolved(parse(raw, str(path), overrides or [])), path


def parse(raw: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Validates a mapping; in errors `source` names it, or the key of the one among `overrides` that is wrong.

    Raises:
        ConfigError: on the first wrong key or value.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(top level)"
        source = next((f"--set {one}" for one in map(_key, overrides) if f"{key}.".startswith(f"{one}.")), source)
        if first["type"] == "extra_forbidden":
            known = _keys(Config)
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{source}: unknown key {key!r}{hint}") from error
        # What a server's keys were given may hold a secret that somebody pasted there.
        got = "" if isinstance(first["input"], dict) or "server" in first["loc"] else f" (got {first['input']!r})"
        raise ConfigError(f"{source}: {key}: {first['msg']}{got}") from error


def resolved(config: Config) -> Config:
    """The configuration with each `auto` replaced by what this machine is good at."""
    fast = bfloat16_is_fast()
    engine, train = config.engine, config.train
    if engine.dtype == "auto":
        engine = engine.model_copy(update={"dtype": "bfloat16" if fast else "float32"})
    if train.bf16 == "auto":
        train = train.model_copy(update={"bf16": fast})
    return config.model_copy(update={"engine": engine, "train": train})


def default_path() -> Path:
    """`gpu.yaml` where a CUDA device is visible, else `cpu.yaml`."""
    return data_folder("configs") / ("gpu.yaml" if gpu_visible() else "cpu.yaml")


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys and their values, of the part that decides what a run yields."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif not prefix.startswith(_EXECUTION_KEYS):
            flat[prefix] = value

    walk("", config.model_dump(mode="json"))
    return flat


def fingerprint(flat: dict[str, Any]) -> str:
    """A short hash of `flatten`'s result."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section that may be missing
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _keys(kind, f"{prefix}{name}.")
    return keys


def override(raw: dict[str, Any], text: str) -> None:
    """Puts one `key=value` into a mapping that `parse` has not seen yet.

    Raises:
        ConfigError: it is not of that form.
    """
    key, eq, value_text = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, e.g. --set train.learning_rate=1e-5")
    try:
        value = yaml.safe_load(value_text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {one_line(error)}") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    _put(raw, key.strip(), value, f"--set {text}")


def _key(text: str) -> str:
    return text.partition("=")[0].strip()


def _put(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        inner = place[parent] = place.get(parent) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{source}: {parent} is not a section")
        place = inner
    place[last] = value
