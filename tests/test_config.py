"""dream/config.py: files in, one checked configuration out."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from dream.config import Config, Section, fingerprint, flatten, load, parse
from dream.errors import ConfigError

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def inner(annotation: object) -> list[type[Section]]:
    """The sections that a field holds, also where it may hold none."""
    kinds = get_args(annotation) or [annotation]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def sections(model: type[BaseModel] = Config) -> list[type[BaseModel]]:
    """The configuration's model and those of all its sections."""
    fields = model.model_fields.values()
    return [model, *(found for field in fields for kind in inner(field.annotation) for found in sections(kind))]


def fields() -> list[tuple[str, str]]:
    """Every leaf field as (section.name, its documentation)."""
    return [
        (f"{section.__name__}.{name}", field.description or "")
        for section in sections()
        for name, field in section.model_fields.items()
        if field.annotation not in inner(field.annotation)
    ]


@pytest.fixture
def write(tmp_path: Path):
    """Writes a configuration file."""

    def write_file(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write_file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    """Every shipped configuration loads, and resolves to the same values when its resolved form is loaded again."""
    config, used = load(path)
    assert used == path
    assert parse(config.model_dump(mode="json"), "manifest") == config


def test_file_values_win_over_defaults(write) -> None:
    """A value in the file is used and the rest are the defaults."""
    config, _ = load(write("generate: {pairs: 7}"))
    assert config.generate.pairs == 7
    assert config.generate.samples == Config().generate.samples


def test_empty_file_is_the_defaults(write) -> None:
    """An empty file means the defaults."""
    assert load(write("# nothing yet\n"))[0] == load(write("{}"))[0]
    assert load(write("{}"))[0].generate == Config().generate


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("trian: {beta: 1}", "trian", "train"),
        ("train: {learning_rte: 1}", "train.learning_rte", "train.learning_rate"),
        ("train: {lora: {rnk: 4}}", "train.lora.rnk", "train.lora.rank"),
        ("pairs: 3", "pairs", "generate.pairs"),
        ("generate: {miror: true}", "generate.miror", "generate.mirror"),
        (
            "judge: {server: {base_url: 'http://x/v1', model: y, timeout: 3}}",
            "judge.server.timeout",
            "judge.server.timeout_s",
        ),
    ],
)
def test_unknown_key_names_the_nearest(write, text: str, unknown: str, nearest: str) -> None:
    """An unknown key is refused with the file, the key and the nearest known one."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: unknown key {unknown!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("generate: {pairs: many}", "generate.pairs"),
        ("generate: {pairs: 0}", "generate.pairs"),
        ("generate: {dreamer: loud}", "generate.dreamer"),
        ("generate: {near_duplicate: 0}", "generate.near_duplicate"),
        ("generate: {near_duplicate: 1.1}", "generate.near_duplicate"),
        ("generate: {spare_share: -0.1}", "generate.spare_share"),
        ("generate: {mirror: sometimes}", "generate.mirror"),
        ("judge: {signals: []}", "judge.signals"),
        ("judge: {checks: [spelling]}", "judge.checks.0"),
        ("judge: {precision: 0.5}", "judge.precision"),
        ("judge: {server: {base_url: 'http://x/v1', model: ''}}", "judge.server.model"),
        ("judge: {server: {base_url: 'http://x/v1', model: y, api_key_env: 'MY KEY'}}", "judge.server.api_key_env"),
        ("filters: {max_new_word_pairs: -1}", "filters.max_new_word_pairs"),
        ("filters: {max_new_word_pairs: 0.5}", "filters.max_new_word_pairs"),
        ("audit: {reply_auc: 0.4}", "audit.reply_auc"),
        ("audit: {min_pairs: 1}", "audit.min_pairs"),
        ("engine: 3", "engine"),
        ("gate: {max_length_growth: .nan}", "gate.max_length_growth"),
    ],
)
def test_wrong_value_names_file_and_key(write, text: str, key: str) -> None:
    """A value of the wrong type or out of range is refused with the file and the dotted key."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {key}: ")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a: 'x", "\x00", "just words"])
def test_unreadable_file_names_itself(write, text: str) -> None:
    """A file that is not a YAML mapping is refused with its name, in one line."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_option_is_taken_as_it_is(write) -> None:
    """A path is no YAML, in which what follows a `#` is a comment."""
    config, _ = load(write("seed: 2"), ["model=a"], {"model": "models/run #2", "rounds": 4})
    assert (config.model, config.rounds, config.seed) == ("models/run #2", 4, 2)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    """A file that does not exist is the user's error, with exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "absent.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "raw",
    [
        {"train": {"optim": "apollo_adamw", "method": "lora"}},
        {"train": {"batch_size": 16, "micro_batch_size": 3}},
        {"train": {"fsdp": True, "workers": 2}},
        {"train": {"fsdp": True, "workers": 2, "method": "full", "optim": "apollo_adamw"}},
        {"train": {"fsdp": True, "workers": 1, "method": "full"}},
        {"train": {"batch_size": 6, "micro_batch_size": 3, "crossed_weight": 1.0}},
        {"train": {"batch_size": 9, "micro_batch_size": 3}},
        {"train": {"batch_size": 16, "micro_batch_size": 4, "rehearsal": 6}},
        {"judge": {"signals": ["wording", "server"]}},
        {"seed": -1},
        {"seed": 2**32},
        {"generate": {"temperature": 0, "samples": 2}},
        {"train": {"flip_probability": 0.5}},
        {"train": {"flip_probability": -0.1}},
        {"judge": {"server": {"base_url": "http://me:hidden@127.0.0.1:8000/v1", "model": "big"}}},
    ],
)
def test_inconsistent_values_are_refused(raw: dict) -> None:
    """Values that cannot go together are refused although each is allowed."""
    with pytest.raises(ConfigError):
        parse(raw, "test")


