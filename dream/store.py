"""Run folders: append-only JSON Lines and small JSON documents written atomically.

A line is complete only when it ends in a newline, so a torn last line (power, full disk) is cut off when the file is
opened for appending and nothing else is lost. The two rows of a contrast pair go out in one write; half a pair is
ignored on reading. One process at a time owns a run folder.
"""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from dream.errors import DataError, RunError, StorageError
from dream.records import ContrastPair, Dropped, PreferencePair, Record

R = TypeVar("R", bound=BaseModel)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON document so that readers see the old one or the new one, never half of it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _storage_error(path, error) from error


def read_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        DataError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error


class Log:
    """An append-only JSON Lines file. Opening it cuts off a torn last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            self._file.truncate(_complete_length(path, size))
        except OSError as error:
            raise _storage_error(path, error) from error

    def append(self, *records: Record, sync: bool = False) -> None:
        """Appends records in one write: after a crash either all of them are there or a torn tail that is ignored.

        With `sync` they are on the disk when it returns; some file systems show a full disk only then.

        Raises:
            StorageError: the disk is full or not writable; the file is as before.
        """
        data = "".join(record.model_dump_json() + "\n" for record in records).encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(28, "No space left on device")
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # half a row is cut off when the file is opened again; a whole one then counts
                self._file.truncate(start)
            raise _storage_error(self.path, error) from error

    def sync(self) -> None:
        """Forces what was appended to the disk.

        Raises:
            StorageError: it did not get there.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def replace(self, path: Path) -> None:
        """Takes the place of another file, whole; further appends go there."""
        self.sync()
        try:
            self.path.replace(path)
        except OSError as error:
            raise _storage_error(path, error) from error
        self.path = path

    def close(self) -> None:
        """Syncs and closes."""
        self.sync()
        self._file.close()


