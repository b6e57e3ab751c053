"""The algorithms of signatures over shared secrets: which candidates they look at, and which of them match.

Signatures are compared in constant time, in their encoded form: an expected signature has one spelling, so that no
changed byte passes. The keys are all compared, whichever matches: how long that takes doesn't tell.
"""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.model import UsageError
from gateway.verify.content import Content
from gateway.verify.key_ring import KeyEntry, KeyRing

Message = Callable[[bytes], bytes]
"""Returns the signed string; its argument is the secret, for strings that contain it."""


class Algorithm(Protocol):
    """An algorithm with its keys."""

    @property
    def name(self) -> str:
        """What it is called, for people."""

    @property
    def form(self) -> str:
        """What a candidate looks like, for people."""

    def fits(self, candidate: bytes) -> bool:
        """Return whether a string could be one of its signatures."""

    def match(self, candidates: Sequence[bytes], message: Message, content: Content) -> KeyEntry[Any] | None:
        """Return the first key with which any candidate is a signature of the message; None if it is with none."""

    def sign(self, message: Message, now: float) -> bytes:
        """Return the signature with the first key that verifies now. Raises UsageError if there is none here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hmac:
    """An HMAC (RFC 2104)."""

    algorithm: str
    encode: Callable[[bytes], bytes]
    keys: KeyRing[bytes]
    length: int

    @property
    def name(self) -> str:
        return self.algorithm

    @property
    def form(self) -> str:
        return f"{self.length} characters"

    def fits(self, candidate: bytes) -> bool:
        return len(candidate) == self.length

    def match(self, candidates: Sequence[bytes], message: Message, content: Content) -> KeyEntry[bytes] | None:
        return self.match_string(candidates, message(b""), content)

    def match_string(self, candidates: Sequence[bytes], signed: bytes, content: Content) -> KeyEntry[bytes] | None:
        """Do what `match` does, with the message itself: on the path of most events."""
        keys = self.keys
        matched: KeyEntry[bytes] | None = None
        for entry in keys.entries if keys.never_expires else keys.at(content.now):
            expected = self._signature(entry.key, signed, content)
            is_matched = False
            for candidate in candidates:  # all of them: the time taken doesn't depend on which one matches
                is_matched |= hmac.compare_digest(candidate, expected)
            if is_matched:
                matched = matched or entry
        return matched

    def sign(self, message: Message, now: float) -> bytes:
        return self.encode(hmac.digest(self.keys.first(now), message(b""), self.algorithm))

    def _signature(self, key: bytes, message: bytes, content: Content) -> bytes:
        for *made, digest in content.digests:
            if made == [key, self.algorithm, message]:
                return self.encode(digest)
        digest = hmac.digest(key, message, self.algorithm)
        content.digests.append((key, self.algorithm, message, digest))
        return self.encode(digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hash:
    """A hash of a string that contains the secret."""

    algorithm: str
    encode: Callable[[bytes], bytes]
    secrets: KeyRing[bytes]
    length: int

    @property
    def name(self) -> str:
        return f"{self.algorithm} hash"

    @property
    def form(self) -> str:
        return f"{self.length} characters"

    def fits(self, candidate: bytes) -> bool:
        return len(candidate) == self.length

    def match(self, candidates: Sequence[bytes], message: Message, content: Content) -> KeyEntry[bytes] | None:
        matched: KeyEntry[bytes] | None = None
        for entry in self.secrets.at(content.now):
            if _any_is(self._signature(message(entry.key)), candidates):
                matched = matched or entry
        return matched

    def sign(self, message: Message, now: float) -> bytes:
        return self._signature(message(self.secrets.first(now)))

    def _signature(self, message: bytes) -> bytes:
        return self.encode(hashlib.new(self.algorithm, message, usedforsecurity=False).digest())


class OfSenderAloneError(UsageError):
    """A test event can't be signed, since only the sender has the key."""

    def __init__(self, advice: str = "") -> None:
        expected = "a test event for this source: expected a secret, but only the sender has the private key"
        super().__init__(expected + advice)


def _any_is(expected: bytes, candidates: Sequence[bytes]) -> bool:
    """Compare with all of them: the time taken doesn't depend on which one matches."""
    is_matched = False
    for candidate in candidates:
        is_matched |= hmac.compare_digest(candidate, expected)
    return is_matched
