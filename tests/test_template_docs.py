"""docs/TEMPLATES.md: every snippet is run, and does what the page says.

A `yaml` or `jinja` snippet changes the template that `dream templates new` writes, which must then load, unless the
fence after it quotes its `error` or `advice`. In a `console` snippet lines with `$` are run, and the others must be in
what they print, but for numbers and `...`.
"""

import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from dream import models
from dream.cli import app
from dream.engine import Engine
from dream.template_audit import advice
from dream.template_new import new
from dream.templates import examine

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "TEMPLATES.md").read_text(encoding="utf-8")
TEMPLATES = ("backup-copy", "branch-delete", "call-time", "general-thanks")
NAME = "parcel-locker"


class Snippet(NamedTuple):
    """A fenced part of the page; `kind` and `text` of the fence after it where that is a quoted answer."""

    line: int
    kind: str
    text: str
    answer: str
    said: list[str]


def snippets() -> Iterator[Snippet]:
    """All fenced parts of the page."""
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    answers = ("error", "advice")
    for place, fence in enumerate(fences):
        if place and fence[1] in answers:
            assert fences[place - 1][1] not in answers, fence[0]
            continue
        after = fences[place + 1] if place + 1 < len(fences) else None
        answer, said = (after[1], after[2].splitlines()) if after and after[1] in answers else ("", [])
        yield Snippet(PAGE.count("\n", 0, fence.start()) + 1, fence[1], fence[2], answer, said)


SNIPPETS = list(snippets())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Path:
    """A working directory with the prompts and a few of the templates; models are played by a script."""

    @asynccontextmanager
    async def scripted(*args: object) -> AsyncIterator[Engine]:
        yield engine

    pool = ModuleType("dream.pool")
    pool.vllm_pool = scripted
    monkeypatch.setitem(sys.modules, "dream.pool", pool)
    monkeypatch.setattr(models, "resolve", lambda model: model)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    skipped = [path.name for path in (ROOT / "prompts" / "scenarios").glob("*.j2") if path.stem not in TEMPLATES]
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts", ignore=lambda *_: skipped)
    return tmp_path


def with_yaml(text: str, snippet: str) -> str:
    """The template with the keys of a snippet of its head: those in `slots`, `sides` and `mentions` one by one.

    New slots are used in the situation, since a slot that nothing uses is refused.
    """
    section = ""
    slots = []
    for line in snippet.splitlines():
        key = re.match(r" *(\w+):", line)[1]
        if not line.startswith(" ") and line.endswith(":"):
            section = key
        elif line.startswith(" "):
            slots += [key] if section == "slots" else []
            head, rest = text.split(f"\n{section}:", 1)
            inside, rest = re.split(r"\n(?=\S)", rest, maxsplit=1)
            inside = re.sub(rf"\n  {key}:.*", "", inside)
            text = f"{head}\n{section}:{inside}\n{line}\n{rest}"
        elif re.search(rf"^{key}:", text, re.MULTILINE):
            text = re.sub(rf"^{key}:.*", lambda _, line=line: line, text, count=1, flags=re.MULTILINE)
        else:
            text = text.replace("\nslots:", f"\n{line}\nslots:", 1)
    uses = "".join(f" {{{{ {slot} }}}}" for slot in slots)
    return text.replace("{% block situation %}\n", f"{{% block situation %}}\n{uses}\n", 1)


def with_jinja(text: str, snippet: str) -> str:
    """The template with the blocks of a snippet; one of a name that there is not comes last."""
    for block in re.finditer(r"\{% block (\w+) %\}.*?\{% endblock %\}\n", snippet, re.DOTALL):
        old = re.search(rf"\{{% block {block[1]} %\}}.*?\{{% endblock %\}}\n", text, re.DOTALL)
        text = text.replace(old[0], block[0]) if old else text + block[0]
    return text


CHANGES: dict[str, Callable[[str, str], str]] = {"yaml": with_yaml, "jinja": with_jinja}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: f"line {snippet.line}")
def test_snippet_does_what_the_page_says(snippet: Snippet) -> None:
    """A snippet is run and gives what the page quotes; one of a kind that is not known here fails."""
    if snippet.kind == "console":
        run_lines(snippet.text)
        return
    path = new(NAME)
    before = path.read_text()
    path.write_text(CHANGES[snippet.kind](before, snippet.text))
    template, problems = examine(path)
    said = {"error": problems, "advice": advice([template]) if template else []}
    assert [re.sub(rf"^{re.escape(str(path))}(:\d+)?: ", "", line) for line in said[snippet.answer or "error"]] == (
        snippet.said
    )
    assert (template is None) == (snippet.answer == "error")


def run_lines(text: str) -> None:
    """Runs the lines with `$`; what they print must hold the other lines after them, in order."""
    printed: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            printed = run_command(line[2:])
            continue
        pattern = re.sub(r"\d+", r"\\d+", re.escape(line).replace(re.escape("..."), ".*"))
        found = next((place for place, other in enumerate(printed) if re.search(f"{pattern}$", other)), None)
        assert found is not None, f"{line!r} is not in {printed}"
        printed = printed[found + 1 :]


def run_command(line: str) -> list[str]:
    """The lines that a command prints, which must succeed."""
    program, *words = line.split()
    assert program == "dream"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(dream [^`]+)`", PAGE))))
def test_command_in_the_text_works(line: str) -> None:
    """A command that is named in running text can be run as it is."""
    assert run_command(line)


def test_page_names_every_key_and_block() -> None:
    """No key and no block of a template is left out."""
    from dream.template import CONTRAST_BLOCKS, FrontMatter

    missing = [name for name in (*FrontMatter.model_fields, *CONTRAST_BLOCKS) if not re.search(rf"\b{name}\b", PAGE)]
    assert missing == []


def test_snippet_of_unknown_kind_fails() -> None:
    """Every fence of the page is found, and one that is no answer is of a kind that is run."""
    fences = len(SNIPPETS) + sum(bool(snippet.answer) for snippet in SNIPPETS)
    assert len(re.findall(r"```|~~~|^    ", PAGE, re.MULTILINE)) == 2 * fences
    assert {snippet.kind for snippet in SNIPPETS} <= {"console", *CHANGES}
