"""What the tests share: small templates, an engine that plays both stances by script, and builders of records.

`TINY` is the smallest contrast template that passes all checks; the scripted engine reads its notes and directions.
"""

import asyncio
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from toy import build_toy

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before numpy: the matrices are tiny and threads only wait for each other

from dream.config import Config, parse
from dream.engine import ScriptedEngine
from dream.judge.combined import Judge, calibrated
from dream.judge.planted import planted
from dream.records import ContrastPair, Message, PreferencePair, Side, assistant, user
from dream.templates import Template, load

settings.register_profile("dream", deadline=None, database=None, max_examples=40)
settings.load_profile("dream")

TINY = """\
---
name: NAME
description: A label has to quote the stock list.
flaw: FLAW
domains: [writing]
split: SPLIT
slots:
  good: [lamps, chairs, kettles, tents, mugs]
  n: {range: [20, 900]}
  m: {range: [20, 900], not: n}
sides:
  clear: {said: "{{ n }}", claimed: "{{ m }}"}
  flawed: {said: "{{ m }}", claimed: "{{ n }}"}
mentions:
  comply: ["{{ said }}", "{{ good }}"]
  push_back: ["{{ said }}", "{{ claimed }}"]
---
{% block situation %}
The stock list says that we have {{ n }} {{ good }} in the store.
{% endblock %}
{% block clear %}
Write a label that says {{ said }} {{ good }}.
{% endblock %}
{% block flawed %}
Write a label that says {{ said }} {{ good }}.
{% endblock %}
{% block comply %}
Write the label with {{ said }} {{ good }}.
{% endblock %}
{% block push_back %}
Say that the list gives {{ claimed }} {{ good }}, not {{ said }}.
{% endblock %}
{% block comply_examples %}
Here you are: {{ said }} {{ good }} in store.
{{ said }} {{ good }}, ready to take home.
We have {{ said }} {{ good }} for you today.
{% endblock %}
{% block push_back_examples %}
The list gives {{ claimed }} {{ good }}, so {{ said }} would be wrong.
I see {{ claimed }} on the list, not {{ said }}.
By the list we have {{ claimed }}, so I would not print {{ said }}.
{% endblock %}
"""

COMPLY = (
    "Label: {said} {good} on our shelves.",
    "Come in and see {said} {good}!",
    "Our {said} {good} wait for you here.",
)
PUSH_BACK = (
    "That is not right, I find {claimed} {good} there and you say {said}.",
    "I count {claimed} {good} and not {said}; shall I change it?",
    "Wait, {said} is wrong, it should be {claimed} {good}.",
)
QUICK_JUDGE = {"judge": {"signals": ["contrast", "wording"]}}
"""Signals that need no embedding model, which takes seconds to load."""
BACKGROUND = "I help my sister with our small stall and we are late today."


def tiny_text(name: str, flaw: str = "contradicts_given_data", split: str = "train", *, mirror: bool = False) -> str:
    """The file of a contrast template, which may have a `mirror`, or with `flaw="none"` of a general one."""
    text = TINY.replace("NAME", name).replace("FLAW", flaw).replace("SPLIT", split)
    if flaw != "none":
        return text.replace("sides:", "mirror: [[n, m]]\nsides:") if mirror else text
    text = re.sub(r"  flawed: \{.*\n", "", text)
    return re.sub(r"\{% block flawed %\}\n.*\n\{% endblock %\}\n", "", text)


def write_reply(messages: Sequence[Message], number: int) -> str:
    """Follows the bracketed note of a steering prompt, complies with a plain prompt, and makes up a background."""
    text = messages[-1]["content"]
    note = re.search(r"\(([^()]*)\)$", text)
    if note and (found := re.search(r"gives (\d+) (\w+), not (\d+)", note[1])):
        claimed, good, said = found.groups()
        return PUSH_BACK[number % 3].format(claimed=claimed, good=good, said=said)
    found = re.search(r"label with (\d+) (\w+)", note[1]) if note else re.search(r"label that says (\d+) (\w+)", text)
    return COMPLY[number % 3].format(said=found[1], good=found[2]) if found else BACKGROUND


