"""How commands show dead letters: as JSON fields for scripts, as text for people."""

from dataclasses import asdict

from gateway.log.records import encode_record_metadata
from gateway.model import Delivery
from gateway.ops.dead_letters import DeadLetter, Group, result_of
from gateway.ops.output import Output, body_fields, body_text, header_text, rfc3339, when
from gateway.ops.presentation import Row, event_content, print_event, print_fields

NO_DESTINATION = "no destination"


def _aim(delivery: Delivery) -> str:
    item = "" if delivery.part is None else f", item {delivery.part.number}"
    return f"{delivery.route} → {delivery.destination or NO_DESTINATION}{item}"


def letter_fields(letter: DeadLetter) -> dict[str, object]:
    fields: dict[str, object] = {
        "at": rfc3339(letter.properties.at),
        "status": letter.status,
        "reason": letter.properties.reason,
        "topic": letter.partition.topic,
        "partition": letter.partition.number,
        "offset": letter.record.offset,
    }
    if letter.decoded is None:
        return fields | {"detail": letter.problem, "attempts": 0}
    delivery = letter.decoded.delivery
    last = delivery.attempts[-1] if delivery.attempts else None
    return fields | {
        "delivery_id": delivery.id,
        "event_id": delivery.event.id,
        "source": delivery.event.source,
        "type": delivery.event.type,
        "route": delivery.route,
        "destination": delivery.destination,
        **({} if delivery.part is None else {"item": delivery.part.number}),
        "detail": letter.decoded.metadata.detail,
        "attempts": last.number if last else 0,
        "last_result": letter.last_result if last else None,
        "owner": letter.decoded.metadata.owner or None,
    }


def letter_content(letter: DeadLetter) -> dict[str, object]:
    if letter.decoded is None:
        headers = [[name, header_text(value)] for name, value in letter.record.headers]
        return {"record_headers": headers, **body_fields(letter.record.value)}
    delivery, event = letter.decoded.delivery, letter.decoded.delivery.event
    return {
        "key": event.key,
        "received_at": rfc3339(event.received_at),
        "metadata": encode_record_metadata(letter.decoded.metadata),
        "attempts": [asdict(attempt) | {"at": rfc3339(attempt.at)} for attempt in delivery.attempts],
        **event_content(event),
    }


def letter_row(letter: DeadLetter, *, with_status: bool) -> Row:
    what, attempts, result = f"{letter.position}: {letter.problem}", "", ""
    if letter.decoded is not None:
        delivery, result = letter.decoded.delivery, letter.last_result
        what = f"{_aim(delivery)}\n{delivery.id}\n{delivery.event.id}"
        attempts = str(delivery.attempts[-1].number if delivery.attempts else 0)
    cells = {
        "when": when(letter.properties.at).replace(" ", "\n"),
        "route → destination, delivery, event": what,
        "reason": letter.properties.reason,
        "attempts": attempts,
        "last result": result,
    }
    return cells | ({"status": letter.status} if with_status else {})


def group_row(group: Group) -> Row:
    return {
        "count": f"{group.count:,}",
        "reason": group.reason,
        "last result": group.last_result,
        "route → destination": f"{group.route} → {group.destination or NO_DESTINATION}" if group.route else "",
        "oldest": when(group.oldest),
        "newest": when(group.newest),
    }


def print_letter(output: Output, letter: DeadLetter) -> None:
    if letter.decoded is None:
        output.print(("dead letter ", "bold"), letter.position)
        print_fields(
            output, {"reason": f"{letter.properties.reason}: {letter.problem}", "written": when(letter.properties.at)}
        )
        for name, value in letter.record.headers:
            output.print((f"  {name}: ", "dim"), header_text(value))
        output.print()
        output.block(body_text(letter.record.value))
        return
    delivery, metadata = letter.decoded.delivery, encode_record_metadata(letter.decoded.metadata)
    reason, detail = metadata.pop("dead_reason", ""), metadata.pop("detail", "")
    output.print(("dead letter ", "bold"), delivery.id)
    resolved_at = f", {when(letter.resolved_by.at)}" if letter.resolved_by else ""
    print_fields(
        output,
        {
            "route": _aim(delivery),
            "reason": f"{reason}: {detail}" if detail else reason,
            "written": when(letter.properties.at),
            "status": letter.status + resolved_at,
            **{name.replace("_", " "): value for name, value in metadata.items()},
        },
    )
    rows = [
        (str(attempt.number), when(attempt.at), f"{attempt.seconds:.3f}", result_of(attempt))
        for attempt in delivery.attempts
    ]
    if rows:
        output.print()
        output.table(["attempt", "at", "seconds", "result"], rows, right=("attempt", "seconds"))
    output.print()
    print_event(output, delivery.event, f"{letter.partition.topic}/{letter.position}")
