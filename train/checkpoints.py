"""Result folders that are whole or absent, and a policy's weights as they are served.

A policy is an initial model plus an adapter, or a folder of full weights. The engine gets merged weights: every tensor
is computed in float32 and rounded once to the served precision (`as_served`).
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any
from zlib import crc32

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dream.config import LoraConfig
from dream.errors import ConfigError, RunError, StorageError, TrainingError, one_line

OnChange = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Told a parameter's name and its float32 values before and after; the same tensor twice when nothing touched it."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` only when the block ends well.

    It stands beside `out` as `.NAME.PID.tmp`, a name that no other process writes to; what killed attempts left of that
    kind is thrown away. Everything is forced to the disk before the name appears, so a half-written result never
    looks complete.

    Raises:
        RunError: `out` exists already.
        StorageError: the disk is full or not writable.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    if out.exists():
        raise RunError(f"{out}: exists already; remove it, or choose another folder")
    try:
        for left in out.parent.glob(f".{out.name}.*tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.rename(out)
        _sync(out.parent)
    except OSError as error:
        raise StorageError(
            f"{out}: {error.strerror or error}; make room or fix permissions, then run it again"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Place(Enum):
    """Where a model is loaded to."""

    DEVICES = auto()
    """The GPU where there is one; spread over several where no other worker uses them."""
    PARTS = auto()
    """Every worker's part on its device, see `in_parts`."""
    MEMORY = auto()
    """Main memory, whatever GPUs there are."""


def load_model(
    source: str, dtype: torch.dtype | str, trust_remote_code: bool, place: Place = Place.DEVICES
) -> PreTrainedModel:
    """A causal language model in evaluation mode. `dtype` "auto" keeps the precision of the files.

    Raises:
        TrainingError: it is not there or cannot be read.
    """
    spread = torch.cuda.device_count() > 1 and not torch.distributed.is_initialized()  # else they are other workers'
    devices = ("auto" if spread else "cuda") if torch.cuda.is_available() else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map=devices if place is Place.DEVICES else None,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"{source}: cannot be loaded as a language model: {one_line(error)[:500]}") from error
    assert isinstance(model, PreTrainedModel)
    return in_parts(model.eval()) if place is Place.PARTS else model.eval()


def in_parts(model: PreTrainedModel) -> PreTrainedModel:
    """The model with each worker holding its part of every weight, on its device (PyTorch's FSDP2; arXiv 2304.11277).

    A call gathers the weights layer by layer, so from now on all workers must make the same calls. Nothing else is
    asked to shard: accelerate 1.15 leaves the trainer's `fsdp` unheard on a CPU, and transformers 5.19 does not train
    tied embeddings right that it sharded (`distributed_config`).
    """
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(model, reshard_after_forward=True)  # in parts between calls: those are what the optimiser must get
    model._is_distributed_loading_by_transformers = True  # the trainer is not to wrap it once more
    return model


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Values by parameter name. Of a model `in_parts` all workers must ask, and the first gets them, in main memory."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    if isinstance(model, FSDPModule):
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        parameters = get_model_state_dict(model, options=gather)  # type: ignore[arg-type]  # it is a module too
    return parameters