def test_set_overrides_the_file(write) -> None:
    """`--set` wins over the file, makes sections that are not there, and reads 1e-5 as a number."""
    path = write("generate: {pairs: 7}")
    config, _ = load(path, ["generate.pairs=9", "train.learning_rate=1e-5", "train.lora.rank=4", "model=own/model"])
    assert config.generate.pairs == 9
    assert config.train.learning_rate == 1e-5
    assert config.train.lora.rank == 4
    assert config.model == "own/model"


def test_wrong_key_of_an_override_is_named_as_one(write) -> None:
    """The file is not said to hold what it does not."""
    with pytest.raises(ConfigError, match=r"^--set generate\.pair: unknown key 'generate\.pair'; did you mean"):
        load(write("model: own/model"), ["seed=2", "generate.pair=3"])
    with pytest.raises(ConfigError, match=r"^--set generate\.pairs: generate\.pairs: "):
        load(write("model: own/model"), ["generate.pairs=none"])


@pytest.mark.parametrize(
    "override",
    ["generate.pairs", "=3", "model.name=x", "generate.pears=3", "generate.pairs=few", "model=[a", "judge.signals={"],
)
def test_bad_set_is_a_config_error(write, override: str) -> None:
    """A `--set` that is malformed, unknown or of the wrong type is the user's error, never a traceback."""
    with pytest.raises(ConfigError):
        load(write("model: own/model"), [override])


@pytest.mark.parametrize(
    "override",
    [
        "ray.address=auto",
        "rounds=9",
        "engine.replicas=4",
        "engine.max_restarts=0",
        "engine.release=true",
        "engine.max_num_seqs=8",
        "generate.concurrency=2",
        "train.micro_batch_size=4",
        "train.workers=2",
    ],
)
def test_fingerprint_ignores_execution_keys(write, override: str) -> None:
    """How a run is carried out does not change what it is, so it may be continued elsewhere."""
    path = write("{}")
    assert fingerprint(flatten(load(path, [override])[0])) == fingerprint(flatten(load(path)[0]))


DECISIVE = [
    "seed=2", "train.beta=0.2", "judge.precision=0.9", "model=own/model", "generate.mirror=false",
    "generate.coverage=false", "generate.near_duplicate=0.7", "generate.spare_share=0", "audit.reply_auc=0.7",
    "filters.max_new_word_pairs=3",
]  # fmt: skip
"""Settings that change what a run yields."""


@pytest.mark.parametrize("override", DECISIVE)
def test_fingerprint_sees_what_decides_the_result(write, override: str) -> None:
    """A value that decides the result changes the fingerprint and shows under its dotted key alone."""
    path = write("{}")
    before, after = flatten(load(path)[0]), flatten(load(path, [override])[0])
    assert fingerprint(before) != fingerprint(after)
    assert [key for key in before if before[key] != after[key]] == [override.partition("=")[0]]


def test_every_field_is_documented() -> None:
    """Every field has a description, which is its documentation, and it ends as a sentence does."""
    assert [name for name, text in fields() if not text.strip().endswith((".", "?"))] == []


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("GenerateConfig.dreamer", ["slots", "background", "write"]),
        ("GenerateConfig.steering", ["prompt", "note"]),
        ("JudgeConfig.signals", ["wording", "embedding", "structure", "contrast", "rubric", "server"]),
        ("JudgeConfig.checks", ["names_flaw", "does_work", "right_side"]),
    ],
)
def test_every_choice_is_documented(field: str, words: list[str]) -> None:
    """The description of a choice speaks of all its values."""
    text = dict(fields())[field]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_refused_password_is_not_shown() -> None:
    """The message about a password in an address does not repeat it."""
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        parse({"judge": {"server": {"base_url": "http://me:hidden@127.0.0.1:8000/v1", "model": "big"}}}, "test")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000/v1", "https://judge.example", "http://[::1]:8000/v1"])
def test_server_addresses(address: str) -> None:
    """An address with a scheme and a host is taken as it is."""
    config = parse({"judge": {"server": {"base_url": address, "model": "big"}}}, "test")
    assert config.judge.server is not None
    assert config.judge.server.base_url == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8000/v1", "such as http"),
        ("judge.example", "such as http"),
        ("ftp://judge.example/v1", "such as http"),
        ("http:///v1", "such as http"),
        ("", "such as http"),
        ("http://[::1:8000/v1", "not an address"),
        ("http://me@judge.example/v1", "api_key_env"),
        ("https://judge.example/v1?key=hidden", "api_key_env"),
        ("https://judge.example/v1#hidden", "api_key_env"),
    ],
)
def test_bad_server_address_is_refused(address: str, words: str) -> None:
    """What is no address, or holds what would end up in manifests, is refused under its key and not repeated."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse({"judge": {"server": {"base_url": address, "model": "big"}}}, "test")
    assert str(caught.value).startswith("test: judge.server.base_url: ")
    assert "hidden" not in str(caught.value)
