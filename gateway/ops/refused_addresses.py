"""Destinations whose URL has a literal address that no delivery may reach: known without DNS, before any attempt."""

from collections.abc import Iterator

from gateway.client.egress import EgressGuard, EgressRefusedError
from gateway.client.resolver import literal_address
from gateway.rules.addresses import url_parts
from gateway.rules.rules import Rules


def refused_addresses(rules: Rules) -> Iterator[tuple[str, str]]:
    """Yield the names of such destinations, each with the reason."""
    guard = EgressGuard(rules.egress)
    for name, destination in sorted(rules.destinations.items()):
        address = literal_address(url_parts(destination.url).hostname or "")
        if address is None:
            continue
        try:
            guard.check(address)
        except EgressRefusedError as error:
            yield name, str(error)
