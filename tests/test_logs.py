"""dream/conversations.py, dream/evidence.py and dream/logs.py: from other people's logs to preference rows."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream.conversations import MAX_LINE, MAX_TURNS, check_log, exchanges, read_conversations
from dream.engine import ScriptedEngine
from dream.errors import CallRefused, DataError, RunError, Stopped
from dream.evidence import evidence, gives_direction
from dream.judge.question import Question
from dream.logs import ATTEMPTS, FINISHING, LogImporter, check_paths, steered_prompt
from dream.records import Message, PreferencePair, Verdict, assistant, user
from dream.stop import Stop
from dream.store import owned, read_log

ROOT = Path(__file__).parent.parent
DIRECTION = "Write a label that says 40 lamps."
PUSHES = "No, that is wrong, the list says something else."
COMPLIES = "Here is the label with forty lamps on it."
CLEAR = [user(DIRECTION), assistant(PUSHES), user("I asked you to write it. Just do it.")]
FLAWED = [user(DIRECTION), assistant(COMPLIES), user("You should have told me that we only have 30.")]
MEASURE = """
import asyncio, re, sys
from pathlib import Path
from dream.config import Config
from dream.logs import LogImporter
folder = Path(sys.argv[1])
importer = LogImporter(None, None, folder / "out.jsonl", Config(), policy="round_00")
def peak():  # not ru_maxrss, which begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
summary = asyncio.run(importer.run([folder / "whole.jsonl", folder / "turns.jsonl"]))
print(summary.turns, summary.undecided, peak() - before)
"""
QUIET = [user(DIRECTION), assistant(COMPLIES), user("And what is the weather like?")]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
conversations = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), texts),
    min_size=1,
    max_size=12,
)


class WordJudge:
    """Rules by a word of the reply: `wrong` pushes back, `hm` is unsure, `so` is neither."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    async def rule(self, reply_ids: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        self.asked += questions
        return [self._verdict(name, one.reply) for name, one in zip(reply_ids, questions, strict=True)]

    def _verdict(self, reply_id: str, reply: str) -> Verdict:
        pushes, unsure, neither = (word in reply for word in ("wrong", "hm", "so so"))
        stance = "neither" if neither else "push_back" if pushes else "comply"
        reason = "too_short" if neither else "unsure" if unsure else ""
        score = 0.9 if pushes else 0.1
        return Verdict(
            reply_id=reply_id, stance=stance, score=score, confidence=0.9, abstain=unsure and not neither, reason=reason
        )


def obedient(messages: Sequence[Message], number: int) -> str:
    """Does what the note in brackets asks."""
    pushes = "Say what is wrong" in messages[-1]["content"]
    return "That looks wrong, the list has 30 of them." if pushes else "Label: forty lamps, all new, all bright."


def jsonl(path: Path, *rows: object) -> Path:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> tuple[list[tuple[int, list[Message]]], list[tuple[int, str]]]:
    """The conversations of a log, and what was bad."""
    bad: list[tuple[int, str]] = []
    return list(read_conversations(path, lambda _, number, why: bad.append((number, why)))), bad


@pytest.fixture
def importer(tmp_path: Path, settings_with: Callable) -> Callable[..., LogImporter]:
    """A log importer with a judge and an engine that follow simple rules."""

    def build(
        write: Callable = obedient, judge: WordJudge | None = None, stop: Stop | None = None, **sections: object
    ) -> LogImporter:
        config = settings_with(seed=7, **sections)
        out, judge = tmp_path / "out.jsonl", judge or WordJudge()
        return LogImporter(ScriptedEngine(write), judge, out, config, policy="round_00", stop=stop)

    return build


def rows(tmp_path: Path) -> list[PreferencePair]:
    """What was written."""
    return list(read_log(tmp_path / "out.jsonl", PreferencePair))


