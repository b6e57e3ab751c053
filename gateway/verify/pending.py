"""A source whose provider sends a token to be shown to its operator: Notion's, by which its events are signed later.

Such a request is unsigned, so that anybody may send one. It counts only while the rules say `pending`, only if it is
nothing but a token, and all that comes of it is that operators can read the token (`pending_tokens.py` of the ingress):
it verifies nothing until one of them has written it into the rules.
"""

from dataclasses import dataclass

from gateway.model import UsageError
from gateway.verify.check import BodyCheck, Draft, SigningSpec
from gateway.verify.content import Content
from gateway.verify.handshakes import HandshakeKeys, Respond
from gateway.verify.request import Reason, Request, refused


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingToken:
    """Accepts what `respond` takes for a token, and no other request; one with the signature's header neither."""

    respond: Respond
    header: str

    def check_head(self, head: Request, now: float) -> BodyCheck:  # noqa: ARG002 - of the protocol
        if head.values(self.header.lower().encode()):
            raise refused(
                Reason.MISSING_SIGNATURE, "expected a verification token without a signature, got one with it"
            )
        return self._check_body

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - of the protocol
        raise UsageError("a test event for this source: expected a secret, but it is pending")

    def query(self, now: float) -> str:  # noqa: ARG002 - of the protocol
        return ""

    def signing_spec(self) -> SigningSpec:
        return SigningSpec(proof="nothing, for its verification token alone, while it is pending")

    def _check_body(self, request: Request, content: Content) -> None:  # noqa: ARG002 - of the protocol
        if self.respond(request, HandshakeKeys()) is None:
            expected = f"expected a signature in the header {self.header}, or nothing but a verification token"
            raise refused(Reason.MISSING_SIGNATURE, f"{expected}, got neither")
