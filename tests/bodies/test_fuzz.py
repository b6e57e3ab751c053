"""Each decoder given what nearly fits: it reads it within its bounds, or raises its one error.

`make test` draws some hundred inputs; for ten minutes of one decoder, each time others:

    GATEWAY_FUZZ_SECONDS=600 .venv/bin/python -m pytest tests/bodies/test_fuzz.py -q -s -k decompression
"""

import gzip
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.bodies.codings import MAX_CONTENT
from gateway.bodies.content import read
from gateway.model import UnreadableBodyError
from gateway.telemetry.metrics import REJECTIONS
from tests.bodies.test_codings import raw_deflate
from tests.bodies.test_content import documented
from tests.bodies.test_forms import BOUNDARY, TYPE, a_form, part
from tests.bodies.test_xml import TYPES

SECONDS = float(os.environ.get("GATEWAY_FUZZ_SECONDS", "0"))
pytestmark = pytest.mark.timeout(SECONDS + 120)
MAX_DEPTH = 1100  # orjson's 1024, in a field of a form; of XML a hundred
MOST_SECONDS = 0.5  # of processor time, for inputs of some kilobytes


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a decoder is given: a seed and pieces of which others are made, and the two fields that say what it is."""

    seeds: Sequence[bytes]
    pieces: Sequence[bytes]
    content_types: Sequence[str]
    codings: Sequence[str] = ("",)
    packings: Sequence[Callable[[bytes], bytes]] = (bytes,)
    """What the input goes through before it is damaged again."""


def gzipped(content: bytes) -> bytes:
    """Compress without the time, which Hypothesis couldn't draw again."""
    return gzip.compress(content, mtime=0)


JSON = b'{"a": [1, "x", null, {"b": 1.5}]}'
TARGETS = {
    "form": Target(
        seeds=[
            *[body for _, body, _ in documented("application/x-www-form-urlencoded")],
            b"payload=%5B1%5D&mandrill_events=%7B&payload=1",
            b"a=%C3%A9&=&&b",
        ],
        pieces=[b"&", b"=", b"%", b"+", b"%2", b"%00", b"%ff", b"payload=%7B%7D", b"&" * 300, b"%41" * 300, b"\xc3"],
        content_types=["application/x-www-form-urlencoded"],
    ),
    "multipart": Target(
        seeds=[
            *[body.replace(b"xYzZY", BOUNDARY.encode()) for _, body, _ in documented("multipart/form-data")],
            a_form(part("x"), part(JSON, 'Content-Disposition: form-data; name="j"', "Content-Type: application/json")),
            a_form(part(b"\0", "Content-Disposition: form-data; name=a; filename*=UTF-8''%C3%A9")),
        ],
        pieces=[b"\r\n", b"--", b"\r\n--" + BOUNDARY.encode(), b'"', b"\\", b";", b"name=", b"filename=", b"charset=",
                b"utf-16", b"\r\n ", b": ", part("y"), b"--" + BOUNDARY.encode() + b"--", b"\n", b"%22", b"\xff"],
        content_types=[TYPE, f'multipart/form-data; boundary="{BOUNDARY}"', "multipart/form-data; boundary=-"],
    ),
    "xml": Target(
        seeds=[
            *[body for _, body, _ in documented("text/xml")],
            *[text.encode() for text in TYPES.values() if len(text) < 1000],
            "<?xml version='1.0' encoding='utf-16'?><a b='é'>&amp;<c/></a>".encode("utf-16"),
            b"<a><![CDATA[x]]><!-- c --><?p i?>&#65;</a>",
        ],
        pieces=[b"<", b">", b"</", b"/>", b"<a>", b"</a>", b"&", b";", b"<!--", b"-->", b"<![CDATA[", b"]]>", b"<?",
                b"?>", b"<!DOCTYPE a [", b"<!ENTITY b 'c'>", b"&b;", b" a='1'", b" xmlns:p='u'", b"p:", b"\0",
                b"\xff\xfe", b"<a>" * 60, b"encoding='utf-7'", b"encoding='latin-1'", b"\xc3\xa9"],
        content_types=["text/xml", "application/xml; charset=iso-8859-1", "a/b+xml; charset=x", "text/xml; charset"],
    ),
    "decompression": Target(
        seeds=[JSON, b"", b"[" + b"0," * 2000 + b"0]", b"\0" * (MAX_CONTENT // 64)],
        pieces=[b"\0", b"\xff", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", b"\x78\x9c", b"\0\0\0\xff\xff", b"\x03\0",
                gzipped(JSON)],
        content_types=["application/json"],
        codings=["gzip", "deflate", "x-gzip", "gzip, gzip", "deflate, gzip", "gzip,deflate,gzip", "br", "identity"],
        packings=[gzipped, zlib.compress, raw_deflate, lambda raw: gzipped(gzipped(raw)),
                  lambda raw: zlib.compress(raw, 0), lambda raw: gzipped(zlib.compress(raw))],
    ),
}  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[bytes], pieces: Sequence[bytes]) -> bytes:
    """Draw a body that is changed in a few places: bytes, pieces put in, parts left out, repeated or moved."""
    body = bytearray(draw(bodies))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(body)))
        end = min(len(body), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["byte", "piece", "cut", "repeat", "move", "end"])):
            case "byte" if at < len(body):
                body[at] = draw(st.integers(0, 255))
            case "piece":
                body[at:at] = draw(st.sampled_from(pieces))
            case "cut":
                del body[at:end]
            case "repeat":
                body[at:at] = body[at:end] * draw(st.integers(1, 9))
            case "move":
                to = draw(st.integers(0, len(body)))
                body[to:to] = body[at:end]
            case _:
                del body[at:]
    return bytes(body)


