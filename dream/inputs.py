"""Data files that people write: JSON Lines with line numbers in every error."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from dream.errors import DataError
from dream.judge.question import Labelled, Question
from dream.records import ContrastPair, Message, PreferencePair, Record, user
from dream.store import contrast_pairs

R = TypeVar("R", bound=BaseModel)


class LabelledRow(Record):
    """A row of `dream judge check`: a reply whose stance a person has decided."""

    prompt: list[Message]
    response: str
    label: Literal["comply", "push_back"]


def read_user_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; blank lines are skipped, and `prompt` given as a text becomes messages.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        if isinstance(row.get("prompt"), str):
            row["prompt"] = [user(row["prompt"])]
        yield number, row


def read_user_rows(path: Path, kind: type[R]) -> list[R]:
    """All rows of a file as records of one kind.

    Raises:
        DataError: naming the file, the line and the key; or there is no row at all.
    """
    rows = []
    for number, raw in read_user_lines(path):
        try:
            rows.append(kind.model_validate(raw))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"{path}:{number}: {key}: {first['msg']}") from error
    if not rows:
        raise DataError(f"{path}: no rows; write one JSON object a line")
    return rows


def read_labelled(path: Path) -> list[Labelled]:
    """The labelled replies of a file; replies to one prompt form a group."""
    return [
        Labelled(Question(row.prompt, row.response), row.label, row.prompt[-1]["content"] if row.prompt else "")
        for row in read_user_rows(path, LabelledRow)
    ]


def read_data(paths: Sequence[Path]) -> list[ContrastPair]:
    """The contrast pairs of several files, each under an id of its own.

    Every run numbers its pairs alike, so a file in which an earlier one's ids come again has its place put before its
    own.

    Raises:
        DataError: a bad row, or a file without a whole pair.
    """
    pairs: list[ContrastPair] = []
    for place, path in enumerate(paths, 1):
        taken, found = {pair.clear.pair_id for pair in pairs}, read_contrast_pairs(path)
        again = any(pair.clear.pair_id in taken for pair in found)
        pairs += [_renamed(pair, f"data{place}-") for pair in found] if again else found
    return pairs


def _renamed(pair: ContrastPair, before: str) -> ContrastPair:
    """The pair under another id; what names the pair that it mirrors follows."""

    def row(one: PreferencePair) -> PreferencePair:
        mirrored = one.meta.get("mirror_of")
        meta = one.meta | ({"mirror_of": before + str(mirrored)} if mirrored else {})
        return one.model_copy(update={"pair_id": before + one.pair_id, "meta": meta})

    return ContrastPair(clear=row(pair.clear), flawed=row(pair.flawed))


def read_contrast_pairs(path: Path) -> list[ContrastPair]:
    """The whole contrast pairs of a pairs.jsonl; a pair with one row only is left out, which is said.

    Raises:
        DataError: a bad row or weight, no whole pair, or two rows of one side under one id.
    """
    rows = read_user_rows(path, PreferencePair)
    [((often, side), times)] = Counter((row.pair_id, row.side) for row in rows).most_common(1)
    if times > 1:
        raise DataError(
            f"{path}: {times} {side} rows are called {often!r}; give files of several runs one by one, "
            "--data A --data B"
        )
    pairs = list(contrast_pairs(rows))
    if not pairs:
        raise DataError(
            f"{path}: no contrast pair; each pair_id needs a clear and a flawed row (rows of `dream logs import` have "
            "one side only: train on them with TRL)"
        )
    for pair in pairs:
        for row in (pair.clear, pair.flawed):
            sure = row.meta.get("judge_confidence", 1.0)
            if not isinstance(sure, (int, float)) or not 0 < sure <= 1:
                raise DataError(
                    f"{path}: pair {row.pair_id!r}, {row.side}: meta.judge_confidence is {sure!r}; it is the row's "
                    "weight, above 0 and up to 1, or left out"
                )
    if halves := len(rows) - 2 * len(pairs):
        logging.getLogger("dream").warning("%s: %d rows without their pair's other side are left out", path, halves)
    return pairs
