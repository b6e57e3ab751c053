"""The OpenAPI document of the API, made of the table of endpoints and their shapes. Pure."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from gateway.api.acts import KEY_PATTERN, LONGEST_KEY
from gateway.api.endpoint import BYTES, Endpoint, Parameter
from gateway.api.endpoints import BASE, ENDPOINTS
from gateway.api.event_stream import EVENT_STREAM
from gateway.api.json_shapes import SCHEMAS, object_schema, schema_of, shapes_in
from gateway.api.problems import STATUSES, Code, Problem
from gateway.model import DISTRIBUTION

PROBLEM = "application/problem+json"
JSON = "application/json"
OWN = "/openapi.json"
"""Where the document itself is."""
ANY = (Code.INVALID_REQUEST, Code.UNAUTHENTICATED, Code.FORBIDDEN, Code.TOO_MANY_REQUESTS, Code.BUG, Code.BUSY)
"""What any request may meet."""
KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Of the client's making, another for each command: asked again with it, within a day, a command is "
    "given once, and answered alike. Best a UUID, as a string of RFC 9651, in double quotes.",
    "schema": {"type": "string", "pattern": KEY_PATTERN, "maxLength": LONGEST_KEY},
    "example": '"8e03978e-40d5-43dd-bc93-6894a57f9324"',
}
LAST_EVENT: dict[str, Any] = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The last id that was sent: what follows it is sent.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}
WITH_BODY = (Code.TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE)


def document(endpoints: Iterable[Endpoint] = ENDPOINTS) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1, whose schemas are JSON Schema's)."""
    table = tuple(endpoints)
    paths: dict[str, dict[str, Any]] = {OWN: {"get": _own()}}
    for endpoint in table:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": DISTRIBUTION,
            "version": "1",
            "description": "What operators see and do, at the admin address of a process. docs/api.md explains it.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": BASE}],
        "security": [{}, {"token": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(_schemas(table).items())),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Of `gateway token new`; without one, only who is on this machine is let in.",
                }
            },
        },
    }


def _schemas(table: Iterable[Endpoint]) -> dict[str, Any]:
    written, read = {Problem}, set[Any]()
    for endpoint in table:
        written.update(shapes_in(endpoint.answer))
        read.update(() if endpoint.body is None else shapes_in(endpoint.body))
    shapes = [*[(shape, False) for shape in written], *[(shape, True) for shape in read - written]]
    return {shape.__name__: object_schema(shape, is_read=is_read) for shape, is_read in shapes}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    codes = [*ANY, *endpoint.codes, *(() if endpoint.body is None else WITH_BODY)]
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.about,
        "tags": [endpoint.tag],
        "x-role": endpoint.role.value,
    }
    parameters = [_parameter(endpoint, each) for each in endpoint.parameters]
    if endpoint.answer == EVENT_STREAM:
        parameters.append(LAST_EVENT)
    if endpoint.is_keyed:
        parameters.append(KEY)
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        operation["requestBody"] = {
            "description": f"At most {endpoint.body_bytes:,} bytes: a larger one is refused with 413.",
            "required": True,
            "content": {JSON: {"schema": schema_of(endpoint.body)}},
            "x-max-bytes": endpoint.body_bytes,
        }
    operation["responses"] = _responses(endpoint.status, _content(endpoint.answer), codes)
    return operation


def _own() -> dict[str, Any]:
    return {
        "operationId": "getOpenApi",
        "summary": "Return this document",
        "tags": ["access"],
        "x-role": "viewer",
        "responses": _responses(200, {JSON: {"schema": {"type": "object"}}}, ANY),
    }


def _parameter(endpoint: Endpoint, parameter: Parameter) -> dict[str, Any]:
    schema = schema_of(parameter.kind)
    if (default := endpoint.default(parameter)) is not None:
        schema["default"] = default
    if parameter.place == "path":
        schema["minLength"] = 1
    found: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.place,
        "required": endpoint.is_required(parameter),
        "description": parameter.about,
        "schema": schema,
    }
    if parameter.example is not None:
        found["example"] = parameter.example
    return found


def _content(answer: Any) -> dict[str, Any]:  # noqa: ANN401 - a shape, or BYTES
    if answer == EVENT_STREAM:
        return {EVENT_STREAM: {"schema": {"type": "string"}}}
    return {BYTES: {}} if answer == BYTES else {JSON: {"schema": schema_of(answer)}}


def _responses(status: int, content: Mapping[str, Any], codes: Iterable[Code]) -> dict[str, Any]:
    responses: dict[str, Any] = {str(status): {"description": HTTPStatus(status).phrase, "content": content}}
    by_status: dict[int, list[Code]] = {}
    for code in dict.fromkeys(codes):
        by_status.setdefault(STATUSES[code], []).append(code)
    for number, its in sorted(by_status.items()):
        responses[str(number)] = {
            "description": f"{HTTPStatus(number).phrase}: {', '.join(its)}",
            "content": {PROBLEM: {"schema": {"$ref": f"{SCHEMAS}{Problem.__name__}"}}},
        }
    return responses