def bodies_for(target: Target) -> st.SearchStrategy[bytes]:
    pieces = st.lists(st.sampled_from(target.pieces), max_size=12).map(b"".join)
    plain = damaged(st.sampled_from(target.seeds) | pieces | st.binary(max_size=60), target.pieces)
    packed = st.tuples(st.sampled_from(target.packings), plain).map(lambda drawn: drawn[0](drawn[1]))
    return packed | damaged(packed, target.pieces) | plain


def check(body: bytes, coding: str, content_type: str) -> None:
    began = time.thread_time()
    try:
        value = read(body, coding, content_type)
    except UnreadableBodyError as error:
        assert error.status in {400, 413, 415}  # noqa: PT017 - an expected end
        assert error.reason in REJECTIONS  # noqa: PT017 - an expected end
        assert len(error.detail) <= 80  # noqa: PT017 - otherwise a dead letter doesn't show it
    else:
        assert _values(value) <= MAX_CONTENT
        assert _depth(value) <= MAX_DEPTH
    assert time.thread_time() - began < MOST_SECONDS


def _values(value: Any) -> int:
    """Count values; each text is one that can be written."""
    match value:
        case dict():
            return 1 + sum(_values(each) + _values(name) for name, each in value.items())
        case list():
            return 1 + sum(_values(each) for each in value)
        case str():
            assert orjson.loads(orjson.dumps(value)) == value
            return 1
        case _:
            return 1


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_the_documented_error_comes_of_any_body(name: str) -> None:
    target = TARGETS[name]
    count = 0

    @settings(
        max_examples=1000 if SECONDS else 200,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(bodies_for(target), st.sampled_from(target.codings), st.sampled_from(target.content_types))
    def fuzz(body: bytes, coding: str, content_type: str) -> None:
        nonlocal count
        count += 1
        check(body, coding, content_type)

    end = time.monotonic() + SECONDS
    fuzz()
    while time.monotonic() < end:
        fuzz()
    if SECONDS:
        print(f"{name}: {count:,} inputs")  # noqa: T201 - what ten minutes came to
