"""`gateway run`: the gateway process."""

import os
import sys
from pathlib import Path

import uvloop

from gateway import garbage
from gateway.commands.base import SETTINGS, Invocation, command
from gateway.commands.values import Parser
from gateway.processes.child import child_in, lines_of
from gateway.processes.supervisor import private_folder, supervise
from gateway.run import Gateway
from gateway.settings import Settings, refuse_useless_processes
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
    settings = call.settings
    refuse_useless_processes(settings)
    child = child_in(os.environ)
    if child is None and settings.processes > 1:
        return _run_several(settings)
    if child is not None:
        child.end_with_parent()
        settings = child.settings(settings)
    lines = logs.configure(
        json=not sys.stdout.isatty(),
        descriptor=1,
        process=settings.process,
        lock=None if child is None else child.lines,
    )
    gateway = Gateway(settings, logs.get_logger("gateway"), child)
    gateway.count_dropped(lines)
    garbage.prepare()
    try:
        uvloop.run(gateway.run())
    finally:
        lines.close()
    return 0


def _run_several(settings: Settings) -> int:
    with private_folder() as name:
        folder = Path(name)
        lines = logs.configure(json=not sys.stdout.isatty(), descriptor=1, lock=lines_of(folder))
        try:
            return supervise(settings, logs.get_logger("gateway"), folder)
        finally:
            lines.close()
