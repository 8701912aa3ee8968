"""tests/bench: the arithmetic of rows, the table and file that they end in, and that DPO is compared like with like."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_rows

from dream.config import TrainConfig, load
from dream.engine import Sampling
from dream.errors import TrainingError
from dream.records import user
from dream.scenarios import STANCES, draw, draw_seed
from dream.selfplay import note
from dream.store import write_json
from dream.templates import load_all
from tests.bench import Row, bench, effect, paired_rates, trial
from tests.bench import growth_256_vs_16 as growth
from tests.bench.growth_256_vs_16 import Dreamed
from tests.bench.scripted import worked_engine
from tests.bench.unseen import by_template, untrained
from train.behaviour import Ruling, Sampled
from train.evals import Evaluation, RoundEvaluation, figures
from train.gate import Decision
from train.history import RoundResult
from train.retention import Retention

FAST = Row(name="fast", ours=30.0, other=10.0, ratio=3.0, target=2.0, unit="pairs/s")
SLOW = Row(name="slow", ours=15.0, other=10.0, ratio=1.5, target=2.0, unit="pairs/s")
RATES = st.lists(
    st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.floats(0.01, 1e2)), min_size=1, max_size=7
)  # ours, other, and by how much the machine speeds up in that repetition


DRAWS = 20
"""Of each template."""


@pytest.fixture
def fake_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two measured rows and one that fails, in an empty working directory."""

    def measure_apart(name: str) -> list[Row]:
        if name == "broken":
            raise TrainingError("the losses differ")
        return {"fast": [FAST], "slow": [SLOW]}[name]

    monkeypatch.setattr(bench, "measure_apart", measure_apart)
    monkeypatch.setattr(bench, "ROWS", {name: name for name in ("fast", "broken", "slow")})
    monkeypatch.chdir(tmp_path)


@given(RATES)
def test_ratio_does_not_see_the_machine_speed(rates: list[tuple[float, float, float]]) -> None:
    """A repetition in which both are slower or faster alike leaves the ratio as it was."""
    ours, other, speed = zip(*rates, strict=True)
    calm = paired_rates("row", ours, other, target=2.0, unit="pairs/s")
    shaky = paired_rates(
        "row",
        [rate * by for rate, by in zip(ours, speed, strict=True)],
        [rate * by for rate, by in zip(other, speed, strict=True)],
        target=2.0,
        unit="pairs/s",
    )
    assert shaky.ratio == pytest.approx(calm.ratio)
    assert (calm.ours, calm.other) == (median(ours), median(other))


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_target_is_met_from_its_value_on(ratio: float, target: float) -> None:
    """A ratio at its target is met, one below is missed."""
    assert FAST.model_copy(update={"ratio": ratio, "target": target}).met == (ratio >= target)


@pytest.mark.usefixtures("fake_rows")
def test_rows_are_printed_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds the rows key by key; a missed target is said and is no failure."""
    assert bench.main(["fast", "slow"]) == 0
    assert json.loads(bench.RESULT.read_text()) == [
        {"name": "fast", "ours": 30.0, "other": 10.0, "ratio": 3.0, "target": 2.0, "unit": "pairs/s"},
        {"name": "slow", "ours": 15.0, "other": 10.0, "ratio": 1.5, "target": 2.0, "unit": "pairs/s"},
    ]
    _, fast, slow = (line.split() for line in capsys.readouterr().out.splitlines())
    assert fast == ["fast", "30", "10", "pairs/s", "3.00", "3.00,", "3.00", "2.00", "met"]
    assert slow == ["slow", "15", "10", "pairs/s", "1.50", "1.50,", "1.50", "2.00", "MISSED"]


@pytest.mark.usefixtures("fake_rows")
def test_of_several_runs_the_median_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows take turns, so that a slow minute meets all; written is a run that was measured, told is the spread, too."""
    order: list[str] = []
    ratios = {"fast": [3.0, 1.0, 2.0], "slow": [1.5, 1.75, 1.25]}

    def measure_apart(name: str) -> list[Row]:
        order.append(name)
        row = FAST if name == "fast" else SLOW
        return [row.model_copy(update={"ratio": ratios[name].pop(0)})]

    monkeypatch.setattr(bench, "measure_apart", measure_apart)
    assert bench.main(["--runs", "3", "fast", "slow"]) == 0
    assert order == ["fast", "slow"] * 3
    assert [row["ratio"] for row in json.loads(bench.RESULT.read_text())] == [2.0, 1.5]
    _, fast, slow = (line.split() for line in capsys.readouterr().out.splitlines())
    assert fast[4:] == ["2.00", "1.00,", "3.00", "2.00", "met"]
    assert slow[4:] == ["1.50", "1.25,", "1.75", "2.00", "MISSED"]


