"""A training process that ends with the one that started it: `python -P -m train.child PARENT_PID MODULE ARGUMENT ...`.

An orphan would go on writing into the folder in which the same command, given again, trains anew, and hold its memory.
Begins before torch is imported, which takes seconds. Not covered: systems other than Linux, where an orphan goes on.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dream.errors import ConfigError, DreamError
from dream.records import Record
from dream.store import read_json

S = TypeVar("S", bound=Record)
Report = Callable[[dict[str, Any]], None]
"""Takes what such a process says of its progress."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that ends; at once where it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def carry_out(module: str, kind: type[S], run: Callable[[S, Report], None], argv: Sequence[str] | None) -> int:
    """What the `main` of such a module does: reads the specification file that `argv` (default: the command line) names
    and runs it, its reports to stdout, a JSON line each. Returns 0, or prints a one-line message and returns the
    error's exit code."""
    progress = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print, stdout carries progress only
    paths = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(paths) != 1:
            raise ConfigError(f"usage: python -P -m {module} SPEC.json")
        try:
            spec = kind.model_validate(read_json(Path(paths[0])))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{paths[0]}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        run(spec, lambda line: print(json.dumps(line), file=progress))
    except DreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main(argv: Sequence[str]) -> int:
    """What the module's `main` returns."""
    parent, module, *arguments = argv
    end_with(int(parent))
    code: int = importlib.import_module(module).main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