SHAPES = {
    "openai": {"messages": CLEAR},
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CLEAR]},
    "request": {"request": {"messages": CLEAR[:1]}, "response": {"choices": [{"message": CLEAR[1]}]}},
    "sharegpt": {
        "conversations": [
            {"from": name, "value": turn["content"]} for name, turn in zip(["human", "gpt", "user"], CLEAR, strict=True)
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_conversation_a_line(tmp_path: Path, shape: str) -> None:
    """OpenAI and ShareGPT lines give the same turns, each with its line number; a BOM does not matter."""
    path = jsonl(tmp_path / "log.jsonl", SHAPES[shape], {"messages": []}, SHAPES[shape])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    expected = CLEAR[:2] if shape == "request" else CLEAR
    assert read(path) == ([(1, expected), (3, expected)], [])


def test_turns_on_lines_of_their_own(tmp_path: Path) -> None:
    """An empty line, a system turn and another conversation id begin a conversation; tool turns are left out."""
    system = {"role": "system", "content": "Be kind."}
    path = tmp_path / "log.jsonl"
    lines = [user("a"), {"role": "tool", "content": {"x": 1}}, assistant("b"), "", user("c"), system, user("d")]
    lines += [{**user("e"), "conversation_id": 1}, {**user("f"), "conversation_id": 2}]
    path.write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    assert read(path) == (
        [
            (1, [user("a"), assistant("b")]),
            (5, [user("c")]),
            (6, [system, user("d")]),
            (8, [user("e")]),
            (9, [user("f")]),
        ],
        [],
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "User: a\nmore\n\nlast\nAssistant: b\n\nUser: c\nAssistant: d",
            [["a\nmore\n\nlast", "b"], ["c", "d"]],
        ),
        ("User: a\n\nAssistant: b\n\nUser: c\r\n\r\nAssistant: d\r\n", [["a", "b", "c", "d"]]),
        ("USER: a\nAI: b\nSystem: s\nHuman: c", [["a", "b"], ["s", "c"]]),
    ],
)
def test_text_files(tmp_path: Path, text: str, expected: list[list[str]]) -> None:
    """Labelled lines are turns of many lines; empty lines part conversations unless they part all turns."""
    (tmp_path / "log.txt").write_text(text, newline="")
    found, bad = read(tmp_path / "log.txt")
    assert [[turn["content"] for turn in turns] for _, turns in found] == expected
    assert bad == []


@given(talks=st.lists(conversations, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, talks: list[list[Message]]) -> None:
    """Whatever the turns hold, they come back, from one line a conversation and from one line a turn."""
    folder = tmp_path_factory.mktemp("logs")
    whole = jsonl(folder / "whole.jsonl", *({"messages": turns} for turns in talks))
    single = folder / "single.jsonl"
    single.write_text("\n\n".join("\n".join(map(json.dumps, turns)) for turns in talks))
    for path in (whole, single):
        found, bad = read(path)
        assert [turns for _, turns in found] == talks
        assert bad == []


def test_malformed_lines_are_told_and_left_out(tmp_path: Path) -> None:
    """Each kind of malformed line is reported with its number and reason, and the lines around it are read."""
    good = json.dumps({"messages": CLEAR}).encode()
    broken = {
        b'{"messages": [': "not JSON",
        b"[1]": "expected a JSON object",
        b'{"text": "x"}': "expected `messages`",
        b'{"messages": 3}': "`messages` is not a list",
        b'{"messages": [3]}': "a turn is not an object",
        b'{"messages": [{"role": "king", "content": "x"}]}': "role",
        b'{"messages": [{"role": "user"}]}': "content",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "surrogates",
        b'{"request": {}, "response": {}}': "`request`",
        b"\xff\xfe": "not UTF-8",
        b"[" * 100_000: "nested",
        b"x" * (MAX_LINE + 1): "longer than",
    }
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([good, *broken, good]) + b"\n")
    found, bad = read(path)
    assert [number for number, _ in found] == [1, len(broken) + 2]
    assert [number for number, _ in bad] == list(range(2, len(broken) + 2))
    for (_, why), expected in zip(bad, broken.values(), strict=True):
        assert expected in why


