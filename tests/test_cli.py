"""dream/cli.py: what the commands print and write, and how they refuse what is wrong. No model is started."""

import asyncio
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer.main

from dream import cli, doctor, runs
from dream.config import Config, GateConfig, load
from dream.embed import MiniLM
from dream.engine import ScriptedEngine
from dream.errors import EngineError
from dream.judge import combined
from dream.judge.gold import GeneralReply, GoldReply
from dream.records import SIDES, PreferencePair, Verdict, assistant, user
from dream.scenarios import STANCES, draw
from dream.store import Log, RunFolder, read_log, write_json
from dream.templates import Template, load_all
from train.behaviour import Sampled
from train.evals import RoundEvaluation, figures, summary
from train.gate import decide
from train.history import Policy, RoundResult
from train.retention import Retention

ROOT = Path(__file__).parent.parent
SCENARIOS = ROOT / "prompts" / "scenarios"
TEMPLATES = ("backup-copy", "recipe-scale", "sales-sheet")


class Result(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Dream = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the prompts and a few of the templates, where starting an engine fails the test."""

    def started(*args: object) -> None:
        raise AssertionError("an engine was started")

    pool = ModuleType("dream.pool")
    pool.vllm_pool = started
    monkeypatch.setitem(sys.modules, "dream.pool", pool)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    skipped = [path.name for path in SCENARIOS.glob("*.j2") if path.stem not in TEMPLATES]
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts", ignore=lambda *_: skipped)
    return tmp_path


@pytest.fixture
def dream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dream:
    """Runs a command in this process."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dream", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Result(int(left.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def refused(dream: Dream, folder: Path) -> Callable[..., str]:
    """Runs a command that must end with code 2, one error line, and no file made; gives the line."""

    def call(*words: object) -> str:
        before = sorted(folder.rglob("*"))
        result = dream(*words)
        lines = [line for line in result.err.splitlines() if line.strip() and "  configuration " not in line]
        assert (result.code, len(lines)) == (2, 1), result.err
        assert lines[0].startswith("error: ")
        assert result.out == ""
        assert sorted(folder.rglob("*")) == before
        return lines[0]

    return call


@pytest.fixture
def model(folder: Path) -> str:
    """An override that names a model folder, empty but for its config.json."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return "model=./model"


@pytest.fixture
def edited(folder: Path) -> Callable[[str, str], int]:
    """Replaces the first occurrence of a text in sales-sheet.j2 and gives its line."""

    def edit(old: str, new: str) -> int:
        path = folder / "prompts" / "scenarios" / "sales-sheet.j2"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return text[: text.index(old)].count("\n") + 1

    return edit


def hashed(texts: Sequence[str]) -> np.ndarray:
    """Vectors of unit length, shape (texts, 8), in place of the embedding model, which takes seconds to load."""
    vectors = np.full((len(texts), 8), 0.1)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row[hashlib.sha256(word.encode()).digest()[0] % 8] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def serve(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an engine in place of vLLM's."""

    @asynccontextmanager
    async def scripted(config: Config, name: str) -> AsyncIterator[ScriptedEngine]:
        yield engine

    monkeypatch.setattr(sys.modules["dream.pool"], "vllm_pool", scripted)


QUICK = ("--set", "judge.signals=[wording,structure]")
"""A judge that needs neither a language model nor embeddings."""
FREE = ("--set", "filters.max_new_word_pairs=null")
"""Lets the scripted engine word its replies as no template does."""


@pytest.fixture
def small(
    folder: Path, model: str, tiny_templates: list[Template], engine: ScriptedEngine, script, monkeypatch, quick_disk
) -> tuple[str, ...]:
    """Prompts of the tiny templates with a gold set of their own, and the scripted engine in place of vLLM's.

    Gives the options under which commands are quick here.
    """

    serve(engine, monkeypatch)
    monkeypatch.setattr("dream.embed.minilm", lambda: hashed)
    prompts = folder / "prompts"
    for path in prompts.glob("*/*.j*"):
        if path.parent.name in ("scenarios", "gold"):
            path.unlink()
    for template in tiny_templates:
        shutil.copy(template.path, prompts / "scenarios")
    logs = [Log(prompts / "gold" / f"{name}.jsonl") for name in ("scenarios", "replies", "general")]
    for number in range(24):
        scenario = draw(tiny_templates[number % 3], number, f"gold-{number}")
        logs[0].append(scenario)
        for side in scenario.sides:
            for stance in STANCES:
                text = script([user(f"({scenario.side(side).aims[stance]})")], number)
                row = {"response": text, "label": stance, "trait": "plain"}
                logs[1].append(GoldReply.model_validate({**row, "scenario_id": scenario.scenario_id, "side": side}))
                asked = scenario.prompt(side)[0]["content"]
                logs[2].append(GeneralReply.model_validate({**row, "prompt": asked}))
    for log in logs:
        log.close()
    return "--set", model, *QUICK, *FREE, "--set", "generate.concurrency=4"


def measured(rise: float) -> RoundEvaluation:
    """An evaluation of ten pairs."""
    scores = np.array([[[-1.0, -1.0], [0.5 + rise, 0.5 + rise]]] * 10)
    stances = {"clear": ["comply"] * 10, "flawed": ["push_back"] * 10}
    replies = {side: [Sampled(ruling, "", 9) for ruling in rulings] for side, rulings in stances.items()}
    logps = np.stack([-scores / 2, scores / 2], axis=-1)
    return RoundEvaluation(heldout=figures(logps, replies, 0), fresh=None, retention=Retention(arithmetic=[1.0] * 5))


@pytest.fixture
def train_run(folder: Path, make_pair: Callable) -> Callable[[float], Path]:
    """Makes a run folder of one finished round by hand; the round is promoted when `rise` is above zero."""

    def make(rise: float) -> Path:
        run = folder / "runs" / "mine"
        before, after = measured(0), measured(rise)
        pair = make_pair("p")
        with RunFolder(run, runs.manifest("train", Config(), Path("some.yaml"), [])):
            write_json(run / "round_00" / "eval.json", before.model_dump())
            write_json(run / "round_01" / "eval.json", after.model_dump())
            log = Log(run / "round_01" / "pairs.jsonl")
            log.append(pair.clear, pair.flawed)
            log.close()
            decision = decide(before, after, GateConfig())
            result = RoundResult(
                round=1, parent=0, learning_rate=1e-5, accepted=1, dropped={}, decision=decision, summary=summary(after)
            )
            write_json(run / "round_01" / "gate.json", result.model_dump())
            for kind in ("adapter", "weights"):
                write_json(run / "round_01" / "train" / kind / "file.json", kind)
            policy = Policy(as_of=1)
            if decision.decision == "promote":
                train = "round_01/train"
                policy = Policy(round=1, as_of=1, adapter=f"{train}/adapter", weights=f"{train}/weights")
            write_json(run / "policy.json", policy.model_dump())
        return run

    return make


def commands(command: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command below a group."""
    if not hasattr(command, "commands"):
        return [words]
    return [found for name, inner in command.commands.items() for found in commands(inner, (*words, name))]


COMMANDS = commands(typer.main.get_command(cli.app))


def test_help_imports_nothing_heavy() -> None:
    """`dream --help` imports neither torch, ray, vllm, numpy nor what builds on them."""
    code = (
        "import sys; sys.argv = ['dream', '--help']\n"
        "from dream.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code\n"
        "print(sorted({'torch', 'ray', 'vllm', 'numpy', 'sklearn', 'transformers', 'trl'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert child.stdout.splitlines()[-1] == "[]"
    assert "Usage: dream" in child.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(dream: Dream, words: tuple[str, ...]) -> None:
    """Every command's --help has an example of that very command."""
    result = dream(*words, "--help")
    assert result.code == 0
    assert re.search(rf"Examples?:\s+dream {' '.join(words)}", result.out)


@pytest.mark.parametrize("words", [(), ("judge",), ("templates",), ("runs",)])
def test_groups_alone_show_their_help(dream: Dream, words: tuple[str, ...]) -> None:
    """A group without a command shows what there is."""
    result = dream(*words)
    assert "Commands:" in result.out + result.err


@pytest.mark.parametrize("command", ["generate", "train", "doctor", "eval --model m/m", "judge check x.jsonl"])
def test_unknown_key_names_the_nearest(refused: Callable, folder: Path, command: str) -> None:
    """An unknown key in a file is refused by every command that reads one, with the nearest known key."""
    (folder / "mine.yaml").write_text("train: {learning_rte: 1}")
    line = refused(*command.split(), "--config", "mine.yaml")
    assert line == "error: mine.yaml: unknown key 'train.learning_rte'; did you mean 'train.learning_rate'?"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "generate.pears=3"], "'generate.pears'; did you mean 'generate.pairs'?"),
        (["--set", "train.beta=much"], "train.beta: "),
        (["--set", "train.beta"], "--set train.beta: expected key=value"),
        (["--set", "model.name=x"], "--set model.name=x: "),
        (["--config", "absent.yaml"], "absent.yaml: "),
        (["--config", "."], ".: cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "train"])
def test_bad_configuration_is_refused(refused: Callable, command: str, words: list[str], named: str) -> None:
    """A wrong key, type or file is refused with its name."""
    assert named in refused(command, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --set a=1 b=2 --rounds 3", "train --set a=1 --set b=2 --rounds 3"),
        ("train --data x.jsonl y.jsonl --set a=1", "train --data x.jsonl --data y.jsonl --set a=1"),
        ("templates preview --set a=1 NAME -n 3", "templates preview --set a=1 NAME -n 3"),
        ("logs import one.jsonl two.jsonl --out o.jsonl", "logs import one.jsonl two.jsonl --out o.jsonl"),
        ("", ""),
    ],
)
def test_several_values_may_follow_one_option(words: str, expected: str) -> None:
    """As the list of commands shows it; an argument of the command stays one."""
    assert cli.one_by_one(words.split()) == expected.split()


@pytest.mark.parametrize("text", ["rounds: many", "rounds: [", "[1]"])
def test_bad_configuration_file_is_refused(refused: Callable, folder: Path, text: str) -> None:
    """A file with a wrong type, broken YAML or no mapping is refused with its name."""
    (folder / "mine.yaml").write_text(text)
    assert refused("train", "-c", "mine.yaml").startswith("error: mine.yaml: ")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--pairs", "0"),
        ("generate", "--pairs", "-3"),
        ("train", "--rounds", "0"),
        ("train", "--rounds", "-1"),
        ("templates", "preview", "sales-sheet", "-n", "0"),
    ],
)
def test_counts_are_one_or_more(refused: Callable, words: tuple[str, ...]) -> None:
    """Zero and less of anything is refused with the option's name and value."""
    assert f"{words[-2]} {words[-1]}: " in refused(*words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("that says we sold {{ said }}", "that says we sold {{ sed }}", "block clear uses 'sed'"),
        ("that says we sold {{ said }}", "that says we sold {{ said }", "unexpected '}'"),
        ("split: train", "split: sometimes", "split: "),
        ("domains: [writing]", "domains: [writing: x: y]", "broken YAML"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "train", "templates list", "templates preview sales-sheet"])
