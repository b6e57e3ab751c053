"""`gateway run`: the gateway process."""

import sys

import uvloop

from gateway import garbage
from gateway.commands.base import SETTINGS, Invocation, command
from gateway.commands.values import Parser
from gateway.run import Gateway
from gateway.telemetry import logs


def run_arguments(parser: Parser) -> None:
    about = "for local development: create missing topics, and only warn about broker settings that could lose events"
    parser.add_argument("--dev", action="store_const", const="true", help=f"{about} [env: GATEWAY_DEV]")
    parser.set_defaults(json=False)


@command(
    "run",
    about="receive events and deliver them, until SIGTERM",
    example="gateway run --rules routes.yaml --log kafka://broker1:9092,broker2:9092",
    add_arguments=run_arguments,
    settings=tuple(SETTINGS),
)
def _run(call: Invocation) -> int:
    lines = logs.configure(json=not sys.stdout.isatty(), descriptor=1)
    gateway = Gateway(call.settings, logs.get_logger("gateway"))
    garbage.prepare()
    try:
        uvloop.run(gateway.run())
    finally:
        lines.close()
    return 0
