"""Requests that others have signed, one JSON file for each provider in `vectors/`.

made_by     who made the signature: "stripe 12.0.1 (PyPI)", or the address of the published vector
now         Unix seconds at which it is fresh
config      keys of `verify:` beside the scheme: the secrets, and what else the preset takes
public_url  the address that the sender was given, where it is signed
method      POST if absent
path, query
headers     pairs of name and value, those that the provider sends
body        text, or body_base64
documents   what is at the addresses of keys that must be fetched
covers      what the signature vouches for: "body" if absent; "fields" of the body alone; or "nothing" (a credential)
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from gateway.verify.remote_keys import KeyCache
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from gateway.verify.verifier import Verifier

FOLDER = Path(__file__).parent / "vectors"


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A request that was signed by somebody else, and what verifies it."""

    scheme: str
    made_by: str
    now: float
    config: Mapping[str, Any]
    request: Request
    public_url: str | None = None
    covers: str = "body"
    documents: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> KeyCache:
        """What was fetched from those addresses, just now."""
        return cache_of(self.documents, self.now)

    @override
    def __str__(self) -> str:
        return self.scheme

    def verifier(self, **config: object) -> Verifier:
        return build_verifier({"scheme": self.scheme, **self.config, **config}, public_url=self.public_url)


def cache_of(documents: Mapping[str, str], now: float) -> KeyCache:
    """Return a cache with what was fetched just now."""
    keys = KeyCache()
    for url, document in documents.items():
        keys.keep(url, document.encode(), now)
    return keys


def vectors() -> Iterator[Vector]:
    """Return the vectors of all providers; a file has one or a list of them."""
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        for entry in found if isinstance(found, list) else [found]:
            yield _vector(path.stem, entry)


def _vector(scheme: str, entry: dict[str, Any]) -> Vector:
    body = base64.b64decode(entry["body_base64"]) if "body_base64" in entry else entry["body"].encode()
    request = Request(
        method=entry.get("method", "POST"),
        path=entry.get("path", f"/in/{scheme}"),
        query=entry.get("query", ""),
        headers=tuple((name.encode(), value.encode()) for name, value in entry["headers"]),
        body=body,
    )
    return Vector(
        scheme=scheme,
        made_by=entry["made_by"],
        now=entry["now"],
        config=entry["config"],
        request=request,
        public_url=entry.get("public_url"),
        covers=entry.get("covers", "body"),
        documents=entry.get("documents", {}),
    )