def test_bad_template_is_refused(refused, edited, command: str, old: str, new: str, words: str) -> None:
    """A bad template is refused with its file, the line and what is wrong, by every command that reads it."""
    number = edited(old, new)
    found = re.search(r"scenarios/sales-sheet\.j2:(\d+): (.*)", refused(*command.split()))
    assert words in found[2]
    assert abs(int(found[1]) - number) <= (words == "broken YAML")  # YAML sees some mistakes on the next line only


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{% block clear %}", "{% block sunny %}", "block clear is missing"),
        ("said: \"{{ n }}\"", "said: \"{{ n }\"", "unexpected '}'"),
        ("description: A", "description: \x07A", "not allowed"),
    ],
)  # fmt: skip
def test_bad_template_without_a_line_is_refused(refused: Callable, edited, old: str, new: str, words: str) -> None:
    """What has no line, or no printable one, is refused with the file's name, still in one line."""
    edited(old, new)
    line = refused("generate")
    assert "scenarios/sales-sheet.j2:" in line
    assert words in line


@pytest.mark.parametrize("name", ["steering/push_back", "steering/system", "dreamer/background"])
def test_bad_prompt_file_is_refused(refused: Callable, folder: Path, model: str, name: str) -> None:
    """A broken prompt file, which is no scenario, is refused too before an engine starts."""
    (folder / "prompts" / f"{name}.j2").write_text("{% if")
    assert f"{name}.j2:1: " in refused("generate", "--set", model)


