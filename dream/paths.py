"""Where prompts, configs and models are found: the working directory first, then what travels with the package."""

import importlib.util
import os
from pathlib import Path

from dream.errors import ConfigError, DreamError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(kind: str) -> Path:
    """The folder `prompts` or `configs` in use.

    `./<kind>` in the working directory wins; otherwise the copy inside the wheel, or the checkout of an editable
    install.

    Raises:
        ConfigError: neither exists.
    """
    candidates = [Path.cwd() / kind, _PACKAGE / "_data" / kind, _PACKAGE.parent / kind]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(f"no {kind} folder: looked in {', '.join(map(str, candidates))}; reinstall the package")


def model_cache() -> Path:
    """Where embedded models are unpacked: `$DREAM_MODELS`, else `./models` in a checkout, else the user's cache."""
    if named := os.environ.get("DREAM_MODELS"):
        return Path(named)
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return _PACKAGE.parent / "models"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dream"


def own_train_package() -> None:
    """Makes sure that `import train` means ours.

    Raises:
        DreamError: another module of that name comes first.
    """
    spec = importlib.util.find_spec("train")
    ours = _PACKAGE.parent / "train" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != ours:
        where = spec.origin if spec else "nowhere"
        raise DreamError(f"`import train` finds {where}, not {ours}; rename that file or work in another folder")
