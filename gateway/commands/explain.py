"""`gateway explain`: where an event goes, and why."""

import argparse
import os
import time
from base64 import b64encode
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    opened_log,
    read,
    rule_file,
    rule_file_argument,
    rules_without_secrets,
)
from gateway.commands.events import find, position_of_original
from gateway.commands.values import Parser, header, parameter
from gateway.engine.control.records import DeadFilter
from gateway.log.records import decode_event
from gateway.model import EVENT_ID, Event, EventId, Headers, RefusedError, UsageError
from gateway.ops.control_client import ControlClient
from gateway.ops.dead_letters import ListedLetter, listed, open_dead_letters_of
from gateway.ops.explain import Explained, explain, explain_event
from gateway.ops.kick_report import unread_text
from gateway.ops.log_search import is_position
from gateway.ops.output import Output, count
from gateway.ops.presentation import explained_fields, print_explained
from gateway.ops.redaction import Redactions
from gateway.ops.source_presentation import print_source, source_fields
from gateway.ops.verification import verification_of
from gateway.required_topics import event_topics
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.log.base import Partition


def explain_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    about = "a file with a body, - for stdin, an event in the log by its id or position, or the name of a source"
    parser.add_argument("event", metavar="EVENT", help=about)
    parser.add_argument("--source", metavar="SOURCE", help="the source of the event; required with a file or stdin")
    parser.add_argument(
        "--header", action="append", default=[], type=header, metavar="'K: V'", help="a header of the event; repeatable"
    )
    parser.add_argument(
        "--query", action="append", default=[], type=parameter, metavar="K=V", help="a query parameter; repeatable"
    )
    parser.add_argument("--show-secrets", action="store_true", help="mask nothing")
    api_arguments(parser)


@command(
    "explain",
    about="show which routes match an event, which don't and why, and the requests they would make",
    example="gateway explain routes.yaml --source github --header 'X-GitHub-Event: push' samples/github.push.json",
    add_arguments=explain_arguments,
    settings=LOG_SETTINGS,
)
async def _explain(call: Invocation) -> int:
    arguments = call.arguments
    if api_of(call) is not None:
        return await _explain_by_api(call)
    rules = rules_without_secrets(rule_file(call))
    is_secret_shown = arguments.show_secrets
    position = duplicate_of = ""
    dead: Sequence[ListedLetter] = ()
    unread: dict[Partition, str] = {}
    if EVENT_ID.fullmatch(arguments.event) or is_position(arguments.event, event_topics(rules, call.topics)):
        async with opened_log(call) as log:
            found = await find(call, log, event_topics(rules, call.topics), arguments.event)
            if found is None:
                return 1
            with call.output.waiting("looking for the original, if it is a duplicate"):
                position, duplicate_of = (
                    found.position,
                    await position_of_original(rules, log, found, decode_event(found.record)),
                )
            event = decode_event(found.record)
            with call.output.waiting("looking for its dead letters"):
                control = await ControlClient(log, call.topics).control()
                letters = await open_dead_letters_of(log, call.topics, control, event, unread)
            hidden = Redactions(None if is_secret_shown else rules)
            dead = [listed(hidden.letter(letter)) for letter in letters]
            if unread:
                call.output.note(f"{unread_text(len(unread))}: its dead letters there aren't shown")
        explained = explain_event(rules, event, now=time.time(), is_secret_shown=is_secret_shown)
    elif arguments.source is None and arguments.event in rules.sources:
        source = rules.sources[arguments.event]
        routes = [route.name for route in rules.routes.values() if source.name in route.sources]
        if call.output.json:
            call.output.line(source_fields(source, verification_of(rules.files, source), routes))
        else:
            print_source(call.output, source, verification_of(rules.files, source), routes)
        return 0
    elif arguments.source is None:
        near = did_you_mean(arguments.event, rules.sources)
        raise UsageError(f"explain: expected --source with a file, an event's id, or the name of a source{near}")
    else:
        body = read(arguments.event)
        try:
            explained = explain(
                rules,
                source=arguments.source,
                headers=_headers_of(arguments),
                query="&".join(arguments.query),
                body=body,
                now=time.time(),
                is_secret_shown=is_secret_shown,
            )
        except RefusedError as error:
            call.output.fail(f"the ingress would answer {error.status} ({error.reason}): {error.detail}")
            return 1
    if call.output.json:
        call.output.line(explained_fields(explained, duplicate_of, dead))
    else:
        print_explained(call.output, explained, position, duplicate_of, dead)
    return 0


