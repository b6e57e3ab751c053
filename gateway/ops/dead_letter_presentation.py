"""How commands show dead letters: as JSON fields for scripts, as text for people."""

from dataclasses import asdict

from gateway.log.records import encode_record_metadata
from gateway.ops.dead_letters import DeadLetter, Group, ListedLetter, result_of
from gateway.ops.output import Output, body_fields, body_text, header_text, rfc3339, when
from gateway.ops.presentation import Row, event_content, print_event, print_fields

NO_DESTINATION = "no destination"


def _aim(route: str, destination: str, item: int | None) -> str:
    of_item = "" if item is None else f", item {item}"
    return f"{route} → {destination or NO_DESTINATION}{of_item}"


def letter_fields(letter: ListedLetter) -> dict[str, object]:
    fields: dict[str, object] = {
        "at": rfc3339(letter.at),
        "status": letter.status,
        "reason": letter.reason,
        "topic": letter.partition.topic,
        "partition": letter.partition.number,
        "offset": letter.offset,
    }
    if letter.delivery_id is None:
        return fields | {"detail": letter.detail, "attempts": 0}
    return fields | {
        "delivery_id": letter.delivery_id,
        "event_id": letter.event_id,
        "source": letter.source,
        "type": letter.type,
        "route": letter.route,
        "destination": letter.destination,
        **({} if letter.item is None else {"item": letter.item}),
        "detail": letter.detail,
        "attempts": letter.attempts,
        "last_result": letter.last_result if letter.attempts else None,
        "owner": letter.owner or None,
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


def letter_row(letter: ListedLetter, *, with_status: bool) -> Row:
    what, attempts, result = f"{letter.position}: {letter.detail}", "", ""
    if letter.delivery_id is not None:
        result = letter.last_result
        aim = _aim(letter.route, letter.destination, letter.item)
        what, attempts = f"{aim}\n{letter.delivery_id}\n{letter.event_id}", str(letter.attempts)
    cells = {
        "when": when(letter.at).replace(" ", "\n"),
        "route → destination, delivery, event": what,
        "reason": letter.reason,
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
            "route": _aim(
                delivery.route, delivery.destination, None if delivery.part is None else delivery.part.number
            ),
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
