"""The command line: each module parses the arguments of some commands, calls `gateway.ops`, and prints the result."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from typing_extensions import override

from gateway.commands.base import REGISTERED, Command

_ACTIONS = ("pause", "resume", "kick")
_MODULES = {
    "run": ("run",),
    "check": ("check", "schema"),
    "explain": ("explain",),
    "init": ("init",),
    "fmt": ("fmt",),
    "test": ("test",),
    "diff": ("diff",),
    "providers": ("providers",),
    "send": ("send", "receive"),
    "trigger": ("trigger",),
    "listen": ("listen",),
    "topics": ("topics create", "topics check"),
    "events": ("events list", "events search", "events show"),
    "export": ("events export",),
    "redeliver": ("events redeliver",),
    "deliveries": ("deliveries list",),
    "dead": ("dead list", "dead show", "dead replay", "dead drop"),
    "rejected": ("rejected list", "rejected show", "rejected retry", "rejected drop"),
    "replay": ("replay",),
    "spool": ("spool list", "spool move", "spool drop", "spool verify"),
    "audit": ("audit list",),
    "token": ("token new", "token list", "token revoke"),
    "access": ("access check",),
    "status": ("status",),
    "control": tuple([f"{what} {action}" for what in ("route", "destination") for action in _ACTIONS]),
    "maintenance": ("migrate", "backup", "restore"),
    "completion": ("completion",),
}
"""Module → the names of its commands, in the order of the help."""


class _Commands(Mapping[str, Command]):
    """Imports a module when one of its commands is looked up: most starts need one command."""

    def __init__(self) -> None:
        self._module_of = {name: module for module, names in _MODULES.items() for name in names}

    @override
    def __getitem__(self, name: str) -> Command:
        import_module(f"gateway.commands.{self._module_of[name]}")
        return REGISTERED[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._module_of)

    @override
    def __len__(self) -> int:
        return len(self._module_of)


COMMANDS = _Commands()
"""By name, in the order of the help."""