def read_log(path: Path, kind: type[R]) -> Iterator[R]:
    """The records of a JSON Lines file of ours; a missing file is empty, a torn last line is left out.

    Raises:
        DataError: a complete line that is not such a record, with its number.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"]))
                raise DataError(f"{path}:{number}: {key}: {first['msg']}") from error


def mend_pairs(path: Path) -> None:
    """Cuts half a contrast pair (a kill between its rows) off the end of a pairs.jsonl, so that nobody trains on it."""
    if not path.exists():
        return
    try:
        lines = path.read_bytes()[: _complete_length(path, path.stat().st_size)].splitlines(keepends=True)
        if len(lines) % 2:
            os.truncate(path, sum(map(len, lines[:-1])))
    except OSError as error:
        raise _storage_error(path, error) from error


def contrast_pairs(rows: Iterable[PreferencePair]) -> Iterator[ContrastPair]:
    """Rows joined to contrast pairs by `pair_id`; half a pair (a crash between its rows) is left out."""
    waiting: dict[str, PreferencePair] = {}
    for row in rows:
        other = waiting.pop(row.pair_id, None)
        if other is None:
            waiting[row.pair_id] = row
        elif {other.side, row.side} == {"clear", "flawed"}:
            clear, flawed = (row, other) if row.side == "clear" else (other, row)
            yield ContrastPair(clear=clear, flawed=flawed)


def drop_reasons(folder: Path) -> dict[str, int]:
    """How often each reason dropped a scenario of a round, the commonest first."""
    return dict(Counter(row.reason for row in read_log(folder / "dropped.jsonl", Dropped)).most_common())


class RoundStore:
    """One round's folder while it is being dreamed."""

    LOGS = ("scenarios", "replies", "verdicts", "pairs", "spare", "general", "dropped")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("pairs", "spare"):
            mend_pairs(folder / f"{name}.jsonl")
        self._logs = {name: Log(folder / f"{name}.jsonl") for name in self.LOGS}
        self.pairs = list(contrast_pairs(read_log(folder / "pairs.jsonl", PreferencePair)))
        kept = {pair.clear.pair_id for pair in self.pairs}
        # By id, as a pair that left the round's pairs twice stands there twice.
        spare = {pair.clear.pair_id: pair for pair in contrast_pairs(read_log(folder / "spare.jsonl", PreferencePair))}
        self.spare = [pair for pair_id, pair in spare.items() if pair_id not in kept]
        self.general = list(read_log(folder / "general.jsonl", PreferencePair))
        self.dropped = list(read_log(folder / "dropped.jsonl", Dropped))

    @property
    def done(self) -> set[str]:
        """Ids of the scenarios that ended: kept, or dropped with a reason."""
        kept = {pair.clear.meta["scenario_id"] for pair in (*self.pairs, *self.spare)}
        kept |= {row.meta["scenario_id"] for row in self.general}
        return kept | {row.scenario_id for row in self.dropped}

    def add(self, log: str, *records: Record) -> None:
        """Appends records to one of `LOGS`."""
        self._logs[log].append(*records)

    def keep(self, *pairs: ContrastPair) -> None:
        """Stores accepted contrast pairs, all rows in one write, on the disk before they are counted."""
        self._accept("pairs", *(row for pair in pairs for row in (pair.clear, pair.flawed)))
        self.pairs += pairs

    def keep_spare(self, pair: ContrastPair) -> None:
        """Stores an accepted candidate that is not among the round's pairs: one too many, or dreamed for balance."""
        self._accept("spare", pair.clear, pair.flawed)
        self.spare.append(pair)

    def _accept(self, log: str, *rows: PreferencePair) -> None:
        """Rows on the disk, and their scenarios before them: after a loss of power a pair whose scenario were gone
        would be drawn again."""
        self._logs["scenarios"].sync()
        self._logs[log].append(*rows, sync=True)

    def exchange(self, chosen: list[ContrastPair]) -> None:
        """Makes `chosen`, out of the pairs and the spare ones, the round's pairs; the others are spare.

        What goes out is in spare.jsonl before pairs.jsonl is replaced, so a kill in between loses nothing.
        """
        ids = {pair.clear.pair_id for pair in chosen}
        leaving = [pair for pair in self.pairs if pair.clear.pair_id not in ids]
        staying_spare = [pair for pair in self.spare if pair.clear.pair_id not in ids]
        for pair in leaving:
            self._logs["spare"].append(pair.clear, pair.flawed)
        self._logs["spare"].sync()
        path = self.folder / "pairs.jsonl"
        scratch = path.with_name(".pairs.jsonl.new")
        scratch.unlink(missing_ok=True)  # a kill may have left one
        fresh = Log(scratch)
        for pair in chosen:
            fresh.append(pair.clear, pair.flawed)
        fresh.replace(path)
        self._logs["pairs"].close()
        self._logs["pairs"] = fresh
        self.pairs, self.spare = list(chosen), [*staying_spare, *leaving]

    def keep_general(self, row: PreferencePair) -> None:
        """Stores an accepted general pair."""
        self._accept("general", row)
        self.general.append(row)

    def drop(self, row: Dropped) -> None:
        """Stores what was not kept, with its reason."""
        self._logs["dropped"].append(row)
        self.dropped.append(row)

    def close(self) -> None:
        """Closes all files."""
        for log in self._logs.values():
            log.close()


TEMPLATE_KEY = "template."
PROMPT_KEY = "prompts."
"""How the settings in a manifest that are template hashes begin."""


