"""Requests with an idempotency key: what was answered to each is in the log, so that whoever gets it again knows.

    checkpoint/request/NAME        what was asked under a key, and the answer

It is stored together with the command that it is about, so that there is neither without the other, and read by every
process: the answer is the same after a restart, and elsewhere. Versions that don't know such records ignore them.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass

import orjson

from gateway.engine.control.records import ControlRecord, Kind, decode
from gateway.engine.control.state import Control
from gateway.model import UnreadableRecordError

KEPT = 86400.0
"""Seconds for which the answer to a key is known: clients that try again do so within hours."""
FORGOTTEN_AT_ONCE = 50
"""Answers that are deleted with each new one, at most."""
_PREFIX = "request/"
_KEY = f"checkpoint/{_PREFIX}".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedRequest:
    """A request's key, as digests of whose it is and of what is asked.

    `name` is that of the answer, and `command` that of the command, where that may have any: what is asked is in that.
    """

    name: str
    command: str
    asked: str

    @classmethod
    def of(cls, who: str, key: str, asked: object) -> "KeyedRequest":
        name, what = _digest(f"{who}\0{key}"), _digest(repr(asked))
        return cls(name=name, command=_digest(f"{name}\0{what}"), asked=what)

    def answered(self, answer: dict[str, object], at: float) -> ControlRecord:
        """Return the record of an answer."""
        detail = orjson.dumps({"asked": self.asked, "answer": answer}).decode()
        return ControlRecord(kind="checkpoint", name=f"{_PREFIX}{self.name}", state="done", at=at, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What was answered under a key. `is_of_another`: to another request."""

    answer: dict[str, object]
    is_of_another: bool


class Answers:
    """The answers that the control records have."""

    def __init__(self) -> None:
        self._records: dict[str, ControlRecord] = {}

    def apply(self, key: bytes, value: bytes) -> None:
        """Take the next record of the control topic."""
        if not key.startswith(_KEY):
            return
        name = key.removeprefix(_KEY).decode("ascii", "replace")
        self._records.pop(name, None)
        with suppress(UnreadableRecordError):
            if (record := decode(key, value)).state != "deleted":
                self._records[name] = record

    def to(self, request: KeyedRequest, *, now: float) -> Known | None:
        """Return what was answered under a request's key; None if nothing was, or it is too long ago."""
        record = self._records.get(request.name)
        if record is None or record.at < now - KEPT:
            return None
        try:
            found = orjson.loads(record.detail)
            return Known(answer=dict(found["answer"]), is_of_another=found["asked"] != request.asked)
        except (ValueError, TypeError, KeyError):
            return None

    def forgotten(self, *, now: float) -> list[ControlRecord]:
        """Return the records that delete answers that nobody asks for any more: some at a time."""
        old = [record for record in self._records.values() if record.at < now - KEPT]
        return [record.with_state("deleted") for record in old[:FORGOTTEN_AT_ONCE]]


def place_of(control: Control, kind: Kind, name: str, *, now: float) -> tuple[str, ControlRecord | None]:
    """Return the name for the command of a key ("" without one), and the command that it names already, if it does.

    A command is known for weeks, and its answer for a day: a key that is used after that has a new command, whose name
    is another. A retry finds that one.
    """
    while name and (before := control.commands.get(f"{kind}/{name}")) is not None:
        if before.at >= now - KEPT:
            return name, before
        name = _digest(f"{name}\0{before.at!r}")
    return name, None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
