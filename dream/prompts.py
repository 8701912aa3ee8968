"""Prompt files: the text that a model is shown lives in `prompts/`.

Only questions of form stand beside the code that checks their answers (train/instructions.py)."""

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
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{path}:{error.lineno}: {error.message}") from error


def render(name: str, **variables: object) -> str:
    """The prompt file `prompts/<name>.j2`, rendered.

    Raises:
        TemplateError: it is missing or broken.
    """
    path = data_folder("prompts") / f"{name}.j2"
    try:
        return _load(path).render(**variables).strip()
    except jinja2.TemplateRuntimeError as error:
        raise TemplateError(f"{path}: {error.message}") from error


def check_all() -> None:
    """Compiles every prompt file outside `scenarios/`, so that a broken one shows before a model is started.

    Raises:
        TemplateError: naming the file and line.
    """
    folder = data_folder("prompts")
    for path in sorted(folder.rglob("*.j2")):
        if path.parent.name != "scenarios":
            _load(path)


def lines(name: str, **variables: object) -> list[str]:
    """The non-empty lines of a prompt file, rendered."""
    return [line.strip() for line in render(name, **variables).splitlines() if line.strip()]
