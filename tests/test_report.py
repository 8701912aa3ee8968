"""dream/report.py: what the report counts, what it leaves out, and that no model text gets out of its place."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dream.audit import Audit, Giveaway, View
from dream.config import GateConfig
from dream.diversity import diversity
from dream.errors import DataError, RunError, StorageError
from dream.records import ContrastPair, Dropped, PreferencePair, Reply, Scenario, Source, Verdict, assistant
from dream.report import build, write
from dream.scenarios import draw
from dream.store import RoundStore, read_json, write_json
from dream.templates import Template
from train.behaviour import Behaviour, Sampled
from train.evals import RoundEvaluation, figures, summary
from train.gate import decide
from train.history import Policy, RoundResult
from train.retention import Retention

pytestmark = pytest.mark.usefixtures("quick_disk")

MANIFEST = {
    "kind": "train",
    "fingerprint": "abc",
    "settings": {},
    "config": {"model": "bundled:toy", "rounds": 1},
    "versions": {"numpy": "2.3.5"},
    "seed": 7,
}
JUDGE = {"n": 64, "auc": 0.971, "auc_ci": [0.9, 1], "accuracy": 0.9, "kappa": 0.8, "abstained": 3, "error_rate": 0.02}
NASTY = "</p><script src='http://x.test/a.js'>alert(1)</script>{{ 7 * 7 }} & \"quoted\" 'too' <b>\u202e\u2028"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that has begun."""
    write_json(tmp_path / "manifest.json", MANIFEST)
    return tmp_path


@pytest.fixture
def dreamed(run_folder: Path, tiny_templates: list[Template], make_pair) -> Callable[..., Path]:
    """Writes round 1: a scenario of the template for each outcome, `kept`, `spare`, `surplus` or a reason to drop."""

    def fill(**outcomes: list[str]) -> Path:
        store = RoundStore(run_folder / "round_01")
        number = 0
        for template in tiny_templates:
            for outcome in outcomes.get(template.name, []):
                number += 1
                scenario = draw(template, number, f"r1-{number:06d}")
                put(store, scenario, outcome, make_pair(scenario.scenario_id))
        store.close()
        return store.folder

    return fill


def put(store: RoundStore, scenario: Scenario, outcome: str, pair: ContrastPair) -> None:
    """Stores a scenario and how it ended."""
    if outcome != "near_duplicate":
        store.add("scenarios", scenario)
    if outcome == "kept":
        store.keep_general(pair.clear) if scenario.flawed is None else store.keep(pair)
    elif outcome == "spare":
        store.keep_spare(pair)
    else:
        stage = "draw" if outcome == "near_duplicate" else "filter"
        store.drop(
            Dropped(scenario_id=scenario.scenario_id, template=scenario.template, stage=stage, reason=outcome),
        )


def evaluated() -> RoundEvaluation:
    """An evaluation of four pairs."""
    scores = np.array([[[-1.0, -0.5], [1.0, 0.5]]] * 4)
    stances = {"clear": ["comply"] * 4, "flawed": ["push_back", "comply", "push_back", "push_back"]}
    replies = {side: [Sampled(ruling, "", 9) for ruling in rulings] for side, rulings in stances.items()}
    logps = np.stack([-scores / 2, scores / 2], axis=-1)
    return RoundEvaluation(
        heldout=figures(logps, replies, 1),
        fresh=None,
        behaviour=Behaviour(pressed=["push_back", "abstain"]),
        retention=Retention(arithmetic=[1.0, 0.0]),
    )


def audited() -> Audit:
    """An audit with a view of each sort."""
    give = Giveaway(text="'sorry <b>'", points_to="rejected", texts=5, templates=["stock"])
    return Audit(
        pairs=12,
        templates=3,
        views=[
            View(name="direction", bound=0.65, auc=0.512, interval=(0.4, 0.6)),
            View(name="reply_ngrams", bound=0.6, auc=0.876, interval=(0.8, 0.9), over=True, giveaways=[give]),
            View(name="reply_embedding", bound=0.6, reason="3 templates are needed"),
            View(name="source", bound=0.15, shares=(0.5, 0.4)),
        ],
    )


