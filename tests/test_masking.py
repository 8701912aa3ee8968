"""dream/masking.py: secrets in other people's text are gone before it is stored or shown to a model."""

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.masking import KINDS, marks, mask

PEM = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow+/=\n-----END RSA PRIVATE KEY-----"
SECRETS = {
    "sk-proj-abcDEF0123456789abcd": "API_KEY",
    "sk-abcdefghijklmnopqrstuvwxyz": "API_KEY",
    "rk_live_abcdef0123456789abcd": "API_KEY",
    "AKIAIOSFODNN7EXAMPLE": "API_KEY",
    "AIzaSyA-0123456789abcdefghijklmnopqrstu": "API_KEY",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345": "TOKEN",
    "github_pat_11ABCDEFG0123456789_abcdef": "TOKEN",
    "hf_abcdefghijABCDEFGHIJabcdefghijABCD": "TOKEN",
    "glpat-abcdefGHIJ0123456789": "TOKEN",
    "xoxb-123456789012-abcdefABCDEF": "TOKEN",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN-HNjUQ": "JWT",
    "bob.smith+x@mail.example.co.uk": "EMAIL",
    PEM: "PRIVATE_KEY",
}
FRAGMENTS = [
    *SECRETS, "password=", "api_key: ", '"token": "', "Bearer ", "://u:", "@", "/home/", "C:\\Users\\", "\\", "'", '"',
    "[TOKEN]", "]", "-----", "-----BEGIN PRIVATE KEY-----", "sk-", "eyJ", "AKIA", "a", "b1", "_", "-", ".", "/", ":",
    " ", "\n", "=", ";",
]  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=14).map("".join)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", ["{}", "it is {} now", "({}),", "key\n{}\nend"])
def test_secret_becomes_its_kind(secret: str, around: str) -> None:
    """A secret of each common service is replaced by its kind, the words around it stay."""
    kind = SECRETS[secret]
    assert mask(around.format(secret)) == (around.format(f"[{kind}]"), Counter([kind]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DB_PASSWORD=hunter2 and on", "DB_PASSWORD=[PASSWORD] and on"),
        ("Api-Key : hunter2", "Api-Key : [PASSWORD]"),
        ('{"password": "two words", "n": 1}', '{"password": "[PASSWORD]", "n": 1}'),
        ("token: Bearer abcdefghijklmnop", "token: [PASSWORD] [TOKEN]"),
        ("Authorization: Bearer abc.def-ghi_jkl==", "Authorization: Bearer [TOKEN]"),
        ("psql postgres://ann:p@ss@db.example/x", "psql postgres://[PASSWORD]@db.example/x"),
        ("cat /home/ann/.ssh/id", "cat /home/[USER]/.ssh/id"),
        ("open /Users/ann.lee/x.txt.", "open /Users/[USER]/x.txt."),
        ("dir C:\\Users\\Ann Lee\\Desktop", "dir C:\\Users\\[USER]\\Desktop"),
        ("dir C:\\\\Users\\\\ann\\\\x", "dir C:\\\\Users\\\\[USER]\\\\x"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE and no end", "[PRIVATE_KEY]"),
    ],
)
def test_only_the_secret_part_goes(text: str, expected: str) -> None:
    """Of assignments, addresses and paths the key, the host and the rest of the path stay."""
    assert mask(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "Install react@18.2.0 with sk-learn.",
        "max_tokens: 256, see https://example.org:8080/home/page?x=@me",
        "The risk-abcdefghijklmnopqrstuvw is low; eyJoke. Keys and tokens are in the bearer's basic bag.",
        "Write a label that says 40 lamps.",
    ],
)
def test_plain_text_stays(text: str) -> None:
    """Text without secrets is unchanged and nothing is counted."""
    assert mask(text) == (text, Counter())


@given(text=hostile)
def test_masking_masked_text_changes_nothing(text: str) -> None:
    """Whatever stands side by side, the second masking finds nothing."""
    masked, _ = mask(text)
    assert mask(masked) == (masked, Counter())


@given(before=hostile, secret=st.sampled_from(sorted(SECRETS)), after=hostile)
def test_no_secret_survives_between_spaces(before: str, secret: str, after: str) -> None:
    """A secret that stands by itself is never in the masked text, whatever is before and after it."""
    masked, counts = mask(f"{before} {secret} {after}")
    assert counts.total() >= 1
    assert set(counts) <= set(KINDS)
    assert f" {secret} " not in masked


@given(parts=st.lists(st.sampled_from(sorted(SECRETS)), max_size=6))
def test_counts_are_the_marks(parts: list[str]) -> None:
    """The counts by kind are those of the secrets, and `marks` counts the same in the result."""
    masked, counts = mask("\n".join(parts))
    assert counts == Counter(SECRETS[part] for part in parts)
    assert marks(masked) == len(parts)


@pytest.mark.parametrize("piece", [
    "a@", "a.", "sk-a", "eyJaaaaaaaa-", "eyJ-", "-----BEGIN PRIVATE KEY-----", "://a:", "/home/", "password=\"' ",
    "C:\\Users\\a ", "bearer \t", "a@b.",
])  # fmt: skip
def test_time_is_linear_in_hostile_text(piece: str) -> None:
    """Text made to make patterns go back and forth takes ten times as long when it is ten times as long, not a hundred
    times: a whole megabyte is a matter of seconds."""

    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        began = time.process_time()
        mask(text)
        return time.process_time() - began

    small = min(seconds(10_000) for _ in range(3))
    assert seconds(100_000) < 40 * small + 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"refreshToken": "abc123"', '"refreshToken": "[PASSWORD]"'),
        ("DB_PASS=hunter2", "DB_PASS=[PASSWORD]"),
        ("SECRET_KEY_BASE=xyz", "SECRET_KEY_BASE=[PASSWORD]"),
        ("AccountKey=abc==;x", "AccountKey=[PASSWORD];x"),
        ("password=ab,cd", "password=[PASSWORD]"),
        ("Authorization: Token abcdefghijkl1234", "Authorization: Token [TOKEN]"),
        ("run --password hunter2 now", "run --password [PASSWORD] now"),
        ("run --token=abc now", "run --token=[PASSWORD] now"),
        ("https://hooks.slack.com/services/T00/B00/XXXXXXXX", "https://hooks.slack.com/services/[TOKEN]"),
        (r'password = "ab\"cdef9"', 'password = "[PASSWORD]"'),
        (r'{"api_key": "q1\"w2e3r4"}', '{"api_key": "[PASSWORD]"}'),
        (r"secret: 'it\'s mine' # x", "secret: '[PASSWORD]' # x"),
        (r'"body": "{\"token\": \"abc123\", \"n\": 1}"', r'"body": "{\"token\": \"[PASSWORD]", \"n\": 1}"'),
        ("bypass: yes", "bypass: yes"),
        ("compass --passive mode", "compass --passive mode"),
    ],
)
def test_names_that_secrets_hide_behind(text: str, expected: str) -> None:
    """Settings, headers, flags and addresses that hold a secret, and words that only look like them."""
    assert mask(text)[0] == expected
    assert mask(expected)[0] == expected
