"""Prompt files: the text that a model is shown lives in `prompts/`.

Only questions of form stand beside the code that checks their answers (train/instructions.py)."""

import hashlib
from functools import cache
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dream.errors import TemplateError
from dream.paths import data_folder

# Without the bounds of scenario templates: these files come with the package, and a reply that is judged may be long.
ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _load(path: Path) -> jinja2.Template:
    try:
        return ENVIRONMENT.from_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TemplateError(f"{path}: missing; copy it from the package's prompts folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: cannot be read: {error}; save it as UTF-8") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{path}:{error.lineno}: {error.message}") from error


def render(name: str, **variables: object) -> str:
    """The prompt file `prompts/<name>.j2`, rendered.

    Raises:
        TemplateError: it is missing or broken.
    """
    path = _path(name)
    try:
        return _load(path).render(**variables).strip()
    except jinja2.TemplateRuntimeError as error:
        raise TemplateError(f"{path}: {error.message}") from error


def _path(name: str) -> Path:
    return data_folder("prompts") / f"{name}.j2"


def check_all() -> None:
    """Compiles every prompt file outside `scenarios/` and looks at lists, so that a broken one shows before a model is
    started.

    Raises:
        TemplateError: naming the file and line.
    """
    folder = data_folder("prompts")
    for path in sorted(folder.rglob("*.j2")):
        if path.parent.name != "scenarios":
            _load(path)
    for name in ("rehearsal/questions", "dreamer/voices"):
        lines(name)
    for name in ("pressure", "dreamer/background_examples"):
        halves(name)


def hashes() -> dict[str, str]:
    """What every prompt file outside `scenarios/` holds, by its path in `prompts/`, as a short hash."""
    folder = data_folder("prompts")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".j2", ".jsonl") and path.parent.name != "scenarios"
    }


def lines(name: str, **variables: object) -> list[str]:
    """The non-empty lines of a prompt file, rendered.

    Raises:
        TemplateError: there are none, or the file is missing or broken.
    """
    found = [line.strip() for line in render(name, **variables).splitlines() if line.strip()]
    if not found:
        raise TemplateError(f"{_path(name)}: no lines; write one a line")
    return found


def halves(name: str) -> list[tuple[str, str]]:
    """The lines of a prompt file, each parted at its first `|`.

    Raises:
        TemplateError: a line has none, or as `lines`.
    """
    parted = [line.partition("|") for line in lines(name)]
    for first, bar, second in parted:
        if not bar or not first.strip() or not second.strip():
            raise TemplateError(f"{_path(name)}: {first + bar + second!r}: expected two texts with | between them")
    return [(first.strip(), second.strip()) for first, _, second in parted]
