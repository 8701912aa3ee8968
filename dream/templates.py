"""Scenario templates: one file, `prompts/scenarios/NAME.j2`, makes both sides of a situation by construction.

A template is YAML front matter and named Jinja blocks. The flaw is in the rendered directions, so that a small model
need not invent one. Templates run in Jinja's immutable sandbox with strict undefined, and `load` checks all that can
be checked before a model is started. What a template draws is in `dream.scenarios`; docs/TEMPLATES.md is the page for
template writers.
"""

import difflib
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dream.errors import TemplateError
from dream.paths import data_folder

CONTRAST_BLOCKS = ("situation", "clear", "flawed", "comply", "push_back", "comply_examples", "push_back_examples")
GENERAL_BLOCKS = tuple(name for name in CONTRAST_BLOCKS if name != "flawed")
GENERAL = "none"
"""The `flaw` of a general template: an ordinary request, one side only."""
MIN_EXAMPLES = 3
MAX_RENDERED = 4_000
"""Characters one block may render to; more is a loop that does not end, or a mistake."""

PLAN = 100_000
"""Seeds of one plan of draws: `seed // PLAN` names the plan, `seed % PLAN` is the turn in it."""
Picker = Callable[[Sequence[Any], Sequence[Any]], Any]
"""Chooses one of some values that is not among those taken."""

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with strict undefined and without operators that make huge values."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` between numbers, as arithmetic in templates needs it; `**` and repeated texts are refused."""
        if operator == "**" or not all(isinstance(value, int | float) for value in (left, right)):
            raise jinja2.exceptions.SecurityError(f"{operator} is for multiplying numbers only")
        return super().call_binop(context, operator, left, right)


ENVIRONMENT = BoundedSandbox()


@cache
def compiled_string(source: str) -> jinja2.Template:
    """A Jinja string of some front matter; drawing renders the same few strings again and again."""
    return ENVIRONMENT.from_string(source)