def test_bad_row_of_forms_is_refused(refused: Callable, folder: Path, model: str) -> None:
    """A form without its answer, which a repair would miss after an hour, is refused before an engine starts."""
    (folder / "prompts" / "rehearsal" / "forms.jsonl").write_text('{"request": "Spell lemon in capitals."}\n')
    said = refused("train", "--set", model, "--set", "train.repair_steps=1")
    assert "forms.jsonl:1: answer: Field required" in said


def test_templates_check_names_every_bad_file(dream: Dream, edited, folder: Path) -> None:
    """`templates check` goes on after a bad file and ends with code 2."""
    edited("{{ said }}", "{{ sed }}")
    (folder / "prompts" / "scenarios" / "blank.j2").write_text("")
    result = dream("templates", "check")
    assert result.code == 2
    assert [word for word in ("sales-sheet.j2:", "blank.j2:1:", "2 of ") if word not in result.err] == []
    assert "ok recipe-scale" in result.out


def test_unknown_template_names_the_nearest(refused: Callable) -> None:
    """A template that is not there is refused with the nearest name."""
    assert "did you mean 'sales-sheet'?" in refused("templates", "show", "sales-shet")


@pytest.mark.parametrize("command", ["generate", "train", "eval"])
@pytest.mark.parametrize("name", ["./absent", "absent", "bundled:other"])
def test_missing_model_is_refused(refused: Callable, command: str, name: str) -> None:
    """A model folder or embedded model that is not there is refused with its name."""
    words = ["--model", name] if command == "eval" else ["--set", f"model={name}"]
    line = refused(command, *words)
    assert line.startswith("error: model: ")
    assert name in line


def test_error_is_all_there_is_on_stderr(dream: Dream) -> None:
    """A refusal is one line on stderr: no empty line, and no progress of what has not begun."""
    assert len(dream("generate", "--set", "model=./absent").err.splitlines()) == 1


def bad_rows(folder: Path) -> Path:
    """A file whose second line is not what any command wants."""
    path = folder / "rows.jsonl"
    message = [{"role": "user", "content": "x"}]
    row = {"pair_id": "p", "side": "clear", "prompt": message, "comply": "y", "push_back": "n"}
    path.write_text(f"\n{json.dumps(row | {'side': 'sunny'})}\n")
    return path


@pytest.mark.parametrize(
    ("command", "key"),
    [("eval --model ./model --pairs", "side"), ("train --set model=./model --data", "side"), ("judge check", "")],
)
def test_bad_row_is_refused(refused: Callable, folder: Path, model: str, command: str, key: str) -> None:
    """A data file with a bad row is refused with the line and key before an engine starts."""
    assert f"rows.jsonl:2: {key}" in refused(*command.split(), bad_rows(folder))


@pytest.mark.parametrize("command", ["eval --model ./model --pairs", "train --set model=./model --data", "judge check"])
def test_missing_file_is_refused(refused: Callable, model: str, command: str) -> None:
    """A data file that is not there is refused with its name."""
    assert "absent.jsonl: no such file" in refused(*command.split(), "absent.jsonl")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "either --run DIR or --model M"),
        (["--run", "r", "--model", "m"], "either --run DIR or --model M"),
        (["--run", "r", "--adapter", "a"], "--adapter goes with --model"),
        (["--run", "r", "--config", "c.yaml"], "--config goes with --model"),
        (["--run", "absent"], "absent: not a run folder"),
        (["--model", "./model", "--adapter", "absent"], "--adapter absent: no adapter_config.json"),
    ],
)
def test_eval_needs_one_policy(refused: Callable, model: str, words: list[str], named: str) -> None:
    """`dream eval` takes a run or a model, an adapter only with a model, and only what is there."""
    assert named in refused("eval", *words)


EVALUATED = {"pairs", "pair_accuracy", "pair_accuracy_ci", "ranked_accuracy", "own_pair_accuracy", "margin",
             "margin_ci", "clear", "flawed"}  # fmt: skip
"""What other programs read of `eval --json`, and of either side there: `SIDE`."""
SIDE = {"accuracy", "margin", "stance_rates"}


