"""A gateway with an index."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess
from tests.listen.listener import a_gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    async with a_gateway(tmp_path) as running:
        yield running
