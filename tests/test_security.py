"""What docs/SECURITY.md promises: what a template cannot do, and what the code never does."""

import ast
import ipaddress
import os
import pickle
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateSyntaxError
from ray._private import ray_constants, services

from dream import config, pool
from dream.config import Config, EngineConfig
from dream.errors import ConfigError, EngineError, TemplateError, TrainingError
from dream.records import Record
from dream.sandbox import ENVIRONMENT, compiled_expression
from dream.store import Log, RunFolder, write_json
from dream.template import MAX_RENDERED, Lines, Template
from dream.templates import examine, load
from dream.vllm_engine import engine_arguments
from train.checkpoints import load_adapter, load_model

ROOT = Path(__file__).parent.parent
DOUBLING = "  n0: [xx]\n" + "".join(f"  n{place + 1}: {{expr: n{place} ~ n{place}}}\n" for place in range(40))
"""Slots each of which is twice as long as the one before."""
QUICK_S = 1.0
"""Processor time in which a hostile template is refused."""


@pytest.fixture
def refused(tmp_path: Path, template_text: Callable[..., str]) -> Callable[[str, str], tuple[int, str]]:
    """Loads the tiny template with one text replaced; gives the line and the text of the first problem."""

    def try_to_load(old: str, new: str) -> tuple[int, str]:
        text = template_text("hostile")
        assert text.count(old) >= 1
        path = tmp_path / "hostile.j2"
        path.write_text(text.replace(old, new, 1))
        begun = time.process_time()
        template, problems = examine(path)
        assert time.process_time() - begun < QUICK_S
        assert template is None
        found = re.fullmatch(rf"{re.escape(str(path))}:(\d+): (.+)", problems[0])
        assert found
        return int(found[1]), found[2]

    return try_to_load


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "'__class__' of a value is not for templates; use a filter"),
        ("{{ good.upper() }}", "'upper' of a value is not for templates; use a filter"),
        ("{{ good['upper'] }}", "'upper' of a value is not for templates"),
        ("{{ '{0.__class__}'.format(n) }}", "'format' of a value is not for templates"),
        ("{{ range.mro }}", "'mro' of a value is not for templates"),
        ("{{ [1] | map(attribute='real') }}", "No filter named 'map'"),
        ("{{ self.push_back() }}", "only range(...) can be called in a template; use a filter"),
        ("{{ lipsum(999999) }}", "uses 'lipsum', which no slot defines"),
        ("{% include 'other' %}", "include is not for templates; they have if, for, set and filters"),
        ("{% import 'os' as os %}", "import is not for templates"),
        ("{% macro f() %}{{ f() }}{% endmacro %}", "macro is not for templates"),
        ("{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "a recursive loop is not for templates"),
        ("{% block more %}{% endblock %}", "block more is inside something else"),
        ("{% set loop = good %}{% set range = loop.upper %}{{ range() }}", "'upper' of a value is not for templates"),
        ("{% for i in range(3) %}{{ loop.cycle(1, 2) }}{% endfor %}", "only range(...) can be called"),
        ("{{ " + "(" * 2000 + "n" + ")" * 2000 + " }}", "nested too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
        ("{{ " + "-" * 500 + "1 }}", "nested too deeply"),
    ],
)  # fmt: skip
def test_template_cannot_reach_out(refused, template_text, bad: str, said: str) -> None:
    """Attributes, calls, other files and what calls itself are refused with the line and what to do."""
    line, problem = refused("Write the label with", f"{bad} Write the label with")
    assert said in problem
    if "deeply" not in said:
        lines = template_text("hostile").splitlines()
        assert "Write the label with" in lines[line - 1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "** is not for templates; multiply"),
        ("{% for i in range(1000000000) %}{% endfor %}", "makes a value of over 5,000"),
        ("{% for i in range(4999) %}{% for j in range(4999) %}{% endfor %}{% endfor %}", "20,000 steps; make its"),
        ("{% for i in range(4999) if i < 0 %}{% endfor %}" * 9, "20,000 steps; make its"),
        ("{% for i in range(4999) %}more and more {% endfor %}", "over 4,000 characters; make it shorter"),
        ("{% for i in range(4999) %}{{ good | title | title | title }}{% endfor %}", "20,000 steps; make its"),
        ("{{ 'x' * 10**9 }}", "** is not for templates"),
        ("{{ 'x' * 1000000000 }}", "* is for numbers only"),
        ("{{ [1] * 1000000000 }}", "* is for numbers only"),
        ("{{ '%999999999d' % 1 }}", "% is for numbers only"),
        ("{{ 9**9**9 }}", "** is not for templates"),
        ("{{ 999999999 * 999999999 }}", "makes a number of over 16 digits"),
        ("{{ 1 | round(-999999999) }}", "round takes at most 15 places"),
        ("{{ '%999999999d' | format(1) }}", "is not for format; use %s, %d"),
        ("{{ '%.999999999f' | format(1) }}", "is not for format"),
        ("{{ '%*d' | format(999999999, 1) }}", "is not for format"),
        ("{{ '%(a)999999999d' | format(a=1) }}", "is not for format"),
        ("{{ 'x' | center(999999999) }}", "No filter named 'center'"),
        ("{% set a = 'x' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}", "makes a value of over 5,000"),
        ("{% set a = 'x' %}" + "{% set a = a + a %}" * 40 + "{{ a }}", "makes a value of over 5,000"),
        ("{% set a = [1] %}" + "{% set a = [a, a] %}" * 40 + "{{ a }}", "makes a value of over 5,000"),
        ("{% set a = {1: 1} %}" + "{% set a = {1: a, 2: a} %}" * 40 + "{{ a }}", "makes a value of over 5,000"),
        ("{% set a = 'x' %}" + "{% set a = [a, a] | join %}" * 40, "makes a value of over 5,000"),
        ("{{ 'x'" + " | replace('x', 'xxxxxxxxxxxxxxxxxxxx')" * 10 + " }}", "makes a value of over 5,000"),
        ("{% set a, b = 'x', 'y' %}" + "{% set a, b = a ~ b, b ~ a %}" * 40, "20,000 steps; make its"),
    ],
)  # fmt: skip
def test_template_cannot_take_long_or_grow(refused, bad: str, said: str) -> None:
    """Loops without end and huge values are refused, at once and in every way that a template has."""
    assert said in refused("Write the label with", f"{bad} Write the label with")[1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("  n: {expr: 9**9**9}\n", "slots.n: cannot compute '9**9**9': ** is not for templates"),
        ("  n: {expr: \"'x' * 999999999\"}\n", "slots.n: cannot compute"),
        ("  n: {expr: \"''.__class__.__mro__\"}\n", "slots.n: cannot compute"),
        ("  n: {expr: \"'%999999999d' | format(1)\"}\n", "slots.n: cannot compute"),
        ("  n: {expr: \"good" + " | replace('e', 'eeeeeeeeeeeeeeeeeeee')" * 10 + "\"}\n", "slots.n: cannot compute"),
        (DOUBLING + "  n: {expr: n40 ~ n40}\n", "slots.n12: cannot compute 'n11 ~ n11': makes a value of over 5,000"),
        ("  n: {range: [0, 999999999999]}\n", "slots.n: the ranges have over 200,000 values in all; narrow them"),
        ("".join(f"  n{i}: {{range: [0, 99999]}}\n" for i in range(40)), "slots.n2: the ranges have over 200,000"),
        ("  a: &a [x, x]\n  n: [*a, *a]\n", "*a repeats another value; write it out"),
        ("  a: &a [*a]\n  n: [x]\n", "*a repeats another value"),
        ("  n: " + "[" * 2000 + "]" * 2000 + "\n", "nested too deeply"),
        ("  n: [2024-02-31]\n", "YAML cannot read 2024-02-31: day is out of range for month; put it in quotes"),
        ("  n: [" + "9" * 5000 + "]\n", "YAML cannot read 999"),
        ("  n: !!timestamp x\n", "broken YAML"),
        ("  n: !!bool x\n", "broken YAML"),
        ("  n: !!python/object/apply:os.system [true]\n", "broken YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_head_cannot_take_long_or_grow(refused, bad: str, said: str) -> None:
    """The same of the front matter: its expressions, its ranges, and YAML that means more than it says."""
    assert said in refused("  n: {range: [20, 900]}\n", bad)[1]


@pytest.mark.parametrize(
    "bad",
    ["{% for i in range(4999) %}more and more{% endfor %}", "{% for i in range(4999) %}{% for j in range(4999) %}"
     "{% endfor %}{% endfor %}", "{{ n.__class__ }}", "{{ 'x' * 999999999 }}"],
)  # fmt: skip
@pytest.mark.parametrize("place", ['said: "', 'comply: ["'])
def test_string_of_the_head_is_bounded(refused, template_text, place: str, bad: str) -> None:
    """Jinja strings of `sides` and `mentions` are refused like blocks, at their line."""
    line, problem = refused(place, f"{place}{bad}")
    assert place in template_text("hostile").splitlines()[line - 1]
    assert re.match(r"(sides\.clear\.said|mentions\.comply\.0): ", problem)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(3) %}{{ i * 2 }}{{ ', ' if not loop.last }}{% endfor %}", "0, 2, 4"),
        ("{% for a, b in [(1, 'x'), (2, 'y')] if a > 1 %}{{ a ~ b }}{% else %}none{% endfor %}", "2y"),
        ("{% for x in ['b', 'a'] | sort %}{{ loop.index }}{{ x }}{% endfor %}", "1a2b"),
        ("{% set x = name | upper %}{{ x }} {{ {'Ann': 'she', 'Bob': 'he'}[name] }}", "ANN she"),
        ("{{ '%.1f %5s%% %g' | format(2, 'a', 1.5) }} {{ 7 % 4 }} {{ 2.345 | round(1) }}", "2.0     a% 1.5 3 2.3"),
        ("{{ [3, 1] | join('-') }} {{ name[0] }} {{ missing | default('no') }} {{ 'n' in name }}", "3-1 A no True"),
        ("{% if name is defined and name != 'x' %}{{ name[::-1] }}{% endif %}", "nnA"),
    ],
)
def test_what_templates_need_still_works(source: str, text: str) -> None:
    """Loops, variables, filters, look-ups and formats of ordinary size do what Jinja says."""
    assert ENVIRONMENT.from_string(source).render(name="Ann") == text