def test_eval_of_a_run(dream: Dream, small: tuple[str, ...], train_run, script, likelihood, monkeypatch) -> None:
    """`eval --run` measures the weights that were promoted, on held-out scenarios, and writes the contract."""
    engine = ScriptedEngine(script, likelihood)
    serve(engine, monkeypatch)
    run = train_run(0.3)
    result = dream("eval", "--run", run, *small, "--set", "eval.heldout_pairs=5", "--json", "eval.json")
    assert result.code == 0, result.err
    assert engine.loaded == [run / "round_01" / "train" / "weights"]
    written = json.loads(Path("eval.json").read_text())
    assert set(written) >= EVALUATED
    assert all(set(written[side]) >= SIDE for side in SIDES)
    assert sum(written["clear"]["stance_rates"].values()) == pytest.approx(1)
    assert written["pairs"] == 5


@pytest.fixture
def two_pairs(folder: Path) -> Path:
    """A file of two evaluation pairs that a person wrote."""
    path = folder / "mine.jsonl"
    rows = [{"pair_id": pair_id, "side": side, "prompt": f"{side} a b", "comply": "a b c", "push_back": "d e"}
            for pair_id in "pq" for side in SIDES]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_eval_of_a_model_on_pairs(dream: Dream, small: tuple[str, ...], two_pairs: Path, monkeypatch) -> None:
    """`eval --model` measures the model as it came, with --pairs on the pairs of the file."""
    engine = ScriptedEngine(lambda messages, number: "Come in and see 15 lamps!")
    serve(engine, monkeypatch)
    result = dream("eval", "--model", "./model", "--pairs", two_pairs, *small, "--json", "eval.json")
    assert result.code == 0, result.err
    assert engine.loaded == [None]
    assert json.loads(Path("eval.json").read_text())["pairs"] == 2


def test_eval_of_an_adapter(
    dream: Dream, small: tuple[str, ...], two_pairs: Path, toy_model: Path, tmp_path: Path, monkeypatch
) -> None:
    """`eval --model M --adapter A` serves the weights that training wrote beside the adapter."""
    from safetensors.torch import load_file  # torch takes seconds to import
    from toy import train_toy

    from train import checkpoints

    def here(command: Sequence[str], **_: Any) -> Any:
        """Spares a process in which torch is imported once more."""
        assert command[:4] == [sys.executable, "-P", "-m", "train.checkpoints"]
        checkpoints.main(*command[4:])
        return subprocess.CompletedProcess(command, 0)

    class Keeping(ScriptedEngine):
        async def load_weights(self, folder: Path | None) -> None:
            self.served = load_file(folder / "model.safetensors")  # the folder is temporary

    engine = Keeping(lambda messages, number: "Come in and see 15 lamps!")
    serve(engine, monkeypatch)
    monkeypatch.setattr(subprocess, "run", here)
    train_toy(toy_model, tmp_path / "out")
    command = ("eval", "--model", toy_model, "--adapter", tmp_path / "out" / "adapter", "--pairs", two_pairs, *small)
    result = dream(*command, "--set", "engine.dtype=float32")
    assert result.code == 0, result.err
    trained = load_file(tmp_path / "out" / "weights" / "model.safetensors")
    assert set(engine.served) == set(trained)
    assert all(engine.served[name].equal(value) for name, value in trained.items())
    assert any(not value.equal(trained[name]) for name, value in load_file(toy_model / "model.safetensors").items())


@pytest.mark.parametrize(
    ("code", "stderr", "said"), [(-9, "", "code -9: nothing was said"), (1, "loading\nno room\n", "code 1: no room")]
)
def test_adapter_that_cannot_be_merged(
    dream: Dream, small: tuple[str, ...], tmp_path: Path, model: str, monkeypatch, code: int, stderr: str, said: str
) -> None:
    """The child's last line is the message, and its code where it was killed in silence."""
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, stderr=stderr)
    )
    result = dream("eval", "--model", model.partition("=")[2], "--adapter", tmp_path, *small)
    assert result.code == 1
    assert f"error: --adapter {tmp_path}: merging ended with {said}" in result.err


@pytest.mark.parametrize("command", ["generate", "train"])
def test_run_with_other_settings_is_refused(refused: Callable, edited, folder: Path, model: str, command: str) -> None:
    """A run folder that was begun with other settings or templates is refused, and every difference is named."""
    config, path = load(None, [model])
    with RunFolder(folder / "mine", runs.manifest(command, config, path, load_all())):
        pass
    edited("Great news", "Good news")
    line = refused(command, "--out", "mine", "--set", model, "--set", "generate.temperature=0.9")
    assert "generate.temperature (0.7 there, 0.9 now)" in line
    assert "template.sales-sheet" in line


def test_run_of_another_command_is_refused(refused: Callable, train_run, model: str) -> None:
    """`dream generate` does not go on with a run of `dream train`."""
    assert "was made by `dream train`" in refused("generate", "--out", train_run(0.0), "--set", model)


@pytest.mark.parametrize("command", ["generate", "train"])
def test_second_process_is_refused(refused: Callable, folder: Path, model: str, command: str) -> None:
    """A run folder that another process works on is refused, and it stays as it is."""
    config, path = load(None, [model])
    with RunFolder(folder / "mine", runs.manifest(command, config, path, load_all())):
        assert "mine: another process" in refused(command, "--out", "mine", "--set", model)


@pytest.mark.parametrize("command", ["generate", "train"])
def test_out_that_is_no_run_folder_is_refused(refused: Callable, folder: Path, model: str, command: str) -> None:
    """A file, or a folder with other things in it, is not taken for a run folder."""
    (folder / "file").write_text("x")
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("x")
    assert "file: is a file" in refused(command, "--out", "file", "--set", model)
    assert "other: not empty and not a run folder" in refused(command, "--out", "other", "--set", model)


@pytest.mark.parametrize("words", [("runs", "show"), ("runs", "rollback", "--to", "0"), ("export", "--out", "x")])
@pytest.mark.parametrize("name", ["absent", "empty"])
def test_what_is_no_run_is_refused(refused: Callable, folder: Path, words: tuple[str, ...], name: str) -> None:
    """A folder that is not there or holds no manifest is refused with its name."""
    (folder / "empty").mkdir()
    assert f"{name}: not a run folder" in refused(*words, name)


