"""Secrets and personal data in text that others wrote, replaced by `[KIND]` before it is stored or shown to a model.

Not covered: names of people, street addresses, phone, card and account numbers, IP addresses, `curl -u user:password`,
passwords in running prose ("the password is ..."), and what follows a space, `&` or `;` in one without quotation marks.
Where a value may or may not be a secret (`token: str` in code) it is masked.
"""

import re
from collections import Counter

_QUOTE = r"\\?[\"']?"

# Kind, needles (the lower-cased text must hold one; most hold none, which is quick to see), pattern, replacement.
#
# A pattern either fails after a bounded number of characters or at the end of a run that no other start scans again,
# and a match takes all letters and digits that follow. The first keeps hostile text linear; the second keeps what
# stands beside a mask from becoming a secret when the masked text is masked again.
_RULES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "PRIVATE_KEY",  # first, because its line of hyphens would be cut in two by the rules below
        ("private key",),
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----))*+"
        r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?",
        "[PRIVATE_KEY]",
    ),
    ("PASSWORD", ("://",), r"(?<=://)[^\s/:@\"'<>\\]*:[^\s/\"'<>\\]+@", "[PASSWORD]@"),
    ("JWT", ("eyj",), r"(?<![A-Za-z0-9_-])eyJ[\w-]{8,}+\.[\w-]{8,}+(?:\.[\w-]*+)?", "[JWT]"),
    ("API_KEY", ("sk-",), r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]{0,60}[0-9]|[A-Za-z0-9]{20})[\w-]{16,}+", "[API_KEY]"),
    ("API_KEY", ("k_live_", "k_test_"), r"(?<![A-Za-z0-9])[rsp]k_(?:live|test)_\w{16,}+", "[API_KEY]"),
    ("API_KEY", ("akia", "asia"), r"(?<![A-Za-z0-9])A(?:KIA|SIA)[A-Z0-9]{16}\w*+", "[API_KEY]"),
    ("API_KEY", ("aiza",), r"(?<![A-Za-z0-9])AIza[\w-]{30,}+", "[API_KEY]"),
    (
        "TOKEN",
        ("gho_", "ghp_", "ghr_", "ghs_", "ghu_", "hf_", "npm_"),
        r"(?<![A-Za-z0-9])(?:gh[oprsu]_|hf_|npm_)[A-Za-z0-9]{20,}+\w*+",
        "[TOKEN]",
    ),
    (
        "TOKEN",
        ("github_pat_", "glpat-", "pypi-", "xapp-", "xox"),
        r"(?<![A-Za-z0-9])(?:github_pat_|glpat-|pypi-|xapp-|xox[a-z]-)[\w-]{10,}+",
        "[TOKEN]",
    ),
    (
        "TOKEN",
        ("bearer", "authorization"),
        rf"(?i)((?<![a-z0-9])bearer[ \t]{{1,9}}"
        rf"|authorization{_QUOTE}:[ \t]{{0,9}}{_QUOTE}(?:basic|token|apikey)[ \t]{{1,9}})"
        r"[\w.~+/=-]{12,}+",
        r"\1[TOKEN]",
    ),
    (
        "PASSWORD",
        ("pass", "pwd", "secret", "key", "token"),
        r"(?i)((?>(?:password|passwd|passphrase|(?<![a-z])pass|pwd|secret|token"
        r"|(?:api|access|secret|private|account|encryption|signing)[ _-]?key(?:_base)?)"
        rf"{_QUOTE}[ \t]{{0,9}}(?:=>|[:=]{{1,2}})[ \t]{{0,9}}{_QUOTE}))(?!MARK)"
        # In JSON within JSON a value ends at the next quotation mark, elsewhere at one without a backslash.
        r"(?:(?<=\\[\"'])[^\"'\r\n]+|(?<=\")(?:\\.|[^\"\\\r\n])+|(?<=')(?:\\.|[^'\\\r\n])+|[^\s\"'\\;&]+)",
        r"\1[PASSWORD]",
    ),
    (
        "PASSWORD",
        ("--",),
        rf"(?i)(--(?:password|passwd|token|secret|api-key)[ \t]{{1,9}}{_QUOTE})(?!MARK|-)[^\s\"'\\]+",
        r"\1[PASSWORD]",
    ),
    ("TOKEN", ("hooks.slack.com",), r"(?<=hooks\.slack\.com/services/)[\w/]{10,}+", "[TOKEN]"),
    ("EMAIL", ("@",), r"(?<![\w.+-])(?<![A-Z]\])[\w.+-]++@(?:[\w-]++\.)+[A-Za-z]{2,}+(?![\w-])", "[EMAIL]"),
    (
        "USER",
        ("/home/", "/users/"),
        r"((?<![\w.~\])-])/(?:mnt/[a-z]/)?(?:home|Users)/)\w++(?:[.-]+\w++)*+",
        r"\1[USER]",
    ),
    (
        "USER",
        (":\\users\\", ":\\\\users", ":/users/"),
        r"(?i)((?<![a-z0-9\]])[a-z]:(\\{1,2}|/)Users\2)(?:[^\\/:*?\"<>|\r\n\[\]]{1,40}(?=\\)|\w++(?:[.-]+\w++)*+)",
        r"\1[USER]",
    ),
)

KINDS = tuple(dict.fromkeys(kind for kind, *_ in _RULES))

_MARK = rf"\[(?:{'|'.join(KINDS)})\]"
_COMPILED = [
    (kind, needles, re.compile(pattern.replace("MARK", _MARK)), mark) for kind, needles, pattern, mark in _RULES
]
_MARKS = re.compile(_MARK)
_NEEDLES = re.compile("|".join(re.escape(needle) for _, needles, *_ in _RULES for needle in needles))


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with secrets replaced by `[KIND]`, and how many of each of `KINDS` there were.

    Masking masked text changes nothing. The time is linear in the text.
    """
    counts: Counter[str] = Counter()
    lowered = text.lower()
    if not _NEEDLES.search(lowered):
        return text, counts
    for kind, needles, pattern, mark in _COMPILED:
        if any(map(lowered.__contains__, needles)):
            text, count = pattern.subn(mark, text)
            counts[kind] += count
    return text, +counts


def marks(*texts: str) -> int:
    """How many masks stand in masked texts."""
    return sum(len(_MARKS.findall(text)) for text in texts)
