"""dream/memory.py and what `dream doctor` says of it: counted against torch, peft and apollo on tiny models."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dream import doctor
from dream.config import Config, load, parse, resolved
from dream.errors import ConfigError
from dream.memory import (
    GIB,
    Batch,
    Device,
    ModelShape,
    activations,
    apollo_values,
    engine_plan,
    largest_batch,
    plan,
    read_shape,
    shape_of,
    trainer_plan,
)
from dream.paths import data_folder
from tests.toy import build_toy

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False,
}  # fmt: skip

shapes = st.builds(
    ModelShape,
    layers=st.integers(1, 80), hidden=st.integers(16, 8192), intermediate=st.integers(16, 30000),
    heads=st.integers(1, 64), kv_heads=st.integers(1, 8), head_dim=st.sampled_from([32, 64, 128]),
    vocab=st.integers(100, 300_000), tied=st.booleans(),
)  # fmt: skip
devices = st.builds(Device, st.integers(GIB, 200 * GIB), st.integers(1, 8), st.booleans())


def config(**sections: Any) -> Config:
    """A configuration in float32 with what is given."""
    sections["engine"] = {"dtype": "float32", **sections.get("engine", {})}
    sections["train"] = {"bf16": False, **sections.get("train", {})}
    return resolved(parse(sections, "test"))


def llama(**sizes: Any) -> Any:
    """A Llama of these sizes with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_parameters_of_the_embedded_model() -> None:
    """SmolLM2-135M has 134,515,008 values."""
    assert shape_of(SMOLLM2, "test").parameters == 134_515_008


