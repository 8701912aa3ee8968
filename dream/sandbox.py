"""Jinja for text that nobody has read yet: the immutable sandbox with strict undefined, in which no template can reach
Python's insides or take more than a moment or more than a little memory (docs/SECURITY.md).

Not covered: how large a template file is; time still grows with that.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_VALUE = 5_000
"""Size of any one value that a template makes: characters of a text, entries of a list with all that is in them."""
MAX_NUMBER = 10**15
"""Largest whole number that a template makes; a longer one takes ever more time to multiply and to write."""
MAX_WORK = 20_000
"""Steps of one rendering: every value that is made counts its size, every pass of a loop the parts of its body."""
MAX_DEPTH = 20
"""Levels of a template's syntax; Python cannot compile loops that are nested more deeply."""
MAX_DIGITS = 15
"""Places that `round` takes."""

SYNTAX = (nodes.Template, nodes.Output, nodes.Block, nodes.If, nodes.For, nodes.Assign, nodes.Expr, nodes.Helper)
"""Kinds of parts that a template is made of. Without macros and nested blocks nothing can call itself."""
MAKERS: tuple[type[nodes.Expr], ...] = (
    nodes.List, nodes.Tuple, nodes.Dict, nodes.Concat, nodes.Filter, nodes.Call,
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow,
)  # fmt: skip
"""Expressions whose value can be larger than those it is made of."""
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "first", "float", "int", "join", "last", "length", "lower", "max",
    "min", "replace", "sort", "string", "sum", "title", "trim", "truncate", "upper", "wordcount",
)  # fmt: skip
"""Jinja's filters that templates have, beside `format` and `round`. Others make huge values of small ones (`center`,
`indent`), call by name (`map`, `attr`) or throw dice of their own (`random`)."""
CONVERSION = re.compile(r"%%|%(\(\w+\))?[-+ #0]*\d{0,2}(\.\d{1,2})?[sdifeEgGxXo]")
"""What `format` fills in: no width from the arguments, nor one of more than two digits."""


class CountedContext(Context):
    """The values of one rendering, and what it has taken so far."""

    work = 0

    def charge(self, steps: int) -> None:
        """Raises SecurityError when the rendering has taken more than `MAX_WORK`."""
        self.work += steps
        if self.work > MAX_WORK:
            raise SecurityError(f"takes over {MAX_WORK:,} steps; make its loops and texts shorter")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with strict undefined, a few statements and filters, and a bound on all they do.

    Parsing refuses other statements (`jinja2.TemplateSyntaxError`, with the line) and has `_bounded` look at every
    value that is made; rendering raises `SecurityError` beyond a bound.
    """

    context_class = CountedContext
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self.globals = {"range": range}
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters |= {"format": _format, "round": _round, BOUNDED: _bounded, COUNTED: _counted}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        try:
            tree: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        except RecursionError:
            raise jinja2.TemplateSyntaxError("is nested too deeply; write it more simply", 1) from None
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*` and `%` between numbers, as arithmetic in templates needs them; the same of texts, and `**`, is refused.

        A text times a number repeats it, and a text `%` a number formats it.
        """
        if operator == "**":
            raise SecurityError("** is not for templates; multiply with *")
        if not all(isinstance(value, int | float) for value in (left, right)):
            raise SecurityError(f"{operator} is for numbers only; write texts out, or use the filter format")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Values are texts, numbers and lists, and filters do what their methods would; a loop has its counters."""
        return isinstance(obj, LoopContext) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is an attribute like any other."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """What an attribute that is refused gives: an error as soon as it is used."""
        hint = f"{attribute!r} of a value is not for templates; use a filter such as {{{{ value | upper }}}}"
        return self.undefined(hint, obj=obj, name=attribute, exc=SecurityError)

    def is_safe_callable(self, obj: Any) -> bool:
        """Only `range`; raises SecurityError for anything else."""
        if super().is_safe_callable(obj) and obj is range:
            return True
        raise SecurityError("only range(...) can be called in a template; use a filter")


BOUNDED, COUNTED = "a bounded value", "counted passes"
"""Names of the filters that `_Bounds` puts in, which no template can write."""


@jinja2.pass_context
def _bounded(context: CountedContext, value: Any) -> Any:
    """The value, if it is no larger than a template may make."""
    size = _size(value)
    if size > MAX_VALUE:
        raise SecurityError(f"makes a value of over {MAX_VALUE:,} characters or entries; make it smaller")
    context.charge(1 + size)
    return value


def _size(value: Any) -> int:
    """Characters of a text, entries of a collection with all that is in them; counts little further than allowed.

    Raises:
        SecurityError: a number is too large.
    """
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise SecurityError(f"makes a number of over {len(str(MAX_NUMBER))} digits; make it smaller")
    if isinstance(value, str | range):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 0
    size = 0
    for part in itertools.chain(value, value.values() if isinstance(value, dict) else ()):
        size += 1 + _size(part)
        if size > MAX_VALUE:
            break
    return size


@jinja2.pass_context
def _counted(context: CountedContext, values: Iterable[Any], parts: int) -> Iterator[Any]:
    """What a loop goes over; each pass is charged as many steps as its body has parts."""
    for value in values:
        context.charge(parts)
        yield value


def _format(text: str, *values: Any, **named: Any) -> str:
    """Jinja's `format` with short widths."""
    if "%" in CONVERSION.sub("", text):
        raise SecurityError(f"{text!r} is not for format; use %s, %d, %.2f and the like, with widths of two digits")
    return text % (named or values)


