"""The recipes of the documentation, from a signed request to what their destinations get, as their tests say."""

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.client.request import Outbound
from gateway.ops.rule_tests import request_differences
from gateway.ops.send import Sender, sign, source_of
from gateway.rules.load import load_rules
from gateway.rules.request_templates import Method
from gateway.rules.rule_tests import ExpectedRequest, RuleTest, read_tests
from tests.acceptance.conftest import LogPlace
from tests.gateway_process import GatewayProcess
from tests.sink import Answer, Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

FOLDER = Path(__file__).parents[2] / "docs/recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WEBHOOKS = ("SLACK_WEBHOOK", "DISCORD_WEBHOOK", "TEAMS_WORKFLOW")
AS_WRITTEN = ("PAGERDUTY_KEY", "POSTMARK_TOKEN")
"""Their tests expect the reference itself: with this value it is that."""
KEYED = ("ACCOUNTS_SECRET", "WAREHOUSE_SECRET")
TOKEN = "/oauth2/token"
HOST = re.compile(r"https://([a-z.]+\.example|events\.pagerduty\.com|api\.postmarkapp\.com)")


def environ_of(text: str, sink: str) -> dict[str, str]:
    """Return values for the references of a recipe."""
    found = dict.fromkeys(re.findall(r"\$\{([A-Z_]+)\}", text), "only-for-this-test-0123456789abcdef")
    found |= {name: f"{sink}/webhook" for name in WEBHOOKS if name in found}
    found |= {name: f"${{{name}}}" for name in AS_WRITTEN if name in found}
    found |= dict.fromkeys([name for name in KEYED if name in found], "whsec_" + "QUJD" * 8)
    return found


def answer(request: Request) -> Answer:
    if not request.target.endswith(TOKEN):
        return Answer()
    token = json.dumps({"access_token": "t", "token_type": "Bearer", "expires_in": 3600}).encode()
    return Answer(headers=(("Content-Type", "application/json"),), body=token)


async def delivered(sink: Sink, count: int) -> list[Request]:
    """Wait for so many requests that aren't for a token, and return them."""
    while True:
        found = [each for each in sink.requests if not each.target.endswith(TOKEN)]
        if len(found) >= count:
            return found
        await sink.received(len(sink.requests) + 1)


def outbound_of(request: Request) -> Outbound:
    """Return what arrived as it was composed, for the host that the recipe has."""
    host, _, path = request.target.removeprefix("/").partition("/")
    return Outbound(
        url=f"https://{host}/{path}",
        headers=request.headers,
        body=request.body,
        method=Method(request.method),
    )


def expected_of(test: RuleTest, routes: tuple[str, ...]) -> Iterator[ExpectedRequest]:
    told = {request.route: request for request in test.requests}
    for route in routes:
        yield told.get(route) or ExpectedRequest(route=route, to=None, fields={})


@pytest.mark.rotated
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
async def test_a_recipe_does_what_its_tests_say(
    path: Path, embedded_place: LogPlace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = await asyncio.to_thread(path.read_text)
    async with Sink(answer, path="") as sink:
        local, _, _ = HOST.sub(rf"{sink.url}/\1", text).partition("\ntests:")
        local = local.replace("quiet: 30s", "quiet: 1s")
        environ = environ_of(text, sink.url)
        for name, value in environ.items():
            monkeypatch.setitem(os.environ, name, value)
        gateway = GatewayProcess(folder, rules=local, log=embedded_place.url, environ=environ)
        rules = await asyncio.to_thread(load_rules, gateway.rules)
        tests, _ = await asyncio.to_thread(read_tests, [path], [])
        count = 0
        async with gateway, Sender() as sender:
            for number, test in enumerate(tests):
                assert test.routes is not None
                await send(sender, gateway, test, number)
                count += len(test.routes)
                got = (await delivered(sink, count))[count - len(test.routes) :]
                mine = {each.header("gateway-route"): each for each in got}
                assert mine.keys() == set(test.routes)
                for expected in expected_of(test, test.routes):
                    found = mine[expected.route]
                    fields = dict(expected.fields)
                    if found.target == "/webhook":
                        fields.pop("url", None)
                    wanted = ExpectedRequest(route=expected.route, to=expected.to, fields=fields)
                    assert list(request_differences(expected.route, wanted, outbound_of(found))) == []
        assert {route for test in tests for route in test.routes or ()} == set(rules.routes)


async def send(sender: Sender, gateway: GatewayProcess, test: RuleTest, number: int) -> None:
    event = test.event
    source, verifier = await asyncio.to_thread(source_of, gateway.rules, event.source, secret=None)
    headers = {name.decode(): value.decode() for name, value in event.headers}
    request = sign(
        source,
        verifier,
        url=f"http://127.0.0.1:{gateway.port}",
        body=event.body,
        id=f"id-{number}",
        type=headers.get("x-github-event", "test"),
        headers=headers,
        now=time.time(),
    )
    response = await sender.send(request)
    assert response.status in {200, 202}, (test.name, response)
