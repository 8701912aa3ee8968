"""`dream templates new`: a commented template to start from, in the prompts folder of the working directory."""

import re
import shutil
import tempfile
from pathlib import Path

from dream.errors import StorageError, TemplateError
from dream.paths import data_folder

STARTING_POINT = "new_template.j2"
"""In the prompts folder, so that people can have their own."""


def new(name: str) -> Path:
    """Writes `prompts/scenarios/NAME.j2`, a valid template that explains each key and block, and gives its path.

    The file is in the working directory: one without a `prompts` folder gets a copy of the package's, because a folder
    of its own replaces that one whole.

    Raises:
        TemplateError: the name cannot be one, is taken, or the prompts folder has no starting point.
        StorageError: the file cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise TemplateError(f"{name!r}: a template's name has small letters, digits and hyphens only")
    source = data_folder("prompts")
    if (source / "scenarios" / f"{name}.j2").exists():
        raise TemplateError(f"{source / 'scenarios' / name}.j2: exists; choose another name or edit it")
    try:
        text = (source / STARTING_POINT).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(f"{source / STARTING_POINT}: missing; copy it from the package's prompts folder") from error
    own = Path.cwd() / "prompts"
    path = own / "scenarios" / f"{name}.j2"
    try:
        if source != own:
            _copy(source, own)
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace("NAME", name))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _copy(source: Path, target: Path) -> None:
    """Copies a folder so that there is all of it or none, since a part would be taken for the whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        shutil.copytree(source, Path(folder) / "copy")
        (Path(folder) / "copy").rename(target)
