"""What is checked of a template's blocks, before a model is started: their names and variables, then some draws.

The front matter has been checked by `dream.template_head`. A check yields problems, each one line that names the file,
the line and what to do; `dream.templates` raises the first or shows them all.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from jinja2 import meta, nodes

from dream.errors import TemplateError
from dream.sandbox import ENVIRONMENT
from dream.template import CONTRAST_BLOCKS, GENERAL_BLOCKS, Template, mentioned
from dream.template_head import apart_from, bracket_problem, names_in, names_in_expression, nearest, single_brackets

MIN_EXAMPLES = 3
DRAWS = [(seed, False) for seed in range(5)] + [(seed, True) for seed in range(8)]
"""Seeds, and whether by the coverage plan, which visits every value of short lists such as styles."""
SHARED = 0.5
"""Part of the words of the shorter direction that the other one must have too."""


def problems(template: Template, tree: nodes.Template) -> list[str]:
    """Every problem of a template whose head is sound; draws are looked at only where all names are right."""
    blocks = {block.name: block for block in tree.find_all(nodes.Block)}
    if found := [*_missing(template, blocks), *_wrong_names(template, blocks)]:
        return found
    first: dict[str, str] = {}
    for place, problem in _drawn(template):
        first.setdefault(place, problem)
    return [*_unused(template, blocks), *first.values()]


def _missing(template: Template, blocks: dict[str, nodes.Block]) -> Iterator[str]:
    """Blocks that are missing, and blocks of other names."""
    wanted = GENERAL_BLOCKS if template.general else CONTRAST_BLOCKS
    last = max((block.lineno for block in blocks.values()), default=max(template.lines.of.values()))
    for name in wanted:
        if name not in blocks:
            yield f"{template.path}:{last}: block {name} is missing; add {{% block {name} %}} ... {{% endblock %}}"
    for name, block in blocks.items():
        if name not in wanted:
            hint = nearest(name, wanted, f"blocks are {', '.join(wanted)}")
            yield f"{template.path}:{block.lineno}: unknown block {name}; {hint}"


def _wrong_names(template: Template, blocks: dict[str, nodes.Block]) -> Iterator[str]:
    """Variables that nothing defines, and names in single brackets."""
    known = {*template.front.slots, *template.front.sides.get("clear", {}), "side"}
    for name, block in blocks.items():
        body = _body(block)
        for undefined in sorted(meta.find_undeclared_variables(body) - known):
            line = next((node.lineno for node in body.find_all(nodes.Name) if node.name == undefined), block.lineno)
            yield (
                f"{template.path}:{line}: block {name} uses {undefined!r}, which no slot defines; "
                f"{nearest(undefined, known)}"
            )
        if brackets := single_brackets(body):
            line, text = brackets
            yield f"{template.path}:{line}: block {name}: {bracket_problem(text)}"


def _body(block: nodes.Block) -> nodes.Template:
    """What is in a block, as a tree of its own."""
    body = nodes.Template(block.body, lineno=block.lineno)
    body.environment = ENVIRONMENT
    return body


def _unused(template: Template, blocks: dict[str, nodes.Block]) -> Iterator[str]:
    """Slots and values of sides that nothing uses."""
    front = template.front
    used = set().union(*(meta.find_undeclared_variables(_body(block)) for block in blocks.values()))
    for text in (text for texts in front.mentions.values() for text in texts):
        used |= names_in(text)
    for text in (text for own in front.sides.values() for text in own.values()):
        used |= names_in(text)
    for spec in (spec for spec in front.slots.values() if isinstance(spec, dict)):
        used |= {str(spec.get("from")), *apart_from(spec)}
        used |= names_in_expression(spec["expr"]) if "expr" in spec else set()
    for slot in front.slots:
        if slot not in used:
            yield f"{template.lines.at('slots', slot)}: slots.{slot} is used nowhere; use it in a block or remove it"
    for name in front.sides.get("clear", {}):
        if name not in used:
            where = template.lines.at("sides", "clear", name)
            yield f"{where}: sides.clear.{name} is used nowhere; use it in a block or remove it from both sides"


def _drawn(template: Template) -> Iterator[tuple[str, str]]:
    """Draws a few times and looks at what comes out; each problem with the block or key that it is in."""
    for seed, covered in DRAWS:
        try:
            slots = template.variables(seed, covered)
            sides = ("clear",) if template.general else ("clear", "flawed")
            variables = {side: template.side_variables(side, slots) for side in sides}
        except TemplateError as error:
            yield "slots", str(error)
            continue
        failed = False
        for side in sides:
            for block, problem in _rendered(template, side, variables[side]):
                failed = True
                yield block, problem
        if not failed and not template.general:
            pair = list(_pair(template, variables))
            yield from pair
            if pair:
                continue
            try:
                yield from _mirror(template, slots)
            except TemplateError as error:  # what can be drawn cannot always be computed with the values swapped
                yield "mirror", f"{error}; swap other slots, or remove mirror"


def _rendered(template: Template, side: str, variables: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the blocks of one side in one draw."""
    for block in ("situation", side, "comply", "push_back", "comply_examples", "push_back_examples"):
        where = template.lines.at("block", block)
        try:
            text = template.render(block, variables)
            if not text and block != "situation" and not block.endswith("_examples"):
                yield block, f"{where}: block {block} renders to nothing; write a text for every draw"
            if block.endswith("_examples"):
                yield from _examples(template, block, text.splitlines(), where, side, variables)
        except TemplateError as error:
            yield block, str(error)


