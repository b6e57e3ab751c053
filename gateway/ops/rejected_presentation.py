"""How commands show refused requests: as JSON fields for scripts, as text for people. Never with a credential."""

from gateway.ops.output import Output, body_fields, body_text, count, header_text, rfc3339, when
from gateway.ops.presentation import Row
from gateway.ops.rejected import Rejected, RejectedGroup, shown_body, shown_headers, shown_query
from gateway.ops.rejected_retry import Report
from gateway.quarantine.records import Missing, RequestOutcome

MISSING = {
    Missing.NOTHING: "",
    Missing.BODY: "too large to keep whole",
    Missing.CREDENTIAL: "its credential was too short to keep",
}
NOT_SHOWN = "(not shown: a credential is in it)"


def rejected_fields(rejected: Rejected) -> dict[str, object]:
    fields: dict[str, object] = {
        "position": rejected.position,
        "stored_at": rfc3339(rejected.record.appended_at),
        "status": rejected.status,
        "source": rejected.source,
        "reason": rejected.reason,
    }
    request = rejected.request
    if request is None:
        return fields | {"detail": rejected.problem}
    return fields | {
        "received_at": rfc3339(request.at),
        "address": request.address,
        "bytes": request.size,
        "missing": request.missing.value or None,
    }


def rejected_content(rejected: Rejected) -> dict[str, object]:
    request = rejected.request
    if request is None:
        return {}
    body = shown_body(request)
    return {
        "method": request.method,
        "path": request.path,
        "query": shown_query(request),
        "headers": [[header_text(name), header_text(value)] for name, value in shown_headers(request)],
        **({} if body is None else body_fields(body)),
    }


def rejected_row(rejected: Rejected, *, with_status: bool) -> Row:
    request = rejected.request
    cells = {
        "position": rejected.position,
        "when": when(rejected.record.appended_at if request is None else request.at),
        "source": rejected.source,
        "reason": rejected.reason,
        "from": "" if request is None else request.address,
        "bytes": "" if request is None else f"{request.size:,}",
        "": rejected.problem if request is None else MISSING[request.missing],
    }
    return cells | ({"status": rejected.status} if with_status else {})


def rejected_group_row(group: RejectedGroup) -> Row:
    missing = [
        f"{number:,} {'' if why is Missing.BODY else 'whose '}{_REST[why]}" for why, number in group.missing.items()
    ]
    return {
        "requests": f"{group.count:,}",
        "source": group.source,
        "reason": group.reason,
        "oldest": when(group.oldest),
        "newest": when(group.newest),
        "can't be verified again": ", ".join(missing),
    }


_REST = {Missing.BODY: "too large", Missing.CREDENTIAL: "credential was too short", Missing.NOTHING: ""}


def rejected_group_fields(group: RejectedGroup) -> dict[str, object]:
    return {
        "source": group.source,
        "reason": group.reason,
        "count": group.count,
        "oldest": rfc3339(group.oldest),
        "newest": rfc3339(group.newest),
        "missing": {why.value: number for why, number in group.missing.items()},
    }


def print_rejected(output: Output, rejected: Rejected) -> None:
    output.print(("refused request ", "bold"), rejected.position)
    request = rejected.request
    rows = {"source": rejected.source, "status": rejected.status}
    if request is None:
        rows |= {"reason": f"{rejected.reason}: {rejected.problem}", "stored": when(rejected.record.appended_at)}
    else:
        query = shown_query(request)
        size = count(request.size, "byte") + (f", {MISSING[request.missing]}" if request.missing else "")
        rows |= {
            "reason": rejected.reason,
            "received": when(request.at),
            "from": request.address or "unknown",
            "request": f"{request.method} {request.path}{'?' if query else ''}{query}",
            "body": size,
        }
    for name, value in rows.items():
        output.print((f"{name:<9}", "dim"), value)
    if request is None:
        return
    output.print()
    for header, content in shown_headers(request):
        output.print((f"  {header_text(header)}: ", "dim"), header_text(content))
    output.print()
    body = shown_body(request)
    output.block(NOT_SHOWN if body is None else body_text(body))


def report_fields(report: Report, *, is_dry: bool) -> dict[str, object]:
    return {
        "dry_run": is_dry,
        **{outcome.value: report.outcomes[outcome] for outcome in RequestOutcome},
        "events": report.events,
        "refused": dict(report.refused),
        "too_large": report.missing[Missing.BODY],
        "short_credential": report.missing[Missing.CREDENTIAL],
        "unreadable": report.unreadable,
        "elsewhere": report.elsewhere,
        "left": report.left,
        "problem": report.problem or None,
    }
