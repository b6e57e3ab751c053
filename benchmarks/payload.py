"""A push of 2 kB as GitHub sends it: the body's shape, the whole set of headers, the signature.

Each has a commit of its own, `after`, by which a destination knows it whatever becomes of its headers, and some text.

https://docs.github.com/en/webhooks/webhook-events-and-payloads#push
"""

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Sequence

SECRET = "It's a Secret to Everybody"  # From GitHub's documentation.
REPOSITORY = "acme/shop"
BODY_BYTES = 2048
COMMIT = "6113728f27ae82c7b1a177c8d03f9e96e0adf246"
OWN = "~" * 256
"""Where each body has digits of its own: a batch of bodies that differ in nothing would compress to almost nothing."""


def _body() -> bytes:
    author = {"name": "Mona Lisa", "email": "mona@acme.example", "username": "mona"}
    commit = {
        "id": COMMIT,
        "tree_id": "3a05b9f1f0b6a2c2fe58d5e1b6e0d29b3b1a2c77",
        "distinct": True,
        "message": "Round totals half to even",
        "timestamp": "2025-03-04T10:11:12+01:00",
        "url": f"https://github.example/{REPOSITORY}/commit/{COMMIT}",
        "author": author,
        "committer": author,
        "added": [],
        "removed": [],
        "modified": ["shop/cart/totals.py", "tests/cart/test_totals.py"],
    }
    push = {
        "ref": "refs/heads/main",
        "before": "95790bf891e76fee5e1747ab589903a6a1f80f22",
        "after": commit["id"],
        "repository": {
            "id": 186853002,
            "node_id": "MDEwOlJlcG9zaXRvcnkxODY4NTMwMDI=",
            "name": REPOSITORY.partition("/")[2],
            "full_name": REPOSITORY,
            "private": True,
            "owner": {"name": "acme", "login": "acme", "id": 21031067, "type": "Organization"},
            "html_url": f"https://github.example/{REPOSITORY}",
            "default_branch": "main",
        },
        "pusher": {"name": "mona", "email": "mona@acme.example"},
        "sender": {"login": "mona", "id": 21031068, "type": "User", "site_admin": False},
        "created": False,
        "deleted": False,
        "forced": False,
        "compare": f"https://github.example/{REPOSITORY}/compare/95790bf891e7...6113728f27ae",
        "commits": [commit],
        "head_commit": commit | {"message": ""},
    }
    missing = BODY_BYTES - len(json.dumps(push, separators=(",", ":"))) - len(OWN)
    push["head_commit"] = commit | {"message": (f"{commit['message']}, as the tax office does. " * 20)[:missing] + OWN}
    return json.dumps(push, separators=(",", ":")).encode()


BODY = _body()
_BEFORE, _, _REST = BODY.partition(COMMIT.encode())
_AFTER, _, _END = _REST.partition(OWN.encode())


class Pushes:
    """Requests as bytes, each with its own delivery id and its own commit. Their `types` take turns.

    Larger ones have a longer message, which compresses to a half as digits do.
    """

    def __init__(
        self, port: int, path: str = "/in/github", *, size: int = BODY_BYTES, types: Sequence[str] = ("push",)
    ) -> None:
        # These distinguish the events of this run from older ones in the log.
        self._run = secrets.token_hex(16)
        self._rest = f"-{secrets.token_hex(2)}-11ef-9a2b-{secrets.token_hex(6)}".encode()
        self._after = _AFTER.replace(b'"message":"', b'"message":"' + _digits(size - BODY_BYTES), 1)
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: GitHub-Hookshot/044aadd\r\n"
            f"Content-Length: {size}\r\nAccept: */*\r\nContent-Type: application/json\r\nX-GitHub-Delivery: "
        ).encode()
        self._tails = [
            (
                f"\r\nX-GitHub-Event: {name}\r\nX-GitHub-Hook-ID: 457826735\r\n"
                "X-GitHub-Hook-Installation-Target-ID: 186853002\r\n"
                "X-GitHub-Hook-Installation-Target-Type: repository\r\n"
                "X-Hub-Signature-256: sha256="
            ).encode()
            for name in types
        ]
        self._mac = hmac.new(SECRET.encode(), _BEFORE, hashlib.sha256)
        self._random = random.Random(0)
        self._sent = 0

    def next(self) -> tuple[bytes, bytes]:
        """Return a commit, and the request with it."""
        commit, rest = self._next()
        mac = self._mac.copy()
        mac.update(rest)
        identity = b"%08x%b" % (self._sent, self._rest)
        tail = self._tails[self._sent % len(self._tails)]
        head = b"%b%b%b%b\r\n\r\n" % (self._head, identity, tail, mac.hexdigest().encode())
        return commit, b"%b%b%b" % (head, _BEFORE, rest)

    def body(self) -> tuple[bytes, bytes]:
        """Return a commit, and the body alone."""
        commit, rest = self._next()
        return commit, _BEFORE + rest

    def _next(self) -> tuple[bytes, bytes]:
        self._sent += 1
        commit = f"{self._run}{self._sent:08x}".encode()
        own = self._random.randbytes(len(OWN) // 2).hex().encode()
        return commit, b"%b%b%b%b" % (commit, self._after, own, _END)


def _digits(count: int) -> bytes:
    return random.Random(count).randbytes(count // 2 + 1).hex()[:count].encode()
