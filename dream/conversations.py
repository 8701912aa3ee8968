"""Conversation logs that others wrote, read line by line in bounded memory, and the exchanges in them.

Not covered: images and tools; such turns are left out.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dream.errors import DataError
from dream.records import Message

OnBad = Callable[[Path, int, str], None]
"""Told of a malformed line: the file, the line's number, and why."""
_Bad = Callable[[int, str], None]
_Piece = tuple[int, list[Message], bool]
"""A line's number, the turns that it ends, and whether they begin a conversation."""

MAX_LINE = 10_000_000
"""Bytes of a line; a longer one is malformed."""
MAX_TURNS = 1_000
"""A transcript that goes on for longer is read in parts, so that memory stays bounded."""
HISTORY = 6
"""Messages of a prompt, besides the system message."""

_BOM = b"\xef\xbb\xbf"
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "function_call", "observation"), "tool"),
}
_LABEL = re.compile(r"\s*(User|Human|Assistant|ChatGPT|GPT|AI|System|USER|HUMAN|ASSISTANT|SYSTEM):\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Exchange:
    """A reply with what it answers and what the user said next; `turn` is the reply's place in its conversation."""

    turn: int
    prompt: list[Message]
    reply: str
    following: str

    @property
    def direction(self) -> str:
        """The user turn that was answered."""
        return self.prompt[-1]["content"]

    @property
    def pair_id(self) -> str:
        """The same wherever the exchange stands: logs of requests repeat a conversation's beginning with each turn."""
        content = json.dumps([self.prompt, self.reply])
        return f"log-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def check_log(path: Path) -> None:
    """Sees to it, before a model is started, that a file can be read line by line.

    Raises:
        DataError: there is no such file, it cannot be read, or it is one big JSON array.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(_BOM).lstrip()
            file.seek(max(0, path.stat().st_size - 4096))
            tail = file.read().rstrip()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix.lower() != ".txt" and head.startswith(b"[") and tail.endswith(b"]"):
        raise DataError(
            f"{path}: is one JSON array; write one conversation a line, e.g. jq -c '.[]' {path} > {path.stem}.jsonl"
        )


def read_conversations(path: Path, on_bad: OnBad) -> Iterator[tuple[int, list[Message]]]:
    """The conversations of a log, each with the number of its first line, in bounded memory.

    A line is a conversation (OpenAI: `messages`, or `request` and `response`; ShareGPT: `conversations`) or one turn
    (`role` and `content`); turns make a conversation until an empty line, a system turn, another `conversation_id` or
    a malformed line. In a `.txt` file turns begin with `User:` or `Assistant:`. A malformed line is reported and left
    out. Turns without text and tool turns are left out.

    Raises:
        DataError: see `check_log`.
    """
    check_log(path)

    def bad(number: int, why: str) -> None:
        on_bad(path, number, why)

    pieces = _labelled_turns(path, bad) if path.suffix.lower() == ".txt" else _json_turns(path, bad)
    begun, size = 0, 0
    messages: list[Message] = []
    for number, turns, starts in pieces:
        full = size > MAX_LINE or (len(messages) >= MAX_TURNS and turns[:1] and turns[0]["role"] == "user")
        if messages and (starts or full):
            yield begun, messages
            messages, size = [], 0
        begun = begun if messages else number
        messages += turns
        size += sum(100 + len(turn["content"]) for turn in turns)
    if messages:
        yield begun, messages


def exchanges(messages: Sequence[Message]) -> Iterator[Exchange]:
    """Each assistant turn that answers a user turn; the prompt begins with a user turn after the system message, and
    neighbouring turns of one role are one in it."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    for turn in range(1, len(messages)):
        if (messages[turn - 1]["role"], messages[turn]["role"]) != ("user", "assistant"):
            continue
        history = [m for m in messages[max(0, turn - HISTORY) : turn] if m["role"] != "system"]
        while history[0]["role"] != "user":
            del history[0]
        following = messages[turn + 1] if turn + 1 < len(messages) else None
        said = following["content"] if following and following["role"] == "user" else ""
        yield Exchange(turn, system + _joined(history), messages[turn]["content"], said)


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of one role as one: many chat templates take no two."""
    joined: list[Message] = []
    for role, turns in groupby(messages, key=lambda message: message["role"]):
        joined.append({"role": role, "content": "\n\n".join(turn["content"] for turn in turns)})
    return joined


def _json_turns(path: Path, bad: _Bad) -> Iterator[_Piece]:
    conversation_id = None
    for number, text in _lines(path, bad):
        if text is None or not text.strip():
            yield number, [], True
            continue
        try:
            row = _json_object(text)
            whole = _whole_conversation(row)
            items = [row] if whole is None else whole
            turns = [turn for item in items if (turn := _message(item)) is not None]
        except ValueError as error:
            bad(number, str(error))
            yield number, [], True
            continue
        if whole is not None:
            yield number, turns, True
            yield number, [], True
            continue
        changed = row.get("conversation_id") != conversation_id
        conversation_id = row.get("conversation_id")
        yield number, turns, changed or any(turn["role"] == "system" for turn in turns)


def _json_object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON of a log: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _whole_conversation(row: dict[str, Any]) -> list[Any] | None:
    """The turns of a line that holds a conversation; None where it is a single turn."""
    for key in ("messages", "conversations"):
        if key in row:
            if not isinstance(row[key], list):
                raise ValueError(f"`{key}` is not a list of turns")
            return list(row[key])
    if "request" in row and "response" in row:
        try:
            return [*row["request"]["messages"], row["response"]["choices"][0]["message"]]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("`request` has no `messages`, or `response` no `choices` with a `message`") from error
    if not row.keys() & {"role", "from"}:
        raise ValueError("expected `messages`, `conversations`, `request` and `response`, or `role` and `content`")
    return None


def _message(item: Any) -> Message | None:
    """One turn; None where it says nothing: tool turns, tool calls, images."""
    if not isinstance(item, dict):
        raise ValueError(f"a turn is not an object but {type(item).__name__}")
    role = _ROLES.get(str(item.get("role", item.get("from"))).lower())
    if role is None:
        raise ValueError("a turn's role is none of system, user and assistant")
    content = item.get("content", item.get("value"))
    if role == "tool" or item.get("tool_calls") or ("content" in item and content is None):
        return None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise ValueError("a turn's content is neither text nor a list of parts")
    content.encode()  # half a surrogate pair is a ValueError here and would be one when the row is written
    return {"role": role, "content": content} if content.strip() else None


def _labelled_turns(path: Path, bad: _Bad) -> Iterator[_Piece]:
    """Turns of a text file. An empty line before `User:` begins a conversation, unless replies have one too."""
    begun, size, role, starts = 0, 0, "", True
    lines: list[str] = []
    blank = spaced = False
    for number, text in _lines(path, bad):
        label = _LABEL.match(text or "")
        if lines and (label or text is None):
            yield begun, _spoken(role, lines), starts
            lines = []
        if text is None:
            yield number, [], True
        elif label:
            last, role = role, _ROLES[label[1].lower()]
            spaced = spaced or (blank and role == "assistant")
            starts = role == "system" or (blank and not spaced and (last, role) == ("assistant", "user"))
            begun, size, lines = number, len(text), [label[2]]
        elif lines and size <= MAX_LINE:
            lines.append(text)
            size += len(text)
        elif text.strip():
            bad(number, "is of no turn: begin turns with `User:` or `Assistant:`, and keep them below 10 MB")
        blank = text is not None and not text.strip()
    if lines:
        yield begun, _spoken(role, lines), starts


def _spoken(role: str, lines: Sequence[str]) -> list[Message]:
    content = "".join(lines).strip()
    return [{"role": role, "content": content}] if content else []


def _lines(path: Path, bad: _Bad) -> Iterator[tuple[int, str | None]]:
    """Numbered lines; None in place of one that is too long or not UTF-8."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                bad(number, f"longer than {MAX_LINE:,} bytes")
                yield number, None
                continue
            try:
                yield number, (line.removeprefix(_BOM) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                bad(number, f"not UTF-8: {error.reason} at byte {error.start}")
                yield number, None