def _round(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    """Jinja's `round` to a few places; it computes 10 to the power of their number."""
    if abs(precision) > MAX_DIGITS:
        raise SecurityError(f"round takes at most {MAX_DIGITS} places")
    return do_round(value, precision, method)


class _Bounds(NodeTransformer):
    """Refuses what is no part of a template, and has what is made and each pass of a loop counted.

    Raises:
        jinja2.TemplateSyntaxError: at the line of what is refused.
    """

    def __init__(self) -> None:
        self._depth = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self._depth += 1
        if problem := self._problem(node):
            raise jinja2.TemplateSyntaxError(problem, node.lineno)
        super().generic_visit(node, *args, **kwargs)
        self._depth -= 1
        if isinstance(node, nodes.For):
            passed = [*node.body, *([node.test] if node.test else [])]
            parts = sum(1 for part in passed for _ in part.find_all(nodes.Node))
            node.iter = _filtered(node.iter, COUNTED, nodes.Const(1 + len(passed) + parts))
        if isinstance(node, nodes.Tuple) and node.ctx == "store":  # the variables of a loop or `set`
            return node
        return _filtered(node, BOUNDED) if isinstance(node, MAKERS) else node

    def _problem(self, node: nodes.Node) -> str:
        if not isinstance(node, SYNTAX):
            return f"{type(node).__name__.lower()} is not for templates; they have if, for, set and filters"
        if isinstance(node, nodes.For) and node.recursive:
            return "a recursive loop is not for templates; write the loops out"
        if isinstance(node, nodes.Block) and self._depth > 2:
            return f"block {node.name} is inside something else; put blocks one after another"
        return "is nested too deeply; write it more simply" if self._depth > MAX_DEPTH else ""


def _filtered(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    """The expression with a filter after it."""
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno, environment=node.environment)


ENVIRONMENT = BoundedSandbox()


@cache
def compiled_string(source: str) -> jinja2.Template:
    """A Jinja string of some front matter; drawing renders the same few strings again and again."""
    return ENVIRONMENT.from_string(source)


@cache
def compiled_expression(source: str) -> Callable[..., Any]:
    """The `expr` of a slot, as a function of the slots; Jinja's own `compile_expression` would go past the bounds."""
    template = ENVIRONMENT.from_string(f"{{% set value = ({source}) %}}")
    return lambda **variables: getattr(template.make_module(variables), "value")  # noqa: B009  # made at run time