class RunFolder:
    """A run folder, owned by this process while the `with` block lasts."""

    def __init__(self, path: Path, manifest: dict[str, Any], allow_template_change: bool = False) -> None:
        """`manifest` must hold `kind`, `fingerprint` and `settings` (flat keys); it is written if the run is new.

        A run whose templates were edited since is refused, unless `allow_template_change`: then the manifest takes the
        new hashes and keeps the old ones under `template_changes`.
        """
        self.path = path.resolve()
        self._wanted, self._allow_template_change = manifest, allow_template_change

    def __enter__(self) -> "RunFolder":
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file; choose another --out")
        strange = self.path.is_dir() and not (self.path / "manifest.json").exists()
        if strange and any(not found.name.startswith(".") for found in self.path.iterdir()):
            raise RunError(f"{self.path}: not empty and not a run folder; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise _storage_error(self.path, error) from error
        try:
            _own(self._lock, self.path)
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _open(self) -> None:
        """Reads or writes the manifest; the lock is held."""
        path = self.path / "manifest.json"
        existing = read_json(path) if path.exists() else None
        if existing is not None and not isinstance(existing, dict):
            raise RunError(f"{path}: not a manifest; choose another --out")
        self.continued = existing is not None
        self.manifest = self._continued(existing) if existing is not None else self._wanted
        if self.manifest != existing:
            write_json(path, self.manifest)
        _point_latest(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def note(self, key: str, value: Any) -> None:
        """Adds something that was found out later to the manifest, such as how good the judge is."""
        self.manifest = {**self.manifest, key: value}
        write_json(self.path / "manifest.json", self.manifest)

    def _continued(self, existing: dict[str, Any]) -> dict[str, Any]:
        """The manifest of a run that goes on."""
        if existing.get("kind") != self._wanted["kind"]:
            raise RunError(f"{self.path}: was made by `dream {existing.get('kind')}`; choose another --out")
        if existing.get("fingerprint") == self._wanted["fingerprint"]:
            return existing
        old, new = existing.get("settings", {}), self._wanted["settings"]
        keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        shown = ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in keys[:5])
        if not all(key.startswith((TEMPLATE_KEY, PROMPT_KEY)) for key in keys):
            raise RunError(f"{self.path}: was begun with other settings: {shown}; use those, or choose another --out")
        if not self._allow_template_change:
            raise RunError(
                f"{self.path}: templates changed since it was begun: {shown}; go on with --allow-template-change, put "
                "the old files back, or choose another --out"
            )
        changes = {key.removeprefix(TEMPLATE_KEY): [old.get(key), new.get(key)] for key in keys}
        return {
            **existing,
            "settings": new,
            "fingerprint": self._wanted["fingerprint"],
            "template_changes": [*existing.get("template_changes", []), changes],
        }


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """While the block lasts no other process owns this file, which is made where it is not there yet.

    Raises:
        RunError: another process owns it, or its file system has no locks.
        StorageError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise _storage_error(path, error) from error
    with file:
        _own(file, path)
        yield


def _own(file: IO[Any], path: Path) -> None:
    """Locks an open file until it is closed; `path` is what the messages are about."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path}: another process is working on it; wait for it, or choose another --out") from error
    except OSError as error:
        raise RunError(
            f"{path}: its file system has no locks ({error.strerror or error}), which keep two processes apart; choose "
            "an --out on another"
        ) from error


def round_folder(run: Path, number: int) -> Path:
    """`round_01` and so on."""
    return run / f"round_{number:02d}"


def round_folders(run: Path) -> dict[int, Path]:
    """The folders of a run's rounds by number, in order; a copy that somebody put beside them is none."""
    numbered = {path.name.removeprefix("round_"): path for path in run.glob("round_*") if path.is_dir()}
    return {number: numbered[text] for number, text in sorted((int(t), t) for t in numbered if t.isdecimal())}


def new_run_path(kind: str, root: Path = Path("runs")) -> Path:
    """A fresh folder name under `runs/`, by time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{n}" for n in range(2, 100))]:
        path = root / f"{kind}-{stamp}{suffix}"
        if not path.exists():
            return path
    raise RunError(f"{root}: too many runs in this second; name one with --out")


def _point_latest(path: Path) -> None:
    latest = path.parent / "latest"
    temporary = path.parent / f".latest-{os.getpid()}"
    try:
        if latest.exists() and not latest.is_symlink():
            return  # somebody's own folder of that name stays
        temporary.unlink(missing_ok=True)  # of a process of this number that was killed here
        temporary.symlink_to(path.name)
        temporary.replace(latest)
    except OSError:
        return  # a disk without links, or a parent that others own: the link is a convenience, and the run is not


def _complete_length(path: Path, size: int) -> int:
    """Bytes up to and including the last newline."""
    if size == 0:
        return 0
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - 65_536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: {error.strerror or error}; make room or fix permissions, then run the same command again"
    )
