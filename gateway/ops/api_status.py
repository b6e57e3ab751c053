"""What the API tells as the status, as the findings that the log and processes would have given."""

from collections.abc import Sequence
from typing import NamedTuple

from yarl import URL

from gateway.ops.api_answers import Answer, time_of
from gateway.ops.api_client import ApiClient
from gateway.ops.api_dead_letters import attempt_of
from gateway.ops.findings import KINDS, Finding
from gateway.ops.waiting_deliveries import AttemptInfo


class ToldStatus(NamedTuple):
    """What was found, the worst first; `left_out` is how many more there are, `notes` what wasn't looked at."""

    found: Sequence[Finding]
    attempts: Sequence[AttemptInfo]
    is_all_seen: bool
    left_out: int
    notes: Sequence[str]


async def told_status(client: ApiClient, destination: str | None) -> ToldStatus:
    """Return what keeps deliveries from going out, as a process tells it."""
    answer = await client.get("status", destination=destination)
    where = URL(client.url).authority
    return ToldStatus(
        found=[_finding(item, where) for item in answer["items"]],
        attempts=[_attempt(item) for item in answer["attempts"]],
        is_all_seen=answer["is_all_seen"],
        left_out=answer["left_out"],
        notes=answer["notes"],
    )


def _finding(item: Answer, where: str) -> Finding:
    return Finding(
        rank=KINDS.index(item["kind"]) if item["kind"] in KINDS else len(KINDS),
        what=item["what"],
        why=item["why"],
        needs_attention=item["needs_attention"],
        since=None if item["since"] is None else time_of(item["since"]),
        until=None if item["until"] is None else time_of(item["until"]),
        is_due=item["is_due"],
        by=where if item["is_own"] else item["by"] or "",
        next=tuple(item["steps"]),
        count=item["count"],
        source=item["source"] or "",
        route=item["route"] or "",
        destination=item["destination"] or "",
    )


def _attempt(item: Answer) -> AttemptInfo:
    return AttemptInfo(
        delivery_id=item["delivery_id"],
        event_id=item["event_id"],
        source=item["source"],
        route=item["route"],
        attempt=attempt_of(item),
    )
