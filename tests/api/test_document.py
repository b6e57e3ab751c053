"""The document of the API is that of its handlers, and of the file that is committed."""

from inspect import Parameter as Argument
from inspect import signature
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from structlog.testing import capture_logs

from dev import openapi
from gateway.access.principal import AccessRole
from gateway.api.backend import Backend
from gateway.api.endpoint import Endpoint
from gateway.api.endpoints import BASE, ENDPOINTS
from gateway.api.openapi import OWN, document
from gateway.api.problems import STATUSES, Code
from tests.api.answers import problems_of
from tests.api.conftest import World

EACH = pytest.mark.parametrize("endpoint", ENDPOINTS, ids=[each.name for each in ENDPOINTS])


def test_the_committed_document_is_that_of_the_endpoints() -> None:
    assert openapi.DOCUMENT.read_text() == openapi.text(), "run `python -m dev.openapi`"


def test_each_schema_is_one_of_json_schema() -> None:
    for schema in document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for each in document()["paths"].values() for operation in each.values()]
    assert len(names) == len(set(names)) == len(ENDPOINTS) + 1


@EACH
def test_a_function_takes_what_its_endpoint_says(endpoint: Endpoint) -> None:
    arguments = [each for each in signature(endpoint.run).parameters.values() if each.kind is Argument.KEYWORD_ONLY]
    expected = [each.name for each in endpoint.parameters] + ([] if endpoint.body is None else ["given"])
    expected += ["sent"] if endpoint.method == "POST" and endpoint.role is AccessRole.OPERATOR else []
    assert sorted(each.name for each in arguments) == sorted(expected)
    in_path = {each.name for each in endpoint.parameters if each.place == "path"}
    assert in_path == set(endpoint.path.replace("}", "{").split("{")[1::2])
    assert all(endpoint.is_required(each) == (each.place == "path") for each in endpoint.parameters)
    assert endpoint.about


async def test_every_route_is_of_the_document(world: World) -> None:
    assert world.client.app is not None
    served = {
        (route.method, route.resource.canonical.removeprefix(BASE))
        for route in world.client.app.router.routes()
        if route.resource is not None and route.method != "*"
    }
    told = {(method.upper(), path) for path, its in document()["paths"].items() for method in its}
    assert served == told


async def test_it_is_served_as_it_is(world: World) -> None:
    assert await world.get(OWN) == document()


def test_each_problem_has_its_status() -> None:
    assert STATUSES.keys() == set(Code)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"name": "a", "role": "viewer", "owners": None, "sources": None, "via": "x"}, None),
        ({"name": "a", "role": "viewer", "owners": None, "sources": None}, "'via' is a required property"),
        ({"name": "a", "role": "boss", "owners": None, "sources": None, "via": "x"}, "is not one of"),
        ({"name": 1, "role": "viewer", "owners": [], "sources": None, "via": "x"}, "not of type 'string'"),
        ({"name": "a", "role": "viewer", "owners": [], "sources": [], "via": "x", "more": 1}, "not allowed"),
    ],
)
def test_an_answer_that_isnt_as_the_document_says_is_found(answer: dict[str, Any], problem: str | None) -> None:
    found = problems_of("GET", "/me", 200, "application/json", answer)
    assert (found == []) if problem is None else (problem in found[0])


def _longest(schema: dict[str, Any], shapes: dict[str, Any]) -> int:
    """Return how many bytes a value has at most, by a program that escapes all but ASCII."""
    if "$ref" in schema:
        its = shapes[schema["$ref"].rpartition("/")[2]]["properties"]
        return 2 + sum([len(name) + 6 + _longest(each, shapes) for name, each in its.items()])
    if "anyOf" in schema:
        return max(_longest(each, shapes) for each in schema["anyOf"])
    if "enum" in schema:
        return 2 + max(map(len, schema["enum"]))
    match schema["type"]:
        case "array":
            return 2 + int(schema["maxItems"]) * (2 + _longest(schema["items"], shapes))
        case "string" | ["string", "null"]:
            # Of ASCII only a quote and a backslash have to be escaped; an emoji is written as two of \\ud83d.
            return 2 + int(schema["maxLength"]) * (2 if schema.get("pattern", "").startswith("^[") else 12)
        case _:
            return 25


@pytest.mark.parametrize("endpoint", [each for each in ENDPOINTS if each.body is not None], ids=lambda each: each.name)
def test_no_valid_body_is_too_large(endpoint: Endpoint) -> None:
    """But for what is to be explained, where three limits together would be far more than anybody needs."""
    operation = document()["paths"][endpoint.path]["post"]
    body, shapes = operation["requestBody"], document()["components"]["schemas"]
    assert body["x-max-bytes"] == endpoint.body_bytes
    if endpoint.name != "explain":
        needed = _longest(body["content"]["application/json"]["schema"], shapes)
        assert needed <= endpoint.body_bytes <= 128 << 10, needed


