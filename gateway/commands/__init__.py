"""The command line: each module parses the arguments of some commands, calls `gateway.ops`, and prints the result."""

from gateway.commands import (
    check,
    completion,
    control,
    dead,
    events,
    explain,
    maintenance,
    replay,
    run,
    send,
    status,
    topics,
)
from gateway.commands.base import REGISTERED

COMMANDS = {
    name: command
    for module in (run, check, explain, send, topics, events, dead, replay, status, control, maintenance, completion)
    for name, command in REGISTERED.items()
    if command.run.__module__ == module.__name__
}
"""By name, in the order of the help."""
