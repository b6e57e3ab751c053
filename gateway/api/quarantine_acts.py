"""Refused requests that are verified again by the active rules, and admitted if they pass: at once, not by a command.

That is `gateway rejected retry`, in this process: what was admitted isn't admitted twice, whoever tries, and however
often. So a key keeps the first answer, and without one a second try finds what the first has left.
"""

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass

from gateway.access.principal import Principal
from gateway.api.acts import SENT, Sent
from gateway.api.backend import Backend, must_be_available
from gateway.api.command_shapes import Reason
from gateway.api.json_shapes import ShapeError, read_shape
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.visibility import sees_source
from gateway.ops.audit import Actor
from gateway.ops.control_client import ControlClient
from gateway.ops.key_documents import opened_client
from gateway.ops.keyed_requests import KeyedRequest
from gateway.ops.rejected import RejectedFilter
from gateway.ops.rejected_retry import RejectedCommand, Report
from gateway.rules.rules import Rules, Source

SECONDS = 20.0
"""For which it is tried: a quarantine that takes longer is for the command."""
WAIT = 5.0
"""Seconds to wait for another command that works on the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRefused:
    """Why refused requests are verified again; with `dry_run`, it is only told what would become of them."""

    dry_run: bool = False
    reason: Reason = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriedRefused:
    """What became of a source's refused requests: each is counted once.

    `present` were in the log already; `handshakes` are awaited by nobody any more; `still_refused` are by reason.
    `incomplete` can't be verified again, by what wasn't kept of them; `elsewhere` were resolved by another command
    meanwhile. `left` weren't looked at, as `problem` says.
    """

    is_dry: bool
    admitted: int
    present: int
    handshakes: int
    still_refused: Mapping[str, int]
    incomplete: Mapping[str, int]
    unreadable: int
    elsewhere: int
    left: int
    problem: str | None


async def retry_refused(
    backend: Backend, principal: Principal, *, name: str, given: RetryRefused, sent: Sent = SENT
) -> RetriedRefused:
    """Verify a source's refused requests again, by the secrets in the rules, and admit those that pass."""
    asked = ("retry refused", name, given)
    request = None if sent.key is None else KeyedRequest.of(principal.identity, sent.key, asked)
    if request is not None and (known := await _known(backend, request)) is not None:
        return known  # whatever has become of the rules since
    rules = backend.rules()
    source = rules.sources.get(name)
    if source is None or not sees_source(principal, rules, name):
        raise not_found("a source")
    if backend.are_rules_bare:
        why = f"expected a process that has the secrets of source {name}, got one without"
        raise ApiError(Code.CONFLICT, f"{why}: `gateway rejected retry {name}`, where they are")
    if backend.retrying.locked():
        raise ApiError(Code.BUSY, "another of these is in progress: try again")
    actor = Actor.of(principal, sent.origin)
    async with backend.retrying:
        if request is not None and (known := await _known(backend, request)) is not None:
            return known
        command = RejectedCommand(backend.log, backend.topics, wait=WAIT, why=given.reason or "", actor=actor)
        async with must_be_available(2 * SECONDS):
            report = await _bounded(_retried(command, rules, source, is_dry=given.dry_run), name)
            answer = _answer(report, is_dry=given.dry_run)
            if request is not None:
                client = ControlClient(backend.log, backend.topics, actor=actor)
                await client.note(request.answered(asdict(answer), backend.log.now()))
    return answer


async def _bounded(retrying: Awaitable[Report], name: str) -> Report:
    try:
        async with asyncio.timeout(SECONDS):
            return await retrying
    except TimeoutError:
        told_so = f"it wasn't done within {SECONDS:g} s: what was admitted isn't admitted twice"
        raise ApiError(Code.CONFLICT, f"{told_so}; `gateway rejected retry {name}` takes as long as it needs") from None


async def _known(backend: Backend, request: KeyedRequest) -> RetriedRefused | None:
    async with must_be_available():
        known = (await backend.answers()).to(request, now=backend.log.now())
    if known is None:
        return None
    if known.is_of_another:
        raise ApiError(Code.KEY_REUSED, "Idempotency-Key: it was used for another request")
    try:
        return read_shape(RetriedRefused, known.answer)
    except ShapeError as error:
        raise ApiError(Code.CONFLICT, "Idempotency-Key: a newer version has stored its answer") from error


async def _retried(command: RejectedCommand, rules: Rules, source: Source, *, is_dry: bool) -> Report:
    which = RejectedFilter()
    if not source.verifier.fetches_keys:
        return await command.retry(source, which, dry_run=is_dry)
    async with opened_client(rules) as client:
        return await command.retry(source, which, fetch=client.fetch, dry_run=is_dry)


def _answer(report: Report, *, is_dry: bool) -> RetriedRefused:
    return RetriedRefused(
        is_dry=is_dry,
        admitted=report.admitted,
        present=report.present,
        handshakes=report.handshakes,
        still_refused=dict(report.refused),
        incomplete={why.value: number for why, number in report.missing.items()},
        unreadable=report.unreadable,
        elsewhere=report.elsewhere,
        left=report.left,
        problem=report.problem or None,
    )
