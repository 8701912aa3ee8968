"""What a run folder says of its rounds: which policy was accepted, what each round came to, and its pairs.

Nothing here trains or measures. A round that ended has a gate.json; policy.json follows the gate files.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dream.errors import RunError
from dream.records import ContrastPair, PreferencePair, Record
from dream.store import contrast_pairs, read_json, read_log, round_folder, round_folders, write_json
from train.evals import RoundEvaluation
from train.gate import Decision


class Policy(Record):
    """policy.json: the accepted round (0 is the initial model) and where its weights are, relative to the run.

    `as_of` is the last round that was taken into account, so that a kill between gate.json and policy.json is noticed;
    `chosen_after` is the last round before the user went back to this one, 0 where the gate's word holds.
    """

    round: int = 0
    as_of: int = 0
    chosen_after: int = 0
    adapter: str | None = None
    weights: str | None = None
    masters: str | None = None

    @property
    def version(self) -> str:
        """The name that rows carry."""
        return f"round_{self.round:02d}"


class RoundResult(Record):
    """gate.json: what a round did, and whether its candidate became the policy."""

    round: int
    parent: int
    learning_rate: float
    accepted: int
    dropped: dict[str, int]
    decision: Decision
    summary: dict[str, Any]


def stored_evaluation(run: Path, number: int) -> RoundEvaluation:
    """The evaluation of a round that ended."""
    return read_evaluation(round_folder(run, number) / "eval.json")


def read_evaluation(path: Path) -> RoundEvaluation:
    """An eval.json.

    Raises:
        RunError: it is damaged, or of a version that measured other things.
    """
    try:
        return RoundEvaluation.model_validate(read_json(path))
    except ValidationError as error:
        raise RunError(f"{path}: not an evaluation of this version; remove it to measure again") from error


def read_policy(run: Path) -> Policy:
    """The accepted policy, decisions included that a kill kept from policy.json; the initial one where no round was
    promoted yet."""
    path = run / "policy.json"
    try:
        policy = Policy.model_validate(read_json(path)) if path.exists() else Policy()
    except ValidationError as error:
        raise RunError(
            f"{path}: not a policy file; restore it, or remove it to have the policy that the gate files name"
        ) from error
    for result in finished_rounds(run):
        if result.round > policy.as_of:
            promoted = result.decision.decision == "promote"
            policy = trained_policy(run, result.round) if promoted else policy
            policy = policy.model_copy(update={"as_of": result.round})
    return policy


def finished_rounds(run: Path) -> list[RoundResult]:
    """The results of the rounds that ended, in order."""
    results = []
    for path in (folder / "gate.json" for folder in round_folders(run).values()):
        if not path.exists():
            continue
        try:
            results.append(RoundResult.model_validate(read_json(path)))
        except ValidationError as error:
            raise RunError(f"{path}: not a gate file of this version; restore it, or begin another run") from error
    return results


def settle(run: Path) -> Policy:
    """Takes the newest decisions into policy.json and returns the policy."""
    policy = read_policy(run)
    write_json(run / "policy.json", policy.model_dump())
    return policy


def trained_policy(run: Path, number: int) -> Policy:
    """The policy that a round's training left; 0 is the initial model."""
    if number == 0:
        return Policy()
    out = round_folder(Path(), number) / "train"
    return Policy(
        round=number,
        as_of=number,
        adapter=str(out / "adapter") if (run / out / "adapter").exists() else None,
        weights=str(out / "weights"),
        masters=str(out / "masters") if (run / out / "masters").exists() else None,
    )


def roll_back(run: Path, number: int) -> Policy:
    """Makes an earlier promoted round (0: the initial model) the policy again; nothing is deleted.

    Raises:
        RunError: no such round, or it was not promoted.
    """
    results = finished_rounds(run)
    there = sorted({0, *(result.round for result in results if result.decision.decision == "promote")})
    if number not in there:
        raise RunError(f"{run}: round {number} was not promoted; --to takes one of {', '.join(map(str, there))}")
    unfinished = round_folder(run, len(results) + 1)
    trained = (unfinished / "train").exists()  # at the rate of the rejections that are forgiven
    if unfinished.exists() and (trained or number != read_policy(run).round):  # else it came from the policy that stays
        unfinished.rename(run / f"set_aside_{time.time_ns()}_{unfinished.name}")
    policy = trained_policy(run, number).model_copy(update={"as_of": len(results), "chosen_after": len(results)})
    write_json(run / "policy.json", policy.model_dump())
    return policy


def rejections(results: Sequence[RoundResult], policy: Policy) -> int:
    """How many rounds were rejected since the last promotion, or since the user chose `policy`; each halves the trust,
    the learning rate.

    An inconclusive round is no rejection: of its candidate nothing is known.
    """
    count = 0
    for result in reversed(results):
        if result.decision.decision == "promote" or result.round <= policy.chosen_after:
            break
        count += result.decision.conclusive
    return count


def stored_pairs(run: Path, number: int) -> list[ContrastPair]:
    """The contrast pairs of a round."""
    return list(contrast_pairs(read_log(round_folder(run, number) / "pairs.jsonl", PreferencePair)))


def undecided_pairs(run: Path) -> list[ContrastPair]:
    """The pairs of the inconclusive rounds since the last one that was decided: they train again, with new ones."""
    return [pair for number in _undecided(finished_rounds(run)) for pair in stored_pairs(run, number)]


def promoted_pairs(run: Path) -> list[ContrastPair]:
    """The pairs that the accepted policy was trained on, for replay: those of its round, of the undecided rounds before
    it, which trained with it, and of the promoted ones that it comes from."""
    results, number = finished_rounds(run), read_policy(run).round
    taught: list[int] = []
    while number:
        taught = [*_undecided(results[: number - 1]), number, *taught]
        number = results[number - 1].parent
    return [pair for number in taught for pair in stored_pairs(run, number)]


def _undecided(results: Sequence[RoundResult]) -> list[int]:
    """The inconclusive rounds at the end of `results`, in order."""
    last = max((number for number, result in enumerate(results, 1) if result.decision.conclusive), default=0)
    return [result.round for result in results[last:]]
