"""Batches given what nearly fits: what is split is what a JSON parser reads there, and the rest is refused."""

import json
import time
from collections.abc import Sequence

import pytest
from hypothesis import strategies as st

from gateway.model import RefusedError
from gateway.rules.batches import MAX_EVENTS, split
from tests.fuzz.inputs import ENOUGH_TIME, fuzz, made_of, took

pytestmark = ENOUGH_TIME
MOST_SECONDS = 0.5  # of processor time, for inputs of some kilobytes
MOST_MEMORY = 4 << 20  # bytes for one of them

SEEDS = [
    b'[{"id":"1"},{"id":"2"}]',
    b'{"x":{"records":[0]},"data":{"n":[],"records":[1.0, "a\\u00e9", null, [1,[2]], {"records":[3]}]}}',
    b'{"records":[1],"records":[2,{"a":1e400}]}',
    '\ufeff[{"é":"\\ud83d\\ude00"}]'.encode(),
    b"[" + b"0," * MAX_EVENTS + b"0]",
]
PIECES = [
    *rb'[ ] { } , : " \ "records": "data":{ [] {} 1e999 - NaN Infinity \ud800 \u0000 true nul'.split(),
    *[b"9" * 5000, b"0" * 20, b"[" * 1200, b'{"data":' * 1200, b"\xff", b"\0", b" \t\r\n", b"\x0b", b'"\n"'],
]
PATHS: Sequence[Sequence[str]] = [(), ("records",), ("data", "records"), ("",)]


def check(drawn: tuple[bytes, Sequence[str]]) -> None:
    body, path = drawn
    began = time.thread_time()
    try:
        items = split(body, path)
    except RefusedError as error:
        assert (error.status, error.reason) in {(400, "malformed_batch"), (413, "batch_too_large")}
        items = None
    assert took(began) < MOST_SECONDS
    if items is not None:
        assert len(items) <= MAX_EVENTS
        found = json.loads(b"[" + b",".join(items) + b"]")
        assert repr(found) == repr(_at(json.loads(body.decode("utf-8-sig")), path))  # NaN isn't equal to itself


def _at(value: object, path: Sequence[str]) -> object:
    for name in path:
        assert isinstance(value, dict)
        value = value[name]
    return value


def test_nothing_is_split_that_is_no_list() -> None:
    fuzz("batches", st.tuples(made_of(SEEDS, PIECES), st.sampled_from(PATHS)), check, most_memory=MOST_MEMORY)


@pytest.mark.parametrize("path", PATHS[:3])
def test_the_seeds_reach_their_lists(path: Sequence[str]) -> None:
    assert any(split(seed, path) for seed in SEEDS[:3])