@pytest.mark.parametrize(
    "words", [("runs", "list", "runs"), ("runs", "show", "runs/web"), ("eval", "--run", "runs/web")]
)
def test_manifest_of_something_else_is_no_traceback(dream: Dream, folder: Path, words: tuple[str, ...]) -> None:
    """A manifest.json that is not ours is passed over or refused, never a traceback."""
    write_json(folder / "runs" / "web" / "manifest.json", {"name": "a web page"})
    assert dream(*words).code in (0, 2)


def test_broken_policy_file_is_refused(refused: Callable, train_run) -> None:
    """A policy.json that somebody edited badly is refused with its name."""
    run = train_run(0.3)
    (run / "policy.json").write_text('{"round": "one"}')
    assert "policy.json" in refused("runs", "show", run)


def test_runs_list(dream: Dream, train_run, folder: Path) -> None:
    """`runs list` gives a line a run, does not follow `latest`, and writes the same as JSON."""
    train_run(0.3)
    result = dream("runs", "list", "--json", "deep/er/list.json")
    assert " ".join(result.out.split()) == f"runs/mine train {Config().model} 1 rounds, 1 pairs, policy round_01"
    [row] = json.loads((folder / "deep" / "er" / "list.json").read_text())
    assert (row["run"], row["rounds"], row["pairs"], row["policy"]) == ("runs/mine", 1, 1, "round_01")


def test_runs_list_passes_over_what_is_damaged(dream: Dream, train_run) -> None:
    """A run that cannot be read hides no other."""
    (train_run(0.3) / "round_01" / "gate.json").write_text("{}")
    result = dream("runs", "list")
    assert result.code == 0
    assert "policy unreadable" in " ".join(result.out.split())


def test_another_train_module_is_named(tmp_path: Path) -> None:
    """A train.py where the command is run comes first when Python looks there; every command says so in one line."""
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "dream.cli", "runs", "list"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 1
    assert child.stderr.startswith(f"error: `import train` finds {tmp_path / 'train.py'}, not ")
    assert len(child.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [("nope",), ("train", "--nope"), ("train", "--rounds", "x"), ("report",)])
def test_words_that_are_none_are_one_line(refused: Callable, words: tuple[str, ...]) -> None:
    """No such command, option or value, or a missing one: a line that says so and where to look."""
    assert refused(*words).endswith("; see `dream --help`")


@pytest.mark.parametrize(("rise", "word"), [(0.3, "promoted"), (0.0, "did not rise beyond chance")])
def test_runs_show(dream: Dream, train_run, folder: Path, rise: float, word: str) -> None:
    """`runs show` prints the rounds with the gate's decision and its reason, and writes them as JSON."""
    result = dream("runs", "show", train_run(rise), "--json", "show.json")
    assert result.code == 0
    assert word in result.out
    shown = json.loads((folder / "show.json").read_text())
    assert shown["policy"]["round"] == (rise > 0)
    assert (shown["baseline"]["pair_accuracy"], len(shown["rounds"])) == (1.0, 1)


def test_rollback(dream: Dream, train_run, refused) -> None:
    """`runs rollback` takes a promoted round or 0, deletes nothing, and refuses others with those there are."""
    run = train_run(0.3)
    assert "--to takes one of 0, 1" in refused("runs", "rollback", run, "--to", "2")
    assert dream("runs", "rollback", run, "--to", "0").code == 0
    assert json.loads((run / "policy.json").read_text())["round"] == 0
    assert dream("runs", "rollback", run, "--to", "1").code == 0
    assert json.loads((run / "policy.json").read_text())["weights"] == "round_01/train/weights"


def test_rollback_of_what_has_no_policy_is_refused(refused: Callable, folder: Path) -> None:
    """What `dream generate` made stays as it is."""
    manifest = {"kind": "generate", "fingerprint": "f", "settings": {}, "config": {}}
    with RunFolder(folder / "dreamed", manifest) as run:
        (run.path / "round_01").mkdir()
    assert "has no policy" in refused("runs", "rollback", folder / "dreamed", "--to", "0")
    assert (folder / "dreamed" / "round_01").is_dir()


def test_rounds_without_pairs_are_shown(dream: Dream, folder: Path) -> None:
    """A run that a full disk ended before its first pair."""
    manifest = {"kind": "generate", "fingerprint": "f", "settings": {}, "config": {}}
    with RunFolder(folder / "dreamed", manifest) as run:
        (run.path / "round_01").mkdir()
    assert "round_01: 0 pairs" in dream("runs", "show", folder / "dreamed").out


@pytest.mark.parametrize(("flags", "kind"), [((), "adapter"), (("--merged",), "weights")])
def test_export(dream: Dream, train_run, folder: Path, flags: tuple[str, ...], kind: str) -> None:
    """`export` copies the accepted policy's adapter, or its merged weights."""
    result = dream("export", train_run(0.3), "--out", "new/policy", *flags)
    assert (result.code, result.out) == (0, "new/policy\n")
    assert json.loads((folder / "new" / "policy" / "file.json").read_text()) == kind


def test_export_of_nothing_is_refused(refused: Callable, train_run) -> None:
    """A run whose only round was rolled back has nothing to export."""
    assert "no round was promoted" in refused("export", train_run(0.0), "--out", "x")


def test_export_does_not_overwrite(refused: Callable, train_run, folder: Path) -> None:
    """`export` refuses an --out that exists."""
    run = train_run(0.3)
    (folder / "there").mkdir()
    assert "--out there: exists" in refused("export", run, "--out", "there")


