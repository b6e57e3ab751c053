"""What is likely to be meant by a mistake in a rule file: the ends of messages, "" where nothing is."""

import re

from gateway.model import ExpressionError
from gateway.rules.value_kinds import MappingKind, Scalar, mappings_in
from gateway.rules.yaml_document import scalar
from gateway.text import did_you_mean

FEW = 12
"""Keys that a message may list."""
_INDEX = re.compile(r"\[\d+\]")
_SOURCE = re.compile(r"sources\.[^.]+")
_OF_VERIFY = frozenset(("scheme", "secrets", "public_keys", "header", "signed", "algorithm", "tolerance", "timestamp"))
_OF_EVENT = re.compile(r"(?:body|headers|query|id|type|source|key|item|each)\b")
_OF_REQUEST = frozenset(("timestamp", "body", "id", "url", "method", "path", "secret"))
_ON_AND_OFF = frozenset(("yes", "no", "on", "off", "y", "n"))
_COMPARISON = re.compile(r"(>=|<=|==|!=|>|<) *(-?\d+(?:\.\d+)?)")
_TESTS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "==": "is", "!=": "not"}
_REGULAR = re.compile(r"\([^()]*\|[^()]*\)|^\^|.\$$")
_REFERENCE_ELSEWHERE = re.compile(
    r"(?:[A-Za-z]+ )?(?:\$[A-Za-z_][A-Za-z0-9_]*|\$\([^()]*\)|%[A-Za-z_][A-Za-z0-9_]*%|\{\{[^{}]*\}\})"
)
_TEMPLATE_ELSEWHERE = re.compile(r"(?<!\$)\{\{ *(?:body|headers|query|item|each|id|type|source|key)\b[^{}]*\}\}")


def of_unknown_key(name: str, mapping: MappingKind, path: str, whole: MappingKind) -> str:
    """Return which key of a mapping at a path is meant, or where this one belongs in a `whole` file."""
    if name in _OF_VERIFY and _SOURCE.fullmatch(path):
        return ", which is one of `verify`"
    if name in whole.by_name:
        return ": it is one of the file's, at its top" if path else ": it is one of the main file's alone"
    if guess := did_you_mean(name, mapping.by_name):
        return guess
    root = _INDEX.sub("[]", path)
    places = [
        where
        for where, each in mappings_in(whole)
        if name in each.by_name and where.startswith(("sources", "destinations", "routes[]")) and "to[]" not in where
    ]
    near = [where for where in places if root and where.startswith(root)] or [
        where for where in places if where.split(".")[0] != root.split(".")[0]
    ]
    if near:
        return f", which is one of `{min(near, key=len)}`"
    return f", expected one of {', '.join(mapping.by_name)}" if len(mapping.keys) <= FEW else ""


def of_quotes(value: object, kind: Scalar) -> str:
    """Return what to say of a value that would be right with quotes, or without."""
    if kind.is_secret or "CEL" in kind.expected:  # as CEL, a number or `true` is valid, and seldom meant
        return ""
    if isinstance(value, str) and kind.json.get("type") == "boolean" and value.lower() in _ON_AND_OFF:
        return ", a string in YAML 1.2"
    other = scalar(value) if isinstance(value, str) else str(value).lower() if isinstance(value, int | float) else value
    if type(other) is type(value):
        return ""
    try:
        kind.parse(other)
    except (ValueError, ExpressionError, TypeError):
        return ""
    return ", a string: it is written without quotes" if isinstance(value, str) else ": a string is written in quotes"


def of_reference(inner: str) -> str:
    """Return what is meant by what is in the braces of `${…}`, if that is no reference."""
    return " (what an event has is written ${{ … }})" if _OF_EVENT.match(inner) else ""


def of_variable(name: str) -> str:
    """Return what is meant by the name of a missing environment variable."""
    return f" (a part of the request is written {{{name}}}, without $)" if name in _OF_REQUEST else ""


def of_pattern(text: str) -> str:
    """Return which test of `match` is meant by a string that looks like one, or like a regular expression."""
    if found := _COMPARISON.fullmatch(text):
        return f"{{{_TESTS[found[1]]}: {found[2]}}}"
    return "a list of values, a glob, or `when` with matches()" if _REGULAR.search(text) else ""


def is_reference_elsewhere(value: object) -> bool:
    """Return whether a secret is what would be a reference in another tool, after `Bearer ` perhaps."""
    return isinstance(value, str) and _REFERENCE_ELSEWHERE.fullmatch(value) is not None


def is_template_elsewhere(value: str) -> bool:
    """Return whether a string has what would be a template in another tool."""
    return _TEMPLATE_ELSEWHERE.search(value) is not None
