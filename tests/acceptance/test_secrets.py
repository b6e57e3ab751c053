"""Secrets stay where they are used: none is in a record, a file of the log, a log line or a metric.

Bodies, query strings and headers are in the records, and nowhere else.
"""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gateway.log.base import Partition
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import LogPlace
from tests.gateway_process import GatewayProcess, free_ports
from tests.load import post
from tests.sink import Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = """
version: 1
sources:
  signed: {{verify: {{scheme: github, secrets: ["secret-of-signed"]}}}}
  header: {{quarantine: true, verify: {{scheme: token, header: X-Token, secrets: ["secret-of-header"]}}}}
  query: {{quarantine: true, verify: {{scheme: token, query: key, secrets: ["secret-of-query"]}}}}
  bearer: {{quarantine: true, verify: {{scheme: bearer, secrets: ["secret-of-bearer"]}}}}
destinations:
  failing:
    url: "{failing}/secret-of-url"
    headers: {{X-Api-Key: secret-of-headers}}
    auth: {{bearer: {{token: secret-of-auth}}}}
    sign: {{secrets: ["whsec_c2VjcmV0LW9mLXNpZ24tYW5kLWl0cy1rZXk="]}}
  refusing:
    url: "{refusing}/secret-of-url"
    auth: {{basic: {{username: gateway, password: secret-of-basic}}}}
routes:
  - name: all
    from: [signed, header, query, bearer]
    to: [failing, refusing]
    retry: {{schedule: [5s], jitter: 0, results: {{connect: dead_letter}}}}
"""
SECRETS = (b"secret-of-", b"secret-guessed", b"c2VjcmV0", b"Z2F0ZXdheTpzZWNyZXQ")
"""What each is known by, as it stands in the rules, or base64 as it goes over the wire."""
KNOWN = (
    ("header", "X-Token: secret-of-header"),
    ("bearer", "Authorization: Bearer secret-of-bearer"),
    ("query?key=secret-of-query&page=2", "Cookie: session=secret-of-cookie"),
)


def a_post(where: str, header: str) -> bytes:
    return f"POST /in/{where} HTTP/1.1\r\nHost: gateway.test\r\n{header}\r\nContent-Length: 2\r\n\r\n{{}}".encode()


async def test_no_secret_is_in_a_record_a_log_line_or_a_metric(place: LogPlace, folder: Path) -> None:
    def script(request: Request) -> int:
        return 503 if request.header("gateway-attempt") == "1" else 200

    async with AsyncExitStack() as stack:
        failing = await stack.enter_async_context(Sink(script))
        [refused] = free_ports(1)
        rules = RULES.format(failing=failing.url, refusing=f"http://127.0.0.1:{refused}")
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        await stack.enter_async_context(gateway)
        for where, header in KNOWN:
            assert (await post(gateway.port, a_post(where, header)))[0] == 202
            guessed = a_post(where, header).replace(b"secret-of", b"secret-guessed")
            assert (await post(gateway.port, guessed))[0] == 401
        await gateway.until("gateway_deliveries_total", 3, outcome="delivered", timeout=20)
        await gateway.until("gateway_deliveries_total", 3, outcome="dead_lettered", timeout=20)
        await gateway.until("gateway_quarantined_total", 3, outcome="kept", timeout=20)
        used = failing.requests[0]
        metrics = await gateway.scrape()
        assert await gateway.stop() == 0

    assert used.target.endswith("/secret-of-url"), "they were in use"
    assert (used.header("x-api-key"), used.header("authorization")) == ("secret-of-headers", "Bearer secret-of-auth")
    assert used.header("webhook-signature")
    records = await everything(place)
    assert len(records) >= 3 + 3 + 3 + 3, "events, retries, dead letters, refused requests"
    told = {"records": b"\n".join(records), "log lines": gateway.output.read_bytes(), "metrics": metrics.encode()}
    if not place.is_kafka:
        told["files"] = content(folder, "gateway.db*")
    found = {(where, secret) for where, text in told.items() for secret in SECRETS if secret in text}
    assert found == set()


BODY = b'{"note": "body-of-somebody", "n": "%d"}'
PRIVATE = (b"body-of-somebody", b"query-of-somebody", b"value-of-a-header")


async def test_no_body_query_string_or_header_is_in_a_log_line_or_a_metric(place: LogPlace, folder: Path) -> None:
    """Whatever becomes of them: refused, not JSON, too large, delivered, retried, dead by a bad expression."""
    async with Sink(503, 200) as failing, Sink(404) as refusing:
        rules = LOUD.format(failing=failing.url, refusing=refusing.url)
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        async with gateway:
            for number, (source, status) in enumerate((("open", 202), ("closed", 401), ("nobody", 404))):
                assert (await post(gateway.port, a_private_post(source, BODY % number)))[0] == status
            assert (await post(gateway.port, a_private_post("open", b"body-of-somebody, not JSON")))[0] == 202
            assert (await post(gateway.port, a_private_post("open", b"body-of-somebody" * 70_000)))[0] == 413
            await gateway.until("gateway_deliveries_total", 2, outcome="delivered", timeout=20)
            await gateway.until("gateway_dead_letters_total", 1, reason="expression_error", timeout=20)
            metrics = await gateway.scrape()
            assert await gateway.stop() == 0
        assert any(b"body-of-somebody" in request.body for request in failing.requests), "they were in use"
    output = gateway.output.read_bytes()
    assert output.count(b'"request_finished"') == 5
    told = {"log lines": output, "metrics": metrics.encode()}
    assert {(where, text) for where, page in told.items() for text in PRIVATE if text in page} == set()


LOUD = """
version: 1
sources:
  open: {{verify: {{scheme: none}}}}
  closed: {{verify: {{scheme: github, secrets: ["secret-of-closed"]}}}}
destinations:
  failing: {{url: "{failing}?token=query-of-somebody"}}
  refusing: {{url: "{refusing}?token=query-of-somebody"}}
routes:
  - {{name: all, from: open, to: [failing], retry: {{schedule: [100ms], jitter: 0}}}}
  - {{name: strict, from: open, when: "int(body.note) > 0", to: [refusing]}}
"""


def a_private_post(source: str, body: bytes) -> bytes:
    head = f"POST /in/{source}?page=query-of-somebody HTTP/1.1\r\nHost: gateway.test\r\nX-Note: value-of-a-header\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def content(folder: Path, pattern: str) -> bytes:
    return b"".join([file.read_bytes() for file in folder.glob(pattern)])


async def everything(place: LogPlace) -> list[bytes]:
    """Return every record of the gateway's topics, with its headers."""
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    found = []
    try:
        for topic in sorted(await log.topics()):
            if not topic.startswith(Topics(place.prefix).prefix):
                continue
            for number, (start, end) in (await log.bounds(topic)).items():
                async for records in log.scan(Partition(topic, number), start, end):
                    found += [repr(record).encode() for record in records]
    finally:
        await log.close()
    return found