@pytest.mark.usefixtures("fake_rows")
def test_row_that_fails_stops_no_other_and_fails_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Without names all rows are measured; the error names its row."""
    assert bench.main([]) == 1
    assert [row["name"] for row in json.loads(bench.RESULT.read_text())] == ["fast", "slow"]
    assert "error: broken: the losses differ" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="an orphan goes on elsewhere (train/child.py)")
def test_measuring_process_ends_with_a_killed_bench() -> None:
    """No orphan holds the memory and the cores of the next measurement."""
    code = (
        "import os, time; from tests.bench.bench import process_apart; pool = process_apart();"
        "print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 600).result()"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()
    began = time.monotonic()
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() - began < 10
        time.sleep(0.05)


@pytest.mark.usefixtures("fake_rows")
def test_unknown_row_is_refused_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the rows there are."""
    assert bench.main(["fast", "quick"]) == 2
    assert "no row 'quick' in the benchmark; there is fast, broken, slow" in capsys.readouterr().err
    assert not bench.RESULT.exists()


def test_both_trainers_make_the_same_run(toy_model: Path) -> None:
    """Same adapter, batches and schedule give the same losses in every step; another adapter does not."""
    from tests.bench.dpo_vs_trl import require_same_losses, train_ours, train_theirs

    train = TrainConfig(
        batch_size=4,
        micro_batch_size=2,
        learning_rate=1e-2,
        nll_weight=0.0,
        warmup=0.0,
        schedule="constant",
        bf16=False,
    )
    ours, theirs, others = (
        trainer(str(toy_model), train, toy_rows(), seed).losses
        for trainer, seed in ((train_ours, 1), (train_theirs, 1), (train_theirs, 2))
    )
    assert len(ours) == 4
    require_same_losses(ours, theirs)
    with pytest.raises(TrainingError, match="loss of step 2"):
        require_same_losses(ours, others)
    with pytest.raises(TrainingError, match="4 optimiser steps and TRL's 3"):
        require_same_losses(ours, theirs[:3])


RESULT = RoundResult(
    round=1, parent=0, learning_rate=1, accepted=8, dropped={}, summary={},
    decision=Decision(decision="roll_back", reason="sycophancy drift", checks=[]),
)  # fmt: skip


def test_effect_joins_what_was_sampled_on_both_sets() -> None:
    """Sampled replies are few on either set of scenarios, so they are compared over both, too, as the gate does."""

    def measured(*rulings: Ruling) -> Evaluation:
        said = [Sampled(ruling, "a b", 2) for ruling in rulings]
        return figures(np.zeros((2, 2, 2, 2)), {"clear": said, "flawed": said}, 0)

    nothing = Retention(arithmetic=[], facts=[], format=[], neutral=[], tasks={})
    before = RoundEvaluation(
        heldout=measured("abstain", "comply"), fresh=measured("comply", "comply"), retention=nothing
    )
    after = RoundEvaluation(
        heldout=measured("push_back", "comply"), fresh=measured("comply", "abstain"), retention=nothing
    )
    found = effect.compared(effect.Shown("mine", before, after, RESULT))
    assert found["both: sampled: comply on clear"] == ([1, 1, 0, 1], [1, 0, 0, 1])
    assert found["both: sampled: push back on flawed"] == ([0, 0, 0, 0], [0, 0, 1, 0])