ROLES = (None, *AccessRole)
"""None: nobody who may."""


@pytest.mark.parametrize("role", ROLES, ids=str)
async def test_each_role_at_each_endpoint(world: World, role: AccessRole | None) -> None:
    """Who may not is told so before anything is looked at; who may gets past that, wherever it ends then."""
    for endpoint in ENDPOINTS:
        await _check_role(world, endpoint, role)


async def _check_role(world: World, endpoint: Endpoint, role: AccessRole | None) -> None:
    world.become(role)
    path = endpoint.path
    for parameter in endpoint.parameters:
        path = path.replace(f"{{{parameter.name}}}", "nothing")
    headers = {"Host": "gateway.example"} if role is None else {}
    body: dict[str, object] | None = None if endpoint.body is None else {}
    async with world.client.request(endpoint.method, f"{BASE}{path}", headers=headers, json=body) as response:
        problem = await response.json() if response.status >= 400 else {}
    if role is None:
        assert (response.status, problem["code"]) == (401, "unauthenticated")
        assert "WWW-Authenticate" in response.headers
    elif role.covers(endpoint.role):
        assert response.status not in (401, 403, 500)
    else:
        assert (response.status, problem["code"]) == (403, "forbidden")
        assert problem["detail"] == f"expected the role {endpoint.role}, got {role}"


EXPECTED = {
    AccessRole.VIEWER: {
        *(
            "getMe",
            "searchEvents",
            "getEvent",
            "listDeliveries",
            "listWaiting",
            "searchDeliveries",
            "listDeadLetters",
            "getDeadLetter",
            "listSources",
        ),
        *("getSource", "listDestinations", "getDestination", "listRoutes", "getRoute", "getRules", "getIndex"),
        "getTraffic",
        *("getCommand", "listReplays", "getReplay", "tailEvents", "listRedeliveries", "getRedelivery"),
        *("listFindings", "listSpools", "getStatus", "getRefused", "getRuleFile"),
    },
    AccessRole.READER: {
        *("getEventBody", "getEventRaw", "getEventTest", "getAttempt", "explain", "exportEvent", "explainEvent"),
        *("countReplay", "getEventRoutes"),
    },
    AccessRole.OPERATOR: {
        *("pauseRoute", "resumeRoute", "kickRoute", "pauseDestination", "resumeDestination", "kickDestination"),
        *("replayDeadLetters", "dropDeadLetters", "startReplay", "cancelReplay", "redeliverEvent"),
        *("cancelRedelivery", "listAudit"),
        "retryRefused",
    },
}


def test_the_least_role_of_each_endpoint() -> None:
    """Written down a second time: who lowers a role does so twice."""
    assert {role: {each.name for each in ENDPOINTS if each.role is role} for role in AccessRole} == EXPECTED


async def test_what_changes_something_is_no_get() -> None:
    acts = {each.name for each in ENDPOINTS if each.method != "GET"} - {"explain", "countReplay"}
    assert acts == EXPECTED[AccessRole.OPERATOR] - {"listAudit"}


@pytest.mark.parametrize("path", [OWN, "/nothing", "/me", "/events/evt_1/nothing", "/"])
async def test_nobody_learns_what_there_is(world: World, path: str) -> None:
    headers = {"Host": "gateway.example"}
    assert (await world.ask("GET", path, 401, headers=headers))["code"] == "unauthenticated"
    headers = {"Origin": "https://evil.example"}
    assert (await world.ask("GET", path, 403, headers=headers))["code"] == "forbidden"
    async with world.client.get(f"{BASE}{path}", headers=headers) as response:
        assert not [name for name in response.headers if name.lower().startswith("access-control-")]


async def test_another_method_is_told_which_there_are(world: World) -> None:
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        async with world.client.request(method, f"{BASE}/me") as response:
            assert (response.status, response.headers["Allow"]) == (405, "GET")
    assert (await world.get("/nothing", 404))["code"] == "not_found"


async def test_a_bug_is_one_requests_alone_and_tells_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise KeyError(b"secret".decode())

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(Backend, "control", fail)
        problem = await world.get("/routes", 500)
    assert problem["detail"] == "a bug of the gateway: its log has more"
    assert [(line["event"], line["operation"]) for line in lines] == [("api_failed", "listRoutes")]
    assert "'secret'" not in str(lines)
    await world.get("/routes")


async def test_too_many_requests_at_a_time_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.application.AT_A_TIME", 0)
    assert (await world.get("/me", 503))["code"] == "busy"
