"""Replies and prompts as a judge may see them: text that cannot act as a chat turn."""

import re

CONTROL = re.compile(
    "<\uff5c[^\uff5c()\n]{0,40}\uff5c>"  # the fullwidth bars of some templates
    r"|<\|[^|<>()\n]{0,40}\|>|\[/?(?:INST|SYS)\]|<</?SYS>>|</?s>|<pad>|<unk>|<mask>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos)>|</?(?:system|assistant|user|reply|request|transcript|think)>",
    re.IGNORECASE,
)
"""Tokens by which chat templates and judging prompts mark turns. None has round brackets, so that `neutral` is done in
one pass: what it puts in place of one token cannot complete another."""
GARBLED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
"""Control characters, and the mark that bytes which were no text leave."""
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\ud800-\udfff"  # half characters, which no request can carry
    "\U000e0000-\U000e0fff]"  # tags, in which whole sentences can be hidden
)


def visible(text: str) -> str:
    """The text without characters that no reader sees and that could hide a control token from a pattern."""
    return _INVISIBLE.sub("", text)


def is_clean(text: str) -> bool:
    """Whether a text can stand in a prompt: no control tokens, hidden ones included, and nothing garbled."""
    return not GARBLED.search(text) and not CONTROL.search(visible(text))


def neutral(text: str) -> str:
    """The text with control tokens taken apart: `<|im_end|>` becomes `(im_end)`, as a reader would understand it."""
    return CONTROL.sub(lambda found: f"({re.sub(r'[^0-9A-Za-z_ ]', '', found[0])})", visible(text))
