"""The kinds of message fields in rule files: templates, whose literal parts are checked when they are loaded."""

from collections.abc import Callable

from gateway.model import ExpressionError
from gateway.rules.request_presets.preset import Field, Kind, url
from gateway.rules.request_templates import PathTemplate
from gateway.rules.templates import LOOP, Template
from gateway.rules.value_kinds import Tree

_Shape = tuple[str, type | tuple[type, ...], dict[str, object]]
_TEXT: _Shape = ("a string", (str, int, float), {"type": ["string", "number", "boolean"]})
_SHAPES: dict[Kind, _Shape] = {
    Kind.LINE: _TEXT,
    Kind.TEXT: ("a string", (str, int, float, dict), {"type": ["string", "number", "boolean", "object"]}),
    Kind.URL: ("an http or https URL", str, {"type": "string"}),
    Kind.PATH: ("a string", str, {"type": "string"}),
    Kind.CHOICE: ("a string", str, {"type": "string"}),
    Kind.NUMBER: ("an integer", (int, str), {"type": ["integer", "string"]}),
    Kind.LINES: ("a string or a list of them", (str, list), {"type": ["string", "array"]}),
    Kind.FACTS: ("a mapping of names to strings", dict, {"type": "object"}),
    Kind.JSON: ("a mapping", dict, {"type": "object"}),
}


def field_kind(field: Field) -> Tree:
    """Return the kind of a field's value."""
    expected, shape, json = _SHAPES[field.kind]
    return Tree(expected, shape, _parser(field), json, is_template=True)


def _parser(field: Field) -> Callable[[object], Template | PathTemplate]:
    def parse(value: object) -> Template | PathTemplate:
        if field.kind is Kind.PATH:
            return PathTemplate(f"/{value}")
        if field.kind is Kind.TEXT and isinstance(value, dict) and value.keys() != {*LOOP, "join"}:
            raise ValueError("expected a string, or a mapping with for, as, do and join, got another mapping")
        template = Template(value)
        if template.has_expressions:
            return template
        if field.choices and value not in field.choices:
            raise ValueError(f"expected one of {', '.join(field.choices)}, got {value!r}")
        if field.kind is Kind.NUMBER and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"expected an integer, got {value!r}")
        if field.kind is Kind.URL:
            try:
                url(str(value))
            except ExpressionError as error:
                raise ValueError(str(error)) from error
        return template

    return parse
