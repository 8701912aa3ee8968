"""dream/store.py: run folders that survive kills, torn lines, full disks and second processes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dream import store
from dream.errors import DataError, RunError, StorageError
from dream.records import ContrastPair, Dropped, PreferencePair
from dream.store import Log, RoundStore, RunFolder, contrast_pairs, read_json, read_log, write_json

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
dropped_rows = st.builds(Dropped, scenario_id=texts, template=texts, stage=texts, reason=texts, detail=texts)

HOLD = """
import sys
from pathlib import Path
from dream.store import RunFolder
with RunFolder(Path(sys.argv[1]), {"kind": "generate", "fingerprint": "a", "settings": {}}):
    print("held", flush=True)
    sys.stdin.read()
"""


def manifest(kind: str = "generate", **settings: object) -> dict:
    """What a run is begun with."""
    return {"kind": kind, "fingerprint": repr(settings), "settings": settings}


def written(path: Path, *records: Dropped) -> bytes:
    """Appends records and gives the file's content."""
    log = Log(path)
    for record in records:
        log.append(record)
    log.close()
    return path.read_bytes()


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> Callable[[Log, int], None]:
    """Makes a log's file take only the first bytes of what is written and then report a full disk, or take less."""

    def fill(log: Log, room: int, silently: bool = False) -> None:
        file = log._file

        class Full:
            """The real file, with a disk behind it that has `room` bytes left."""

            def write(self, data: bytes) -> int:
                done = file.write(data[:room])
                if not silently:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return done

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        monkeypatch.setattr(log, "_file", Full())

    return fill


@given(rows=st.lists(dropped_rows, max_size=8))
def test_appended_records_come_back(tmp_path_factory, rows: list[Dropped]) -> None:
    """What is appended is read back equal and in order, whatever text it holds."""
    path = tmp_path_factory.mktemp("log") / "dropped.jsonl"
    written(path, *rows)
    assert list(read_log(path, Dropped)) == rows


@pytest.mark.usefixtures("quick_disk")
def test_torn_line_is_cut_at_every_point(tmp_path: Path) -> None:
    """Wherever a crash cuts the file, the whole lines before it are read, and appending goes on after them."""
    path = tmp_path / "dropped.jsonl"
    rows = [Dropped(scenario_id=text, template="t", stage="s", reason="r") for text in ("one", "zwölf\n", "\U0001f40d")]
    extra = Dropped(scenario_id="new", template="t", stage="s", reason="r")
    data = written(path, *rows)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = rows[: data[:cut].count(b"\n")]
        assert list(read_log(path, Dropped)) == whole
        written(path, extra)
        assert list(read_log(path, Dropped)) == [*whole, extra]


def test_long_torn_line_is_cut(tmp_path: Path) -> None:
    """A torn line longer than a read buffer is cut off and the lines before it stay."""
    path = tmp_path / "dropped.jsonl"
    row = Dropped(scenario_id="1", template="t", stage="s", reason="r", detail="x" * 200_000)
    data = written(path, row, row)
    path.write_bytes(data[:-5])
    Log(path).close()
    assert list(read_log(path, Dropped)) == [row]