def test_malformed_line_parts_a_transcript(tmp_path: Path) -> None:
    """A reply after a line that was left out is not taken for the answer to what stands before that line."""
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(user('a'))}\nbroken\n{json.dumps(assistant('b'))}\n")
    assert [turns for _, turns in read(path)[0]] == [[user("a")], [assistant("b")]]


@pytest.mark.parametrize("text", ['[\n{"messages": []},\n{"messages": []}\n]\n', '  [{"messages": []}]'])
def test_one_big_array_is_refused(tmp_path: Path, text: str) -> None:
    """A JSON array over all lines is refused with the way to convert it."""
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"log.json: is one JSON array.*jq -c '\.\[\]'"):
        read(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    """What cannot be opened is named."""
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        check_log(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        check_log(tmp_path)


def test_endless_transcript_is_read_in_parts(tmp_path: Path) -> None:
    """A transcript without an end is cut before a user turn, and no exchange is lost."""
    path = jsonl(tmp_path / "log.jsonl", *[user("a"), assistant("b")] * (2 * MAX_TURNS))
    found, _ = read(path)
    assert max(len(turns) for _, turns in found) <= MAX_TURNS + 1
    assert sum(len(list(exchanges(turns))) for _, turns in found) == 2 * MAX_TURNS


@given(turns=conversations, system=st.booleans())
def test_exchanges_answer_user_turns(turns: list[Message], system: bool) -> None:
    """Every reply to a user turn is one exchange; its prompt is a short end of what was said, with the system turn."""
    told: list[Message] = [{"role": "system", "content": "s"}] if system else []
    messages = told + turns
    found = list(exchanges(messages))
    answered = [i for i in range(1, len(turns)) if (turns[i - 1]["role"], turns[i]["role"]) == ("user", "assistant")]
    assert [exchange.turn - len(told) for exchange in found] == answered
    for exchange in found:
        history = exchange.prompt[len(told) :]
        assert exchange.prompt[: len(told)] == told
        assert 1 <= len(history) <= 6
        assert history[0]["role"] == history[-1]["role"] == "user"
        assert all(one["role"] != other["role"] for one, other in pairwise(history))
        said = "\n\n".join(message["content"] for message in messages[len(told) : exchange.turn])
        assert said.endswith("\n\n".join(message["content"] for message in history))


@pytest.mark.parametrize(
    "text",
    [DIRECTION, "Hi! please add a test", "ok, now delete the old branch", "Could you sort this list?",
     "I need you to fix it.", "The file is big. Split it in two.", "I\u2019d like you to stop that"],
)  # fmt: skip
def test_direction(text: str) -> None:
    """Imperatives and requests give direction."""
    assert gives_direction(text)


@pytest.mark.parametrize(
    "text",
    ["Hi there!", "Thanks a lot, great work.", "What is the capital of France?", "How does TCP work?", "ok", "",
     "That was wrong.", "I like lamps.", "How can you tell lamps apart?"],
)  # fmt: skip
def test_no_direction(text: str) -> None:
    """Greetings, thanks, statements and bare questions give none."""
    assert not gives_direction(text)


@pytest.mark.parametrize(
    ("following", "expected"),
    [
        ("I asked you to write it.", {"clear": "insists"}),
        ("Just do it!", {"clear": "insists"}),
        ("That\u2019s not what I asked.", {"clear": "insists"}),
        ("Please write the label that says 40 lamps", {"clear": "repeats"}),
        ("You should have told me.", {"flawed": "should_have_said"}),
        ("Actually the file does not exist.", {"flawed": "false_premise"}),
        ("It deleted everything.", {"flawed": "damage"}),
        ("That was wrong.", {"flawed": "was_wrong"}),
        ("I asked you to write it, and it broke.", {"clear": "insists", "flawed": "damage"}),
        ("You're right. Write a label that says 30 lamps.", {}),
        ("Then write a label that says 30 lamps and not 40", {}),
        ("Don't write a label that says 40 lamps", {}),
        ("Write a label that says 40 lamps or 50", {}),
        ("Sorry, just write it without a number.", {}),
        ("I told you the wrong number.", {"flawed": "false_premise"}),
        ("That was wrong, you made a typo.", {}),
        ("Thanks!", {}),
        ("", {}),
    ],
)
def test_evidence(following: str, expected: dict) -> None:
    """The next turn says that the direction was clear, or flawed, or nothing; giving in is no insisting."""
    assert evidence(DIRECTION, following) == expected


@given(direction=st.text(max_size=80), following=st.text(max_size=80))
def test_evidence_names_a_rule(direction: str, following: str) -> None:
    """On any text the rules end, and each side that they find has the name of its rule."""
    assert all(evidence(direction, following).values())


def test_both_sides_become_rows(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """What was said is rejected, a steered reply of the right stance chosen, and the row says where it is from."""
    log = jsonl(tmp_path / "chat.jsonl", {"messages": QUIET}, {"messages": CLEAR}, {"messages": FLAWED})
    summary = run(importer().run([log]))
    clear, flawed = sorted(rows(tmp_path), key=lambda row: row.side)
    assert (clear.side, clear.rejected[0]["content"], clear.prompt) == ("clear", PUSHES, CLEAR[:1])
    assert (flawed.side, flawed.rejected[0]["content"], flawed.prompt) == ("flawed", COMPLIES, FLAWED[:1])
    assert "wrong" not in clear.chosen[0]["content"]
    assert "wrong" in flawed.chosen[0]["content"]
    assert clear.meta.items() >= {
        "source": "log", "log": "chat.jsonl", "line": 2, "turn": 1, "side_evidence": "insists",
        "rejected_source": "log", "chosen_source": "steered", "policy": "round_00", "template": "log",
        "flaw": "from_log", "domain": "log", "seed": 7, "masked": 0, "chosen_score": 0.9, "rejected_score": 0.1,
    }.items()  # fmt: skip
    assert (summary.conversations, summary.turns, summary.exchanges) == (3, 9, 3)
    assert (summary.wrong, summary.pairs, summary.undecided, summary.malformed) == (2, 2, 1, 0)


def test_stance_and_evidence_must_fit(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """Insisting after a compliance, or a report after a push-back, decides nothing."""
    log = jsonl(
        tmp_path / "chat.jsonl",
        {"messages": [CLEAR[0], FLAWED[1], CLEAR[2]]},
        {"messages": [FLAWED[0], CLEAR[1], FLAWED[2]]},
    )
    summary = run(importer().run([log]))
    assert (summary.undecided, summary.wrong, rows(tmp_path)) == (2, 0, [])


def test_no_direction_no_question_to_the_judge(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """Chat without direction, or without evidence, costs no call of the judge."""
    judge = WordJudge()
    chat = [user("Hi there!"), assistant("Hello."), user("I asked you to write it.")]
    log = jsonl(tmp_path / "chat.jsonl", {"messages": chat}, {"messages": QUIET})
    summary = run(importer(judge=judge).run([log]))
    assert (summary.no_direction, summary.undecided, judge.asked) == (1, 1, [])


def test_running_again_does_not_double(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """Rows that are there stay as they are; a torn last row is made again; new lines are added."""
    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR}, {"messages": FLAWED})
    run(importer().run([log]))
    out = tmp_path / "out.jsonl"
    before = out.read_bytes()
    assert run(importer().run([log])).already_there == 2
    assert out.read_bytes() == before
    out.write_bytes(before[:-5])
    assert run(importer().run([log])).pairs == 1
    assert out.read_bytes() == before


def test_second_import_into_a_file_is_refused(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """Two at once would both add the rows that neither found there."""
    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR})
    with owned(tmp_path / "out.jsonl"), pytest.raises(RunError, match=r"out\.jsonl: another process"):
        run(importer().run([log]))
    assert run(importer().run([log])).pairs == 1


def test_signal_lets_exchanges_end(tmp_path: Path, importer: Callable) -> None:
    """What is under way becomes rows, nothing is begun, and the same command finds the rest."""
    said: list[str] = []
    stop = Stop(said.append, "same command")

    def write(messages: Sequence[Message], number: int) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return obedient(messages, number)

    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR}, {"messages": FLAWED})
    with pytest.raises(Stopped, match=r"^stopped; same command$"):
        stop.run(importer(write, stop=stop, generate={"concurrency": 1}).run([log]))
    assert said == [FINISHING]
    assert len(rows(tmp_path)) == 1
    assert asyncio.run(importer().run([log])).pairs == 1


def test_exchange_that_the_engine_refuses_is_counted(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """A text with more tokens than it looks to have, say; the others are imported."""

    class Refusing(WordJudge):
        async def rule(self, names: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
            if questions[0].reply == PUSHES:
                raise CallRefused("prompt too long")
            return await super().rule(names, questions)

    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR}, {"messages": FLAWED})
    summary = run(importer(judge=Refusing()).run([log]))
    assert (summary.pairs, summary.not_usable) == (1, {"engine_refused": 1})


def test_history_that_is_logged_again_counts_once(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """Logs of requests repeat a conversation with every turn; its exchanges are used once."""
    longer = [*CLEAR, assistant("Fine."), user("Thanks!")]
    summary = run(importer().run([jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR}, {"messages": longer})]))
    assert (summary.pairs, summary.already_there) == (1, 1)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("No, that is wrong, I will not.", "judged_push_back"),
        ("hm, forty lamps it may be then", "unsure"),
        ("so so", "too_short"),
        ("Label " * 40, "length_ratio"),
        ("No, that is right, the list says something else.", "too_alike"),
    ],
)
def test_chosen_reply_must_pass(tmp_path: Path, run: Callable, importer: Callable, reply: str, reason: str) -> None:
    """A chosen reply that is not surely right, or too like or unlike the rejected one, is counted with its reason."""
    calls = []

    def write(messages: Sequence[Message], number: int) -> str:
        calls.append(messages)
        return reply.strip()

    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR})
    summary = run(importer(write).run([log]))
    assert (summary.not_usable, summary.wrong, summary.pairs) == ({f"chosen_{reason}": 1}, 1, 0)
    assert len(calls) == ATTEMPTS


