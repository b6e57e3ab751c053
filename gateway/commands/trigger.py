"""`gateway trigger`: fixtures of providers' events, sent as the providers would."""

import argparse
import random
import time
from collections.abc import Iterator

from gateway.commands.base import Invocation, command
from gateway.commands.send import send_all, target_arguments
from gateway.commands.values import Parser, positive
from gateway.model import UsageError
from gateway.ops.fixtures import Fixture, fixture, fixtures, names
from gateway.ops.fixtures.renewal import renewed, with_identity
from gateway.ops.output import Output
from gateway.ops.send import Signed, source_of
from gateway.ops.trigger import (
    Setting,
    curl,
    parse_setting,
    request_fields,
    request_of,
    source_of_provider,
    with_settings,
)


def _setting(text: str) -> Setting:
    try:
        return parse_setting(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PATH=VALUE such as body.data.amount=42, got {text!r}") from None


def _arguments(parser: Parser) -> None:
    parser.add_argument("provider", nargs="?", metavar="PROVIDER", help="the provider; without it, all are listed")
    parser.add_argument("type", nargs="?", metavar="TYPE", help="the type of the event; without it, all are listed")
    parser.add_argument(
        "--source", metavar="SOURCE", help="the source (default: the only one with the provider's scheme)"
    )
    target_arguments(parser)
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="PATH=VALUE",
        help="set a value in the body, such as body.data.amount=42; repeatable",
    )  # fmt: skip
    parser.add_argument("--same", action="store_true", help="send the fixture's own ids and times, the same each time")
    parser.add_argument("--id", metavar="ID", help="like --same, with this ID")
    parser.add_argument("--count", type=positive, default=1, metavar="N", help="send N events, one after the other")
    parser.add_argument(
        "--print",
        action="store_true",
        help="print the request as a curl command, with any secret in it, instead of sending it",
    )


@command(
    "trigger",
    about="send a realistic event of a provider, signed with the secrets in the rules, with new ids and current times",
    example="gateway trigger stripe invoice.payment_failed --set body.data.object.amount_due=4200",
    add_arguments=_arguments,
    settings=("rules",),
)
async def _trigger(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    if arguments.type is None:
        return _list(output, arguments.provider)
    stored = fixture(arguments.provider, arguments.type)
    name = arguments.source or source_of_provider(call.settings.rules, stored.provider)
    source, verifier = source_of(call.settings.rules, name, secret=arguments.secret)
    if arguments.id is not None:
        if not stored.identity:
            raise UsageError(f"--id: expected a provider whose events have an identity, got {stored.provider}")
        stored = with_identity(stored, arguments.id)
    is_same = arguments.same or arguments.id is not None
    for path in with_settings(stored, arguments.set)[1]:
        output.note(f"--set: {path}: the fixture has no such field, and gets it")

    def requests() -> Iterator[tuple[str | None, Signed]]:
        draw = random.SystemRandom()
        for _ in range(arguments.count):
            now = time.time()
            each, _ = with_settings(stored if is_same else renewed(stored, now=now, draw=draw), arguments.set)
            identity = each.identity[0] if each.identity else None
            yield identity, request_of(each, source, verifier, url=arguments.url, now=now)

    if arguments.print:
        for _, request in requests():
            if output.json:
                output.line(request_fields(request))
            else:
                output.block(curl(request))
        return 0
    return await send_all(call, requests(), arguments.count)


def _list(output: Output, provider: str | None) -> int:
    if output.json:
        for each in fixtures(provider):
            output.line(_fields(each))
    elif provider is None:
        rows = [(name, ", ".join(types)) for name, types in names().items()]
        output.table(["provider", "types"], rows, unbroken=["provider"])
    else:
        found = fixtures(provider)
        rows = [(each.name, each.about) for each in found]
        output.table(["type", "what has happened"], rows, unbroken=["type"])
        for text in dict.fromkeys([each.unconfirmed for each in found if each.unconfirmed]):
            of = ", ".join([each.name for each in found if each.unconfirmed == text])
            output.print(f"not confirmed in {of}: {text}")
    return 0


def _fields(fixture: Fixture) -> dict[str, object]:
    return {
        "provider": fixture.provider,
        "name": fixture.name,
        "type": fixture.type,
        "about": fixture.about,
        "made_from": fixture.made_from,
        "unconfirmed": fixture.unconfirmed,
    }