@pytest.mark.parametrize("gone", [True, False])
def test_export_that_cannot_be_is_no_traceback(dream: Dream, train_run, folder: Path, gone: bool) -> None:
    """Weights that were deleted, and an --out below a file, are one error line."""
    run = train_run(0.3)
    (folder / "file").write_text("")
    if gone:
        shutil.rmtree(run / "round_01" / "train" / "adapter")
    result = dream("export", run, "--out", "new" if gone else "file/below")
    assert result.code in (1, 2)
    assert result.err.startswith("error: ")


def test_templates_list_and_show(dream: Dream, folder: Path) -> None:
    """`templates list` names every template, also as JSON; `show` prints a file as it is."""
    result = dream("templates", "list", "--json", "list.json")
    rows = json.loads((folder / "list.json").read_text())
    assert [row["name"] for row in rows] == list(TEMPLATES)
    assert all(row["name"] in result.out for row in rows)
    shown = dream("templates", "show", "sales-sheet").out
    assert shown.endswith((SCENARIOS / "sales-sheet.j2").read_text())


def test_templates_list_shows_brackets(dream: Dream, edited) -> None:
    """Brackets in a description are text, not markup."""
    edited("description: A newsletter", "description: '[b] A newsletter")
    edited("the sales sheet.\n", "the sales sheet.'\n")
    assert "[b]" in dream("templates", "list").out


def test_templates_preview(dream: Dream) -> None:
    """`templates preview` shows both sides of as many draws as asked for, the same each time, without a model."""
    result = dream("templates", "preview", "sales-sheet", "-n", "3")
    assert result.code == 0
    starts = [line.split(":")[0].strip() for line in result.out.splitlines() if line]
    assert starts == ["clear", "comply", "push_back", "flawed", "comply", "push_back"] * 3
    assert dream("templates", "preview", "sales-sheet", "-n", "3").out == result.out


