"""The test receiver of `gateway receive`."""

import asyncio
import base64
import gzip
import hmac
import io
import json
from dataclasses import replace
from datetime import UTC, datetime

import aiohttp
import pytest
from rich.console import Console
from standardwebhooks import Webhook

from gateway.ops.receiver import Received, Receiver
from gateway.verify.schemes import build_verifier

SECRET = base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OTHER = "whsec_" + base64.b64encode(b"x" * 32).decode()
HEADERS = {
    "gateway-event-id": "evt_1",
    "gateway-delivery-id": "dlv_1",
    "gateway-route": "build",
    "gateway-attempt": "2",
}


@pytest.fixture(autouse=True)
def presets_are_read() -> None:
    """Read now what would block the loop of the test that happens to run first."""
    build_verifier({"scheme": "standard-webhooks", "secrets": [OTHER]})


def signed(body: str, *, at: datetime | None = None) -> dict[str, str]:
    """Sign as the vendor's own library does."""
    at = at or datetime.now(UTC)
    signature = Webhook("whsec_" + SECRET).sign("dlv_1", at, body)
    return {"webhook-id": "dlv_1", "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": signature}


def signed_bytes(body: bytes) -> dict[str, str]:
    """Sign what is no text, which the vendor's library can't."""
    at = str(int(datetime.now(UTC).timestamp()))
    code = hmac.digest(base64.b64decode(SECRET), f"dlv_1.{at}.".encode() + body, "sha256")
    return {
        "webhook-id": "dlv_1",
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(code).decode()}",
    }


async def post(receiver: Receiver, body: bytes = b"{}", headers: dict[str, str] | None = None) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(receiver.url + "hook", data=io.BytesIO(body), headers=headers or {}) as response,
    ):
        return response.status


async def test_it_answers_by_script_and_the_last_answer_repeats() -> None:
    reports: list[Received] = []
    async with Receiver(respond=(503, 404, 200), report=reports.append) as receiver:
        assert [await post(receiver) for _ in range(4)] == [503, 404, 200, 200]
    assert [report.answer for report in reports] == [503, 404, 200, 200]


async def test_it_prints_the_request() -> None:
    reports: list[Received] = []
    async with Receiver(report=reports.append) as receiver:
        await post(receiver, b"x" * 2_000_000, HEADERS)
        await post(receiver, b"", {"gateway-attempt": "many"})
    first, second = reports
    assert (first.path, first.route, first.event, first.delivery) == ("/hook", "build", "evt_1", "dlv_1")
    assert (first.attempt, first.size, first.is_verified, first.answer) == (2, 2_000_000, None, 200)
    assert (second.route, second.event, second.attempt, second.size) == (None, None, None, 0)


async def test_a_compressed_body_is_counted_and_verified_as_it_came() -> None:
    reports: list[Received] = []
    whole = gzip.compress(b"{}" * 50)
    async with Receiver(report=reports.append, secrets=(SECRET,)) as receiver:
        for body in (whole, b"not gzip at all"):
            await post(receiver, body, {"Content-Encoding": "gzip", **signed_bytes(body)})
        await post(receiver, whole, {"Content-Encoding": "gzip", **signed("{}" * 50)})
    assert [(each.size, each.is_verified) for each in reports] == [(len(whole), True), (15, True), (len(whole), False)]


@pytest.mark.parametrize(
    ("changed", "body", "is_verified"),
    [
        ({}, b"{}", True),
        ({}, b"{ }", False),
        ({"webhook-id": "dlv_2"}, b"{}", False),
        ({"webhook-signature": "v1,AAAA {}"}, b"{}", True),
        ({"webhook-signature": "v1,AAAA"}, b"{}", False),
        ({"webhook-timestamp": "soon"}, b"{}", False),
    ],
)
async def test_it_verifies_as_a_receiver_should(changed: dict[str, str], body: bytes, *, is_verified: bool) -> None:
    headers = signed("{}")
    headers |= {name: value.replace("{}", headers[name]) for name, value in changed.items()}
    assert await verified(headers, body) is is_verified


async def test_a_request_that_is_old_or_not_signed_is_not_verified() -> None:
    assert not await verified(signed("{}", at=datetime(2020, 1, 1, tzinfo=UTC)), b"{}")
    assert not await verified({}, b"{}")


async def verified(headers: dict[str, str], body: bytes) -> bool | None:
    reports: list[Received] = []
    async with Receiver(report=reports.append, secrets=(OTHER, SECRET)) as receiver:
        await post(receiver, body, headers)
    return reports[0].is_verified


async def test_it_answers_late_on_demand() -> None:
    reports: list[Received] = []
    async with Receiver(delay=30.0, report=reports.append) as receiver:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await post(receiver)
    assert len(reports) == 1


async def test_a_port_in_use_is_reported() -> None:
    async with Receiver(report=print) as receiver:
        second = Receiver(port=receiver.port, report=print)
        with pytest.raises(OSError, match="in use"):
            await second.start()
        await second.close()


def test_a_line_has_it_all() -> None:
    received = Received(
        at=0.25,
        path="/hook",
        route="build",
        event="evt_1",
        delivery="dlv_1",
        attempt=2,
        is_verified=True,
        size=1234,
        answer=503,
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(received.as_text())
    line = capture.get()
    for part in (".250", "503", "✓", "build", "attempt 2", "1,234 B", "evt_1"):
        assert part in line
    assert line.count("\n") == 1
    assert json.loads(received.as_json())["attempt"] == 2


async def test_a_line_for_scripts_has_the_body_and_one_for_people_no_control_characters() -> None:
    reports: list[Received] = []
    async with Receiver(report=reports.append) as receiver:
        await post(receiver, b'{"n": 1}', HEADERS)
        await post(receiver, b"\xff")
    first, second = [json.loads(report.as_json()) for report in reports]
    assert (first["status"], first["verified"], first["event_id"], first["body"]) == (200, None, "evt_1", '{"n": 1}')
    assert second["body_base64"] == "/w=="
    assert "\x1b" not in replace(reports[1], path="/\x1b[2J").as_text().plain
