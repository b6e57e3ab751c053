"""Keeps our credentials from the senders that get a destination's response (`respond: after_delivery`)."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from gateway.bodies.codings import decompressed
from gateway.client.client import SENDERS_RESPONSE_LIMIT
from gateway.client.masking import Mask, Masks
from gateway.client.request import Outbound, Senders
from gateway.model import DestinationResponse, UnreadableBodyError
from gateway.rules.rules import Rules


class WithholdingSenders(Senders, Protocol):
    """Senders that can be told that a response isn't for them."""

    def is_for_them(self, response: DestinationResponse) -> bool:
        """Return whether they get such a response, by its status."""

    def withhold(self, outbound: Outbound) -> None:
        """Note that a sender doesn't get its response, since this repeats a credential."""


class WithoutCredentials:
    """Passes responses on to `senders` unless they repeat a credential of ours; `rules` returns the active rules.

    A destination may repeat the request, in an error page for debugging or as an echo. Then a sender would learn with
    which token the gateway calls the destination. A response that is too long for a sender once it is decompressed
    isn't passed on either: to search it would take the time of all others. A body that can't be decompressed is passed
    on unsearched: with a content coding other than gzip and deflate, with more than three codings, or with bytes that
    aren't what its coding says.
    """

    def __init__(self, senders: WithholdingSenders, rules: Callable[[], Rules]) -> None:
        self._senders = senders
        self._rules = rules
        self._masks = Masks(Mask.of_credentials)

    def wait_for(self, outbound: Outbound) -> bool:
        """Return whether a sender may wait for the response to this request."""
        return self._senders.wait_for(outbound)

    def take(self, outbound: Outbound, response: DestinationResponse | None) -> None:
        """Take the response; None if there is none, or no complete one."""
        if response is None or not self._senders.is_for_them(response) or (content := _content_of(response)) is None:
            self._senders.take(outbound, None)
        elif self._has_credential(outbound, content, response.content_type or b""):
            self._senders.withhold(outbound)
        else:
            self._senders.take(outbound, response)

    def _has_credential(self, outbound: Outbound, *texts: bytes) -> bool:
        rules, delivery = self._rules(), outbound.delivery
        destination = None if delivery is None else rules.destinations.get(delivery.destination)
        if delivery is None or destination is None:
            return True  # it has been removed meanwhile, so that its credentials aren't known any more
        route = rules.routes.get(delivery.route)
        mask = self._masks.of(rules, delivery.route, None if route is None else route.request, destination)
        if outbound.observation is not None:
            mask = mask.with_sent((), outbound.observation.authorizations)
        return any(map(mask.is_in, texts))


def _content_of(response: DestinationResponse) -> bytes | None:
    """Return a response's body, decompressed; b"" if it can't be, and None if it is too long for a sender then."""
    if not response.content_encoding:
        return response.body
    try:
        return decompressed(response.body, response.content_encoding.decode("latin-1"), SENDERS_RESPONSE_LIMIT)
    except UnreadableBodyError as error:
        return None if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else b""
