"""The report of a run: report.json for programs, report.html for people, both out of the files in the run folder.

It reads and never measures: a file that is not there is left out of the report, so it can be made of a run that is
still going on. Not covered: what the policy preferred before and after training, which is in train/ledger.json.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from pydantic import BaseModel, ValidationError

from dream.audit import TITLES, Audit
from dream.diversity import Diversity
from dream.errors import DataError, StorageError
from dream.judge.quality import Quality
from dream.records import ContrastPair, Dropped, PreferencePair, Record, Reply, Scenario, Verdict
from dream.runs import opened
from dream.store import contrast_pairs, drop_reasons, read_json, read_log, round_folders, write_json
from train.data import Drift
from train.evals import RoundEvaluation
from train.history import Policy, RoundResult

M = TypeVar("M", bound=BaseModel)

SAMPLES = 10
"""Contrast pairs that are shown."""
MIN_SHARE = 0.15
"""What passed in less than this share of its draws starves."""
MIN_DRAWN = 4
"""A template that was drawn less often is not said to starve; a kind of flaw, which has several templates, is."""
STANCES = ("comply", "push_back", "neither", "abstain", "unjudged")


class Acceptance(Record):
    """How the scenarios of one template, or of one kind of flaw, fared.

    `accepted` are among the round's pairs; `passed` counts those too that were spare or came when enough were there,
    and `share` is of those. Mirrored twins, which are not dreamed, are not counted.
    """

    name: str
    drawn: int
    passed: int
    accepted: int
    share: float
    starves: bool


class _Model(BaseModel):
    model: str


class _Manifest(BaseModel):
    """What the report needs of manifest.json; other keys are ignored."""

    kind: str
    fingerprint: str
    seed: int
    config: _Model
    versions: dict[str, str] = {}
    judge: Quality | None = None


class _Ledger(BaseModel):
    """What the report needs of train/ledger.json."""

    summary: str
    weights: dict[str, dict[str, float]] = {}
    drift: list[Drift] = []
    reply_tokens: dict[str, float | None] = {}


def build(run: Path) -> dict[str, Any]:
    """Everything the report says of a run.

    Raises:
        RunError: it is no run folder.
        DataError: one of its files is not what it should be.
    """
    opened(run)
    about = _document(run / "manifest.json", _Manifest)
    assert about is not None, "opened() has read it"
    found: dict[str, Any] = {
        "run": run.resolve().name,
        "kind": about.kind,
        "model": about.config.model,
        "seed": about.seed,
        "fingerprint": about.fingerprint,
        "versions": about.versions,
    }
    if about.judge is not None:
        found["judge"] = about.judge.model_dump()
    if policy := _document(run / "policy.json", Policy):
        found["policy"] = policy.version
    folders = round_folders(run)
    found["rounds"] = [_round(number, folder) for number, folder in folders.items()]
    pairs = [(number, pair) for number, folder in folders.items() for pair in _pairs(folder / "pairs.jsonl")]
    shown = random.Random(f"report/{about.seed}").sample(pairs, min(SAMPLES, len(pairs)))
    found["samples"] = [{"round": number, **pair.model_dump()} for number, pair in shown]
    return found


def write(run: Path) -> Path:
    """Writes report.json and report.html into the run folder; the path of the second.

    Raises:
        RunError, DataError: see `build`.
        StorageError: the folder cannot be written.
    """
    found = build(run)
    write_json(run / "report.json", found)
    path = run / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(_html(found), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; make room or fix permissions, then try again"
        ) from error
    return path


def _html(found: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("dream").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(report=found, titles=TITLES, stances=STANCES)


def _round(number: int, folder: Path) -> dict[str, Any]:
    """What one round's files say; files that are missing give no key."""
    found: dict[str, Any] = {"round": number}
    if (folder / "pairs.jsonl").exists():
        found |= _dreamed(folder)
    if audit := _document(folder / "audit.json", Audit):
        found["audit"] = audit.model_dump()
    if diversity := _document(folder / "diversity.json", Diversity):
        found["diversity"] = diversity.model_dump()
    if ledger := _document(folder / "train" / "ledger.json", _Ledger):
        found["ledger"] = ledger.model_dump()
    if evaluation := _document(folder / "eval.json", RoundEvaluation):
        shown = evaluation.model_dump(include={"heldout", "fresh"}, exclude={"heldout": {"items"}, "fresh": {"items"}})
        found["eval"] = {**shown, "retention": evaluation.retained, "behaviour": evaluation.behaviour.rates}
    if result := _document(folder / "gate.json", RoundResult):
        decision = result.decision
        about = {"word": decision.word, "learning_rate": result.learning_rate, "parent": result.parent}
        found["gate"] = {**decision.model_dump(), **about}
    return found


