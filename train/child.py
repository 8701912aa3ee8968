"""A training process that ends with the one that started it: `python -P -m train.child PARENT_PID MODULE ARGUMENT ...`.

An orphan would go on writing into the folder in which the same command, given again, trains anew, and hold its memory.
Begins before torch is imported, which takes seconds. Not covered: systems other than Linux, where an orphan goes on.
"""

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that ends; at once where it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main(argv: Sequence[str]) -> int:
    """What the module's `main` returns."""
    parent, module, *arguments = argv
    end_with(int(parent))
    code: int = importlib.import_module(module).main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
