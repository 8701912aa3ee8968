"""Every error the product raises on purpose. The message is for the person at the terminal.

A message says what was wrong, in which file and key or line, and what to do. `exit_code` is what the command line
returns: 2 when the user's input is wrong, 1 for anything else.
"""


class DreamError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UserError(DreamError):
    """The user's input is wrong; nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file, `--set` or option is wrong."""


class TemplateError(UserError):
    """A scenario template or prompt file is wrong."""


class DataError(UserError):
    """A data file the user named cannot be read as what it should be."""


class RunError(UserError):
    """A run folder cannot be used as asked (other fingerprint, in use, no such round)."""


class StorageError(DreamError):
    """The run folder could not be written (disk full, permissions). The run can be continued."""


class EngineError(DreamError):
    """The inference engine failed and could not be brought back."""


class CallRefused(EngineError):
    """The engine would not answer one call, as of a prompt that is too long for it; it answers others."""


class JudgeError(DreamError):
    """The judge cannot tell known-good from known-bad replies."""


class TrainingError(DreamError):
    """A training step failed or did not do what it claims."""


class Stopped(DreamError):
    """A signal of the user's ended the command, which a shell reads off its exit code."""

    def __init__(self, number: int, how_to_go_on: str) -> None:
        super().__init__("; ".join(filter(None, ("stopped", how_to_go_on))))
        self.exit_code = 128 + number


def one_line(error: BaseException) -> str:
    """What a library's error says, which may be of many lines, in one."""
    return " ".join(str(error).split())


def last_line(said: str) -> str:
    """The last line of what a child process wrote."""
    lines = said.strip().splitlines()
    return lines[-1] if lines else "nothing was said"
