"""train/undo.py: the margin, the counts, and whole tests on a toy policy; what `dream eval --undo` says of them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import train_toy

from dream import cli, runs, tasks, templates
from dream.config import Config, TrainConfig
from dream.errors import ConfigError, RunError, Stopped
from dream.records import EvalPair, PreferencePair, Side, user
from dream.stop import Stop
from dream.store import Log, RunFolder, read_json, read_log, write_json
from dream.templates import Template
from dream.terminal import Terminal, undo_sentence, undo_table
from train.data import Encoded
from train.history import Policy
from train.undo import (
    LIMIT,
    Measured,
    UndoResult,
    UndoSpec,
    crossed,
    crossed_margins,
    is_measured,
    opposite,
    prepare,
    verdict,
)

LENGTHS = Encoded([1], [1, 2], [1, 2, 3])
LOGPS = st.tuples(st.floats(-50, 0), st.floats(-50, 0))


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders go where pytest clears up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def toy_pair(number: int) -> list[EvalPair]:
    """Both sides of what `toy_rows` teaches: comply after x, push back after y."""
    letters: tuple[tuple[Side, str], ...] = (("clear", "x"), ("flawed", "y"))
    return [
        EvalPair(pair_id=f"p{number}", side=side, prompt=[user(f"{letter} w")], comply="a b c", push_back="d e")
        for side, letter in letters
    ]


def toy_spec(model: Path, folder: Path, examples: int, **settings: Any) -> UndoSpec:
    """A test with so many opposite examples, its rows written into the folder."""
    log = Log(folder / "rows.jsonl")
    log.append(*opposite([row for number in range(examples) for row in toy_pair(number)]))
    log.close()
    train = {"batch_size": 2, "micro_batch_size": 2, "bf16": False, "warmup": 0.0, "schedule": "constant"}
    return UndoSpec(
        model=str(model), rows=str(folder / "rows.jsonl"), out=str(folder / "undo.json"), measured=toy_pair(0),
        **{key: settings.pop(key) for key in ("adapter", "weights") if key in settings},
        train=TrainConfig(**{**train, "learning_rate": 1e-2, **settings}),
    )  # fmt: skip


def undone(spec: UndoSpec) -> tuple[UndoResult, list[dict[str, Any]]]:
    """Runs a test in this process; its result and what it reported."""
    from train.undo import run

    lines: list[dict[str, Any]] = []
    run(spec, lines.append)
    return UndoResult.model_validate(read_json(Path(spec.out))), lines


@pytest.mark.parametrize(("method", "reference"), [("lora", "previous"), ("full", "initial")])
def test_opposite_examples_undo_what_was_learned(toy_model: Path, tmp_path: Path, method: str, reference: str) -> None:
    """The toy policy's gain is measured, shrinks with every look and is gone at the first look below the model's."""
    train_toy(toy_model, tmp_path / "out", method=method)
    weights = tmp_path / "out" / "weights"
    where = {"adapter": str(tmp_path / "out" / "adapter")} if method == "lora" else {"weights": str(weights)}
    result, lines = undone(toy_spec(toy_model, tmp_path, 12, method=method, reference=reference, **where))
    assert result.gain > 0.01
    assert [one.examples for one in result.path] == [1, 2, 4, 8, 12]
    seen = [Measured(examples=0, margin=result.policy_margin), *result.path]
    assert lines == [{**one.model_dump(), "limit": 12} for one in seen]
    assert result.path[0].margin < result.policy_margin
    assert result.undone_after is not None
    margins = {one.examples: one.margin for one in result.path}
    assert margins[result.undone_after] <= result.initial_margin
    assert all(margin > result.initial_margin for count, margin in margins.items() if count < result.undone_after)
    assert result.half_undone_after is not None
    assert result.half_undone_after <= result.undone_after


def test_margins_are_those_of_the_saved_weights(toy_model: Path, tmp_path: Path) -> None:
    """Initial model and policy are measured as the folders hold them, each reply under either prompt: by hand."""
    import torch

    from train.checkpoints import load_model, load_tokenizer

    train_toy(toy_model, tmp_path / "out", method="lora")
    result, _ = undone(toy_spec(toy_model, tmp_path, 1, adapter=str(tmp_path / "out" / "adapter")))
    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)

    def logp(model: Any, prompt: str, reply: str) -> float:
        texts = (f"<user> {prompt} <eos> <assistant>", reply)
        head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        with torch.no_grad():
            logps = model(torch.tensor([head + tail])).logits.log_softmax(-1)[0, len(head) - 1 : -1]
        return float(logps[range(len(tail)), tail].mean())

    for folder, found in ((toy_model, result.initial_margin), (tmp_path / "out" / "weights", result.policy_margin)):
        model = load_model(str(folder), torch.float32, trust_remote_code=False)
        flawed, clear = (logp(model, prompt, "d e") - logp(model, prompt, "a b c") for prompt in ("y w", "x w"))
        assert found == pytest.approx(flawed - clear, abs=1e-4)


def test_policy_without_gain_gets_no_number(toy_model: Path, tmp_path: Path) -> None:
    """A policy that is the initial model is not trained, and both counts are None."""
    result, lines = undone(toy_spec(toy_model, tmp_path, 4))
    assert (result.gain, result.path, result.half_undone_after, result.undone_after) == (0, [], None, None)
    assert len(lines) == 1
    assert undo_sentence(result).startswith("nothing to undo")
    undo_table(result)


@given(st.lists(st.tuples(LOGPS, LOGPS, LOGPS, LOGPS), min_size=1, max_size=5), st.floats(-9, 9))
def test_margin_sees_the_condition_only(pairs: list[tuple[Any, ...]], shift: float) -> None:
    """Liking push-back more under every prompt changes nothing; prompts that change places turn the sign."""
    scores = [score for pair in pairs for score in pair]
    rows = [LENGTHS] * len(scores)
    margins = crossed_margins(scores, rows)
    shifted = [(push + shift, comply) for push, comply in scores]
    exchanged = [scores[number ^ 1] for number in range(len(scores))]
    assert len(margins) == len(pairs)
    assert crossed_margins(shifted, rows) == pytest.approx(margins, abs=1e-9)
    assert crossed_margins(exchanged, rows) == pytest.approx(-margins, abs=1e-9)


def test_margin_is_a_mean_over_tokens_and_reply_sets() -> None:
    """d is a mean-token difference, averaged over the two reply sets of each scenario: by hand."""
    first = [(-2.0, -6.0), (-4.0, -3.0), (-2.0, -3.0), (-2.0, -3.0)]  # d: 1, -1, 0, 0
    second = [(-2.0, -3.0), (-2.0, -3.0), (-2.0, -9.0), (-2.0, -6.0)]  # d: 0, 0, 2, 1
    assert crossed_margins([*first, *second], [LENGTHS] * 8) == pytest.approx([1.0, 0.5])


@given(st.integers(1, 200))
def test_looks_double_and_include_the_last(limit: int) -> None:
    """The margin is measured after the first and the last example, and gaps at most double."""
    looks = [count for count in range(1, limit + 1) if is_measured(count, limit)]
    assert (looks[0], looks[-1]) == (1, limit)
    assert all(after <= 2 * before for before, after in pairwise(looks))


def found(initial: float, policy: float, margins: list[float], spread: float = 0.0, limit: int = 4) -> UndoResult:
    """A verdict over looks after 1, 2, 4, ... examples, of nine scenarios; margins of looks lie within `spread`."""
    noise = np.linspace(-spread, spread, 9)
    path = [(2**place, np.full(9, margin) + noise) for place, margin in enumerate(margins)]
    return verdict(np.full(9, initial), np.full(9, policy), path, limit)


@given(st.floats(-1, 1), st.floats(0.01, 1), st.lists(st.floats(-2, 2), min_size=1, max_size=7), st.floats(0, 1))
def test_counts_are_the_first_at_or_below_their_bound(
    initial: float, gain: float, margins: list[float], spread: float
) -> None:
    """Whatever the path does later, the counts stand at its first crossings, half is never after the whole, and the
    interval's ends are in order."""
    result = found(initial, initial + gain, margins, spread, 2 ** (len(margins) - 1))
    path = result.path
    bounds = (result.initial_margin, (result.initial_margin + result.policy_margin) / 2)
    for count, bound in zip((result.undone_after, result.half_undone_after), bounds, strict=True):
        earlier = path if count is None else [one for one in path if one.examples < count]
        assert all(one.margin > bound for one in earlier)
        assert count is None or next(one.margin for one in path if one.examples == count) <= bound
    if result.undone_after is not None:
        assert result.half_undone_after is not None
        assert result.half_undone_after <= result.undone_after
    assert result.undone_after_ci is not None
    low, high = (float("inf") if end is None else end for end in result.undone_after_ci)
    assert low <= high