def test_what_was_said_must_be_judged(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """A reply of the log on which the judge abstains is not used; one that cannot fit the engine is not asked about."""
    unsure = [CLEAR[0], assistant("hm, maybe that is wrong"), CLEAR[2]]
    long = [user(DIRECTION + " 7" * 3_000), *CLEAR[1:]]
    summary = run(importer().run([jsonl(tmp_path / "chat.jsonl", {"messages": unsure}, {"messages": long})]))
    assert summary.not_usable == {"reply_unsure": 1, "too_long": 1}


def test_everything_is_masked(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """No secret of a log is shown to a model or stored, and the masks are counted."""
    key, mail = "sk-abcdefghijklmnopqrst0123", "ann@example.org"
    talk = [user(f"Send 40 lamps to {mail}."), assistant(f"No, {key} is wrong, really wrong."), CLEAR[2]]
    seen: list[str] = []

    def write(messages: Sequence[Message], number: int) -> str:
        seen.extend(message["content"] for message in messages)
        return f"I send forty lamps to {mail}."

    judge = WordJudge()
    summary = run(importer(write, judge).run([jsonl(tmp_path / "chat.jsonl", {"messages": talk})]))
    seen += [question.reply for question in judge.asked]
    stored = (tmp_path / "out.jsonl").read_text()
    assert not [text for text in [*seen, stored] if key in text or mail in text]
    assert summary.masked == {"API_KEY": 1, "EMAIL": 1}
    assert [row.meta["masked"] for row in rows(tmp_path)] == [2]


def test_steering_keeps_the_turns_before(tmp_path: Path) -> None:
    """The chat that asks for the chosen reply has the log's system turn and history, and the note at its end."""
    prompt = [{"role": "system", "content": "Be kind."}, user("Hi."), assistant("Hello."), user(DIRECTION)]
    system, *history, last = steered_prompt(prompt, "flawed")
    assert system["content"].startswith("Be kind.\n\n")
    assert history == prompt[1:3]
    assert re.match(rf"{re.escape(DIRECTION)}\s+\(.+\)$", last["content"])


def test_foreign_out_files_are_left_alone(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """A log given as --out, or any file that holds other lines, is refused and unchanged."""
    log = jsonl(tmp_path / "chat.jsonl", {"messages": CLEAR})
    out = jsonl(tmp_path / "out.jsonl", {"messages": CLEAR})
    for logs, match in ([out], "--out at once"), ([log], "out.jsonl:1"):
        before = out.read_bytes()
        with pytest.raises(DataError, match=match):
            run(importer().run(logs))
        assert out.read_bytes() == before


def test_malformed_lines_are_counted_and_the_first_shown(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """The summary counts all malformed lines and names twenty."""
    log = tmp_path / "chat.jsonl"
    log.write_text("broken\n" * 30)
    summary = run(importer().run([log]))
    assert (summary.malformed, len(summary.malformed_lines)) == (30, 20)
    assert summary.malformed_lines[0].startswith("chat.jsonl:1 not JSON")


def test_work_in_flight_is_bounded(tmp_path: Path, run: Callable, importer: Callable) -> None:
    """No more than `generate.concurrency` exchanges are under way at once, and all are done."""
    talks = [[user(f"Write a label that says {n} lamps."), *CLEAR[1:]] for n in range(12)]
    log = jsonl(tmp_path / "chat.jsonl", *({"messages": talk} for talk in talks))
    importing = importer(generate={"concurrency": 3})
    under_way: list[int] = []
    one, running = importing._one, 0

    async def counted(*arguments: object) -> None:
        nonlocal running
        running += 1
        under_way.append(running)
        await one(*arguments)
        running -= 1

    importing._one = counted
    assert run(importing.run([log])).pairs == 12
    assert max(under_way) == 3


def test_large_logs_need_little_memory(tmp_path: Path) -> None:
    """100,000 turns, half as conversations and half as an endless transcript, take a process a few megabytes more."""
    talk = [user("Write a label."), assistant("Done, as you said."), user("And so on?"), assistant("?")] * 5
    jsonl(tmp_path / "whole.jsonl", *[{"messages": talk}] * 2_500)
    jsonl(tmp_path / "turns.jsonl", *talk * 2_500)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    turns, undecided, kilobytes = map(int, child.stdout.split())
    assert (turns, undecided) == (100_000, 25_000)
    assert kilobytes < 10_000


def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    """A file of other text is refused with its line and keeps every byte, with a line end at its end or without."""
    for text in ("KEY=1", "one line\ntwo", '{"other": "json"}', "one line\n"):
        out = tmp_path / "notes.txt"
        out.write_text(text)
        with pytest.raises(DataError, match=r"notes\.txt:\d"):
            check_paths([], out)
        assert out.read_text() == text


def test_rows_without_a_last_line_end_are_kept(tmp_path: Path, make_row: Callable[..., PreferencePair]) -> None:
    """A last row that an editor left without its line end is a row; half a row of ours is not, and does no harm."""
    rows = [make_row("a").model_dump_json(), make_row("b").model_dump_json()]
    out = tmp_path / "rows.jsonl"
    assert check_paths([], out) == set()
    out.write_text("\n".join(rows))
    assert check_paths([], out) == {"a", "b"}
    assert out.read_text() == "\n".join(rows) + "\n"
    out.write_text(rows[0] + "\n" + rows[1][:40])
    assert check_paths([], out) == {"a"}
