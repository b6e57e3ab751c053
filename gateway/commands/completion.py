"""`gateway completion`: shell completion of commands, options and names in the rules."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.shell_integration import shellcode

from gateway.commands.base import Command, Invocation, command
from gateway.commands.values import Parser
from gateway.model import GatewayError
from gateway.ops import fixtures
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules

SHELLS = ("bash", "zsh", "fish")
KINDS: Mapping[str, Callable[[Rules], Iterable[str]]] = {
    "route": lambda rules: rules.routes,
    "destination": lambda rules: rules.destinations,
    "source": lambda rules: rules.sources,
}
ASKED = "_ARGCOMPLETE"
"""The variable with which the shell's script requests completions."""


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell")


@command(
    "completion",
    about="print a shell completion script, for commands, options and names in the rules",
    example="gateway completion bash > ~/.local/share/bash-completion/completions/gateway",
    add_arguments=_add_arguments,
)
def _completion(call: Invocation) -> int:
    script = shellcode(["gateway"], shell=call.arguments.shell)
    if call.output.json:
        call.output.line({"shell": call.arguments.shell, "script": script})
    else:
        call.output.block(script)
    return 0


def complete(commands: Mapping[str, Command]) -> None:
    """Print the completions that the shell requests, and end the process."""
    argcomplete.autocomplete(_parser_of(commands), always_complete_options=False)


def _parser_of(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return one parser with all commands as subparsers: `gateway route pause` is `pause` in the group `route`."""
    root = argparse.ArgumentParser("gateway")
    root.add_argument("--version", action="store_true")
    tops = root.add_subparsers()
    groups: dict[str, Any] = {}
    for name, each in commands.items():
        first, _, second = name.partition(" ")
        place = tops
        if second:
            if first not in groups:
                groups[first] = tops.add_parser(first).add_subparsers()
            place = groups[first]
        parser = place.add_parser(second or first, parents=[each.parser()], add_help=False)
        _complete_names(parser, first)
    return root


def _complete_names(parser: argparse.ArgumentParser, group: str) -> None:
    """Complete names from the local rules, and those of fixtures."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public accessor
        kind = {"NAME": action.dest, "SOURCE": "source"}.get(str(action.metavar), "")
        kind = group if kind == "name" else kind
        if kind in KINDS:
            action.completer = partial(_names, kind)  # type: ignore[attr-defined]  # argcomplete's
        elif action.dest in _OF_FIXTURES and group == "trigger":
            action.completer = _OF_FIXTURES[action.dest]  # type: ignore[attr-defined]  # argcomplete's


def _names(kind: str, **_: object) -> list[str]:
    with suppress(GatewayError, OSError):
        rules, _problems = check_rules(Path(os.environ.get("GATEWAY_RULES") or "routes.yaml"))
        if rules is not None:
            return list(KINDS[kind](rules))
    return []


def _providers(**_: object) -> Iterable[str]:
    return fixtures.names()


def _types(parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
    return fixtures.names().get(parsed_args.provider, ())


_OF_FIXTURES: Mapping[str, Callable[..., Iterable[str]]] = {"provider": _providers, "type": _types}
"""Argument of `gateway trigger` → what completes it."""