def load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """The tokenizer that comes with a model.

    Raises:
        TrainingError: it is not there or cannot be read.
        ConfigError: it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{source}: its tokenizer cannot be loaded: {one_line(error)[:500]}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"model: {source} has no chat template; name a chat model")
    return tokenizer


def load_adapter(model: PreTrainedModel, folder: str, trainable: bool) -> PeftModel:
    """The model with an adapter of an earlier round; the adapter's values are float32.

    Raises:
        TrainingError: it is not there, not in safetensors, or not for this model.
    """
    if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
        # PEFT would go on to a pickle, and then to the hub.
        raise TrainingError(f"{folder}: no {SAFETENSORS_WEIGHTS_NAME}; name an adapter folder that PEFT wrote")
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"{folder}: cannot be loaded as an adapter of this model: {one_line(error)[:500]}"
        ) from error


def new_adapter(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """The model with an adapter that changes nothing yet.

    Raises:
        ConfigError: `train.lora.target_modules` names no layer of this model.
    """
    wanted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, wanted)
    except ValueError as error:
        raise ConfigError(f"train.lora.target_modules: {one_line(error)[:300]}") from error


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by module name; none where the model has no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every dropout off: the policy and the reference must see the same network."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # of a function, and no module
            module.attention_dropout = 0.0
    return model


def merge_adapters(
    base: PreTrainedModel, start: str | None, end: str | None, dtype: torch.dtype, on_change: OnChange | None = None
) -> PreTrainedModel:
    """The initial model with the adapter `end` merged in, rounded to `dtype`; `base` is used up.

    `on_change` sees every parameter as it is with the adapter `start` (None: without any) and with `end`, in float32.
    """
    if end is None:
        return rounded(base, dtype)
    model = load_adapter(base, end, trainable=False)
    if start is not None:
        model.load_adapter(start, adapter_name="start")
    touched = set()
    for name, module in adapted_layers(model).items():
        layer = module.get_base_layer()
        initial = layer.weight.data.float()
        after = initial + module.get_delta_weight("default").float()
        if on_change is not None:
            before = initial if start is None else initial + module.get_delta_weight("start").float()
            on_change(parameter_name(name), before, after)
        touched.add(id(layer.weight))
        layer.weight.data = as_served(parameter_name(name), after, dtype)
    plain = model.unload()
    assert isinstance(plain, PreTrainedModel)
    if on_change is not None:
        for name, value in plain.named_parameters():
            if id(value) not in touched:
                on_change(name, value.data, value.data)
    return rounded(plain, dtype)


def replace_weights(base: PreTrainedModel, trained: Mapping[str, torch.Tensor], on_change: OnChange) -> PreTrainedModel:
    """`base` with the values of `trained` (by parameter name) in float32, for `method: full`."""
    for name, value in base.named_parameters():
        after = trained[name].detach().float().to(value.device)
        on_change(name, value.data.float(), after)
        value.data = after
    return base


def rounded(model: PreTrainedModel, dtype: torch.dtype, trained: bool = False) -> PreTrainedModel:
    """The model with its parameters in `dtype`: to the nearest, as an engine loads them, or `as_served` when `trained`.

    Buffers stay: rotary frequencies must not lose their precision.
    """
    for name, value in model.named_parameters():
        value.data = as_served(name, value.data, dtype) if trained else value.data.to(dtype)
    model.config.dtype = dtype
    return model


def as_served(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A trained float32 parameter in the served precision.

    To bfloat16 it is rounded up or down at random, in proportion to the distance, so that on average what is served is
    what was trained (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551). A conservative step moves most weights
    by less than half of bfloat16's spacing, and to the nearest they would not move at all (docs/LOG.md). The chance is
    seeded by the parameter's name: the same weights are always served alike.
    """
    if dtype != torch.bfloat16 or value.dtype != torch.float32:
        return value.to(dtype)
    chance = torch.Generator(value.device).manual_seed(crc32(name.encode()))
    low_half = torch.randint(1 << 16, value.shape, generator=chance, dtype=torch.int32, device=value.device)
    bits = value.contiguous().view(torch.int32) + low_half
    return (bits & -(1 << 16)).view(torch.float32).to(dtype)


def parameter_name(module_name: str) -> str:
    """The plain model's name of the weight of an adapted layer."""
    return module_name.removeprefix("base_model.model.") + ".weight"


def main(model: str, adapter: str, out: str, dtype: str, trust_remote_code: str) -> None:
    """Writes the model with the adapter merged in: `python -P -m train.checkpoints MODEL ADAPTER OUT DTYPE False`."""
    trust = trust_remote_code == "True"
    with whole_folder(Path(out)) as folder:
        base = load_model(model, "auto", trust)
        merge_adapters(base, None, adapter, getattr(torch, dtype)).save_pretrained(folder)
        load_tokenizer(model, trust).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