def _examples(
    template: Template, block: str, examples: list[str], where: str, side: str, variables: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """What is wrong with the worked replies of one stance and side."""
    stance = block.removesuffix("_examples")
    if len(examples) < MIN_EXAMPLES:
        yield block, f"{where}: block {block} has {len(examples)} lines; write at least {MIN_EXAMPLES}"
    for place, words in enumerate(template.mentions(stance, variables)):
        for example in examples:
            if not mentioned(words, example):
                yield (
                    f"mentions.{stance}.{place}",
                    f"{template.lines.at('mentions', stance, place)}: {block} on the {side} side: {example!r} lacks "
                    f"{words!r}, which mentions.{stance} asks for; write it there, or ask for less",
                )


def _pair(template: Template, variables: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Both directions of one draw must be different, and little different."""
    where = template.lines.at("block", "flawed")
    clear, flawed = (template.render(side, variables[side]) for side in ("clear", "flawed"))
    if clear == flawed:
        yield "flawed", f"{where}: clear and flawed are equal in a draw ({clear!r}); make a slot or side differ"
        return
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (clear, flawed))
    if len(words & others) < SHARED * min(len(words), len(others)):
        yield (
            "flawed",
            f"{where}: clear and flawed share too few words ({clear!r} / {flawed!r}); write them a minimal edit apart",
        )


def _mirror(template: Template, slots: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each side of the mirrored scenario must be the other side here, word for word, under another situation."""
    if not template.front.mirror:
        return
    where = f"{template.lines.at('mirror')}: mirror"
    swapped = template.mirrored(slots)
    for side, other in (("clear", "flawed"), ("flawed", "clear")):
        here, there = template.side_variables(side, slots), template.side_variables(other, swapped)
        for block in (side, "comply", "push_back", "comply_examples", "push_back_examples"):
            texts = template.render(block, here), template.render(other if block == side else block, there)
            for text, text_there in itertools.zip_longest(*(text.splitlines() for text in texts), fillvalue=""):
                if text != text_there:
                    yield (
                        "mirror",
                        f"{where}: block {block} on the {side} side is not that of the mirrored {other} side: "
                        f"{text!r} / {text_there!r}; swap more slots, or remove mirror",
                    )
    if template.render("situation", template.side_variables("clear", slots)) == template.render(
        "situation", template.side_variables("clear", swapped)
    ):
        yield (
            "mirror",
            f"{where}: the situation stays the same, so both directions would be right and wrong; "
            "name in it what is swapped, or remove mirror",
        )
