"""The ingress given what nearly is a request, over real connections: each gets its response, and none breaks it."""

import asyncio
import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import strategies as st

from gateway.ingress.server import Limits
from tests.fuzz.inputs import ENOUGH_TIME, damaged, fuzz
from tests.ingress.test_ingress import BAD_REQUESTS, CHUNKED, CRM, World, a_request, chunked, running, signed
from tests.ingress.test_proxy_protocol import LOCAL, UNIX, header

pytestmark = ENOUGH_TIME
LIMITS = Limits(head_seconds=0.1, body_seconds=0.1, opening_seconds=0.1)
MOST_SECONDS = 3.0  # from the last byte to the end of the connection; what takes longer hangs
AT_ONCE = 16
MOST_MEMORY = 8 << 20  # bytes for as many requests: a head has at most 64 KiB, and a body that is drawn less
STATUSES = {
    b"100",
    b"200",
    b"202",
    b"400",
    b"401",
    b"404",
    b"405",
    b"408",
    b"411",
    b"413",
    b"415",
    b"417",
    b"431",
    b"501",
}
SEEDS = [
    *[data for data, _, _ in BAD_REQUESTS.values()],
    signed("github"),
    signed("standard"),
    signed("slack"),
    a_request("/in/crm?a=b", CRM),
    a_request("/in/open", CHUNKED, body=chunked(b'{"a":', b"1}")),
    a_request("/in/open", "Expect: 100-continue"),
    a_request("/in/open", "Connection: close") + a_request(),
    a_request() * 3,
    a_request("/healthz", method="GET", body=b""),
]
PIECES = [
    *b"POST GET HEAD OPTIONS CONNECT / /in/open /in/graph?validationToken=x http://x/in/open *".split(),
    *[b"HTTP/1.1", b"HTTP/1.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"],
    *[b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b"\0", b"\x80", b"\xff", b"?", b"#", b"%", b"%0d%0a"],
    b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Content-Length: +5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: gzip\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Connection: keep-alive, close\r\n", b"Expect: 100-continue\r\n",
    b"Expect: x\r\n", b"Host: x\r\n", b"X: " + b"x" * 9000 + b"\r\n", b"X: y\r\n" * 130, b"0\r\n\r\n", b"5\r\n",
    b"5;a=b\r\n", b"fffffffff\r\n", b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\n",
]  # fmt: skip


async def exchange(world: World, parts: Sequence[bytes]) -> bytes | None:
    """Send parts with a moment between them, and return what comes up to a response or the end; None without either."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    received = b""
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(MOST_SECONDS):
            while b"\r\n\r\n" not in re.sub(rb"^HTTP/1.1 100 Continue\r\n\r\n", b"", received):
                data = await reader.read(65536)
                if not data:
                    break
                received += data
    except ConnectionError:  # a reset
        pass
    except TimeoutError:
        return None
    finally:
        writer.close()
    return received


async def check(world: World, drawn: Sequence[Sequence[bytes]], *, may_be_silent: bool) -> None:
    """Send all at once, each on its own connection, and a good request after them."""
    lines = len(world.lines)
    for parts, received in zip(drawn, await asyncio.gather(*[exchange(world, parts) for parts in drawn]), strict=True):
        assert isinstance(received, bytes), parts
        found = re.findall(rb"^HTTP/\d\.\d (\d{3}) [^\r\n]*\r\n", received, re.MULTILINE)
        # What comes after the response resets the connection, and takes away a response that wasn't read yet.
        assert found or (not received and (may_be_silent or len(parts) > 1)), parts
        assert set(found) <= STATUSES, (found, parts)
    began = time.monotonic()
    assert (await world.exchange(a_request("/in/crm", CRM))).status == 202
    assert time.monotonic() - began < 1
    until = time.monotonic() + 1
    while world.ingress._memory.free != world.ingress._memory._total:
        assert time.monotonic() < until, "memory for a body that nobody has"
        await asyncio.sleep(0)
    assert not [line for line in world.lines[lines:] if line["log_level"] == "error"]
    del world.lines[:]
    world.log.stored.clear()


@st.composite
def in_parts(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> list[bytes]:
    """Draw an input that comes at once, or in up to four parts."""
    data = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


REQUESTS = damaged(st.sampled_from(SEEDS), PIECES).map(lambda data: b"P" + data[1:])  # not nothing but line ends
HEADERS = damaged(
    st.sampled_from([header(), header("2001:db8::7"), header(more=b"\x04\0\x05hello"), LOCAL, UNIX]),
    [b"\0", b"\xff", b"PROXY TCP4 ", b"\r\n", header()[:12], b"\x21\x11\x00\x0c", b"\x21\x11\xff\xff"],
)


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of a large representation
@pytest.mark.parametrize("has_header", [False, True], ids=["requests", "proxy_headers"])
def test_whatever_comes_is_responded_to_and_nothing_breaks(*, has_header: bool) -> None:
    """A connection without a PROXY header, where there has to be one, is closed without a word."""
    # A header may take what follows for its own, up to 1,008 bytes; without any, a connection would be idle.
    whole = st.tuples(HEADERS, REQUESTS, st.just(b"X" * 1100)).map(b"".join) if has_header else REQUESTS
    with asyncio.Runner() as runner:
        context = running(limits=LIMITS, proxies=["127.0.0.0/8"] if has_header else [])
        world = runner.run(context.__aenter__())
        good = header() if has_header else b""
        original = world.exchange
        world.exchange = lambda data: original(good + data)  # type: ignore[method-assign] # each needs the header
        try:
            fuzz(
                "PROXY headers" if has_header else "requests",
                st.lists(in_parts(whole), min_size=AT_ONCE, max_size=AT_ONCE),
                lambda drawn: runner.run(check(world, drawn, may_be_silent=has_header)),
                most_memory=MOST_MEMORY,
                examples=20,
                is_slow=True,
            )
        finally:
            runner.run(context.__aexit__(None, None, None))
