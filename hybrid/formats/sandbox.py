"""Jinja for templates that are not trusted: they reach nothing of Python, and time and memory are bounded.

Every value that an operation of a template makes passes `Sandbox.made`, and every round of a loop and call of a macro
`Sandbox.spend`; operations that could make much of little say before how much it will be. Once more was made, or the
thread worked longer, than a rendering may, `LimitError` ends it. Nothing here needs signals or a thread of its own.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from sys import getsizeof
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0  # of one thread's work, for one rendering
_STEP = 8  # bytes that a step counts as, even one that makes nothing
_WIDEST = 1_000  # the largest number that a filter takes for a width or a count
_LARGEST_BITS = 4_096  # of a whole number
# No prompt needs these, and bounds for them would be work.
_REFUSED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap")
_REFUSED_ATTRIBUTES = ("encode", "expandtabs", "striptags", "to_bytes", "translate")
_COUNTED_FILTERS = ("batch", "center", "round", "slice")
# Filters that `bounded` puts into a template; no template can write these names.
_MADE, _SPEND, _JOIN = "made value", "step of a loop", "joined texts"


class LimitError(jinja2.TemplateRuntimeError):
    """A rendering that would take more time or memory than it may."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what a model is trained to say. Here it only stands for itself."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between the tags, as a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """As Jinja's, but printed without what is in it, which may be other namespaces, in circles too."""

    def __repr__(self) -> str:
        return "<namespace>"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one rendering, which may make `limit` bytes of values, each counted whenever it is made."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limit: int = 0) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
            finalize=_printed,
            optimized=False,  # it would compute constants while a template is read
        )
        self.limit = self._left = limit
        self._end = time.thread_time() + SECONDS
        self.globals.pop("lipsum")
        self.globals["namespace"] = _Namespace
        filters = {name: made for name, made in self.filters.items() if name not in _REFUSED_FILTERS}
        filters |= {name: self._counted(filters[name]) for name in _COUNTED_FILTERS}
        filters |= {"format": self._format, "indent": self._indent, "join": self._join, "replace": self._replace}
        filters |= {"sum": self._sum, "tojson": self._tojson, _JOIN: self._join}
        self.filters = {name: self._bounded(made) for name, made in filters.items()}
        self.filters |= {_MADE: self.made, _SPEND: self.spend}

    def spend(self, size: int) -> None:
        """Count a step that makes `size` bytes. Raises `LimitError` when that is too much, or the time is over."""
        self._left -= _STEP + max(0, size)
        if self._left < 0:
            raise LimitError(f"it makes more than {self.limit / 2**20:.0f} MiB of text and lists")
        if time.thread_time() > self._end:
            raise LimitError(f"it works for more than {SECONDS:g} seconds")

    def made(self, value: Any) -> Any:
        """`value`, which was just made, once it is counted."""
        self.spend(getsizeof(value))
        self._weigh(value)
        return value

    def _weigh(self, value: Any) -> None:
        """Raise `LimitError` for a value that with all that is in it is larger than the limit.

        What is in it several times counts as often, as it would be printed or compared.
        """
        waiting, left = [value], self.limit
        while waiting:
            item = waiting.pop()
            left -= getsizeof(item)
            if left < 0:
                raise LimitError(f"it makes a value of more than {self.limit / 2**20:.0f} MiB")
            waiting += _items(item)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use the attribute."""
        return attr not in _REFUSED_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `obj` for a template."""
        method = getattr(obj, "__wrapped__", obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = self._expect(text, method.__name__, args)
        self._weigh((args, kwargs))  # which may come back as they are, as `varargs`
        return self.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right` for a template."""
        if operator == "%" and isinstance(left, str):
            self._expect_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "*":
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            self.spend(getsizeof(repeated) * count if isinstance(count, int) else 0)
        return self.made(super().call_binop(context, operator, left, right))

    def _bounded(self, made: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(made)  # which keeps Jinja's marks of what else it is called with
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.spend(0)
            return self.made(made(*args, **kwargs))

        return bounded

    def _counted(self, made: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(made)
        def counted(*args: Any, **kwargs: Any) -> Any:
            for number in (*args[1:], *kwargs.values()):
                _check_width(number)
            return made(*args, **kwargs)

        return counted

    def _expect(self, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Count what a method of `text` will make, where that may be much more than it is called with."""
        if method in ("format", "format_map"):
            self._expect_format(text)
        elif method in ("center", "ljust", "rjust", "zfill"):
            self.spend(max((number for number in args if isinstance(number, int)), default=0))
        elif method == "replace" and len(args) > 1 and isinstance(args[0], str):
            self.spend(text.count(args[0]) * getsizeof(args[1]))
        elif method == "join" and args:
            parts = list(args[0])
            self.spend(getsizeof(text) * len(parts))
            return (parts,)
        return args

    def _expect_format(self, form: str) -> None:
        fields = form.replace("{{", "").replace("%%", "")
        computed = re.search(r"%(\([^)]*\))?[-+ #\d.]*\*|\{[^{}]*\{", fields)
        if computed:
            raise LimitError("it formats text to a width that it computes")
        self.spend(sum(map(int, re.findall(r"\d+", form))))

    # Filters

    def _attributes(self, value: Any, attribute: Any) -> Iterable[Any]:
        return value if attribute is None else map(jinja2.filters.make_attrgetter(self, attribute), value)

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        parts: list[str] = []
        for item in self._attributes(value, attribute):
            parts.append(str(item))
            self.spend(getsizeof(parts[-1]) + getsizeof(d))
        return str(d).join(parts)

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(s), str(old), str(new)
        self._expect(text, "replace", (old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        _check_width(width if isinstance(width, int) else len(width))
        self.spend((str(s).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        return jinja2.filters.do_indent(str(s), width, first, blank)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        self._expect_format(str(value))
        return jinja2.filters.do_format(str(value), *args, **kwargs)

    def _sum(self, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise LimitError("it sums what are no numbers")
        return sum(self._attributes(iterable, attribute), start)

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """As transformers has it, which unlike Jinja's leaves the text as it is for HTML."""
        _check_width(indent if isinstance(indent, int) else len(indent or ""))
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        parts: list[str] = []
        for part in encoder.iterencode(x):
            self.spend(getsizeof(part))
            parts.append(part)
        return "".join(parts)


def bounded(template: nodes.Template) -> nodes.Template:
    """`template`, with what `Sandbox` needs to count its work."""
    return _Bounds().visit(template)


class _Bounds(NodeTransformer):
    """Puts a step into each loop and macro, and `made` around what would be made without a call of the sandbox."""

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        written = sum(len(data.data) for part in node.body for data in _written(part))
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(written), _SPEND), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE)

    visit_Dict = visit_List

    def visit_Tuple(self, node: Any) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node  # else the names of an assignment

    def visit_Getitem(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOIN)


def _written(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_eval_context
def _printed(context: nodes.EvalContext, value: Any) -> str:
    text = str(value)
    context.environment.spend(getsizeof(text))  # type: ignore[attr-defined]
    return text


def _items(value: Any) -> list[Any]:
    """What is in `value`."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | KeysView | ValuesView | ItemsView) else []


def _check_width(number: object) -> None:
    if isinstance(number, int) and abs(number) > _WIDEST:
        raise LimitError(f"it asks for a width or count of {number:,}, more than {_WIDEST:,}")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
    if bits > _LARGEST_BITS:
        raise LimitError(f"it makes a number of more than {_LARGEST_BITS:,} bits")
