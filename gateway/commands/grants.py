"""Who is given what by the access file, as `gateway access` and `gateway token` show it."""

from pathlib import Path

from gateway.access.access_file import Grant
from gateway.commands.base import Invocation
from gateway.model import UsageError
from gateway.ops.presentation import Row


def access_file(call: Invocation) -> Path:
    """Return the access file. Raises UsageError without one."""
    file = call.settings.access.file
    if file is None:
        raise UsageError("--access: expected the access file, got none")
    return file


def grant_fields(grant: Grant) -> dict[str, object]:
    """Return what a line gives, for JSON."""
    return {
        "name": grant.name,
        "role": grant.role,
        "sources": None if grant.sources is None else sorted(grant.sources),
        "owners": None if grant.owners is None else sorted(grant.owners),
    }


def grant_row(grant: Grant) -> Row:
    """Return what a line gives, for a table."""
    return {
        "name": grant.name,
        "role": grant.role.value,
        "sources": ", ".join(sorted(grant.sources)) if grant.sources else "all",
        "owners": ", ".join(sorted(grant.owners)) if grant.owners else "all",
    }