@pytest.mark.parametrize(("source", "value"), [("n * 2 + 1", 15), ("n / 2", 3.5), ("'%g' | format(n / 2)", "3.5")])
def test_expression_keeps_its_type(source: str, value: object) -> None:
    """The `expr` of a slot gives a number where it computes one."""
    assert compiled_expression(source)(n=7) == value


ATOMS = st.sampled_from(["a", "b", "n", "7", "'xyz'", "[a, b]", "{'k': a}", "range(9)", "range(a)", "missing"])


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, st.sampled_from(["+", "-", "*", "~", "//", "%", "**", "and", "==", "in"]), inner)
    filters = ["join(b)", "string", "replace('x', a)", "sort", "sum", "title", "length", "first", "int", "round(n)",
               "format(a)", "default(b)", "truncate(n)", "max", "upper"]  # fmt: skip
    return st.one_of(
        two.map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(inner, st.sampled_from(filters)).map(lambda parts: f"({' | '.join(parts)})"),
        st.tuples(inner, inner).map(lambda parts: f"[{', '.join(parts)}]"),
        inner.map(lambda part: f"({part})[:n]"),
    )


EXPRESSIONS = st.recursive(ATOMS, _larger, max_leaves=6)
PIECES = st.recursive(
    st.one_of(
        EXPRESSIONS.map(lambda part: f"{{{{ {part} }}}}"),
        st.tuples(st.sampled_from("abn"), EXPRESSIONS).map(lambda parts: "{{% set {} = {} %}}".format(*parts)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=6).map(lambda parts: "".join(parts) * 3),
        st.tuples(EXPRESSIONS, inner).map(lambda parts: "{{% for b in {} %}}{}{{% endfor %}}".format(*parts)),
        st.tuples(EXPRESSIONS, inner).map(lambda parts: "{{% if {} %}}{}{{% endif %}}".format(*parts)),
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python warns of `7[:n]`
@given(body=PIECES)
def test_no_template_escapes_the_bounds(body: str) -> None:
    """Whatever a template is put together of, it writes a short text, or is refused with its file; soon either way."""
    begun, refusal = time.process_time(), ""
    try:
        jinja = ENVIRONMENT.from_string(f"{{% block clear %}}{body}{{% endblock %}}")
        lines = Lines(Path("x.j2"), {(): 1})
        template = Template(Path("x.j2"), "", None, jinja, lines)  # type: ignore[arg-type]  # no head is looked at
        assert len(template.render("clear", {"a": "xxxxxxxxxx", "b": "yx", "n": 900})) <= MAX_RENDERED
    except (TemplateSyntaxError, TemplateError) as error:
        refusal = str(error)
    assert re.match(r"x\.j2:\d+: |is nested too deeply|$", refusal)
    assert time.process_time() - begun < QUICK_S


def test_tiny_template_is_what_the_tests_change(tmp_path: Path, template_text) -> None:
    """The template that the tests above make hostile is accepted as it is."""
    (tmp_path / "hostile.j2").write_text(template_text("hostile"))
    assert load(tmp_path / "hostile.j2").name == "hostile"


@cache
def parsed() -> list[tuple[Path, ast.Module]]:
    """Every module of the product."""
    files = sorted(path for package in ("dream", "train") for path in (ROOT / package).rglob("*.py"))
    return [(path.relative_to(ROOT), ast.parse(path.read_text())) for path in files]


def calls() -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Every call in the product: file, what is called, and the keyword arguments, as they are written."""
    for path, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func), {str(one.arg): ast.unparse(one.value) for one in node.keywords}


def imported() -> Iterator[tuple[Path, str]]:
    """Every module that the product imports, with the file."""
    for path, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((path, one.name) for one in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, str(node.module)


def test_remote_code_is_off_unless_asked() -> None:
    """Code that comes with a model does not run by default, in no shipped configuration, and no call switches it on."""
    assert Config().engine.trust_remote_code is False
    for path in (ROOT / "configs").glob("*.yaml"):
        assert config.load(path)[0].engine.trust_remote_code is False
    assert [(path, name) for path, name, given in calls() if given.get("trust_remote_code") == "True"] == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    """No module loads pickles or runs text as code."""
    modules = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert [(path, name) for path, name in imported() if name.split(".")[0] in modules] == []
    unpickles = re.compile(r"from pickle import|pickle\.(loads?|Unpickler)\((?!pickle\.dumps\()")  # but its own bytes
    assert [path for path, tree in parsed() if unpickles.search(ast.unparse(tree))] == []
    names = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "os.system", "np.loads"}
    assert [(path, name) for path, name, _ in calls() if name in names] == []
    assert [(path, name) for path, name, given in calls() if given.get("allow_pickle", "False") != "False"] == []
    assert [(path, name) for path, name, given in calls() if "shell" in given] == []


def test_weights_are_safetensors() -> None:
    """Models are loaded from safetensors (or the embedded GGUF file) and never saved as anything else."""
    loads = [(path, given) for path, name, given in calls() if re.search(r"AutoModel\w*\.from_pretrained$", name)]
    assert len(loads) >= 3
    assert [path for path, given in loads if given.get("use_safetensors") != "True" and "gguf_file" not in given] == []
    assert [path for path, _, given in calls() if given.get("safe_serialization", "True") != "True"] == []
    assert engine_arguments("m", EngineConfig(), 1, on_gpu=False)["load_format"] == "safetensors"


def test_nothing_here_listens() -> None:
    """No module opens a server or names an address of all interfaces; only Ray and vLLM have ports."""
    modules = {"socket", "socketserver", "http.server", "asyncio.streams", "uvicorn", "fastapi", "flask", "aiohttp"}
    assert [(path, name) for path, name in imported() if name in modules] == []
    names = ("start_server", "create_server", "listen", "bind")
    assert [(path, name) for path, name, _ in calls() if name.split(".")[-1] in names] == []
    assert [path for path, tree in parsed() if re.search(r"0\.0\.0\.0|'::'", ast.unparse(tree))] == []


@pytest.fixture
def ray_options(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], dict[str, Any]]:
    """What `connect` asks of Ray, which is not started, and under `address` the one that Ray makes of it."""

    def ask(address: str | None) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def init(**options: Any) -> None:
            asked.update(options)
            if "_node_ip_address" in options:
                asked["listens"] = services.resolve_ip_for_localhost(options["_node_ip_address"])

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
        monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.1")
        pool.connect(address)
        return asked

    return ask


def test_ray_has_no_dashboard_and_its_own_authentication(ray_options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that is started here has no dashboard, and nothing touches Ray's token authentication, which is on."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    options = ray_options(None)
    assert options["include_dashboard"] is False
    assert "_system_config" not in options
    assert "RAY_AUTH_MODE" not in os.environ
    assert [path for path, tree in parsed() if re.search("RAY_AUTH|AUTH_MODE", ast.unparse(tree))] == []


def test_ray_of_this_machine_listens_on_loopback(ray_options) -> None:
    """What Ray makes of the address that it is given is a loopback address still."""
    assert ipaddress.ip_address(ray_options(None)["listens"]).is_loopback


def test_only_the_configuration_names_another_cluster(ray_options, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address is joined as `ray.address` has it, and is none by default: neither `$RAY_ADDRESS` nor a cluster that
    somebody began on this machine is joined then."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Config().ray.address is None
    assert ray_options(None)["address"] == "local"
    assert ray_options("ray://host:10001")["address"] == "ray://host:10001"


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("auto", ConfigError, r"ray\.address: 'auto' cannot be joined: no cluster"),
        (None, EngineError, r"Ray does not start on this machine: ConnectionError: no cluster"),
    ],
)
def test_ray_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, kind: type[Exception], words: str
) -> None:
    """Whatever Ray raises is said in a line that names the key, and SIGTERM stays ours."""

    def fail(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError("no cluster")

    monkeypatch.setattr(pool.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(pool.ray, "init", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=words):
        pool.connect(address)
    assert signal.getsignal(signal.SIGTERM) == before


class Line(Record):
    """A row of a log."""

    text: str


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_run_folder_has_ordinary_permissions(tmp_path: Path, quick_disk: None, mask: int) -> None:
    """Files and folders of a run get what the umask of the person leaves, no more and no less."""
    before = os.umask(mask)
    try:
        manifest = {"kind": "generate", "fingerprint": "f", "settings": {}}
        with RunFolder(tmp_path / "runs" / "mine", manifest) as run:
            write_json(run.path / "round_01" / "gate.json", {})
            Log(run.path / "round_01" / "pairs.jsonl").append(Line(text="a"))
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (tmp_path / "runs").rglob("*")}
    folders = {name: mode for name, mode in found.items() if name in ("mine", "round_01")}
    assert folders == dict.fromkeys(("mine", "round_01"), 0o777 & ~mask)
    files = {name: found[name] for name in ("manifest.json", "gate.json", "pairs.jsonl", ".lock")}
    assert files == dict.fromkeys(files, 0o666 & ~mask)
    assert [name for _, name, _ in calls() if name.split(".")[-1] in ("chmod", "fchmod", "umask")] == []


def test_keys_are_read_in_one_place() -> None:
    """Whole environments are copied nowhere, so no secret in them ends up in a file; the key is read by the server."""
    reads = re.compile(r"os\.environ(?!\.(get|setdefault|update)\(|\[)|os\.getenv")
    assert [path for path, tree in parsed() if reads.search(ast.unparse(tree))] == []
    named = [path for path, tree in parsed() if "api_key_env" in ast.unparse(tree)]
    assert named == [Path("dream/config.py"), Path("dream/judge/server.py")]


def test_lock_pins_every_package() -> None:
    """Each line of the CPU lock is one package at one version of an index: no address, no range, no local file."""
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[a-z0-9.+!]+", line)] == []
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {"torchvision", "torchaudio"}.isdisjoint(names)


def test_page_names_tests_that_exist() -> None:
    """Every test that docs/SECURITY.md names is there."""
    named = set(re.findall(r"`(test_\w+)\.py::(test_\w+)`", (ROOT / "docs" / "SECURITY.md").read_text()))
    assert len(named) > 10
    missing = [
        (file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / f"{file}.py").read_text()
    ]
    assert missing == []


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path, toy_model: Path) -> None:
    """PEFT would read adapter_model.bin where there are no safetensors; we say what is missing instead."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    model = load_model(str(toy_model), torch.float32, trust_remote_code=False)
    with pytest.raises(TrainingError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, str(tmp_path), trainable=False)
