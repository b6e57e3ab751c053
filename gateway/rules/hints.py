"""Suggestions for mistakes in rule files, to append to messages; "" if there is none."""

import re
from collections.abc import Mapping

from gateway.model import ExpressionError
from gateway.rules.value_kinds import MappingKind, Scalar, Tree, mappings_in
from gateway.rules.yaml_document import scalar
from gateway.text import did_you_mean

_VERIFY = dict.fromkeys(
    ("scheme", "secrets", "public_keys", "header", "signed", "algorithm", "tolerance", "timestamp", "encoding"),
    "it under `verify`",
)
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "sources.NAME": {**_VERIFY, "name": "it as the key of the source"},
    "destinations.NAME": {
        "name": "it as the key of the destination",
        "secrets": "them under `sign`, or a credential under `auth`",
        **dict.fromkeys(("token", "username", "password"), "it under `auth`, as in {bearer: {token: …}}"),
        **dict.fromkeys(("method", "body", "path", "query"), "it under `request` of a route"),
        "retry": "it in a route",
    },
    "routes[]": {
        "key": "`key` of the source, and here `order: key`",
        "type": "`match: {type: …}`",
        "source": "`from`",
        "sources": "`from`",
        "destination": "`to`",
        "destinations": "`to`",
        **dict.fromkeys(("filter", "if", "condition", "conditions", "where"), "`match` or `when`"),
        **dict.fromkeys(("preset", "text", "title", "template"), "it under `request`"),
        **dict.fromkeys(("rate", "timeout", "concurrency", "url", "auth"), "it under the destination"),
    },
}
"""What to write instead of a misplaced key whose name doesn't tell where it belongs."""
NO_TEMPLATE = "expected ${{ … }}, got {{ … }}, which is sent as it is written"
NO_REFERENCE = "expected ${NAME} or ${file:/path}, which are replaced, got another form, which isn't"
MAX_PATTERN = 200
"""Longest string, in characters, that may be meant as a test or a pattern."""
FEW = 12
"""The most keys that a message lists."""
_INDEX = re.compile(r"\[\d+\]")
_NAMED = re.compile(
    r"^(sources|destinations|providers)\.(?:(?!\.(?:limits|verify|respond|client_certificate|auth|tls|sign|proxy_auth)\b).)+"
)
_OF_EVENT = re.compile(r"(?:body|headers|query|id|type|source|key|item|each)\b")
_OF_REQUEST = re.compile(r"timestamp|body|id|url|method|path|secret|header:|query:|form:|field:")
_ON_AND_OFF = frozenset(("yes", "no", "on", "off", "y", "n"))
_COMPARISON = re.compile(r"(>=|<=|==|!=|>|<) *(-?\d+(?:\.\d+)?)")
_TESTS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "==": "is", "!=": "not"}
_REGULAR = re.compile(r"\([^()]*\|[^()]*\)|^\^|.\$$")
_REFERENCE_ELSEWHERE = re.compile(
    r"(?:[A-Za-z]+ )?(?:\$[A-Za-z_][A-Za-z0-9_]*|\$\([^()]*\)|%[A-Za-z_][A-Za-z0-9_]*%|\{\{[^{}]*\}\})"
)
_TEMPLATE_ELSEWHERE = re.compile(r"(?<!\$)\{\{ *(?:body|headers|query|item|each|id|type|source|key)\b[^{}]*\}\}")


def place_of(path: str) -> str:
    """Return a path in the schema's form: `sources.NAME.limits`, `routes[].to[]`."""
    return _NAMED.sub(r"\1.NAME", _INDEX.sub("[]", path))


