"""Whether an answer of the API is as its document says: no field more, and none less."""

import re
from copy import deepcopy
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from gateway.api.openapi import document

FORMATS = Draft202012Validator.FORMAT_CHECKER


def problems_of(method: str, path: str, status: int, content_type: str, answer: object) -> list[str]:
    """Return what is wrong with an answer; `path` is the request's, below the API's own."""
    operation = _operation(method, path)
    if operation is None:
        return [] if status >= 400 else [f"{method} {path}: expected an operation of the document"]
    response = operation["responses"].get(str(status))
    if response is None:
        return [f"{method} {path}: expected one of {', '.join(operation['responses'])}, got {status}"]
    media = response["content"].get(content_type)
    if media is None:
        return [f"{method} {path}: expected one of {', '.join(response['content'])}, got {content_type}"]
    schema = media.get("schema", {}) | {"components": strict()["components"]}
    validator = Draft202012Validator(schema, format_checker=FORMATS)
    return [f"{method} {path} {status}: {each.json_path}: {each.message}" for each in validator.iter_errors(answer)]


def _operation(method: str, path: str) -> Any:
    for pattern, operations in _table():
        if pattern.fullmatch(path.partition("?")[0]):
            return operations.get(method.lower())
    return None


@cache
def _table() -> list[tuple[re.Pattern[str], Any]]:
    """Return the operations of each path that the document has, with a pattern of the path."""
    return [
        (re.compile(re.sub(r"\\\{[a-z]+\\\}", "[^/]+", re.escape(template))), operations)
        for template, operations in document()["paths"].items()
    ]


@cache
def strict() -> dict[str, Any]:
    """Return the document, by which no object has other fields than those that it names."""
    found = deepcopy(document())
    for schema in found["components"]["schemas"].values():
        schema["additionalProperties"] = False
    return found
