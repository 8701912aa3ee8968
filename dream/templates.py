"""Scenario templates: one file, `prompts/scenarios/NAME.j2`, makes both sides of a situation by construction.

A template is YAML front matter and named Jinja blocks. The flaw is in the rendered directions, so that a small model
need not invent one. Here files are read; what a template is stands in `dream.template`, what is checked of its head and
its blocks in `dream.template_head` and `dream.template_checks`, and what it draws in `dream.scenarios`.
docs/TEMPLATES.md is the page for template writers.
"""

import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2 import nodes

from dream import template_checks
from dream.errors import ConfigError, TemplateError
from dream.paths import data_folder
from dream.sandbox import ENVIRONMENT
from dream.template import Template, mentioned
from dream.template_head import read_head, syntax_problem

__all__ = ["Template", "examine", "find", "load", "load_all", "mentioned", "selected"]

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


def examine(path: Path) -> tuple[Template | None, list[str]]:
    """Reads one template file and looks for every problem in it; there is no template where there is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"{path}: cannot be read: {error}"]
    matched = _FRONT_MATTER.match(text)
    if not matched:
        return None, [f"{path}:1: no front matter; begin the file with a YAML head between two `---` lines"]
    front, lines, problems = read_head(path, matched[1])
    # Blank lines in place of the head keep Jinja's line numbers those of the file.
    body = "\n" * matched[0].count("\n") + text[matched.end() :]
    try:
        tree = ENVIRONMENT.parse(body)
        compiled = ENVIRONMENT.from_string(body)
    except jinja2.TemplateSyntaxError as error:
        return None, [*problems, f"{path}:{error.lineno}: {syntax_problem(error)}"]
    if front is None or problems:
        return None, problems
    lines.of.update({("block", block.name): block.lineno for block in tree.find_all(nodes.Block)})
    template = Template(path, hashlib.sha256(text.encode()).hexdigest()[:16], front, compiled, lines)
    problems = template_checks.problems(template, tree)
    return None if problems else template, problems


def load(path: Path) -> Template:
    """Reads and checks one template file.

    Raises:
        TemplateError: the first problem, naming the file, the line and what to do.
    """
    template, problems = examine(path)
    if template is None:
        raise TemplateError(problems[0])
    return template


def load_all(folder: Path | None = None) -> list[Template]:
    """All templates of a folder (default: `scenarios` of the prompts in use), by name.

    Raises:
        TemplateError: the first bad one, or none at all.
    """
    folder = folder or data_folder("prompts") / "scenarios"
    templates = [load(path) for path in sorted(folder.glob("*.j2"))]
    if not templates:
        raise TemplateError(f"{folder}: no *.j2 files; add one (docs/TEMPLATES.md)")
    return templates


def selected(templates: Sequence[Template], names: Sequence[str]) -> list[Template]:
    """Those templates that a run works with: of the contrast templates that are trained on only the named ones (all,
    where none is named), and every held-out and general one.

    Raises:
        ConfigError: a name is not that of a contrast template that is trained on.
    """
    trained = [one.name for one in templates if one.front.split == "train" and not one.general]
    for name in names:
        if name not in trained:
            nearest = difflib.get_close_matches(name, trained, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(trained)}"
            raise ConfigError(f"generate.templates: no contrast template {name!r} with `split: train`; {hint}")
    return [one for one in templates if not names or one.name in names or one.name not in trained]


def find(name: str) -> Template:
    """The template of a name, or of a file.

    Raises:
        TemplateError: there is none; the message gives the nearest name.
    """
    folder = data_folder("prompts") / "scenarios"
    path = Path(name) if name.endswith(".j2") else folder / f"{name}.j2"
    if not path.is_file():
        known = sorted(other.stem for other in folder.glob("*.j2"))
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
        raise TemplateError(f"{folder}: no template {name!r}; {hint}")
    return load(path)
