"""`gateway send` and `receive`: a test sender and a test receiver."""

import asyncio
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from gateway.commands.base import Invocation, command, read
from gateway.commands.values import Parser, duration, header, port, positive, signing_secret, statuses
from gateway.listen_errors import cannot_listen
from gateway.ops.presentation import is_success, print_response, print_responses
from gateway.ops.receiver import Received, Receiver
from gateway.ops.send import Response, Sender, Signed, sample, sign, source_of
from gateway.settings import Address


def target_arguments(parser: Parser) -> None:
    """Add what every command has that sends signed events."""
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8080",
        metavar="URL",
        help="where to send it (default: http://127.0.0.1:8080); the source's path is added if it has none",
    )
    parser.add_argument(
        "--secret",
        metavar="SECRET",
        help="sign with this instead of the secrets in the rules; if the rules have a public key, with its private key",
    )


def send_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the source, as named in routes.yaml")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the body; - is stdin; a small JSON object by default")
    target_arguments(parser)
    parser.add_argument(
        "--type", default="test", metavar="TYPE", help="the event type, if the provider has it in a header"
    )
    parser.add_argument(
        "--id", metavar="ID", help="the event id, if the provider has it in a header; a new one by default"
    )
    parser.add_argument(
        "--header", action="append", default=[], type=header, metavar="'K: V'", help="an additional header; repeatable"
    )
    parser.add_argument("--count", type=positive, default=1, metavar="N", help="send N events, one after the other")
    parser.add_argument("--forge", action="store_true", help="use an invalid signature")


@command(
    "send",
    about="send an event as its provider would, signed with the secrets in the rules",
    example="gateway send github --url http://127.0.0.1:8080 --type push samples/github.push.json",
    add_arguments=send_arguments,
    settings=("rules",),
)
async def _send(call: Invocation) -> int:
    arguments = call.arguments
    source, verifier = source_of(call.settings.rules, arguments.source, secret=arguments.secret)
    given = None if arguments.file is None else read(arguments.file)

    def requests() -> Iterator[tuple[str, Signed]]:
        for _ in range(arguments.count):
            identity = arguments.id or str(uuid.uuid4())
            yield (
                identity,
                sign(
                    source,
                    verifier,
                    url=arguments.url,
                    body=sample(identity, arguments.type) if given is None else given,
                    id=identity,
                    type=arguments.type,
                    headers=dict(arguments.header),
                    now=time.time(),
                    is_forged=arguments.forge,
                ),
            )

    return await send_all(call, requests(), arguments.count)


async def send_all(call: Invocation, requests: Iterable[tuple[str | None, Signed]], count: int) -> int:
    """Send the requests, of which there are `count`, one after the other, each with its identity; print the responses.

    Returns the exit code. The first that gets no response is the last.
    """
    output = call.output
    responses: list[Response] = []
    async with Sender() as sender:
        with output.progress("sending", count) as advance:
            for identity, request in requests:
                try:
                    response = await sender.send(request)
                except (OSError, TimeoutError) as error:
                    output.fail(f"{call.arguments.url}: expected a response, got {str(error) or 'none in time'}")
                    return 1
                responses.append(response)
                if output.json:
                    output.line({**asdict(response), "seconds": round(response.seconds, 6), "id": identity})
                elif count == 1:
                    print_response(output, response)
                advance()
    if count > 1:
        print_responses(output, responses)
    return 0 if all(is_success(response.status) for response in responses) else 1


def receive_arguments(parser: Parser) -> None:
    parser.add_argument("--port", type=port, default=9101, metavar="PORT", help="0 takes a free one (default: 9101)")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: 127.0.0.1)")
    parser.add_argument(
        "--respond",
        type=statuses,
        default=[200],
        metavar="STATUSES",
        help="statuses to respond with, in turn; the last one repeats (default: 200)",
    )
    parser.add_argument(
        "--delay", type=duration, default=0.0, metavar="DURATION", help="wait before each response (default: 0s)"
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        type=signing_secret,
        metavar="whsec_…",
        help="verify signatures with it; repeatable",
    )


@command(
    "receive",
    about="run a test receiver that shows what it gets, verifies it, and fails on demand",
    example="gateway receive --port 9101 --respond 503,503,200 --delay 200ms --secret whsec_…",
    add_arguments=receive_arguments,
)
async def _receive(call: Invocation) -> int:
    arguments, output = call.arguments, call.output

    def report(received: Received) -> None:
        if output.json:
            sys.stdout.write(received.as_json() + "\n")
            sys.stdout.flush()
        else:
            output.print(received.as_text())

    receiver = Receiver(
        report=report,
        host=arguments.host,
        port=arguments.port,
        respond=arguments.respond,
        delay=arguments.delay,
        secrets=arguments.secret,
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await receiver.start()
    except OSError as error:
        await receiver.close()
        raise cannot_listen("--host, --port:", Address(arguments.host, arguments.port), error) from error
    try:
        if output.json:
            output.line({"event": "listening", "url": receiver.url})
        else:
            output.note(f"receiving at {receiver.url}; Ctrl-C ends it")
        await stopping.wait()
    finally:
        await receiver.close()
    return 0
