"""What a Content-Type means: the one place that decides how a body is read."""

import re
from collections.abc import Iterator
from enum import Enum


class Kind(Enum):
    """How a body is read."""

    JSON = "JSON"
    FORM = "a form"
    MULTIPART = "multipart"
    XML = "XML"


MAX_PARAMETERS = 20
FORM = "application/x-www-form-urlencoded"
_KINDS = {
    FORM: Kind.FORM,
    "application/xml": Kind.XML,
    "text/xml": Kind.XML,
}
_PARAMETER = re.compile(
    r""";[ \t]*([!#$%&'*+.^_`|~\w-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))[ \t]*""", re.ASCII
)


def kind_of(content_type: str) -> Kind:
    """Return how a body of a Content-Type (with its parameters, or "") is read: as JSON, if it is nothing else.

    Many senders of JSON call it `text/plain`, or nothing at all.
    """
    name = media_type(content_type)
    if name in _KINDS:
        return _KINDS[name]
    if name.startswith("multipart/"):
        return Kind.MULTIPART
    return Kind.XML if name.endswith("+xml") else Kind.JSON


def media_type(field: str) -> str:
    """Return the media type of a Content-Type, or the type of a Content-Disposition, in lower case."""
    return field.partition(";")[0].strip().lower()


def parameters(field: str) -> dict[str, str]:
    """Return the parameters after the first `;` by their names in lower case; of a repeated one the first.

    Raises ValueError for what isn't a list of parameters (RFC 9110 §5.6.6), and for more than MAX_PARAMETERS. In
    quotes, a backslash escapes a quote or itself alone: some senders write paths as they are.
    """
    found: dict[str, str] = {}
    for name, value in _parameters(field):
        found.setdefault(name.lower(), value)
    return found


def _parameters(field: str) -> Iterator[tuple[str, str]]:
    kind, semicolon, _ = field.partition(";")
    at = len(kind)
    end = len(field.rstrip("; \t")) if semicolon else at
    for _ in range(MAX_PARAMETERS):
        if at >= end:
            return
        parameter = _PARAMETER.match(field, at)
        if parameter is None:
            break
        name, quoted, token = parameter.groups()
        yield name, token if quoted is None else re.sub(r'\\(["\\])', r"\1", quoted)
        at = parameter.end()
    if at < end:
        raise ValueError("expected a few parameters, got something else")