class FrontMatter(BaseModel):
    """The YAML head of a template file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    "The file's name without `.j2`."
    description: str
    "One line for `dream templates list`."
    flaw: str
    "The kind of flaw, e.g. `contradicts_given_data`; `none` makes it a general template with one side only."
    domains: list[str] = Field(min_length=1)
    "Where such a situation occurs; the first is counted for coverage."
    split: Literal["train", "heldout"] = "train"
    "`heldout` templates are never trained on; their kinds of flaw should be in no training template."
    version: int = 1
    "For people; the content hash is what runs record."
    slots: dict[str, Any] = {}
    "Names with their values: a list, `{range: [low, high]}`, `{from: slot, not: slot}` or `{expr: ...}`."
    sides: dict[Literal["clear", "flawed"], dict[str, str]] = {}
    "Values that differ between the sides; each is a Jinja string over the slots."
    mirror: list[tuple[str, str]] = []
    """Slots whose values change places to make the mirrored scenario: its clear direction and replies are those of the
    flawed side here, and the other way round, so that the very same texts are right once and wrong once."""
    mentions: dict[Literal["comply", "push_back"], list[str]] = {}
    "Per stance, Jinja strings that a reply must contain to speak of this very situation; `a|b` means either."


@dataclass(frozen=True)
class Template:
    """A checked template, ready to draw from."""

    path: Path
    hash: str
    front: FrontMatter
    jinja: jinja2.Template

    @property
    def name(self) -> str:
        return self.front.name

    @property
    def general(self) -> bool:
        return self.front.flaw == GENERAL

    def variables(self, seed: int, covered: bool = False) -> dict[str, Any]:
        """Draws a value for every slot; the same seed draws the same values.

        With `covered`, draws whose seeds follow one another (within a block of `PLAN`) take turns through the values of
        each slot, in an order of their own for each slot, instead of throwing dice for every draw.

        Raises:
            TemplateError: a slot is malformed or cannot be drawn.
        """
        drawn: dict[str, Any] = {}
        for slot, spec in self.front.slots.items():
            if covered:
                picker: Picker = _turns(f"{self.name}/{slot}/{seed // PLAN}", seed % PLAN)
            else:
                picker = _dice(f"{self.name}/{slot}/{seed}")
            drawn[slot] = self._draw(slot, spec, drawn, picker)
        return drawn

    def domain(self, seed: int, covered: bool = False) -> str:
        """The domain of a draw."""
        name, domains = f"{self.name}/domain", self.front.domains
        picker = _turns(f"{name}/{seed // PLAN}", seed % PLAN) if covered else _dice(f"{name}/{seed}")
        return str(picker(domains, []))

    def _draw(self, slot: str, spec: Any, drawn: dict[str, Any], pick: "Picker") -> Any:
        where = f"{self.path}: slots.{slot}"
        if isinstance(spec, list):
            return _picked(pick, spec, [], where)
        if not isinstance(spec, dict):
            raise TemplateError(f"{where}: expected a list, or a mapping with range, from or expr, got {spec!r}")
        if unknown := set(spec) - {"range", "step", "from", "not", "expr"}:
            raise TemplateError(f"{where}: unknown key {sorted(unknown)[0]!r}; use range, step, from, not or expr")
        if "expr" in spec:
            return self._compute(slot, spec, drawn)
        excluded = spec.get("not", [])
        others = [excluded] if isinstance(excluded, str) else excluded
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise TemplateError(f"{where}: `not` takes a slot's name or a list of names, got {excluded!r}")
        if missing := [other for other in others if other not in drawn]:
            raise TemplateError(f"{where}: `not: {missing[0]}` names no slot above this one")
        taken = [drawn[other] for other in others]
        if "from" in spec:
            source = self.front.slots.get(spec["from"]) if isinstance(spec["from"], str) else None
            if not isinstance(source, list):
                raise TemplateError(f"{where}: `from: {spec['from']}` names no list slot")
            return _picked(pick, source, taken, where)
        try:
            low, high = spec["range"]
            values: list[Any] = list(range(int(low), int(high) + 1, int(spec.get("step", 1))))
        except (KeyError, TypeError, ValueError) as error:
            raise TemplateError(f"{where}: expected range: [low, high], got {spec!r}") from error
        return _picked(pick, values, taken, where)

    def _compute(self, slot: str, spec: dict[str, Any], drawn: dict[str, Any]) -> Any:
        try:
            return ENVIRONMENT.compile_expression(str(spec["expr"]), undefined_to_none=False)(**drawn)
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            raise TemplateError(f"{self.path}: slots.{slot}: cannot compute {spec['expr']!r}: {error}") from error

    def mirrored(self, slots: dict[str, Any]) -> dict[str, Any]:
        """The slots with the values of each `mirror` couple changed over and every `expr` computed again."""
        swapped = dict(slots)
        for one, other in self.front.mirror:
            swapped[one], swapped[other] = slots[other], slots[one]
        for slot, spec in self.front.slots.items():
            if isinstance(spec, dict) and "expr" in spec:
                swapped[slot] = self._compute(slot, spec, swapped)
        return swapped

    def render(self, block: str, variables: dict[str, Any]) -> str:
        """Renders one block to a single line per source line, surrounding space stripped.

        Raises:
            TemplateError: an undefined variable, refused access, or an output that is too long.
        """
        pieces, size = [], 0
        try:
            for piece in self.jinja.blocks[block](self.jinja.new_context(variables)):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED:
                    raise TemplateError(f"{self.path}: block {block}: renders to over {MAX_RENDERED} characters")
        except TemplateError:
            raise
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            line = self.jinja.get_corresponding_lineno(_error_line(error))
            raise TemplateError(f"{self.path}:{line}: block {block}: {error}") from error
        return "\n".join(" ".join(line.split()) for line in "".join(pieces).strip().splitlines() if line.strip())

    def render_string(self, source: str, variables: dict[str, Any], where: str) -> str:
        """Renders a Jinja string of the front matter; `where` is its key for errors."""
        try:
            text = compiled_string(source).render(variables).strip()
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            raise TemplateError(f"{self.path}: {where}: {error}") from error
        if len(text) > MAX_RENDERED:
            raise TemplateError(f"{self.path}: {where}: renders to over {MAX_RENDERED} characters")
        return text

    def mentions(self, stance: str, variables: dict[str, Any]) -> list[str]:
        """What a reply of this stance must speak of, rendered."""
        texts = [text for key, wanted in self.front.mentions.items() if key == stance for text in wanted]
        return [self.render_string(text, variables, f"mentions.{stance}") for text in texts]

    def side_variables(self, side: str, slots: dict[str, Any]) -> dict[str, Any]:
        """The slots plus the values that are this side's own, and `side` itself."""
        own = self.front.sides.get(side, {})  # type: ignore[call-overload]  # mypy cannot narrow str to the literal
        return {
            **slots,
            **{key: self.render_string(text, slots, f"sides.{side}.{key}") for key, text in own.items()},
            "side": side,
        }


