"""One scenario template: what its file holds, what it draws and how it renders.

Templates run in `dream.sandbox`. What is checked of a file is in `dream.template_checks`, so that a `Template` that
`dream.templates.load` gave can be drawn from without further care.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field

from dream.errors import TemplateError
from dream.sandbox import compiled_expression, compiled_string

CONTRAST_BLOCKS = ("situation", "clear", "flawed", "comply", "push_back", "comply_examples", "push_back_examples")
GENERAL_BLOCKS = tuple(name for name in CONTRAST_BLOCKS if name != "flawed")
GENERAL = "none"
"""The `flaw` of a general template: an ordinary request, one side only."""
MAX_RENDERED = 4_000
"""Characters one block may render to; more is a loop that does not end, or a mistake."""

PLAN = 100_000
"""Seeds of one plan of draws: `seed // PLAN` names the plan, `seed % PLAN` is the turn in it."""
Picker = Callable[[Sequence[Any], Sequence[Any]], Any]
"""Chooses one of some values that is not among those taken."""
Key = tuple[str | int, ...]
"""A place in the front matter, e.g. `("sides", "clear", "said")`."""


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
    "Where such a situation occurs; each draw has one of them."
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
class Lines:
    """Where things stand in a file, for messages: keys of the front matter, and blocks as `("block", NAME)`."""

    path: Path
    of: dict[Key, int]

    def at(self, *key: str | int) -> str:
        """`FILE:LINE` of a place, or of the nearest one around it that is in the file."""
        while key not in self.of:
            key = key[:-1]
        return f"{self.path}:{self.of[key]}"


@dataclass(frozen=True)
class Template:
    """A checked template, ready to draw from."""

    path: Path
    hash: str
    front: FrontMatter
    jinja: jinja2.Template
    lines: Lines

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
            TemplateError: a slot cannot be computed, or `not` leaves it no value.
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

    def _draw(self, slot: str, spec: Any, drawn: dict[str, Any], pick: Picker) -> Any:
        if isinstance(spec, list):
            return pick(spec, [])
        if "expr" in spec:
            return self._compute(slot, spec, drawn)
        apart = spec.get("not", [])
        taken = [drawn[other] for other in ([apart] if isinstance(apart, str) else apart)]
        if "from" in spec:
            values = self.front.slots[spec["from"]]
        else:
            low, high = spec["range"]
            values = range(low, high + 1, spec.get("step", 1))
        if all(value in taken for value in values):
            where = f"{self.lines.at('slots', slot)}: slots.{slot}"
            raise TemplateError(f"{where}: no value is left to draw; list more than `not` keeps away")
        return pick(values, taken)

    def _compute(self, slot: str, spec: dict[str, Any], drawn: dict[str, Any]) -> Any:
        try:
            return compiled_expression(str(spec["expr"]))(**drawn)
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            where = f"{self.lines.at('slots', slot, 'expr')}: slots.{slot}"
            raise TemplateError(f"{where}: cannot compute {spec['expr']!r}: {error}") from error

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
        pieces = self.jinja.blocks[block](self.jinja.new_context(variables))
        try:
            text = _written(pieces, f"{self.lines.at('block', block)}: block {block}")
        except TemplateError:
            raise
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            line = self.jinja.get_corresponding_lineno(_error_line(error))
            raise TemplateError(f"{self.path}:{line}: block {block}: {error}") from error
        return "\n".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())

    def render_string(self, source: str, variables: dict[str, Any], *key: str | int) -> str:
        """Renders a Jinja string of the front matter, which stands at `key`.

        Raises:
            TemplateError: as `render` does.
        """
        where = f"{self.lines.at(*key)}: {'.'.join(map(str, key))}"
        try:
            return _written(compiled_string(source).generate(variables), where).strip()
        except TemplateError:
            raise
        except Exception as error:  # sandboxed user code: whatever it raises is the template's mistake
            raise TemplateError(f"{where}: {error}") from error

    def mentions(self, stance: str, variables: dict[str, Any]) -> list[str]:
        """What a reply of this stance must speak of, rendered."""
        texts = [text for key, wanted in self.front.mentions.items() if key == stance for text in wanted]
        return [self.render_string(text, variables, "mentions", stance, place) for place, text in enumerate(texts)]

    def side_variables(self, side: str, slots: dict[str, Any]) -> dict[str, Any]:
        """The slots plus the values that are this side's own, and `side` itself."""
        own = self.front.sides.get(side, {})  # type: ignore[call-overload]  # mypy cannot narrow str to the literal
        return {
            **slots,
            **{key: self.render_string(text, slots, "sides", side, key) for key, text in own.items()},
            "side": side,
        }


def mentioned(words: str, text: str) -> bool:
    """Whether `text` contains one of the alternatives in `words` (`a|b`) as whole words, ignoring case."""
    return any(
        re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", text, re.IGNORECASE) for option in words.split("|")
    )


def _written(pieces: Iterable[str], where: str) -> str:
    """What a rendering writes, which ends when it is too long.

    Raises:
        TemplateError: it is.
    """
    written, size = [], 0
    for piece in pieces:
        written.append(piece)
        size += len(piece)
        if size > MAX_RENDERED:
            raise TemplateError(f"{where}: renders to over {MAX_RENDERED:,} characters; make it shorter")
    return "".join(written)


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