def of_unknown_key(name: str, mapping: MappingKind, path: str, whole: MappingKind) -> str:
    """Suggest another key for a mapping at a path (`place_of`), or another place in the `whole` file for this key."""
    if other := _ELSEWHERE.get(path, {}).get(name):
        return f": expected {other}"
    is_message = "preset" in mapping.by_name and path.endswith("request")
    if is_message and any(name in each.by_name for where, each in mappings_in(whole) if where == path):
        return f": `{name}` is for a request without `preset`"
    if not path and name in whole.by_name:
        return ": only the main file may have it"
    if guess := did_you_mean(name, mapping.by_name):
        return guess
    beneath = [
        where.removeprefix(f"{path}.")
        for where, each in mappings_in(whole)
        if path and name in each.by_name and where.startswith(f"{path}.") and "to[]" not in where
    ]
    sections = [
        where
        for where, each in mappings_in(whole)
        if name in each.by_name and where in ("sources.NAME", "destinations.NAME", "routes[]") and where != path
    ]
    found = beneath[:3] or (sections if len(sections) == 1 else [])
    if not found and len(mapping.keys) <= FEW:
        return f", expected one of {', '.join(mapping.by_name)}"
    return f": it belongs under {' or '.join([f'`{each}`' for each in found])}" if found else ""


def of_template(path: str, kind: Scalar | Tree) -> str:
    """Suggest what to write where an expression in braces isn't evaluated."""
    if "CEL" in kind.expected:
        return ": CEL is written as it is, without ${{ }}"
    if path.endswith(".url"):
        return ": no host comes from an event. `to` may choose a destination by a template, and `request` have a `path`"
    if ".headers." in path:
        return ": values of an event go under `headers` of a route's `request`"
    if ".match" in path:
        return ": `match` compares with fixed values, `when` with others"
    return ": a secret is ${NAME} or ${file:/path}" if kind.is_secret else ", which templates have, as in `request`"


def of_quotes(value: object, kind: Scalar) -> str:
    """Suggest adding or removing quotes, if the value would be valid then."""
    if kind.is_secret or "CEL" in kind.expected:  # as CEL, a number or `true` is valid, and seldom meant
        return ""
    if isinstance(value, str) and kind.json.get("type") == "boolean" and value.lower() in _ON_AND_OFF:
        return ", a string in YAML 1.2"
    try:
        other = scalar(value) if isinstance(value, str) else str(value).lower()
        if value is None or isinstance(other, str) is isinstance(value, str):
            return ""
        kind.parse(other)
    except (ValueError, ExpressionError, TypeError):
        return ""
    return ", a string: it is written without quotes" if isinstance(value, str) else ": a string is written in quotes"


def of_reference(inner: str, path: str) -> str:
    """Suggest what is meant by an invalid reference `${…}`, given the text in its braces."""
    if ".verify." in path and _OF_REQUEST.match(inner):
        return " (a part of the request is written {…}, without $)"
    is_template = any(part in path for part in (".request.", ".respond.", ".to"))
    return " (values of an event are written ${{ … }})" if is_template and _OF_EVENT.match(inner) else ""


def of_variable(name: str, path: str) -> str:
    """Suggest what is meant by the name of a missing environment variable."""
    is_part = path.endswith(".signed") and _OF_REQUEST.fullmatch(name)
    return f" (a part of the request is written {{{name}}}, without $)" if is_part else ""


def of_pattern(text: str) -> str:
    """Suggest a test of `match` for a string that looks like one, or like a regular expression."""
    if len(text) > MAX_PATTERN:
        return ""
    if found := _COMPARISON.fullmatch(text):
        return f"{{{_TESTS[found[1]]}: {found[2]}}}"
    return "a list of values, a glob, or `when` with matches()" if _REGULAR.search(text) else ""


def is_reference_elsewhere(value: object) -> bool:
    """Return whether a secret looks like a reference in another tool's syntax, perhaps after `Bearer `."""
    return isinstance(value, str) and _REFERENCE_ELSEWHERE.fullmatch(value) is not None


def is_template_elsewhere(value: str) -> bool:
    """Return whether a string contains a template in another tool's syntax."""
    return _TEMPLATE_ELSEWHERE.search(value) is not None