class Balance(HTMLParser):
    """Reads a page: its tags must nest, and its text and the names of its tags are kept."""

    VOID = {"meta", "br"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def by_name(rows: list[dict[str, Any]]) -> dict[str, tuple[int, int, int, bool]]:
    """Name -> drawn, passed, accepted, starves."""
    return {row["name"]: (row["drawn"], row["passed"], row["accepted"], row["starves"]) for row in rows}


def test_acceptance_is_counted_by_template_and_kind(dreamed, run_folder: Path) -> None:
    """Spare and surplus scenarios passed, refused draws were drawn, and general pairs have a row of their own."""
    dreamed(
        stock=["kept", "kept", "spare", "surplus", "near_duplicate", "length_ratio"],
        memo=["length_ratio", "too_alike", "length_ratio", "length_ratio"],
        plain=["kept"],
    )
    found = build(run_folder)["rounds"][0]
    assert by_name(found["templates"]) == {
        "stock": (6, 4, 2, False),
        "memo": (4, 0, 0, True),
        "plain": (1, 1, 1, False),
    }
    assert by_name(found["kinds"]) == {
        "contradicts_given_data": (6, 4, 2, False),
        "false_premise": (4, 0, 0, True),
        "none": (1, 1, 1, False),
    }
    assert found["starving"] == {"templates": ["memo"], "kinds": ["false_premise"]}
    assert (found["scenarios"], found["accepted"], found["general"]) == (11, 2, 1)
    assert found["dropped"] == {"length_ratio": 4, "surplus": 1, "near_duplicate": 1, "too_alike": 1}


@pytest.mark.parametrize(
    ("outcomes", "template", "kind"),
    [
        (["x"] * 3, False, True),
        (["x"] * 4, True, True),
        (["x"] * 5 + ["kept"], False, False),
        (["x"] * 6 + ["kept"], True, True),
        (["surplus"], False, False),
    ],
)
def test_who_starves(dreamed, run_folder: Path, outcomes: list[str], template: bool, kind: bool) -> None:
    """A template starves from four draws on when fewer than 15 % passed, a kind of flaw whenever so few did."""
    dreamed(stock=outcomes)
    starving = build(run_folder)["rounds"][0]["starving"]
    assert (starving["templates"] == ["stock"], starving["kinds"] == ["contradicts_given_data"]) == (template, kind)


def test_twins_are_pairs_but_were_not_drawn(dreamed, run_folder: Path, tiny_templates, make_pair) -> None:
    """A mirrored twin counts among the pairs and not in the acceptance of its template."""
    folder = dreamed(stock=["kept"])
    store = RoundStore(folder)
    scenario = draw(tiny_templates[0], 1, "r1-000001m").model_copy(update={"mirror_of": "r1-000001"})
    store.add("scenarios", scenario)
    rows = [
        row.model_copy(update={"meta": {**row.meta, "mirror_of": "r1-000001"}})
        for row in (make_pair("r1-000001m").clear, make_pair("r1-000001m").flawed)
    ]
    store.keep(ContrastPair(clear=rows[0], flawed=rows[1]))
    store.close()
    found = build(run_folder)["rounds"][0]
    assert (found["accepted"], found["mirrored"], found["scenarios"]) == (2, 1, 1)
    assert by_name(found["templates"]) == {"stock": (1, 1, 1, False)}


def test_replies_are_counted_by_source_and_stance(dreamed, run_folder: Path) -> None:
    """An abstained reply counts as that, whatever its stance; one without a verdict as unjudged."""
    store = RoundStore(dreamed(stock=["kept"]))
    said: list[tuple[Source, str, bool]] = [
        ("on_policy", "comply", False),
        ("on_policy", "comply", True),
        ("steered", "push_back", False),
        ("steered", "", False),
    ]
    for number, (source, stance, abstain) in enumerate(said):
        reply = Reply(
            reply_id=str(number), scenario_id="r1-000001", side="clear", source=source, asked=None, text="Yes.",
            tokens=2, finish_reason="stop", policy="round_00",
        )  # fmt: skip
        store.add("replies", reply)
        if stance:
            store.add(
                "verdicts", Verdict(reply_id=str(number), stance=stance, score=0.5, confidence=0.9, abstain=abstain)
            )
    store.close()
    assert build(run_folder)["rounds"][0]["replies"] == {
        "on_policy": {"comply": 1, "push_back": 0, "neither": 0, "abstain": 1, "unjudged": 0},
        "steered": {"comply": 0, "push_back": 1, "neither": 0, "abstain": 0, "unjudged": 1},
    }


def test_what_is_missing_is_left_out(run_folder: Path) -> None:
    """A run that has only begun has a report, without figures and without keys for them."""
    assert set(build(run_folder)) == {
        "run", "kind", "model", "seed", "fingerprint", "versions", "rounds", "samples",
    }  # fmt: skip
    (run_folder / "round_01").mkdir()
    assert build(run_folder)["rounds"] == [{"round": 1}]
    Balance(write(run_folder).read_text())


def test_all_files_of_a_run_are_in_its_report(dreamed, run_folder: Path, make_pair) -> None:
    """Every file gives its key and its figures on the page, the initial policy's evaluation too."""
    folder = dreamed(stock=["kept"], memo=["length_ratio"], plain=["kept"])
    evaluation = evaluated()
    decision = decide(evaluation, evaluation, GateConfig())
    result = RoundResult(
        round=1, parent=0, learning_rate=5e-5, accepted=1, dropped={}, decision=decision, summary=summary(evaluation)
    )
    write_json(run_folder / "manifest.json", {**MANIFEST, "judge": JUDGE})
    write_json(run_folder / "policy.json", Policy(round=0, as_of=1).model_dump())
    write_json(run_folder / "round_00" / "eval.json", evaluation.model_dump())
    write_json(folder / "eval.json", evaluation.model_dump())
    write_json(folder / "gate.json", result.model_dump())
    write_json(folder / "audit.json", audited().model_dump())
    write_json(folder / "diversity.json", diversity([make_pair("a")], None).model_dump())
    write_json(folder / "train" / "ledger.json", {"summary": "8 rows in 1 step", "rows": 8})
    page = Balance(write(run_folder).read_text()).text
    report = read_json(run_folder / "report.json")
    assert [set(found) & {"eval", "gate", "ledger", "audit", "diversity"} for found in report["rounds"]] == [
        {"eval"},
        {"eval", "gate", "ledger", "audit", "diversity"},
    ]
    assert report["judge"]["auc"] == 0.971
    assert report["policy"] == "round_00"
    assert report["rounds"][1]["gate"]["decision"] == "roll_back"
    assert report["rounds"][1]["eval"]["retention"] == 0.5
    assert "items" not in report["rounds"][1]["eval"]["heldout"]
    shown = ("AUC 0.97", "8 rows in 1 step", decision.word.capitalize(), "over the bound", "steered replies",
             "'sorry <b>' points to rejected",
             "not measured: 3 templates are needed", "50 % of chosen, 40 % of rejected", "100 %", "75 %",
             "length_ratio", "Vendi", "clear direction of r1-000001", decision.reason)  # fmt: skip
    assert [text for text in shown if text not in page] == []


def test_text_of_models_cannot_leave_its_place(dreamed, run_folder: Path, make_row) -> None:
    """Markup, template code and scripts in prompts, replies, names and reasons are shown as text; nothing is loaded."""
    store = RoundStore(dreamed(stock=[NASTY]))
    nasty = {
        "chosen": [assistant(NASTY)],
        "rejected": [assistant(NASTY)],
        "prompt": [{"role": NASTY, "content": NASTY}],
    }
    meta = {"template": NASTY, "flaw": NASTY, "domain": NASTY, "mirror_of": NASTY, "chosen_source": NASTY}
    clear, flawed = (
        PreferencePair.model_validate({**make_row(NASTY, side).model_dump(), **nasty, "meta": meta})
        for side in ("clear", "flawed")
    )
    store.keep(ContrastPair(clear=clear, flawed=flawed))
    store.close()
    source = write(run_folder).read_text()
    page = Balance(source)
    assert page.tags & {"script", "link", "img", "iframe", "object"} == set()
    assert "<script" not in source
    assert page.text.count(NASTY) >= 8
    assert "49" not in page.text


def test_samples_are_drawn_with_the_seed(dreamed, run_folder: Path) -> None:
    """Ten pairs at most, the same every time and others with another seed."""
    dreamed(stock=["kept"] * 40)
    first, again = build(run_folder)["samples"], build(run_folder)["samples"]
    assert len({pair["clear"]["pair_id"] for pair in first}) == 10
    assert first == again
    write_json(run_folder / "manifest.json", {**MANIFEST, "seed": 8})
    assert build(run_folder)["samples"] != first


def test_torn_lines_of_a_running_round_are_left_out(dreamed, run_folder: Path) -> None:
    """Half a pair and half a line, as a round that is going on may show, are no errors and no pairs."""
    path = dreamed(stock=["kept", "kept"]) / "pairs.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert build(run_folder)["rounds"][0]["accepted"] == 1


@pytest.mark.parametrize(
    "name",
    ["policy.json", "round_01/audit.json", "round_01/diversity.json", "round_01/eval.json", "round_01/gate.json",
     "round_01/train/ledger.json"],
)  # fmt: skip
@pytest.mark.parametrize("content", ["{", '{"views": 3, "round": "x"}', "[]"])
def test_malformed_document_is_named(run_folder: Path, name: str, content: str) -> None:
    """What is not JSON, or not the document that it should be, is refused with its name."""
    path = run_folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}: "):
        build(run_folder)


@pytest.mark.parametrize("name", ["scenarios", "pairs", "spare", "general", "dropped", "replies", "verdicts"])
def test_malformed_line_is_named(dreamed, run_folder: Path, name: str) -> None:
    """A whole line that is no such record is refused with file and number."""
    path = dreamed(stock=["kept"]) / f"{name}.jsonl"
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=rf"{name}\.jsonl:\d+: "):
        build(run_folder)


def test_malformed_judge_is_named(run_folder: Path) -> None:
    """So is a manifest whose judge is none."""
    write_json(run_folder / "manifest.json", {**MANIFEST, "judge": {"auc": "good"}})
    with pytest.raises(DataError, match=r"manifest\.json: judge\."):
        build(run_folder)


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    """A folder without a manifest is no run, and no report is left in it."""
    with pytest.raises(RunError, match="not a run folder"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_that_cannot_be_written_is_said(run_folder: Path) -> None:
    """Where report.html cannot be put in its place the error names it."""
    (run_folder / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html: "):
        write(run_folder)