@pytest.mark.parametrize(
    ("spread", "ci"),
    [(0.01, (4, 4)), (0.8, (2, 4)), (3.0, (1, None))],
)
def test_interval_widens_with_the_scenarios(spread: float, ci: tuple[int | None, int | None]) -> None:
    """Scenarios that agree leave one count; the more they differ, the more counts chance could give, up to none."""
    assert found(0.0, 1.0, [0.9, 0.3, -0.4], spread).undone_after_ci == ci


def test_one_scenario_has_no_interval() -> None:
    """A single scenario says nothing of chance."""
    assert verdict(np.zeros(1), np.ones(1), [(1, np.array([-0.5]))], 1).undone_after_ci is None


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ([0.9, 0.4, 0.1], "4 of 4 opposite examples (95 %: 4) undo what was learned, 2 half of it"),
        ([0.9, 0.8, 0.5], "4 opposite examples (95 %: more than 4) do not undo what was learned, 4 half of it"),
        ([1.0, 0.9, 0.8], "4 opposite examples (95 %: more than 4) do not undo what was learned, nor half of it"),
    ],
)
def test_sentence_says_the_number(margins: list[float], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The table ends with a sentence that holds the count, or says that the limit was not enough."""
    undo_table(found(0.1, 1.1, margins))
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == said
    assert shown[-2].split() == ["4", f"{margins[-1]:+.3f}", f"{(margins[-1] - 0.1):.0%}"[:-1], "%"]


def test_opposite_rows_choose_the_wrong_stance() -> None:
    """On the clear side push-back is chosen, on the flawed side compliance."""
    clear, flawed = opposite(toy_pair(0))
    assert [row.chosen[0]["content"] for row in (clear, flawed)] == ["d e", "a b c"]
    assert [row.rejected[0]["content"] for row in (clear, flawed)] == ["a b c", "d e"]


def promoted(run: Path, **paths: str) -> Path:
    """A run folder of which the round is known that was promoted."""
    write_json(run / "policy.json", Policy(round=1, as_of=1, **paths).model_dump())
    (run / "round_01" / "train").mkdir(parents=True)
    write_json(run / "round_01" / "train" / "ledger.json", {"learning_rate": 1e-5, "flip_probability": 0.07})
    return run


def test_prepared_test_has_scenarios_of_its_own(
    tmp_path: Path, tiny_templates: list[Template], settings_with: Callable[..., Config]
) -> None:
    """Measured and trained scenarios come from training templates, are as many as asked, and no prompt serves twice
    over; the loss stays, rate and flip probability are those that the policy was trained with, and the batch is one
    scenario."""
    run = promoted(tmp_path / "run", adapter="a", weights="w")
    config = settings_with(eval={"fresh_pairs": 6}, train={"beta": 0.3, "learning_rate": 2e-5})
    spec = prepare(run, config, tiny_templates, "model")
    rows = list(read_log(Path(spec.rows), PreferencePair))
    assert (len(spec.measured), len(rows)) == (2 * 6, 2 * LIMIT)
    assert not {str(row.prompt) for row in spec.measured} & {str(row.prompt) for row in rows}
    assert (spec.adapter, spec.weights, spec.train.method) == (str(run / "a"), None, "lora")
    kept = ("beta", "nll_weight", "reference", "optim")
    assert all(getattr(spec.train, name) == getattr(config.train, name) for name in kept)
    assert (spec.train.batch_size, spec.train.warmup, spec.train.schedule) == (2, 0.0, "constant")
    assert (spec.train.learning_rate, spec.flip_probability) == (1e-5, 0.07)
    assert sorted(path.name for path in run.iterdir()) == ["policy.json", "round_01"]


@pytest.mark.parametrize("paths", [{"weights": "w"}, {"weights": "w", "masters": "m"}])
def test_full_weights_are_taken_from_masters(
    tmp_path: Path, tiny_templates: list[Template], settings_with: Callable[..., Config], paths: dict[str, str]
) -> None:
    """A policy of full weights goes on from its float32 masters where it has them."""
    run = promoted(tmp_path / "run", **paths)
    spec = prepare(run, settings_with(train={"method": "full"}), tiny_templates, "model")
    assert (spec.adapter, spec.weights) == (None, str(run / list(paths.values())[-1]))


def test_nothing_to_undo_is_refused_before_any_work(
    tmp_path: Path, tiny_templates: list[Template], settings_with: Callable[..., Config]
) -> None:
    """A run without a promoted round, and one without scenarios to measure on, are told apart from a result."""
    with pytest.raises(RunError, match="no round was promoted"):
        prepare(tmp_path, settings_with(), tiny_templates, "model")
    with pytest.raises(ConfigError, match=r"eval\.fresh_pairs"):
        prepare(promoted(tmp_path), settings_with(eval={"fresh_pairs": 0}), tiny_templates, "model")


def test_command_starts_the_child_and_cleans_up(
    toy_model: Path, tmp_path: Path, tiny_templates: list[Template], settings_with: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`tasks.undo` gives the child's result, shows its lines, and leaves neither run nor temporary folder changed."""
    begun = []
    expected = found(0.0, 1.0, [-0.5], limit=1)

    def child(spec: UndoSpec, folder: Path, on_line: Callable[[dict[str, Any]], None], module: str, stop: Stop) -> None:
        begun.append((folder, module))
        on_line({"examples": 1, "margin": -0.5, "limit": 1})
        write_json(Path(spec.out), expected.model_dump())

    monkeypatch.setattr(tasks, "train_in_child", child)
    monkeypatch.setattr(templates, "load_all", lambda: tiny_templates)
    monkeypatch.setattr(Terminal, "PLAIN_SECONDS", 0.0)
    run = promoted(tmp_path / "run", weights="w")
    with Terminal() as terminal:
        assert tasks.undo(settings_with(model=str(toy_model)), run, terminal) == expected
    [(folder, module)] = begun
    assert module == "train.undo"
    assert not folder.exists()
    assert sorted(path.name for path in run.iterdir()) == ["policy.json", "round_01"]
    assert "1 of 1 opposite examples: margin -0.500" in capsys.readouterr().err


def test_signal_leaves_no_folder(
    toy_model: Path, tmp_path: Path, tiny_templates: list[Template], settings_with: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C ends the test by the product's own handling, and what it had written is gone."""
    begun = []

    def child(spec: UndoSpec, folder: Path, on_line: Any, module: str, stop: Stop) -> None:
        begun.append(folder)
        with stop.gently("stopping"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tasks, "train_in_child", child)
    monkeypatch.setattr(templates, "load_all", lambda: tiny_templates)
    run = promoted(tmp_path / "run", weights="w")
    with Terminal() as terminal, pytest.raises(Stopped):
        tasks.undo(settings_with(model=str(toy_model)), run, terminal)
    assert not begun[0].exists()


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Runs `dream eval` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dream", "eval", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_eval_writes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dream eval --run DIR --undo` prints the sentence and writes the record; `--set` reaches the configuration."""
    run, file = tmp_path / "run", tmp_path / "undo.json"
    with RunFolder(run, runs.manifest("train", Config(), Path("some.yaml"), [])):
        pass
    seen = []
    expected = found(0.0, 1.0, [0.5, -0.5], limit=2)
    monkeypatch.setattr(tasks, "undo", lambda config, *rest: seen.append(config) or expected)
    assert command(monkeypatch, "--run", run, "--undo", "--json", file, "--set", "eval.fresh_pairs=7") == 0
    assert seen[0].eval.fresh_pairs == 7
    assert read_json(file) == {
        "initial_margin": 0.0,
        "policy_margin": 1.0,
        "path": [{"examples": 1, "margin": 0.5}, {"examples": 2, "margin": -0.5}],
        "half_undone_after": 1,
        "undone_after": 2,
        "undone_after_ci": [2, 2],
        "limit": 2,
    }
    assert "2 of 2 opposite examples (95 %: 2) undo what was learned, 1 half of it" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--model", "m"), ("--run", "r", "--pairs", "p.jsonl")])
def test_eval_undoes_runs_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """A model has no run to undo, and given pairs would not be used."""
    assert command(monkeypatch, *words, "--undo") == 2
    assert capsys.readouterr().err.startswith("error: dream eval: --undo goes with --run")


def test_module_refuses_a_wrong_specification(tmp_path: Path) -> None:
    """`python -P -m train.undo` says in one line what is wrong, with nothing on stdout."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"model": "m", "rows": "r", "out": "o", "train": {}}))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "train.undo", str(path)], capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == f"error: {path}: measured: Field required\n"


def test_replies_are_crossed(toy_model: Path) -> None:
    """Each reply set stands under the flawed prompt and then the clear one, without an end of turn."""
    from train.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(toy_model), trust_remote_code=False)
    rows = crossed(tokenizer, toy_pair(0))
    assert [tokenizer.decode(row.prompt).split()[1] for row in rows] == ["y", "x", "y", "x"]
    assert {tokenizer.decode(row.chosen) for row in rows} == {"d e"}
    assert {tokenizer.decode(row.rejected) for row in rows} == {"a b c"}
