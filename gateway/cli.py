"""The command line: finds the command, runs it, and returns its exit code.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 unknown (`status` alone: no process responded), 130
interrupted, 143 terminated.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from pathlib import Path

from gateway.commands import COMMANDS
from gateway.commands.base import SETTINGS, Invocation
from gateway.commands.completion import ASKED, complete
from gateway.model import DISTRIBUTION, ForbiddenError, GatewayError, RulesError, UsageError
from gateway.ops.output import Output
from gateway.settings import Settings, from_sources
from gateway.text import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (`sys.argv` by default) and return its exit code."""
    _open_standard_streams()
    if ASKED in os.environ:
        complete(COMMANDS)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
        sys.stdout.flush()
    except SystemExit as end:  # argparse, or rich once nobody reads stdout
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. What is still buffered must not fail at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    return code


def _open_standard_streams() -> None:
    """Discard what goes to a stream that was closed before the start (`>&-`).

    Otherwise the next file that is opened, such as the log, gets its descriptor, and what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free one
    nowhere = Path(os.devnull)
    sys.stdin = sys.stdin or nowhere.open(encoding="utf-8")
    sys.stdout = sys.stdout or nowhere.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or nowhere.open("w", encoding="utf-8")


def _main(words: list[str]) -> int:
    if words in (["--version"], ["-V"]):
        sys.stdout.write(f"gateway {version(DISTRIBUTION)}\n")
        return 0
    command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(" ".join(words[:1]))
    if command is None:
        return _overview(words)
    arguments = command.parser().parse_intermixed_args(words[len(command.name.split()) :])
    output = Output(json=arguments.json)
    try:
        result = command.run(Invocation(arguments, _settings(arguments), output))
        if not isinstance(result, Coroutine):
            return result
        return asyncio.run(result if command.name == "run" else _until_terminated(result))
    except (ForbiddenError, RulesError, UsageError) as error:
        output.fail(str(error))
        return 2
    except BrokenPipeError:
        raise
    except (GatewayError, OSError) as error:
        output.fail(str(error))
        return 1


async def _until_terminated(result: Coroutine[object, object, int]) -> int:
    """Run a command, and cancel it at a SIGTERM as at a Ctrl-C: so it says what it has stored. `run` drains instead."""
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await result


def _settings(arguments: argparse.Namespace) -> Settings:
    """Read the settings that this command takes: an invalid variable of another setting must not stop it."""
    names = [name for name in (*SETTINGS, "dev") if hasattr(arguments, name)]
    environ = {variable: os.environ.get(variable, "") for variable in [f"GATEWAY_{name.upper()}" for name in names]}
    return from_sources({name: getattr(arguments, name) for name in names}, environ)


def _overview(words: list[str]) -> int:
    """Print the list of commands: for `--help` as the result, otherwise as an error."""
    output = Output(json=False)
    group = f"{words[0]} " if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    asked = words[1:] if group else words
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    if asked and asked not in (["--help"], ["-h"], ["help"]):
        known = {name.removeprefix(group).partition(" ")[0] for name in shown}
        output.fail(f"unknown command {' '.join(words)!r}{did_you_mean(asked[0], known)}; `gateway --help` lists them")
        return 2
    output.print(("usage: ", "bold"), f"gateway {group or 'COMMAND '}…")
    output.print()
    output.table(["command", "what it does"], [(name, command.about) for name, command in shown.items()])
    output.print()
    output.print("`gateway COMMAND --help` shows a command's arguments, with an example.")
    return 0 if asked else 2
