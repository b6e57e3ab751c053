"""Who has done what: written to `gateway.audit` before it is done, and again with what came of it.

    begin ──▶ the act ──▶ record_outcome: accepted ──▶ record_outcome: done, cancelled …   each a record of the act
      └─ can't be written: nothing is done

A kill between the two leaves an act of which nothing more is known than that it was about to be done.
"""

import getpass
import os
import secrets
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace

import structlog

from gateway.access.principal import Principal
from gateway.log.audit_records import ActOutcome, AuditRecord, decode_audit_record, encode_audit_record
from gateway.log.base import Log, Partition
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError, RecordTooLargeError, UnreadableRecordError, immutable
from gateway.ops.log_search import Found, newest_first

logger = structlog.get_logger(__name__)
COMMAND = "command"
"""How it is known who runs a command: this machine says so, and whoever has an account there may say anything."""
LOOPBACK = "loopback"
"""As little is known of who is on this machine and asks its admin address."""


@immutable
class Actor:
    """Who does something, how that is known, and from where; `is_proven`: they had to prove it."""

    who: str
    via: str
    origin: str
    is_proven: bool

    @classmethod
    def of_command(cls) -> "Actor":
        """Return who runs this command, as far as this machine knows."""
        name = who()
        return cls(who=name, via=COMMAND, origin=name.rpartition("@")[2], is_proven=False)

    @classmethod
    def of(cls, principal: Principal, origin: str) -> "Actor":
        """Return who makes a request, from an address."""
        is_proven = principal.via != LOOPBACK
        return cls(who=principal.name, via=principal.via, origin=origin, is_proven=is_proven)


def who() -> str:
    """Return who runs this command, as far as this machine knows: "user@host"."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Auditor:
    """Writes what one actor does, for one reason."""

    def __init__(self, log: Log, topics: Topics, actor: Actor, why: str = "") -> None:
        self._log = log
        self._topics = topics
        self.actor = actor
        self._why = why

    async def begin(self, what: str, on: str) -> AuditRecord:
        """Write that something is about to be done, and return it. Raises LogUnavailableError: then it must not be."""
        act = AuditRecord(
            id=f"act_{secrets.token_hex(16)}",
            at=self._log.now(),
            who=self.actor.who,
            via=self.actor.via,
            is_proven=self.actor.is_proven,
            origin=self.actor.origin,
            what=what,
            on=on,
            why=self._why,
        )
        try:
            await self._append(act)
        except LogUnavailableError as error:
            told = f"{what} {on}: not done, as it can't be recorded who does it: {error}"
            raise type(error)(f"{told}{await self._advice()}") from error
        return act

    async def record_outcome(self, act: AuditRecord, outcome: ActOutcome, detail: str = "") -> None:
        """Write what came of it; if that fails, a log line says so: it is done all the same."""
        try:
            await self._append(replace(act, at=self._log.now(), outcome=outcome, detail=detail))
        except (LogUnavailableError, RecordTooLargeError) as error:
            logger.warning("audit_record_failed", act=act.id, outcome=outcome, error=str(error))

    async def _advice(self) -> str:
        """Return what helps if the topic is missing, as it is where an older version has set the log up."""
        with suppress(LogUnavailableError):
            if self._topics.audit not in await self._log.topics():
                return "; `gateway topics create` creates it, and in an embedded log a gateway of this version does"
        return ""

    async def _append(self, act: AuditRecord) -> None:
        record = encode_audit_record(act)
        await self._log.append(self._topics.audit, key=record.key, value=record.value, headers=record.headers)


@immutable
class Act:
    """Something that was done, or was about to be: its first record, and what has come of it."""

    record: AuditRecord
    outcome: ActOutcome
    detail: str
    ended_at: float | None
    """When that was known; None if nothing is."""


@immutable
class UnreadableAct:
    """A record that can't be read, where it is, when it was stored, and why."""

    position: str
    at: float
    problem: str


async def read_acts(
    log: Log, topics: Topics, *, since: float | None = None, unread: dict[Partition, str] | None = None
) -> AsyncGenerator[Act | UnreadableAct, None]:
    """Yield what was done, newest first, with what came of it; with `since` (Unix seconds) what began from then on.

    What can't be read is among it. With `unread`, unreadable partitions are recorded there, with the reason.
    """
    acts = Acts()
    async with aclosing(newest_first(log, [topics.audit], since=since, unread=unread)) as history:
        async for found in history:
            if (act := acts.of(found)) is not None:
                yield act


class Acts:
    """Makes acts of their records, which come newest first: so what came of one is known before it."""

    def __init__(self) -> None:
        self._outcomes: dict[str, AuditRecord] = {}

    def of(self, found: Found) -> Act | UnreadableAct | None:
        """Return the act that a record begins, None for one of what came of it."""
        try:
            record = decode_audit_record(found.record)
        except UnreadableRecordError as error:
            return UnreadableAct(position=found.position, at=found.record.appended_at, problem=str(error))
        if record.outcome is not ActOutcome.BEGUN:
            self._outcomes.setdefault(record.id, record)  # the last one, as it is read first
            return None
        last = self._outcomes.pop(record.id, None)
        return Act(
            record=record,
            outcome=record.outcome if last is None else last.outcome,
            detail="" if last is None else last.detail,
            ended_at=None if last is None else last.at,
        )


def is_by(act: Act | UnreadableAct, name: str) -> bool:
    """Return whether somebody has done it: ada@laptop, or ada on any host."""
    if isinstance(act, UnreadableAct):
        return False
    who = act.record.who
    return name in (who, who.rpartition("@")[0])