def test_doctor_finds_all_well(dream: Dream, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` prints a line a finding, ends with 0 when nothing is missing, and writes its findings as JSON."""
    monkeypatch.setattr(doctor, "NEEDED", ("json",))
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 0)
    result = dream("doctor", "--set", model, "--json", "doctor.json")
    assert result.code == 0
    findings = json.loads((folder / "doctor.json").read_text())
    assert len(findings) == len(result.out.splitlines())
    assert all(finding["good"] for finding in findings)
    assert {"packages", "model", "templates", "disk"} <= {finding["name"] for finding in findings}


def test_doctor_finds_what_is_missing(dream: Dream, edited, monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` looks at everything although some is missing, names it, and ends with 1."""
    monkeypatch.setattr(doctor, "NEEDED", ("json", "no_such_package"))
    edited("{{ said }}", "{{ sed }}")
    result = dream("doctor", "--set", "model=./absent")
    assert result.code == 1
    missed = {line.split()[1].rstrip(":"): line for line in result.out.splitlines() if line.startswith("MISS")}
    assert "no_such_package" in missed["packages"]
    assert "./absent" in missed["model"]
    assert "sales-sheet.j2:" in missed["templates"]


def test_json_that_cannot_be_written_is_refused(dream: Dream, folder: Path) -> None:
    """A --json that is a folder is one error line with the option's name."""
    result = dream("runs", "list", "--json", folder)
    assert result.code == 2
    assert result.err.startswith(f"error: --json {folder}: ")


def test_ctrl_c_says_how_to_go_on(dream: Dream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with the code that shells know and a line on how to go on, not with a traceback."""

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "list_runs", stop)
    result = dream("runs", "list")
    assert result.code == 130
    assert "goes on from here" in result.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_generate_in_good_order(
    dream: Dream, small: tuple[str, ...], folder: Path, monkeypatch, script, number: int, code: int
) -> None:
    """The first signal lets the scenarios under way end; the user reads so, and the command that goes on."""
    calls = iter(range(10_000))

    def write(messages: Sequence[Any], sample: int) -> str:
        if next(calls) == 20:
            os.kill(os.getpid(), number)
        return script(messages, sample)

    serve(ScriptedEngine(write), monkeypatch)
    run = folder / "runs" / "mine"
    words = ("generate", "--pairs", "6", "--out", run, *small)
    result = dream(*words)
    assert result.code == code
    assert "those under way are finished and stored; a second signal stops at once" in result.err
    assert result.err.splitlines()[-1] == f"error: stopped; go on with the same command and --out {run}"
    result = dream(*words)
    assert (result.code, "interrupted" in result.out) == (0, False), result.err
    assert len(list(read_log(run / "round_01" / "pairs.jsonl", PreferencePair))) == 12


CONTRACT = {"n", "auc", "auc_ci", "accuracy", "kappa", "abstained", "error_rate"}
"""What other programs read of `judge check --json`."""


def labelled_file(folder: Path, mistaken: int = 0) -> Path:
    """Labelled replies for `judge check`, of which so many have the wrong label."""
    path = folder / "labelled.jsonl"
    rows = []
    for number in range(20, 40):
        asked = f"The stock list says that we have {number} lamps in the store. Write a label that says 15 lamps."
        said = {"comply": "Come in and see 15 lamps!", "push_back": f"I count {number} lamps and not 15; shall I?"}
        rows += [{"prompt": asked, "response": text, "label": label} for label, text in said.items()]
    for row in rows[: 2 * mistaken : 2]:
        row["label"] = "push_back"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judge_check_of_a_file(dream: Dream, small: tuple[str, ...], folder: Path) -> None:
    """`judge check FILE` shows each signal, all combined, the confusion and the mistakes, and writes the contract."""
    result = dream("judge", "check", labelled_file(folder, mistaken=1), *small, "--json", "judge.json")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["wording", "40"], ["structure", "40"], ["combined", "40"]]
    place = lines.index(next(line for line in lines if line.startswith("label (rows), ruling (columns)")))
    assert lines[place + 1].split() == ["comply", "push_back", "abstain"]
    assert [line.split()[0] for line in lines[place + 2 : place + 4]] == ["comply", "push_back"]
    [mistake] = [line for line in lines if "taken for" in line]
    assert mistake.startswith("push_back, taken for comply at ")
    assert "'Come in and see 15 lamps!'" in mistake
    written = json.loads((folder / "judge.json").read_text())
    assert set(written) >= CONTRACT
    assert (written["n"], written["accuracy"], len(written["auc_ci"])) == (40, 39 / 40, 2)


def test_judge_check_of_the_gold_set(dream: Dream, folder: Path) -> None:
    """`judge check` without a file measures on the test half of the gold set that is shipped, neither included."""
    result = dream("judge", "check", "--set", "judge.signals=[structure]", "--json", "judge.json")
    assert result.code == 0, result.err
    written = json.loads((folder / "judge.json").read_text())
    assert set(written["confusion"]) == {"comply", "push_back", "neither"}
    assert written["n"] > 100
    assert written["auc"] > 0.85
    assert result.out.count("taken for") == 10


def test_judge_check_needs_both_labels(refused: Callable, model: str, folder: Path) -> None:
    """A file in which every reply has one label is refused with its name, before an engine starts."""
    (folder / "one.jsonl").write_text('{"prompt": "Do it.", "response": "Done.", "label": "comply"}\n')
    line = refused("judge", "check", "one.jsonl", "--set", "judge.signals=[contrast]", "--set", model)
    assert line.startswith("error: one.jsonl: no reply is labelled push_back")


def test_generate_and_report(dream: Dream, small: tuple[str, ...], folder: Path) -> None:
    """`generate` delivers the pairs and says so; `report` writes both documents of that run, without a model."""
    result = dream("generate", "--pairs", "3", "--out", "runs/mine", *small, "--json", "made.json")
    assert result.code == 0, result.err
    assert result.out.startswith("3 of 3 contrast pairs")
    assert "pairs: runs/mine/round_01/pairs.jsonl" in result.out
    assert len(list(read_log(folder / "runs" / "mine" / "round_01" / "pairs.jsonl", PreferencePair))) == 6
    made = json.loads((folder / "made.json").read_text())
    assert (made["accepted"], made["run"]) == (3, "runs/mine")
    assert {"audit", "diversity"} <= set(made)
    told = dream("report", "runs/mine")
    assert (told.code, told.out) == (0, "runs/mine/report.html\n")
    report = json.loads((folder / "runs" / "mine" / "report.json").read_text())
    assert report["rounds"][0]["accepted"] == 3
    assert "<html" in (folder / "runs" / "mine" / "report.html").read_text()


def test_invented_words_stop_the_pairs(dream: Dream, small: tuple[str, ...], folder: Path) -> None:
    """By the shipped configuration replies that are worded as no template words them make no pairs, and it says so."""
    assert load(ROOT / "configs" / "cpu.yaml")[0].filters.max_new_word_pairs == 0
    command = ("generate", "--pairs", "1", "--out", "mine", *small, "--json", "made.json")
    settings = ("filters.max_new_word_pairs=0", "generate.max_scenarios_per_pair=2")
    result = dream(*command, *(word for setting in settings for word in ("--set", setting)))
    assert result.code == 1
    assert "stopped short: 0 of 1 pairs" in result.err
    made = json.loads((folder / "made.json").read_text())
    assert made["accepted"] == 0
    verdicts = read_log(folder / "mine" / "round_01" / "verdicts.jsonl", Verdict)
    assert any(verdict.reason.startswith("invented ") for verdict in verdicts)


def test_judge_is_calibrated_while_the_engine_starts(dream: Dream, small: tuple[str, ...], monkeypatch) -> None:
    """An engine that is not up until the judge is made comes up: neither waits for the other to end."""
    made = asyncio.Event()
    real = combined.calibrated

    async def judge(*arguments: Any) -> Any:
        found = await real(*arguments)
        made.set()
        return found

    serving = sys.modules["dream.pool"].vllm_pool

    @asynccontextmanager
    async def slow(config: Config, name: str) -> AsyncIterator[ScriptedEngine]:
        await asyncio.wait_for(made.wait(), 20)
        async with serving(config, name) as engine:
            yield engine

    monkeypatch.setattr(combined, "calibrated", judge)
    monkeypatch.setattr(sys.modules["dream.pool"], "vllm_pool", slow)
    result = dream("generate", "--pairs", "1", "--out", "mine", *small)
    assert result.code == 0, result.err


@pytest.mark.parametrize("gold", ["as it is", "broken"])
def test_engine_that_does_not_start_is_one_line(
    dream: Dream, small: tuple[str, ...], folder: Path, monkeypatch, caplog, gold: str
) -> None:
    """An engine that fails while the judge is calibrated is one error; a broken gold set shows before the engine."""

    @asynccontextmanager
    async def broken(config: Config, name: str) -> AsyncIterator[ScriptedEngine]:
        await asyncio.sleep(0.2)
        raise EngineError("no engine here")
        yield

    if gold == "broken":
        (folder / "prompts" / "gold" / "replies.jsonl").write_text("broken\n" * 3)
    monkeypatch.setattr(sys.modules["dream.pool"], "vllm_pool", broken)
    result = dream("generate", "--pairs", "1", "--out", "mine", *small)
    gc.collect()
    assert result.code != 0
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert ("replies.jsonl:1" in errors[0]) if gold == "broken" else (errors == ["error: no engine here"])
    assert "Traceback" not in result.err + caplog.text


def test_embeddings_are_kept_for_the_next_start(
    dream: Dream, small: tuple[str, ...], folder: Path, monkeypatch
) -> None:
    """Commands that calibrate a judge with embeddings leave the vectors for the next one, which then embeds nothing."""
    embedded: list[str] = []

    def model(texts: Sequence[str]) -> np.ndarray:
        embedded.extend(texts)
        return hashed(texts)

    command = ("judge", "check", labelled_file(folder), *small, "--set", "judge.signals=[embedding]")
    counts = []
    for _ in range(2):
        minilm = MiniLM(lambda: model, folder / "cache" / "vectors.npz")
        monkeypatch.setattr("dream.embed.minilm", lambda minilm=minilm: minilm)
        assert dream(*command).code == 0
        counts.append(len(embedded))
    assert counts[0] == counts[1] > 0


def test_report_of_what_is_no_run_is_refused(refused: Callable, folder: Path) -> None:
    """`report` refuses a folder without a manifest and writes nothing into it."""
    (folder / "empty").mkdir()
    assert "empty: not a run folder" in refused("report", "empty")


def test_manifest_holds_the_judge_and_no_key(dream: Dream, small, folder: Path, monkeypatch) -> None:
    """After `generate` the manifest says how good the judge was; a server's key is in no file of the run."""
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    server = "judge.server={base_url: http://127.0.0.1:9/v1, model: large, api_key_env: JUDGE_KEY}"
    assert dream("generate", "--pairs", "1", "--out", "mine", *small, "--set", server).code == 0
    manifest = json.loads((folder / "mine" / "manifest.json").read_text())
    assert set(manifest["judge"]) >= CONTRACT
    assert manifest["config"]["judge"]["server"]["api_key_env"] == "JUDGE_KEY"
    files = [path for path in (folder / "mine").rglob("*") if path.is_file()]
    assert [path.name for path in files if "sk-very-secret" in path.read_text()] == []


def test_run_with_an_edited_template_goes_on_when_allowed(dream: Dream, small: tuple[str, ...], folder: Path) -> None:
    """A template that was edited under a run is refused with its name, and accepted with --allow-template-change."""
    command = ("generate", "--pairs", "2", "--out", "mine", *small)
    assert dream(*command).code == 0
    path = folder / "prompts" / "scenarios" / "stock.j2"
    path.write_text(path.read_text().replace("ready to take home", "ready to carry home"))
    result = dream(*command)
    assert result.code == 2
    assert "template.stock" in result.err
    assert "--allow-template-change" in result.err
    before = (folder / "mine" / "round_01" / "pairs.jsonl").read_text()
    result = dream(*command, "--allow-template-change")
    assert result.code == 0, result.err
    assert (folder / "mine" / "round_01" / "pairs.jsonl").read_text() == before
    [changed] = json.loads((folder / "mine" / "manifest.json").read_text())["template_changes"]
    assert list(changed) == ["stock"]


def test_run_with_other_prompts_goes_on_when_allowed(dream: Dream, small: tuple[str, ...], folder: Path) -> None:
    """What the gate asks and how replies are steered is part of a run as its templates are."""
    command = ("generate", "--pairs", "1", "--out", "mine", *small)
    assert dream(*command).code == 0
    path = folder / "prompts" / "pressure.j2"
    path.write_text(path.read_text() + "Do it. | Do it now.\n")
    result = dream(*command)
    assert result.code == 2
    assert "prompts.pressure.j2" in result.err
    assert dream(*command, "--allow-template-change").code == 0


def test_judge_that_cannot_tell_stops_generate(dream: Dream, small, folder: Path, monkeypatch) -> None:
    """A judge that errs on known replies stops the run before anything is dreamed, unless it is forced."""
    monkeypatch.setattr("dream.judge.combined.MAX_ERROR_RATE", -0.1)  # now every judge errs too often
    command = ("generate", "--pairs", "1", "--out", "mine", *small)
    result = dream(*command)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: the judge cannot tell known replies")
    assert "--force-judge" in result.err
    assert not (folder / "mine" / "round_01").exists()
    assert dream(*command, "--force-judge").code == 0


def test_logs_import(dream: Dream, small: tuple[str, ...], folder: Path, monkeypatch) -> None:
    """`logs import` turns a needless push-back into a pair, masks secrets, and adds nothing the second time."""
    serve(ScriptedEngine(lambda messages, number: "Come in and see 15 lamps!"), monkeypatch)
    turns = [
        user("Write a label that says 15 lamps. Mail it to anna@example.com."),
        assistant("I count 12 lamps and not 15; shall I change it?"),
        user("I asked you to write it. Just do it."),
    ]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n{broken\n")
    command = ("logs", "import", "chats.jsonl", "--out", "from-logs.jsonl", *small)
    result = dream(*command, "--json", "import.json")
    assert result.code == 0, result.err
    assert result.out.startswith("1 pairs from 1 exchanges in 1 conversations")
    assert "secrets masked: EMAIL 1" in result.out
    assert "chats.jsonl:2 " in result.out
    [row] = read_log(folder / "from-logs.jsonl", PreferencePair)
    assert (row.side, row.rejected) == ("clear", [turns[1]])
    assert row.chosen == [assistant("Come in and see 15 lamps!")]
    assert "anna@example.com" not in row.model_dump_json()
    assert json.loads((folder / "import.json").read_text())["pairs"] == 1
    again = dream(*command)
    assert again.out.startswith("0 pairs from 1 exchanges")
    assert "1 were there already" in again.out


def test_logs_import_of_a_missing_log_is_refused(refused: Callable, model: str) -> None:
    """A log that is not there is refused with its name before an engine starts."""
    assert "absent.jsonl" in refused("logs", "import", "absent.jsonl", "--out", "x.jsonl", "--set", model)
