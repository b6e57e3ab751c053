"""The vendors' own libraries as judges of our verification: each module in `vendors/` is about one provider.

A module is named as the preset (`-` is `_`) and has the following; both functions import the library when they run:

    PACKAGE                     the library and where it is from: "stripe (PyPI)"
    sign(draw)                  returns a request that the library has signed, as a Signed; or, if it only verifies:
    unsigned(draw)              returns a request for us to sign, with the headers that the sender adds beside
    accepts(request, signed)    returns whether the library accepts it, with the secrets and at the time of `signed`

Where only the vendor can sign, `sign` does so with a key that it makes, and `accepts` is the library's opinion of it.

`draw` is a `random.Random`: bodies, secrets and times are drawn anew in each run. Run with `make oracles`, which prints
the seed that repeats it.
"""

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.verify.request import Request


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A signed request, and the keys of `verify:` that accept it."""

    config: Mapping[str, Any]
    headers: Mapping[str, str]
    body: bytes
    now: float
    method: str = "POST"
    path: str = "/in/it"
    query: str = ""
    public_url: str | None = None
    covers: str = "body"
    documents: Mapping[str, str] = field(default_factory=dict)
    """What is at the addresses of keys that must be fetched."""

    @property
    def request(self) -> Request:
        headers = tuple((name.encode(), value.encode()) for name, value in self.headers.items())
        return Request(method=self.method, path=self.path, query=self.query, headers=headers, body=self.body)


def texts(request: Request) -> dict[str, str]:
    """Return the headers as libraries take them, their names in lower case."""
    return {name.decode().lower(): value.decode("latin-1") for name, value in request.headers}


def a_secret(draw: random.Random, length: int = 32) -> str:
    return "".join(draw.choices(string.ascii_letters + string.digits, k=length))


def a_time(draw: random.Random) -> float:
    return float(draw.randrange(1_600_000_000, 1_900_000_000))


def a_body(draw: random.Random, **fields: object) -> bytes:
    """Return a JSON body with the given fields and others, of some sizes, with characters of all planes."""
    text = "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xA1, 0x2FF), 0x1F600])) for _ in range(9))
    more = {
        f"k{n}": draw.choice([text, draw.randrange(10**9), True, None, [text]]) for n in range(draw.choice([0, 3, 40]))
    }
    return orjson.dumps({**fields, **more})
