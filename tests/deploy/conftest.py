"""Programs that the checks of deploy/ need, and what they render, once for all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.tools import ToolMissingError, fetch, find
from tests.deploy.chart import Chart


@pytest.fixture(scope="session")
def tool() -> Callable[[str], Path]:
    """Return the path of a program by its name. Where it isn't there the test is skipped; CI fetches it, or fails."""
    return _tool


@pytest.fixture(scope="session")
def chart(tool: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Chart:
    return Chart(tool("helm"), tmp_path_factory.mktemp("helm"))


def _tool(name: str) -> Path:
    if os.environ.get("CI") == "true":
        try:
            return fetch(name)
        except ToolMissingError as error:
            pytest.fail(str(error))
    if found := find(name):
        return found
    pytest.skip(f"needs {name}: `python dev/tools.py {name}` fetches it")
