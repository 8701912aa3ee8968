"""dream/prompts.py: prompt files as users may leave them."""

from pathlib import Path

import pytest

from dream import prompts
from dream.errors import TemplateError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prompts folder of one's own, which wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    return tmp_path / "prompts"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no lines; write one a line"),
        (b"first | second\nonly one\n", "'only one': expected two texts with | between them"),
        (b"first |\n", "expected two texts"),
        (b"caf\xe9 | tea\n", "save it as UTF-8"),
    ],
)
def test_broken_lists_are_named(folder: Path, content: bytes, said: str) -> None:
    """An edited list that cannot be used is refused with its name."""
    (folder / "quarrels.j2").write_bytes(content)
    with pytest.raises(TemplateError) as caught:
        prompts.halves("quarrels")
    assert str(caught.value).startswith(f"{folder / 'quarrels.j2'}: ")
    assert said in str(caught.value)


def test_hashes_tell_what_was_edited(folder: Path) -> None:
    """Every file but the scenarios, by its place, and nothing but what it holds."""
    for name in ("pressure.j2", "gold/replies.jsonl", "scenarios/one.j2", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a | b")
    before = prompts.hashes()
    assert list(before) == ["gold/replies.jsonl", "pressure.j2"]
    (folder / "pressure.j2").write_text("a | c")
    after = prompts.hashes()
    assert after["gold/replies.jsonl"] == before["gold/replies.jsonl"]
    assert after["pressure.j2"] != before["pressure.j2"]