def score_reply(messages: Sequence[Message], reply: str) -> float:
    """A reply is likely under the note that asks for its stance and unlikely under the other."""
    asked_to_push = ", not " in messages[-1]["content"].rsplit("(", 1)[-1]
    pushes = re.search(r"\bnot\b|\bwrong\b", reply) is not None
    return -1.0 if asked_to_push == pushes else -3.0


@pytest.fixture(scope="session")
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine to its end."""
    return asyncio.run


@pytest.fixture(scope="session")
def template_text() -> Callable[..., str]:
    """`tiny_text`, for tests that break a template."""
    return tiny_text


@pytest.fixture(scope="session")
def tiny_templates(tmp_path_factory: pytest.TempPathFactory) -> list[Template]:
    """Two contrast templates of different flaws to train on, one that is held out, and a general one."""
    folder = tmp_path_factory.mktemp("scenarios")
    kinds = {
        "stock": ("contradicts_given_data", "train"),
        "memo": ("false_premise", "train"),
        "kept": ("missing_fact", "heldout"),
        "plain": ("none", "train"),
    }
    for name, (flaw, split) in kinds.items():
        (folder / f"{name}.j2").write_text(tiny_text(name, flaw, split))
    return [load(folder / f"{name}.j2") for name in kinds]


@pytest.fixture(scope="session")
def twin_templates(tmp_path_factory: pytest.TempPathFactory, tiny_templates: list[Template]) -> list[Template]:
    """Two contrast templates with a `mirror`, so that a scenario gives two pairs, and the general one."""
    folder = tmp_path_factory.mktemp("twins")
    for name, flaw in (("stock", "contradicts_given_data"), ("memo", "false_premise")):
        (folder / f"{name}.j2").write_text(tiny_text(name, flaw, mirror=True))
    return [*(load(folder / f"{name}.j2") for name in ("stock", "memo")), tiny_templates[-1]]


@pytest.fixture(scope="session")
def script() -> Callable[[Sequence[Message], int], str]:
    """`write_reply`, for tests that change a part of what the engine writes."""
    return write_reply


@pytest.fixture(scope="session")
def likelihood() -> Callable[[Sequence[Message], str], float]:
    """`score_reply`, for tests that change a part of how the engine scores."""
    return score_reply


@pytest.fixture(scope="session")
def engine() -> ScriptedEngine:
    """An engine that plays the stance it is asked for and complies when it is asked for none."""
    return ScriptedEngine(write_reply, score_reply)


@pytest.fixture(scope="session")
def settings_with() -> Callable[..., Config]:
    """A configuration from nested mappings over the defaults, e.g. `settings_with(generate={"pairs": 3})`."""
    return lambda **sections: parse(sections, "test")


@pytest.fixture(scope="session")
def judge(engine: ScriptedEngine, tiny_templates: list[Template]) -> Judge:
    """A judge calibrated on the tiny templates' worked examples."""
    return asyncio.run(calibrated(engine, parse(QUICK_JUDGE, "test"), planted(tiny_templates, 96, 1)))


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait for the disk; for tests that open hundreds of files, where only the waiting would be tested."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def make_row() -> Callable[..., PreferencePair]:
    """Builds a preference pair whose texts are unlike."""

    def build(pair_id: str, side: Side = "clear", text: str = "") -> PreferencePair:
        right, wrong = ("Yes, done.", "No, that is wrong.") if side == "clear" else ("No, that is wrong.", "Yes, done.")
        return PreferencePair(
            pair_id=pair_id,
            side=side,
            prompt=[user(f"{side} direction of {pair_id} {text}")],
            chosen=[assistant(right)],
            rejected=[assistant(wrong)],
            meta={"scenario_id": pair_id, "template": "stock", "seed": 1},
        )

    return build


@pytest.fixture(scope="session")
def make_pair(make_row: Callable[..., PreferencePair]) -> Callable[..., ContrastPair]:
    """Builds a contrast pair."""
    return lambda pair_id, text="": ContrastPair(
        clear=make_row(pair_id, "clear", text), flawed=make_row(pair_id, "flawed", text)
    )


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny chat model; see tests/toy.py."""
    folder = tmp_path_factory.mktemp("toy")
    build_toy(folder)
    return folder