@pytest.mark.usefixtures("quick_disk")
def test_pair_is_whole_or_absent_at_every_cut(tmp_path: Path, make_pair) -> None:
    """Wherever a crash cuts pairs.jsonl, the continued round holds whole pairs, in memory and in the file."""
    store = RoundStore(tmp_path / "full")
    pairs = [make_pair("a"), make_pair("b")]
    for pair in pairs:
        store.keep(pair)
    store.close()
    data = (tmp_path / "full" / "pairs.jsonl").read_bytes()
    for cut in range(len(data) + 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "pairs.jsonl").write_bytes(data[:cut])
        continued = RoundStore(folder)
        whole = pairs[: data[:cut].count(b"\n") // 2]
        assert continued.pairs == whole
        assert continued.done == {pair.clear.pair_id for pair in whole}
        continued.keep(make_pair("c"))
        continued.close()
        rows = list(read_log(folder / "pairs.jsonl", PreferencePair))
        assert list(contrast_pairs(rows)) == [*whole, make_pair("c")]
        assert len(rows) == 2 * len(whole) + 2, f"half a pair stays in the file when it is cut at byte {cut}"


@given(st.data())
def test_contrast_pairs_join_rows_in_any_order(make_pair, data: st.DataObject) -> None:
    """Rows are joined by their id whatever their order, and a lone row makes no pair."""
    pairs: list[ContrastPair] = [make_pair(str(number)) for number in range(data.draw(st.integers(0, 5)))]
    rows = data.draw(st.permutations([row for pair in pairs for row in (pair.clear, pair.flawed)]))
    lost = data.draw(st.integers(0, len(rows)))
    joined = sorted(contrast_pairs(rows[lost:]), key=lambda pair: pair.clear.pair_id)
    left = [row.pair_id for row in rows[lost:]]
    assert joined == [pair for pair in pairs if left.count(pair.clear.pair_id) == 2]


def test_bad_line_is_named(tmp_path: Path) -> None:
    """A complete line that is not such a record is refused with file, line number and key."""
    path = tmp_path / "dropped.jsonl"
    written(path, Dropped(scenario_id="1", template="t", stage="s", reason="r"))
    with path.open("a") as file:
        file.write('{"scenario_id": "2", "template": "t", "stage": "s"}\n')
    with pytest.raises(DataError, match=r"dropped\.jsonl:2: reason: "):
        list(read_log(path, Dropped))


@pytest.mark.parametrize("room", [0, 10, 100_000])
def test_full_disk_leaves_the_file_as_before(tmp_path: Path, disk_full, room: int) -> None:
    """When the disk is full in the middle of a record, the file is as before and the error names it."""
    log = Log(tmp_path / "dropped.jsonl")
    row = Dropped(scenario_id="1", template="t", stage="s", reason="r")
    log.append(row)
    before = log.path.read_bytes()
    disk_full(log, room)
    with pytest.raises(StorageError, match=r"dropped\.jsonl: No space left on device"):
        log.append(row, row)
    assert log.path.read_bytes() == before


def test_short_write_leaves_the_file_as_before(tmp_path: Path, disk_full) -> None:
    """When only a part of the bytes is taken, without an error, the file is as before too."""
    log = Log(tmp_path / "dropped.jsonl")
    disk_full(log, 10, silently=True)
    with pytest.raises(StorageError):
        log.append(Dropped(scenario_id="1", template="t", stage="s", reason="r"))
    assert log.path.read_bytes() == b""


def test_full_disk_does_not_count_a_pair(tmp_path: Path, make_pair, disk_full) -> None:
    """A pair that could not be stored is not counted, and can be stored when there is room again."""
    store = RoundStore(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "append", _no_space)
        with pytest.raises(StorageError):
            store.keep(make_pair("a"))
    assert store.pairs == []
    store.keep(make_pair("a"))
    assert store.pairs == list(contrast_pairs(read_log(tmp_path / "pairs.jsonl", PreferencePair)))


def ids(pairs: list[ContrastPair]) -> list[str]:
    """The pairs' ids."""
    return [pair.clear.pair_id for pair in pairs]


def test_spare_pairs_are_kept_apart(tmp_path: Path, make_pair) -> None:
    """Spare pairs come back as such, end their scenarios, and stand in a file like pairs.jsonl."""
    store = RoundStore(tmp_path)
    store.keep(make_pair("a"))
    store.keep_spare(make_pair("b"))
    store.close()
    again = RoundStore(tmp_path)
    assert (again.pairs, again.spare) == ([make_pair("a")], [make_pair("b")])
    assert again.done == {"a", "b"}
    rows = read_log(tmp_path / "spare.jsonl", PreferencePair)
    assert list(contrast_pairs(rows)) == [make_pair("b")]


@pytest.mark.usefixtures("quick_disk")
def test_spare_pair_is_whole_or_absent_at_every_cut(tmp_path: Path, make_pair) -> None:
    """Wherever a crash cuts spare.jsonl, whole pairs are left, in memory and in the file."""
    store = RoundStore(tmp_path / "full")
    for name in "ab":
        store.keep_spare(make_pair(name))
    store.close()
    data = (tmp_path / "full" / "spare.jsonl").read_bytes()
    for cut in range(0, len(data) + 1, 7):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "spare.jsonl").write_bytes(data[:cut])
        continued = RoundStore(folder)
        whole = [make_pair("a"), make_pair("b")][: data[:cut].count(b"\n") // 2]
        assert continued.spare == whole
        continued.close()
        assert len(list(read_log(folder / "spare.jsonl", PreferencePair))) == 2 * len(whole)


class Killed(BaseException):
    """Stands for the process's sudden end."""


def dying_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Lets so many appends and replacements of logs pass, and ends the process before the next one."""
    left = iter(range(steps))

    def counted(work: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            if next(left, None) is None:
                raise Killed
            work(*arguments)

        return step

    for name in ("append", "replace"):
        patch.setattr(Log, name, counted(getattr(Log, name)))


@given(st.data())
@settings(max_examples=25)
def test_exchange_loses_nothing_wherever_it_is_killed(tmp_path_factory, make_pair, data: st.DataObject) -> None:
    """After any exchanges, killed or not, each pair is there once, and the round's are the old or the chosen ones."""
    folder = tmp_path_factory.mktemp("round")
    everything = sorted(f"p{number}" for number in range(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        store = RoundStore(folder)
        for name in everything:
            (store.keep if name < "p3" else store.keep_spare)(make_pair(name))
        for _ in range(data.draw(st.integers(1, 4), "exchanges")):
            before = ids(store.pairs)
            chosen = data.draw(st.permutations([*store.pairs, *store.spare]), "order")[:3]
            steps = data.draw(st.none() | st.integers(0, 7), "steps before the kill")
            try:
                with pytest.MonkeyPatch.context() as killing:
                    if steps is not None:
                        dying_after(killing, steps)
                    store.exchange(chosen)
            except Killed:
                assert ids(RoundStore(folder).pairs) == before
            else:
                assert ids(store.pairs) == ids(chosen)
                before = ids(chosen)
            again = RoundStore(folder)
            assert ids(again.pairs) == before
            assert sorted(ids(again.pairs) + ids(again.spare)) == everything
            if steps is not None or data.draw(st.booleans(), "a new process"):
                store = again


def test_exchange_between_its_two_writes(tmp_path: Path, make_pair) -> None:
    """A kill after spare.jsonl took what goes out and before pairs.jsonl is replaced leaves the old set, once."""
    store = RoundStore(tmp_path)
    store.keep(make_pair("old"))
    store.keep_spare(make_pair("new"))
    with pytest.MonkeyPatch.context() as patch:
        dying_after(patch, 2)  # the append to spare.jsonl and that to the new file
        with pytest.raises(Killed):
            store.exchange([make_pair("new")])
    rows = list(read_log(tmp_path / "spare.jsonl", PreferencePair))
    assert [row.pair_id for row in rows] == ["new", "new", "old", "old"]
    for _ in range(2):
        again = RoundStore(tmp_path)
        assert (ids(again.pairs), ids(again.spare)) == (["old"], ["new"])
    again.exchange([make_pair("new")])
    last = RoundStore(tmp_path)
    assert (ids(last.pairs), ids(last.spare)) == (["new"], ["old"])


def test_pairs_are_kept_after_an_exchange(tmp_path: Path, make_pair) -> None:
    """What is kept after an exchange goes to the new pairs.jsonl, and no other file is left behind."""
    store = RoundStore(tmp_path)
    store.keep(make_pair("a"))
    store.keep_spare(make_pair("b"))
    store.exchange([make_pair("b")])
    store.keep(make_pair("c"))
    store.close()
    assert ids(RoundStore(tmp_path).pairs) == ["b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in RoundStore.LOGS)


def test_full_disk_leaves_an_exchange_undone(tmp_path: Path, make_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new file cannot take the old one's place the error names it, and the store can be used and closed."""
    store = RoundStore(tmp_path)
    store.keep(make_pair("a"))
    store.keep_spare(make_pair("b"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: _refuse(0))
        with pytest.raises(StorageError, match=r"pairs\.jsonl: No space left"):
            store.exchange([make_pair("b")])
    assert (ids(store.pairs), ids(store.spare)) == (["a"], ["b"])
    store.keep(make_pair("c"))
    store.close()
    assert ids(RoundStore(tmp_path).pairs) == ["a", "c"]


def _no_space(log: Log, *records: object, sync: bool = False) -> None:
    raise StorageError(f"{log.path}: No space left on device")


@given(st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3)))
def test_json_document_comes_back(tmp_path_factory, value: object) -> None:
    """A JSON document is read back equal, and nothing else is left beside it."""
    path = tmp_path_factory.mktemp("json") / "inner" / "doc.json"
    write_json(path, value)
    assert read_json(path) == value
    assert [p.name for p in path.parent.iterdir()] == ["doc.json"]


def test_failed_document_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a document cannot be forced to the disk, readers still see the old one."""
    path = tmp_path / "policy.json"
    write_json(path, {"round": 1})
    monkeypatch.setattr(os, "fsync", _refuse)
    with pytest.raises(StorageError, match=r"policy\.json: No space left"):
        write_json(path, {"round": 2})
    assert read_json(path) == {"round": 1}


def _refuse(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\xff"])
def test_broken_document_is_named(tmp_path: Path, text: str) -> None:
    """A document that is not JSON, or not there, is the user's error with the file's name."""
    path = tmp_path / "policy.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"policy\.json"):
        read_json(path)
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "absent.json")


def test_run_is_continued_when_settings_match(tmp_path: Path) -> None:
    """A new run is begun, an equal one continued, with the manifest it was begun with."""
    with RunFolder(tmp_path / "run", manifest(pairs=3)) as first:
        assert not first.continued
    with RunFolder(tmp_path / "run", manifest(pairs=3) | {"host": "other"}) as second:
        assert second.continued
        assert second.manifest == manifest(pairs=3)
    assert (tmp_path / "latest").resolve() == tmp_path / "run"


def test_fingerprint_mismatch_names_the_keys(tmp_path: Path) -> None:
    """A run with other settings is refused, naming each key with both values."""
    with RunFolder(tmp_path / "run", manifest(seed=1, pairs=3, model="a")):
        pass
    with pytest.raises(RunError) as caught, RunFolder(tmp_path / "run", manifest(seed=2, pairs=3, dtype="b")):
        pass
    message = str(caught.value)
    assert "dtype (None there, 'b' now), model ('a' there, None now), seed (1 there, 2 now)" in message
    assert "pairs" not in message


def changed(**templates: str) -> dict:
    """A manifest with one setting and these template hashes."""
    settings = {"seed": 1, **{f"template.{name}": value for name, value in templates.items()}}
    return {"kind": "generate", "fingerprint": repr(settings), "settings": settings}


def test_edited_templates_need_leave(tmp_path: Path) -> None:
    """A run whose templates were edited is refused, saying which and how to go on, and stays as it was."""
    with RunFolder(tmp_path / "run", changed(stock="old", memo="same")):
        pass
    with pytest.raises(RunError) as caught, RunFolder(tmp_path / "run", changed(stock="new", memo="same")):
        pass
    message = str(caught.value)
    assert "template.stock ('old' there, 'new' now)" in message
    assert "--allow-template-change" in message
    assert "memo" not in message
    assert read_json(tmp_path / "run" / "manifest.json") == changed(stock="old", memo="same")


def test_allowed_template_changes_are_recorded(tmp_path: Path) -> None:
    """With leave the run goes on, and the manifest has the new hashes and, change by change, the old ones."""
    with RunFolder(tmp_path / "run", changed(stock="old", memo="same")) as run:
        run.note("judge", {"auc": 0.9})
    with RunFolder(tmp_path / "run", changed(stock="new", memo="same"), allow_template_change=True) as run:
        assert run.continued
    with RunFolder(tmp_path / "run", changed(stock="new", added="one"), allow_template_change=True):
        pass
    wanted = changed(stock="new", added="one")
    assert read_json(tmp_path / "run" / "manifest.json") == {
        **wanted,
        "judge": {"auc": 0.9},
        "template_changes": [{"stock": ["old", "new"]}, {"added": [None, "one"], "memo": ["same", None]}],
    }
    with RunFolder(tmp_path / "run", wanted) as run:
        assert run.continued


def test_leave_for_templates_is_for_nothing_else(tmp_path: Path) -> None:
    """Where another setting differs too the run is refused all the same."""
    with RunFolder(tmp_path / "run", changed(stock="old")):
        pass
    other = changed(stock="new")
    other["settings"]["seed"], other["fingerprint"] = 2, "other"
    with (
        pytest.raises(RunError, match=r"other settings: seed \(1 there, 2 now\)"),
        RunFolder(tmp_path / "run", other, allow_template_change=True),
    ):
        pass
    assert read_json(tmp_path / "run" / "manifest.json") == changed(stock="old")


def test_notes_stay_in_the_manifest(tmp_path: Path) -> None:
    """What is noted stands in the manifest at once, survives continuing the run, and can be noted anew."""
    path = tmp_path / "run" / "manifest.json"
    with RunFolder(tmp_path / "run", manifest(pairs=3)) as run:
        run.note("judge", {"auc": 0.9})
        assert read_json(path) == manifest(pairs=3) | {"judge": {"auc": 0.9}}
    with RunFolder(tmp_path / "run", manifest(pairs=3)) as run:
        assert run.manifest["judge"] == {"auc": 0.9}
        run.note("judge", {"auc": 0.8})
    assert read_json(path) == manifest(pairs=3) | {"judge": {"auc": 0.8}}


def test_other_kind_of_run_is_refused(tmp_path: Path) -> None:
    """A folder of `dream train` is not continued by `dream generate`."""
    with RunFolder(tmp_path / "run", manifest("train")):
        pass
    with pytest.raises(RunError, match="dream train"), RunFolder(tmp_path / "run", manifest("generate")):
        pass


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """A folder that holds something else is left alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"), RunFolder(tmp_path / "run", manifest()):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """An `--out` that is a file is refused with its name."""
    (tmp_path / "run").write_text("mine")
    with pytest.raises((RunError, StorageError), match="run"), RunFolder(tmp_path / "run", manifest()):
        pass


def test_run_can_be_begun_again_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the manifest could not be written, the same command works once there is room, as the error promises."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _refuse)
        with pytest.raises(StorageError, match="run the same command again"), RunFolder(tmp_path / "run", manifest()):
            pass
    with RunFolder(tmp_path / "run", manifest()) as again:
        assert not again.continued


def test_latest_can_be_continued_by_its_name(tmp_path: Path) -> None:
    """`--out runs/latest` continues the run that it points at, and the pointer stays."""
    with RunFolder(tmp_path / "run", manifest()):
        pass
    with RunFolder(tmp_path / "latest", manifest()) as again:
        assert again.continued
    assert (tmp_path / "latest").resolve() == tmp_path / "run"


def test_latest_after_a_kill_within_it(tmp_path: Path) -> None:
    """What a killed process of the same number left of the pointer is in nobody's way."""
    (tmp_path / f".latest-{os.getpid()}").symlink_to("elsewhere")
    with RunFolder(tmp_path / "run", manifest()):
        assert (tmp_path / "latest").resolve() == tmp_path / "run"


def test_own_folder_named_latest_stays(tmp_path: Path) -> None:
    """Somebody's own folder of the name `latest` is not replaced."""
    (tmp_path / "latest").mkdir()
    with RunFolder(tmp_path / "run", manifest()):
        pass
    assert not (tmp_path / "latest").is_symlink()


def test_link_that_cannot_be_made_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without links, or a parent folder that others own, has no `latest`; the run goes on."""
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(PermissionError("not here")))
    with RunFolder(tmp_path / "run", manifest()):
        pass
    assert (tmp_path / "run" / "manifest.json").exists()


def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network disks are: without locks two processes could write into one run."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"its file system has no locks \(No locks available\)"):
        RunFolder(tmp_path / "run", manifest()).__enter__()


def test_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A file of that name which is not ours is no reason for a traceback."""
    write_json(tmp_path / "run" / "manifest.json", ["something", "else"])
    with pytest.raises(RunError, match="not a manifest"):
        RunFolder(tmp_path / "run", manifest()).__enter__()


def test_scenario_is_on_the_disk_before_its_pair(tmp_path: Path, make_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power a pair whose scenario were gone would be drawn again, and counted twice."""
    synced: list[str] = []
    names = {}
    monkeypatch.setattr(store.os, "fsync", lambda handle: synced.append(names[handle]))
    rounds = RoundStore(tmp_path)
    names |= {log._file.fileno(): name for name, log in rounds._logs.items()}
    rounds.keep(make_pair("a"))
    rounds.keep_spare(make_pair("b"))
    rounds.keep_general(make_pair("c").clear)
    assert synced == ["scenarios", "pairs", "scenarios", "spare", "scenarios", "general"]


def test_second_process_is_refused(tmp_path: Path) -> None:
    """While one process works on a run another is refused; once it is killed the run can be continued."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    mine = {"kind": "generate", "fingerprint": "a", "settings": {}}
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"), RunFolder(tmp_path / "run", mine):
            pass
    finally:
        other.kill()
        other.communicate()
    with RunFolder(tmp_path / "run", mine) as continued:
        assert continued.continued
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == mine