def _dreamed(folder: Path) -> dict[str, Any]:
    """What was drawn, what came of it, and what was said."""
    pairs = _pairs(folder / "pairs.jsonl")
    general = list(read_log(folder / "general.jsonl", PreferencePair))
    templates, kinds = _acceptance(folder, pairs, general)
    return {
        "scenarios": sum(one.drawn for one in templates),
        "accepted": len(pairs),
        "mirrored": sum(bool(pair.clear.meta.get("mirror_of")) for pair in pairs),
        "general": len(general),
        "dropped": drop_reasons(folder),
        "templates": [one.model_dump() for one in templates],
        "kinds": [one.model_dump() for one in kinds],
        "starving": {
            "templates": [one.name for one in templates if one.starves],
            "kinds": [one.name for one in kinds if one.starves],
        },
        "replies": _replies(folder),
    }


def _acceptance(
    folder: Path, pairs: Iterable[ContrastPair], general: Iterable[PreferencePair]
) -> tuple[list[Acceptance], list[Acceptance]]:
    """By template, and by kind of flaw. A draw that was refused at once is a row of dropped.jsonl only."""
    scenarios = [row for row in read_log(folder / "scenarios.jsonl", Scenario) if not row.mirror_of]
    dropped = list(read_log(folder / "dropped.jsonl", Dropped))
    template = {row.scenario_id: row.template for row in dropped if row.stage == "draw"}
    template |= {row.scenario_id: row.template for row in scenarios}
    flaw_of = {row.template: row.flaw for row in scenarios}
    flaw = {scenario_id: flaw_of.get(name, "unknown") for scenario_id, name in template.items()}
    accepted = {pair.clear.pair_id for pair in pairs} | {row.pair_id for row in general}
    passed = accepted | {pair.clear.pair_id for pair in _pairs(folder / "spare.jsonl")}
    passed |= {row.scenario_id for row in dropped if row.reason == "surplus"}
    return _counted(template, passed, accepted, MIN_DRAWN), _counted(flaw, passed, accepted, 1)


def _counted(name_of: dict[str, str], passed: set[str], accepted: set[str], min_drawn: int) -> list[Acceptance]:
    """One row a name, in their order; `name_of` is that of each scenario drawn."""
    by_name = defaultdict(set)
    for scenario_id, name in name_of.items():
        by_name[name].add(scenario_id)
    rows = []
    for name, ids in sorted(by_name.items()):
        share = len(ids & passed) / len(ids)
        rows.append(
            Acceptance(
                name=name,
                drawn=len(ids),
                passed=len(ids & passed),
                accepted=len(ids & accepted),
                share=round(share, 4),
                starves=len(ids) >= min_drawn and share < MIN_SHARE,
            )
        )
    return rows


def _replies(folder: Path) -> dict[str, dict[str, int]]:
    """Counts by source and judged stance; `unjudged` where the round ended before the judge had ruled."""
    ruled = {
        verdict.reply_id: "abstain" if verdict.abstain else verdict.stance
        for verdict in read_log(folder / "verdicts.jsonl", Verdict)
    }
    counts: dict[str, Counter[str]] = {}
    for reply in read_log(folder / "replies.jsonl", Reply):
        counts.setdefault(reply.source, Counter())[ruled.get(reply.reply_id, "unjudged")] += 1
    return {source: {stance: counts[source][stance] for stance in STANCES} for source in sorted(counts)}


def _pairs(path: Path) -> list[ContrastPair]:
    return list(contrast_pairs(read_log(path, PreferencePair)))


def _document(path: Path, kind: type[M]) -> M | None:
    """A JSON document of the run, None where it is missing.

    Raises:
        DataError: it is not such a document.
    """
    if not path.exists():
        return None
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(top level)"
        raise DataError(f"{path}: {key}: {first['msg']}; restore the file, or move it away to leave it out") from error
