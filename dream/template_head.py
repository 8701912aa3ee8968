"""The YAML head of a template file: read with the line of every key, and checked for all that shows without a draw."""

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import meta, nodes
from pydantic import ValidationError

from dream.errors import one_line
from dream.sandbox import ENVIRONMENT
from dream.template import GENERAL, FrontMatter, Key, Lines

FIRST_LINE = 2
"""The head begins on the file's second line."""
TEXT = "tag:yaml.org,2002:str"
"""What YAML calls a text."""
MAX_VALUES = 200_000
"""Values of all ranges of a template together; every draw puts them in an order."""
MAX_DEPTH = 10
"""Levels of the front matter's YAML."""
OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
SLOT_KEYS = {"range": {"range", "step", "not"}, "from": {"from", "not"}, "expr": {"expr"}}
"""The kinds of slots that are no list, and the keys each may have."""


def read_head(path: Path, head: str) -> tuple[FrontMatter | None, Lines, list[str]]:
    """The front matter, None where it cannot be made out, with the lines of its keys and every problem found."""
    lines = Lines(path, {(): FIRST_LINE})
    problems: dict[Key, str] = {}
    try:
        if refused := _refused(path, head):
            return None, lines, [refused]
        root = yaml.compose(head, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            return None, lines, [f"{lines.at()}: the front matter must be a mapping of keys to values"]
        problems |= _node_problems(root, lines)
        raw = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return None, lines, [_yaml_problem(path, head, error)]
    except (ValueError, LookupError, AttributeError) as error:  # a tag on what it is not for, the 32nd of a month
        return None, lines, list(problems.values()) or [f"{lines.at()}: broken YAML: {error}; remove the tag (!!)"]
    try:
        front = FrontMatter.model_validate(raw)
    except ValidationError as error:
        for key, problem in _model_problems(error, lines):
            problems.setdefault(key, problem)
        return None, lines, list(problems.values())
    if front.name != path.stem:
        problems["name",] = (
            f"{lines.at('name')}: name is {front.name!r} but the file is {path.name}; make them the same"
        )
    for check in (_slot_problems, _side_problems, _string_problems):
        for key, problem in check(front, lines):
            problems.setdefault(key, problem)
    return front, lines, list(problems.values())


@cache
def names_in(source: str) -> set[str]:
    """The variables that a Jinja source takes from outside.

    Raises:
        jinja2.TemplateSyntaxError: it is no Jinja.
    """
    return meta.find_undeclared_variables(ENVIRONMENT.parse(source))


def names_in_expression(expression: object) -> set[str]:
    """The variables of a slot's `expr`.

    Raises:
        jinja2.TemplateSyntaxError: it is no expression.
    """
    return names_in(f"{{{{ ({expression}) }}}}")


def apart_from(spec: dict[str, Any]) -> list[Any]:
    """The slots that a slot's `not` names."""
    apart = spec.get("not", [])
    return apart if isinstance(apart, list) else [apart]


def single_brackets(tree: nodes.Template) -> tuple[int, str] | None:
    """The line and text of the first name that stands in single brackets, which Jinja takes for plain text."""
    for data in tree.find_all(nodes.TemplateData):
        if found := re.search(r"\{+ *\w+ *\}+", data.data):
            return data.lineno + data.data.count("\n", 0, found.start()), found[0]
    return None


def bracket_problem(text: str) -> str:
    """What to do about a name in single brackets."""
    return f"{text!r} is plain text; write {{{{ {text.strip('{} ')} }}}} for the value"


def syntax_problem(error: jinja2.TemplateSyntaxError) -> str:
    """Jinja's message, with what to do where it is a bracket too few."""
    few = str(error.message).startswith(("unexpected '}'", "expected token 'end of print statement'"))
    return f"{error.message}{'; write {{ name }}, two brackets on each side' * few}"


def nearest(name: str, known: Iterable[str], otherwise: str = "declare it under slots") -> str:
    """What to do about a name that is not known."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {found[0]!r}?" if found else otherwise


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _refused(path: Path, head: str) -> str:
    """The first thing in the YAML that would cost more to read than its length says; reads no further.

    A few aliases, one inside another, are more values than memory holds, and reading nested brackets takes time by the
    square of their number.
    """
    depth = 0
    for token in yaml.scan(head):
        where = f"{path}:{token.start_mark.line + FIRST_LINE}"
        if isinstance(token, yaml.AliasToken):
            return f"{where}: *{token.value} repeats another value; write it out"
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > MAX_DEPTH:
            return f"{where}: the front matter is nested too deeply; write it more simply"
    return ""


def _yaml_problem(path: Path, head: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    position = getattr(error, "position", 0)  # of a character that YAML does not allow
    line = mark.line + FIRST_LINE if mark else head.count("\n", 0, position) + FIRST_LINE
    problem = str(getattr(error, "problem", None) or one_line(error))
    hint = '; put Jinja in quotes: "{{ name }}"' if "unhashable" in problem else ""
    return f"{path}:{line}: broken YAML: {problem}{hint}"


def _node_problems(root: yaml.MappingNode, lines: Lines) -> Iterator[tuple[Key, str]]:
    """Notes the line of every key and yields what YAML reads as something else than is written, empty or twice."""
    waiting: list[tuple[Key, yaml.Node]] = [((), root)]
    while waiting:
        key, node = waiting.pop(0)
        where = f"{lines.at(*key)}: {_dotted(key)}"
        inner: list[tuple[Key, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                below = (*key, str(name.value))
                if below in lines.of:
                    line = name.start_mark.line + FIRST_LINE
                    yield below, f"{lines.path}:{line}: {_dotted(below)} is given twice; remove one"
                lines.of[below] = name.start_mark.line + FIRST_LINE
                if reading := _misread(name):
                    yield below, f"{lines.at(*below)}: {_dotted(below)}: {reading}"
                inner.append((below, value))
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                lines.of[(*key, place)] = value.start_mark.line + FIRST_LINE
                inner.append(((*key, place), value))
        elif reading := _misread(node):
            yield key, f"{where}: {reading}"
        if key[1:] and key[0] in ("slots", "sides", "mentions") and not (inner or str(node.value).strip(" []{}")):
            yield key, f"{where} is empty; give it a value, or remove it"
        waiting += inner


def _misread(node: yaml.Node) -> str:
    """What to do where YAML makes something else of an unquoted word than stands there, as of `on`, `012` or `2.50`."""
    if not isinstance(node, yaml.ScalarNode) or node.style or not node.value or node.tag == TEXT:
        return ""
    try:
        value = yaml.safe_load(node.value)
    except ValueError as error:
        return f"YAML cannot read {node.value:.40}: {error}; put it in quotes"
    return "" if str(value) == node.value else f'YAML reads {node.value} as {value}; put it in quotes: "{node.value}"'


def _model_problems(error: ValidationError, lines: Lines) -> Iterator[tuple[Key, str]]:
    for item in error.errors():
        key = tuple(part for part in item["loc"] if part != "[key]")
        if item["type"] == "missing":
            said = "is missing; add it"
        elif item["type"] == "extra_forbidden":
            keys = FrontMatter.model_fields
            said = f"is no key of a template; {nearest(str(key[-1]), keys, 'keys are ' + ', '.join(keys))}"
        elif item["type"] == "string_type":
            said = f"expected a text in quotes, got {item['input']!r}"
        else:
            said = f"{item['msg']}, got {item['input']!r}" if not isinstance(item["input"], dict) else item["msg"]
        yield key, f"{lines.at(*key)}: {_dotted(key)}: {said}"


def _slot_problems(front: FrontMatter, lines: Lines) -> Iterator[tuple[Key, str]]:
    above: set[str] = set()
    values = 0
    for slot, spec in front.slots.items():
        key: Key = ("slots", slot)
        if not slot.isidentifier() or slot == "side":
            reason = "is the name of the side itself" if slot == "side" else "is no name that a block can use"
            yield key, f"{lines.at(*key)}: {_dotted(key)}: {slot!r} {reason}; use other letters, digits and _"
        elif problem := _spec_problem(spec, front, above):
            place, said = problem
            yield key, f"{lines.at(*key, place)}: {_dotted(key)}: {said}"
        elif isinstance(spec, dict) and "range" in spec:
            low, high = spec["range"]
            values += (high - low) // spec.get("step", 1) + 1
            if values > MAX_VALUES:
                where = f"{lines.at(*key, 'range')}: {_dotted(key)}"
                yield key, f"{where}: the ranges have over {MAX_VALUES:,} values in all; narrow them, or use step"
        above.add(slot)


def _spec_problem(spec: Any, front: FrontMatter, above: set[str]) -> tuple[str | int, str] | None:
    """What is wrong with a slot, and the key or place in it where that is; `above` are the slots it may build on."""
    if isinstance(spec, list):
        odd = next((place for place, value in enumerate(spec) if not isinstance(value, str | int | float)), None)
        return None if odd is None else (odd, f"a value is a text or a number, got {spec[odd]!r}")
    if not isinstance(spec, dict) or len(kinds := set(spec) & set(SLOT_KEYS)) != 1:
        return "", f"expected a list, or a mapping with one of range, from, expr; got {spec!r}"
    kind = kinds.pop()
    if unknown := sorted(map(str, set(spec) - SLOT_KEYS[kind])):
        return unknown[0], f"unknown key {unknown[0]!r}; beside {kind} there may be {_others(kind)}"
    if kind == "expr":
        try:
            names = names_in_expression(spec["expr"])
        except jinja2.TemplateSyntaxError as error:
            return "expr", f"cannot compute {spec['expr']!r}: {error.message}"
        if unknown := sorted(names - above):
            return (
                "expr",
                f"expr uses {unknown[0]!r}, which no slot above this one defines; {nearest(unknown[0], above)}",
            )
        return None
    if wrong := [other for other in apart_from(spec) if not isinstance(other, str) or other not in above]:
        return "not", f"`not: {wrong[0]}` names no slot above this one"
    if kind == "from" and not (isinstance(spec["from"], str) and isinstance(front.slots.get(spec["from"]), list)):
        return "from", f"`from: {spec['from']}` names no slot that is a list"
    if kind == "range":
        ends, step = spec["range"], spec.get("step", 1)
        whole = isinstance(ends, list) and [type(value) for value in (*ends, step)] == [int] * 3
        if not (whole and ends[0] <= ends[1] and step >= 1):
            return "range", f"expected range: [low, high] and step: 1 or more, whole numbers; got {spec!r}"
    return None


def _others(kind: str) -> str:
    return " and ".join(sorted(SLOT_KEYS[kind] - {kind})) or "nothing"


def _side_problems(front: FrontMatter, lines: Lines) -> Iterator[tuple[Key, str]]:
    """What is wrong with the names in `sides` and `mirror`."""
    if front.flaw == GENERAL:
        one_sided: tuple[Key, Key] = (("sides", "flawed"), ("mirror",))
        for key in (key for key in one_sided if key in lines.of):
            yield key, f"{lines.at(*key)}: {_dotted(key)}: flaw is none, so there is a clear side only; remove it"
    else:
        clear, flawed = front.sides.get("clear", {}), front.sides.get("flawed", {})
        for name in sorted(set(clear) ^ set(flawed)):
            side, other = ("clear", "flawed") if name in clear else ("flawed", "clear")
            key = ("sides", side, name)
            yield key, f"{lines.at(*key)}: {_dotted(key)}: {name!r} is given for one side only; add it to sides.{other}"
    for place, slot in ((place, slot) for place, couple in enumerate(front.mirror) for slot in couple):
        spec = front.slots.get(slot)
        if spec is None or (isinstance(spec, dict) and "expr" in spec):
            key = ("mirror", place)
            yield key, f"{lines.at(*key)}: mirror: {slot!r} is no slot that is drawn; name slots with values"


def _string_problems(front: FrontMatter, lines: Lines) -> Iterator[tuple[Key, str]]:
    """What is wrong with the Jinja strings of `sides` and `mentions`."""
    slots = set(front.slots)
    known = {*slots, *front.sides.get("clear", {}), "side"}
    strings: list[tuple[Key, str, set[str]]] = []
    for side, own in front.sides.items():
        strings += [(("sides", side, name), text, slots) for name, text in own.items()]
    for stance, wanted in front.mentions.items():
        strings += [(("mentions", stance, place), text, known) for place, text in enumerate(wanted)]
    for key, text, names in strings:
        if said := _string_problem(text, names):
            yield key, f"{lines.at(*key)}: {_dotted(key)}: {said}"


def _string_problem(text: str, known: set[str]) -> str:
    """What is wrong with a Jinja string of the head that may use the names in `known`."""
    try:
        tree = ENVIRONMENT.parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"{text!r}: {syntax_problem(error)}"
    if unknown := sorted(meta.find_undeclared_variables(tree) - known):
        return f"uses {unknown[0]!r}, which no slot defines; {nearest(unknown[0], known)}"
    brackets = single_brackets(tree)
    return bracket_problem(brackets[1]) if brackets else ""
