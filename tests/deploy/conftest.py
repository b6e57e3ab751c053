"""Programs that the checks of deploy/ need, and what they render, once for all of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.chart import Chart
from tests.tools import needed


@pytest.fixture(scope="session")
def tool() -> Callable[[str], Path]:
    """Return the path of a program by its name. Where it isn't there the test is skipped; CI fetches it, or fails."""
    return needed


@pytest.fixture(scope="session")
def chart(tool: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Chart:
    return Chart(tool("helm"), tmp_path_factory.mktemp("helm"))