def test_parameters_of_the_toy(tmp_path: Path) -> None:
    """The sizes that transformers writes into config.json give the values that it saves."""
    from safetensors.torch import load_file

    build_toy(tmp_path)
    counted = sum(value.numel() for value in load_file(tmp_path / "model.safetensors").values())
    assert read_shape(tmp_path / "config.json").parameters == counted


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (3, 3)]), st.sampled_from([8, 16, 40]), st.booleans())
def test_parameters_are_those_of_torch(layers: int, heads: tuple[int, int], head_dim: int, tied: bool) -> None:
    """Whatever the sizes, heads of another width than hidden / heads included, the count is exact."""
    import torch

    sizes = {
        **TINY, "hidden_size": 48, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": head_dim, "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.device("meta"):
        counted = sum(value.numel() for value in llama(**sizes).parameters())
    assert shape_of(sizes, "test").parameters == counted


def test_adapter_is_that_of_peft() -> None:
    """An adapter on all linear layers, or on some, has as many values as peft makes."""
    import peft

    for wanted in ("all-linear", ["q_proj", "down_proj"]):
        lora = peft.LoraConfig(r=5, target_modules=wanted, task_type="CAUSAL_LM")
        counted = peft.get_peft_model(llama(**TINY), lora).get_nb_trainable_parameters()[0]
        train = config(train={"lora": {"rank": 5, "target_modules": wanted}}).train
        made = trainer_plan(shape_of(TINY, "test"), train, "float32", Device(GIB), Batch(1, 8, 4))
        assert (made.adapter, made.gradients, made.moments) == (4 * counted, 4 * counted, 8 * counted)


@pytest.mark.parametrize("tied", [True, False])
def test_state_is_that_of_apollo(tied: bool) -> None:
    """Apollo's moments and projections after a step have as many values as planned, a projection of its own counted."""
    import torch
    from apollo_torch import APOLLOAdamW

    sizes = {**TINY, "tie_word_embeddings": tied}
    model = llama(**sizes)
    embedding = model.get_input_embeddings().weight
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = [one for one in linear if one is not embedding]  # as transformers takes them for "all-linear"
    known = {id(one) for one in matrices}
    rest = [value for value in model.parameters() if id(value) not in known]
    optimizer = APOLLOAdamW(
        [{"params": rest}, {"params": matrices, "rank": 6, "proj": "random", "scale_type": "channel", "scale": 1.0,
                            "update_proj_gap": 200, "proj_type": "std"}],
        lr=1e-3,
    )  # fmt: skip
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    counted = 0
    for state in optimizer.state.values():
        counted += state["exp_avg"].numel() + state["exp_avg_sq"].numel()
        counted += state["projector"].ortho_matrix.numel() if "projector" in state else 0
    assert apollo_values(shape_of(sizes, "test"), 6) == counted


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_are_those_that_torch_keeps(method: str) -> None:
    """What autograd keeps of a micro batch, prompts shared, is within a tenth of what is planned."""
    import peft
    import torch

    from train.data import Encoded
    from train.scoring import pair_sequences, reply_logps, tensors

    model = llama(**TINY).train()
    train = config(train={"method": method, "lora": {"rank": 2}}).train
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [Encoded(list(range(1, 31)), [1, 2, 3, 4], [5, 6, 7]) for _ in range(3)]
    kept: dict[int, int] = {}
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = reply_logps(model, model.get_output_embeddings(), tensors(pair_sequences(rows, shared=True)))
    measured = sum(size for place, size in kept.items() if place not in own)
    logits = 4 * 21 * TINY["vocab_size"]
    assert loss.shape == (6,)
    planned = activations(shape_of(TINY, "test"), train, Device(GIB), Batch(3, 37, 21)) + logits
    assert planned == pytest.approx(measured, rel=0.1)


@given(shapes, devices)
def test_engine_takes_its_share(shape: ModelShape, device: Device) -> None:
    """On a GPU weights, work and cache are exactly vLLM's share of it; on a CPU the cache is the configured one."""
    asked = config(engine={"gpu_memory_utilization": 0.5, "cpu_kv_cache_gib": 3, "replicas": 2})
    made = engine_plan(shape, asked, device)
    one = made.weights + made.workspace + made.kv_cache
    assert made.reserved == 2 * one
    assert one == int(0.5 * device.memory) if device.gpu else made.kv_cache == 3 * GIB
    assert made.sequence == made.kv_token * asked.engine.max_model_len


def test_engines_of_a_gpu_rest_while_a_step_trains() -> None:
    """configs/gpu.yaml, an 8B model under an adapter, fits its card of 24 GB only because engine and trainer take
    turns there and the merged model takes the policy's place."""
    asked, _ = load(data_folder("configs") / "gpu.yaml", ["engine.dtype=bfloat16", "train.bf16=true"])
    granite = {
        "num_hidden_layers": 40, "hidden_size": 4096, "intermediate_size": 12800, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 49159, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    card = Device(24 * GIB, 1, gpu=True)
    made = plan(shape_of(granite, "test"), asked, card)
    assert all(one.good for one in doctor.memory_findings(made, asked))
    assert made.trainers[0].merged + made.trainers[0].weights > card.memory
    awake = plan(shape_of(granite, "test"), config(engine={"sleep_level": 0}), card).engine
    assert awake.resting == awake.reserved > made.engine.resting


def test_released_engines_leave_all_memory_to_the_step() -> None:
    """A CPU that holds either, not both: the advice names the key, with which it fits."""
    shape, alone = shape_of(SMOLLM2, "test"), config()
    both = plan(shape, alone, Device(24 * GIB))
    device = Device(max(both.engine.reserved, both.trainers[0].peak) + GIB // 2)
    *_, told = doctor.memory_findings(plan(shape, alone, device), alone)
    assert not told.good
    assert "set engine.release" in told.text
    released = config(engine={"release": True})
    *_, told = doctor.memory_findings(plan(shape, released, device), released)
    assert told.good
    assert "as engines are ended while a step trains" in told.text


@given(shapes, devices, st.sampled_from(["lora", "full"]), st.booleans(), st.integers(1, 8), st.integers(64, 2048))
def test_larger_batches_take_more(
    shape: ModelShape, device: Device, method: str, bf16: bool, micro: int, length: int
) -> None:
    """A longer or larger micro batch never takes less, and activations always more."""
    small, long, large = (
        plan(shape, asked, device).trainers[0]
        for asked in (
            config(train={"method": method, "bf16": bf16, "batch_size": 16 * m, "micro_batch_size": m, "max_length": n})
            for m, n in ((micro, length), (micro, 2 * length), (2 * micro, length))
        )
    )
    assert small.peak <= min(long.peak, large.peak)
    assert small.activations < min(long.activations, large.activations)


@given(shapes, devices, st.integers(2, 8))
def test_sharded_workers_take_less(shape: ModelShape, device: Device, workers: int) -> None:
    """Workers together take what one takes, each; sharded, weights, gradients and moments are there only once, beside
    the layer and the embeddings that each worker gathers. Workers of a cluster are elsewhere."""
    full = {"method": "full", "micro_batch_size": 1, "batch_size": 840}
    alone, copies, parts, cluster = (
        plan(shape, config(train={**full, **train}, ray={"address": address}), device).trainers[0]
        for train, address in (
            ({}, None),
            ({"workers": workers}, None),
            ({"workers": workers, "fsdp": True}, None),
            ({"workers": workers, "fsdp": True}, "auto"),
        )
    )
    assert copies.peak == workers * alone.peak
    assert (parts.weights, parts.gradients, parts.moments) == (alone.weights, alone.gradients, alone.moments)
    assert copies.activations < parts.activations < copies.activations + 2 * copies.weights
    assert cluster == alone


def test_sharding_lets_a_larger_model_in() -> None:
    """Two GPUs of 80 GB hold the 16 bytes a value of 8B in AdamW only in parts, and two copies of them never."""
    card, shape = Device(80 * GIB, 2, gpu=True), ModelShape(36, 4096, 12288, 32, 8, 128, 151936, tied=False)
    train = {"method": "full", "micro_batch_size": 1, "batch_size": 16, "workers": 2}
    copies, parts = (plan(shape, config(train={**train, "fsdp": on}), card).trainers[0] for on in (False, True))
    assert parts.peak < card.total < copies.peak


@given(shapes, devices)
def test_apollo_takes_less_than_adamw(shape: ModelShape, device: Device) -> None:
    """With a rank far below the sides of all matrices, Apollo's state is the smaller one; LoRA's the smallest."""
    if min(shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim) < 32:
        return
    asked = config(train={"apollo_rank": 1, "lora": {"rank": 1}})
    lora, adamw, apollo = plan(shape, asked, device).trainers
    assert (lora.method, adamw.optim, apollo.optim) == ("lora", "adamw_torch", "apollo_adamw")
    assert lora.moments < apollo.moments < adamw.moments == 8 * shape.parameters


def test_configured_combination_comes_first() -> None:
    """All three combinations are planned, the configured one first."""
    asked = config(train={"method": "full", "optim": "apollo_adamw"})
    made = plan(shape_of(SMOLLM2, "test"), asked, Device(GIB)).trainers
    assert [(one.method, one.optim) for one in made] == [
        ("full", "apollo_adamw"), ("lora", "adamw_torch"), ("full", "adamw_torch"),
    ]  # fmt: skip


@pytest.mark.parametrize(("crossed", "batch"), [(0.0, Batch(4, 140, 320)), (1.0, Batch(4, 220, 640))])
def test_largest_batch_holds_all_replies(crossed: float, batch: Batch) -> None:
    """Prompt and one reply fill `train.max_length`; the others stand behind them: one, or three where sides are
    compared."""
    train = {"max_length": 100, "micro_batch_size": 4, "crossed_weight": crossed}
    assert largest_batch(config(generate={"max_tokens": 40}, train=train)) == batch


def test_sizes_of_the_text_part_count() -> None:
    """A model that also sees images has its sizes in `text_config`; what is not said is as usual."""
    text = {key: value for key, value in SMOLLM2.items() if key not in ("tie_word_embeddings", "num_key_value_heads")}
    shape = shape_of({"model_type": "any", "text_config": text}, "test")
    assert (shape.kv_heads, shape.head_dim, shape.tied, shape.stored) == (9, 64, True, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_local_experts": 8}, "num_local_experts"),
    ],
)
def test_unknown_sizes_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """A size that is missing or no number, or layers that no formula holds for, is an error with file and key."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMOLLM2, **change}))
    with pytest.raises(ConfigError, match=named) as raised:
        read_shape(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("memory", "gpu", "bad"),
    [
        (64, False, []),
        (6, False, ["lora", "both"]),
        (2, False, ["engine", "lora", "both"]),
        (3, True, ["engine", "both"]),
        (80, True, []),
    ],
)
def test_doctor_says_what_does_not_fit(memory: int, gpu: bool, bad: list[str]) -> None:
    """Of the plan's lines those are not good that are configured and do not fit, and these say what to do."""
    asked = config(generate={"max_tokens": 40}, engine={"gpu_memory_utilization": 0.5, "max_model_len": 1024})
    made = plan(shape_of(SMOLLM2, "test"), asked, Device(memory * GIB, 1, gpu))
    findings = doctor.memory_findings(made, asked)
    assert [one.text.split()[0] for one in findings] == ["engine", "lora", "full", "full", "both"]
    wrong = [one for one in findings if not one.good]
    assert all("lower " in one.text or "name a smaller model" in one.text for one in wrong)
    assert [one.text.split()[0] for one in wrong] == bad


def test_doctor_knows_when_no_batch_is_small_enough() -> None:
    """A smaller micro batch is advised only where it can help."""
    made = plan(shape_of(SMOLLM2, "test"), config(), Device(1))
    assert "name a smaller model" in doctor.memory_findings(made, config())[1].text
    there = Device(made.trainers[0].peak - 1)
    made = plan(shape_of(SMOLLM2, "test"), config(), there)
    assert "lower train.micro_batch_size" in doctor.memory_findings(made, config())[1].text


def test_engines_of_a_cluster_are_not_added() -> None:
    """Where Ray runs elsewhere, engine and trainer are not said to share this machine, nor is the engine too large."""
    asked = config(ray={"address": "auto"})
    engine, *trainers = doctor.memory_findings(plan(shape_of(SMOLLM2, "test"), asked, Device(GIB)), asked)
    assert len(trainers) == 3
    assert engine.good
    assert "the cluster's nodes may have more" in engine.text


def test_disk_must_hold_the_weights_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full weights are kept twice where they are served in less than float32."""
    shape = shape_of(SMOLLM2, "test")
    gigabytes = shape.parameters * (4 + 2) * 100 / 1e9
    asked = config(rounds=100, engine={"dtype": "bfloat16"}, train={"method": "full"})
    for free, good in ((gigabytes * 1.1, True), (gigabytes * 0.9, False)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * 1e9))
        assert doctor._disk(asked, shape) == (
            "disk", good, f"{free:.0f} GB free here; the weights of 100 rounds take {gigabytes:.1f} GB"
        )  # fmt: skip


def test_what_the_configuration_asks_for_must_be_installed() -> None:
    """Beside what every run takes."""
    server = {"signals": ["server"], "server": {"base_url": "http://127.0.0.1:8000/v1", "model": "big"}}
    asked = config(
        judge=server, train={"method": "full", "optim": "apollo_adamw"}, eval={"lm_eval_tasks": ["arc_easy"]}
    )
    assert set(doctor.needed(asked)) - set(doctor.needed(config())) == {"openai", "apollo_torch", "lm_eval"}


def test_doctor_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a model that is not on this machine there is no plan, and the line says so."""
    monkeypatch.setenv("DREAM_MODELS", str(tmp_path))
    for model in ("no-one/no-such-model", "bundled:smollm2-135m-instruct"):
        assert f"not planned: {model} is not on this machine" in str(doctor._shape(model))


@pytest.mark.parametrize(
    ("said", "named", "device"),
    [
        ("24564\n24564\n", None, Device(24564 * 2**20, 2, True)),
        ("24564\n16384\n", "0", Device(24564 * 2**20, 1, True)),
        ("[N/A]\n", None, None),
        (None, None, None),
    ],
)
def test_gpus_are_asked_for_their_memory(
    monkeypatch: pytest.MonkeyPatch, said: str | None, named: str | None, device: Device | None
) -> None:
    """nvidia-smi says how many GPUs of which size there are; without it, or where it cannot say, nothing is known."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if said is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(doctor, "gpu_visible", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert doctor.seen_device() == device
