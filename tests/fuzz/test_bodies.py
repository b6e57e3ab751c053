"""Each decoder of bodies given what nearly fits: it reads it within its bounds, or raises its one error."""

import gzip
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import strategies as st

from gateway.bodies.codings import MAX_CONTENT
from gateway.bodies.content import read
from gateway.model import UnreadableBodyError
from gateway.telemetry.metrics import REJECTIONS
from tests.bodies.test_codings import raw_deflate
from tests.bodies.test_content import documented
from tests.bodies.test_forms import BOUNDARY, TYPE, a_form, part
from tests.bodies.test_xml import TYPES
from tests.fuzz.inputs import ENOUGH_TIME, damaged, fuzz, made_of, took

pytestmark = ENOUGH_TIME
MAX_DEPTH = 1100  # orjson's 1024, in a field of a form; of XML a hundred
MOST_SECONDS = 0.5  # of processor time, for inputs of some kilobytes
MOST_MEMORY = 8 * MAX_CONTENT  # bytes for one of them: decompressed, and as values


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


def bodies_for(target: Target) -> st.SearchStrategy[bytes]:
    plain = made_of(target.seeds, target.pieces)
    packed = st.tuples(st.sampled_from(target.packings), plain).map(lambda drawn: drawn[0](drawn[1]))
    return packed | damaged(packed, target.pieces) | plain


def check(drawn: tuple[bytes, str, str]) -> None:
    body, coding, content_type = drawn
    began = time.thread_time()
    try:
        value = read(body, coding, content_type)
    except UnreadableBodyError as error:
        assert error.status in {400, 413, 415}
        assert error.reason in REJECTIONS
        assert len(error.detail) <= 80  # otherwise a dead letter doesn't show it
    else:
        assert _values(value) <= MAX_CONTENT
        assert _depth(value) <= MAX_DEPTH
    assert took(began) < MOST_SECONDS


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
    fuzz(
        name,
        st.tuples(bodies_for(target), st.sampled_from(target.codings), st.sampled_from(target.content_types)),
        check,
        most_memory=MOST_MEMORY,
    )