def load(path: Path) -> Template:
    """Reads and checks one template file.

    Raises:
        TemplateError: naming the file, the line or key, and what to do.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: cannot be read: {error}") from error
    matched = _FRONT_MATTER.match(text)
    if not matched:
        raise TemplateError(f"{path}:1: no front matter; begin the file with a YAML head between two `---` lines")
    front = _front_matter(path, matched.group(1))
    # Blank lines in place of the head keep Jinja's line numbers those of the file.
    body = "\n" * matched.group(0).count("\n") + text[matched.end() :]
    try:
        tree = ENVIRONMENT.parse(body)
        compiled = ENVIRONMENT.from_string(body)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{path}:{error.lineno}: {error.message}") from error
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    template = Template(path, digest, front, compiled)
    _check_blocks(template, tree)
    _check_renders(template)
    return template


def load_all(folder: Path | None = None) -> list[Template]:
    """All templates of a folder (default: `scenarios` of the prompts in use), by name.

    Raises:
        TemplateError: the first bad one, or none at all.
    """
    folder = folder or data_folder("prompts") / "scenarios"
    templates = [load(path) for path in sorted(folder.glob("*.j2"))]
    if not templates:
        raise TemplateError(f"{folder}: no *.j2 files; add one (docs/TEMPLATES.md)")
    return templates


def find(name: str) -> Template:
    """The template of a name, or of a file.

    Raises:
        TemplateError: there is none; the message gives the nearest name.
    """
    folder = data_folder("prompts") / "scenarios"
    path = Path(name) if name.endswith(".j2") else folder / f"{name}.j2"
    if not path.is_file():
        known = sorted(other.stem for other in folder.glob("*.j2"))
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
        raise TemplateError(f"{folder}: no template {name!r}; {hint}")
    return load(path)


def _front_matter(path: Path, head: str) -> FrontMatter:
    try:
        raw = yaml.safe_load(head)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark else 1  # the head begins on the file's second line
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise TemplateError(f"{path}:{line}: broken YAML: {problem}") from error
    if not isinstance(raw, dict):
        raise TemplateError(f"{path}:2: the front matter must be a mapping of keys to values")
    try:
        front = FrontMatter.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        line = next((n for n, text in enumerate(head.splitlines(), 2) if text.startswith(str(first["loc"][0]))), 2)
        raise TemplateError(f"{path}:{line}: {key}: {first['msg']}") from error
    if front.name != path.stem:
        raise TemplateError(f"{path}: name is {front.name!r} but the file is {path.name}; make them the same")
    return front


def _check_blocks(template: Template, tree: nodes.Template) -> None:
    path, front = template.path, template.front
    found = {block.name: block for block in tree.find_all(nodes.Block)}
    wanted = GENERAL_BLOCKS if template.general else CONTRAST_BLOCKS
    for name in wanted:
        if name not in found:
            raise TemplateError(f"{path}: block {name} is missing; add {{% block {name} %}} ... {{% endblock %}}")
    for name, block in found.items():
        if name not in wanted:
            raise TemplateError(f"{path}:{block.lineno}: unknown block {name}; blocks are {', '.join(wanted)}")
    if not template.general and set(front.sides.get("clear", {})) != set(front.sides.get("flawed", {})):
        odd = sorted(set(front.sides.get("clear", {})) ^ set(front.sides.get("flawed", {})))[0]
        raise TemplateError(f"{path}: sides: {odd!r} is given for one side only; give it for both")
    known = {*front.slots, *front.sides.get("clear", {}), "side"}
    used: set[str] = set()
    for name, block in found.items():
        body = nodes.Template(block.body, lineno=block.lineno)
        body.environment = ENVIRONMENT
        names = meta.find_undeclared_variables(body)
        used |= names
        if undefined := sorted(names - known):
            line = next((n.lineno for n in body.find_all(nodes.Name) if n.name == undefined[0]), block.lineno)
            raise TemplateError(
                f"{path}:{line}: block {name} uses {undefined[0]!r}, which no slot defines; declare it under slots"
            )
    strings = [*(text for own in front.sides.values() for text in own.values())]
    strings += [text for texts in front.mentions.values() for text in texts]
    for text in strings:
        try:
            used |= meta.find_undeclared_variables(ENVIRONMENT.parse(text))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{path}: {text!r}: {error.message}") from error
    for spec in front.slots.values():
        if isinstance(spec, dict):
            used |= {str(spec.get("from", ""))} | set(re.findall(r"\w+", str(spec.get("expr", ""))))
            used |= set(map(str, spec["not"])) if isinstance(spec.get("not"), list) else {str(spec.get("not", ""))}
    if unused := [slot for slot in front.slots if slot not in used]:
        raise TemplateError(f"{path}: slots.{unused[0]} is used nowhere; use it in a block or remove it")


def _check_renders(template: Template) -> None:
    """Draws a few times and looks at what comes out, so that errors show before a model is started."""
    path = template.path
    for seed in range(5):
        slots = template.variables(seed)
        texts = {}
        for side in ("clear",) if template.general else ("clear", "flawed"):
            variables = template.side_variables(side, slots)
            for block in ("situation", side, "comply", "push_back"):
                texts[block] = template.render(block, variables)
                if not texts[block] and block != "situation":
                    raise TemplateError(f"{path}: block {block} renders to nothing")
            for stance in ("comply", "push_back"):
                examples = template.render(f"{stance}_examples", variables).splitlines()
                if len(examples) < MIN_EXAMPLES:
                    raise TemplateError(
                        f"{path}: block {stance}_examples has {len(examples)} lines; write at least {MIN_EXAMPLES}"
                    )
                mentions = template.mentions(stance, variables)
                for example in examples:
                    if lost := [words for words in mentions if not mentioned(words, example)]:
                        raise TemplateError(
                            f"{path}: {stance}_examples on the {side} side: {example!r} lacks {lost[0]!r}, "
                            f"which mentions.{stance} asks for"
                        )
        if template.general:
            continue
        _check_mirror(template, slots)
        if texts["clear"] == texts["flawed"]:
            raise TemplateError(f"{path}: clear and flawed are equal for draw {seed}; make a slot or side differ")
        clear, flawed = (set(re.findall(r"\w+", texts[side].lower())) for side in ("clear", "flawed"))
        if len(clear & flawed) < 0.5 * min(len(clear), len(flawed)):
            raise TemplateError(
                f"{path}: clear and flawed share too few words ({texts['clear']!r} / {texts['flawed']!r}); "
                "they should be a minimal edit apart"
            )


def _check_mirror(template: Template, slots: dict[str, Any]) -> None:
    """Each side of the mirrored scenario must be the other side here, word for word, under another situation."""
    front, path = template.front, template.path
    if not front.mirror:
        return
    for slot in (slot for couple in front.mirror for slot in couple):
        if slot not in front.slots or (isinstance(front.slots[slot], dict) and "expr" in front.slots[slot]):
            raise TemplateError(f"{path}: mirror: {slot!r} is no slot that is drawn; name slots with values")
    swapped = template.mirrored(slots)
    for side, other in (("clear", "flawed"), ("flawed", "clear")):
        here, there = template.side_variables(side, slots), template.side_variables(other, swapped)
        for block in (side, "comply", "push_back", "comply_examples", "push_back_examples"):
            block_there = other if block == side else block
            text, text_there = template.render(block, here), template.render(block_there, there)
            if text != text_there:
                raise TemplateError(
                    f"{path}: mirror: block {block} on the {side} side is not that of the mirrored {other} side: "
                    f"{text.splitlines()[0]!r} / {text_there.splitlines()[0]!r}; swap more slots, or remove mirror"
                )
    if template.render("situation", template.side_variables("clear", slots)) == template.render(
        "situation", template.side_variables("clear", swapped)
    ):
        raise TemplateError(f"{path}: mirror: the situation stays the same, so both directions would be right and wrong")


def mentioned(words: str, text: str) -> bool:
    """Whether `text` contains one of the alternatives in `words` (`a|b`) as whole words, ignoring case."""
    return any(
        re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text, re.IGNORECASE) for option in words.split("|")
    )


def _picked(pick: Picker, values: list[Any], taken: list[Any], where: str) -> Any:
    if all(value in taken for value in values):
        raise TemplateError(f"{where}: no values to draw from; list at least {len(taken) + 1}")
    return pick(values, taken)


def _dice(name: str) -> Picker:
    """Draws by chance, seeded by a name."""
    return lambda values, taken: random.Random(name).choice([value for value in values if value not in taken])


def _turns(name: str, turn: int) -> Picker:
    """Takes turns: every pass over the values visits each once, in a new order; taken ones are passed over."""

    def pick(values: Sequence[Any], taken: Sequence[Any]) -> Any:
        order = list(values)
        random.Random(f"{name}/{turn // len(order)}").shuffle(order)
        start = turn % len(order)
        return next(value for value in order[start:] + order[:start] if value not in taken)

    return pick


def _error_line(error: BaseException) -> int:
    """The line of Jinja's compiled code that an exception passed through."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