def test_effect_tells_what_a_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accepted policy beside the initial one, or the last candidate, with the gate's word; and a readable plot."""
    figure = figures(np.stack([-np.ones((8, 2, 2)), np.ones((8, 2, 2))], -1), {"clear": [], "flawed": []}, 0)
    better = figures(np.array([[[[0.0, -1.0]] * 2, [[0.0, 1.0]] * 2]] * 8), {"clear": [], "flawed": []}, 0)
    nothing = Retention(arithmetic=[1.0, 1.0, 1.0, 0.0], facts=[0.0], format=[], neutral=[], tasks={})
    for number, heldout in enumerate((figure, better)):
        one = RoundEvaluation(heldout=heldout, fresh=None, retention=nothing)
        write_json(tmp_path / f"round_0{number}" / "eval.json", one.model_dump())
    write_json(tmp_path / "round_01" / "gate.json", RESULT.model_dump())

    assert effect.main([f"mine={tmp_path}"]) == 0
    kept = capsys.readouterr().out
    assert "| mine | before | after |" in kept
    assert "| held-out: strict crossed | 0.000 | 0.000 | [+0.000, +0.000] |" in kept
    assert "| retention: mean of the kinds | 0.375 | 0.375 |" in kept  # of .75 and 0, however many questions each has
    assert effect.main(["--candidate", "--svg", str(tmp_path / "plot.svg"), f"mine={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "| held-out: strict crossed | 0.000 | 1.000 | [+1.000, +1.000] |" in shown
    assert "Last round rolled back: sycophancy drift" in shown
    assert effect.main(["--candidate", "--together", f"mine={tmp_path}", f"again={tmp_path}"]) == 0
    total = capsys.readouterr().out.partition("| together |")[2]
    assert "| held-out: strict crossed | 0.000 | 1.000 |" in total
    assert "| retention: mean of the kinds | 0.375 | 0.375 |" in total
    plot = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert plot.tag.endswith("svg")
    assert "clear 0.00 to 1.00" in "".join(plot.itertext())


def test_trial_rows_are_contrast_pairs_with_their_mirrors() -> None:
    """Every step of a trial holds both sides of its scenarios, and where a template mirrors both directions of a
    scenario are right once and wrong once, so that no reply is chosen more often than it is rejected."""
    templates = [one for one in load_all() if one.front.split == "train" and one.front.mirror]
    rows = trial.worked_rows(templates, 48, seed=5, batch_size=16)
    assert len(rows) == 48
    for start in range(0, 48, 16):
        step = rows[start : start + 16]
        assert sorted(row.side for row in step) == ["clear"] * 8 + ["flawed"] * 8
        assert all(sum(one.pair_id == row.pair_id for one in step) == 2 for row in step)
    assert sorted(str(row.chosen) for row in rows) == sorted(str(row.rejected) for row in rows)


def test_scripted_engine_answers_every_note_with_the_replies_of_its_own_draw() -> None:
    """Two draws of a template can have the same aim: told by the aim alone, one got the other's values, and the more
    pairs a round had the more of them its filters dropped."""
    config, _ = load(None)
    templates = [one for one in load_all() if one.front.split == "train"]
    engine = worked_engine(templates, config, DRAWS, 0.0)

    async def go() -> None:
        for template in templates:
            for number in range(DRAWS):
                scenario = draw(template, draw_seed(config, 1, number), "s", covered=config.generate.coverage)
                for side in scenario.sides:
                    for stance in STANCES:
                        asked = user(f"({note(scenario, side, stance)})")
                        [one] = await engine.generate([asked], Sampling(1, 100))
                        assert one.text in scenario.side(side).examples[stance]

    asyncio.run(go())


def test_growth_is_told_by_medians_and_the_memory_of_the_first_rounds() -> None:
    """A peak of memory never falls, so later rounds of a small size show that of larger ones; what is held could."""
    rounds = {
        16: [Dreamed(20, 0.5, 700.0, 600.0), Dreamed(24, 0.3, 800.0, 605.0), Dreamed(22, 0.4, 800.0, 610.0)],
        256: [Dreamed(260, 0.2, 800.0, 620.0), Dreamed(258, 0.3, 800.0, 620.0), Dreamed(262, 0.1, 800.0, 615.0)],
    }
    assert growth.table(rounds)[2:] == [
        "| 16 | 22 | 0.400 (0.300, 0.500) | 700 | 600, 610 |",
        "| 256 | 260 | 0.200 (0.100, 0.300) | 800 | 620, 615 |",
    ]
    drawn = ElementTree.fromstring(growth.plot(rounds))
    assert "16 pairs, 600 MiB256 pairs, 620 MiB" in "".join(drawn.itertext())


def test_unseen_kinds_are_none_of_the_trained_ones() -> None:
    """A template of a trained kind is seen, whatever its name; held-out and general ones are not asked for."""
    templates = load_all()
    trained = [template.name for template in templates if template.front.flaw == "false_premise"][:1]
    found = untrained(templates, trained)
    assert found
    assert {"false_premise"}.isdisjoint(template.front.flaw for template in found)
    assert all(template.front.split == "train" and not template.general for template in found)
    left = {template.front.flaw for template in templates if template.front.split == "train" and not template.general}
    assert {template.front.flaw for template in found} == left - {"false_premise"}


def test_unseen_kinds_are_told_by_template() -> None:
    """The template that gained most margin stands first, each with the means of its own pairs."""
    rng = np.random.default_rng(0)
    logps = rng.normal(-2, 0.1, (4, 2, 2, 2))
    logps[:, 1, :, 1] -= 0.5  # nothing is right before
    gained = logps.copy()
    gained[1::2, 1, :, 1] += 1.0  # under the flawed prompts of the second template push-back becomes likelier
    before, after = (figures(values, {"clear": [], "flawed": []}, 0) for values in (logps, gained))
    *_, first, second = by_template(["stays", "learns"] * 2, before, after)
    assert first.startswith("| learns | ")
    assert second.startswith("| stays | ")
    _, _, a, b, c, d, _ = first.split("|")
    assert float(d) - float(c) == pytest.approx(1.0, abs=2e-3)
    assert float(b) > float(a) == 0