async def _explain_by_api(call: Invocation) -> int:
    """Do the same by the API of a process: by the active rules there, or by those of a file that is named."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import explained_of, headers_in, stored  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_client import ApiRefusedError  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_dead_letters import ApiDeadLetters  # noqa: PLC0415 - a tenth of a second

    arguments, output = call.arguments, call.output
    if arguments.show_secrets:
        raise UsageError("explain: expected no --show-secrets with --api: the API masks secrets always")
    async with client_of(call) as client:
        if arguments.source is not None:
            event = _event_of(arguments)
            body: dict[str, object] = {
                "source": arguments.source,
                "headers": [{"name": name, "value": value} for name, value in arguments.header],
                "query": event.query,
                "body_base64": b64encode(event.body).decode(),
                "include_unmatched": True,
            }
            if arguments.file or arguments.rules:
                body["rules"] = read(str(rule_file(call))).decode("utf-8", "replace")
            try:
                answer = await client.ask("explain", body=body)
            except ApiRefusedError as error:
                if error.code != "not_accepted_by_ingress":
                    raise
                output.fail(str(error))
                return 1
            position, dead = "", list[ListedLetter]()
        else:
            _must_be_an_event(arguments)
            found, event, _ = await stored(client, arguments.event)
            position = found.position
            detail = await client.get("events", position)
            event = replace(event, headers=headers_in(detail))  # those that it came with, whatever is hidden
            answer = await client.get("events", position, "explanation", include_unmatched=True)
            letters = ApiDeadLetters(client)
            with output.waiting("looking for its dead letters"):
                dead = [letter async for letter in letters.read(DeadFilter(ids=(event.id,)))]
            if letters.unread:
                output.note(f"{unread_text(len(letters.unread))}: its dead letters there aren't shown")
    explained, duplicate_of = explained_of(answer, event), EARLIER if answer["is_duplicate"] else ""
    _note_left_out(output, explained)
    if output.json:
        output.line(explained_fields(explained, duplicate_of, dead))
    else:
        print_explained(output, explained, position, duplicate_of, dead)
    return 0


def _note_left_out(output: Output, explained: Explained) -> None:
    if explained.routes_left_out:
        output.note(f"{count(explained.routes_left_out, 'route')} more: the API doesn't show so many")
    for route in explained.routes:
        if left_out := route.requests_in_all - len(route.requests):
            output.note(f"{route.name}: {count(left_out, 'request')} more: the API doesn't show so many")


EARLIER = "an earlier event"
"""What an event is a duplicate of, as far as the API knows."""


def _event_of(arguments: argparse.Namespace) -> Event:
    """Return what is asked about, as an event, of which the API says the rest."""
    return Event(
        id=EventId(""),
        source=arguments.source,
        type="",
        key=None,
        received_at=0.0,
        headers=_headers_of(arguments),
        query="&".join(arguments.query),
        body=read(arguments.event),
    )


def _must_be_an_event(arguments: argparse.Namespace) -> None:
    if not EVENT_ID.fullmatch(arguments.event) and "@" not in arguments.event:
        raise UsageError(
            "explain: expected --source with a file, or the id or position of an event, with --api; "
            f"got {arguments.event!r}: how a source is set up, its process's rules say"
        )
    if arguments.file or arguments.rules:
        raise UsageError("explain: expected no rule file with an event and --api: the active rules there count")


def _headers_of(arguments: argparse.Namespace) -> Headers:
    return tuple([(os.fsencode(name), os.fsencode(value)) for name, value in arguments.header])
