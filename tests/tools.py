"""Programs and files that tests need and the project's own set-up can provide."""

import os
from pathlib import Path

import pytest

from dev.tools import ToolMissingError, fetch, find


def needed(name: str) -> Path:
    """Return a tool's path, or skip the test where it isn't there; with CI=true it is fetched, or the test fails."""
    if os.environ.get("CI") == "true":
        try:
            return fetch(name)
        except ToolMissingError as error:
            pytest.fail(str(error))
    if found := find(name):
        return found
    pytest.skip(f"needs {name}: `python dev/tools.py {name}` fetches it")
