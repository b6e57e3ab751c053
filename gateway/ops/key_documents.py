"""A client for the keys of senders, for commands that verify."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.rules.rules import Rules


@asynccontextmanager
async def opened_client(rules: Rules) -> AsyncIterator[Client]:
    """Open a client that connects to what the rules allow."""
    async with Client(EgressGuard(rules.egress)) as client:
        yield client
