"""Messages of Amazon SNS: which string is signed depends on the message's type, and by which hash on its version.

https://docs.aws.amazon.com/sns/latest/dg/sns-verify-signature-of-message-verify-message-signature.html

Anybody with an account at AWS can have a message signed there. So only the topics that a source names are its senders.

`Timestamp` is when a message was published, and remains so in each of its deliveries, for an hour at most: longer isn't
retried over HTTP (https://docs.aws.amazon.com/sns/latest/dg/sns-message-delivery-retries.html).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.verify.algorithms import OfSenderAloneError
from gateway.verify.check import BodyCheck, Draft, SigningSpec
from gateway.verify.content import Content
from gateway.verify.public_keys import decode_signature, fetched_key
from gateway.verify.remote_keys import MAX_URL
from gateway.verify.request import Reason, Request, refused
from gateway.verify.timestamps import Timestamp

TOPIC = re.compile(r"arn:aws[a-z-]*:sns:[a-z0-9-]{1,32}:[0-9]{12}:[A-Za-z0-9_-]{1,256}(\.fifo)?")
NOTIFICATION = "Notification"
_ALGORITHMS = {"1": "rsa-sha1", "2": "rsa-sha256"}
_CONFIRMATION = ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type")
_SIGNED: Mapping[str, tuple[str, ...]] = {
    NOTIFICATION: ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"),
    "SubscriptionConfirmation": _CONFIRMATION,
    "UnsubscribeConfirmation": _CONFIRMATION,
}
_BESIDE = ("Signature", "SignatureVersion", "SigningCertURL")
# A region alone: with any label, the bucket `sns` of S3 would be such a host, as sns.s3-us-west-2.amazonaws.com.
_REGIONS = {
    r"cn-[a-z]{2,12}": "amazonaws.com.cn",
    r"eusc-de-[a-z]{2,12}": "amazonaws.eu",
    r"us-iso-[a-z]{2,12}": "c2s.ic.gov",
    r"us-isob-[a-z]{2,12}": "sc2s.sgov.gov",
    r"eu-isoe-[a-z]{2,12}": "cloud.adc-e.uk",
    r"us-isof-[a-z]{2,12}": "csp.hci.ic.gov",
    r"(?!cn-)[a-z]{2}(?:-gov)?-[a-z]{2,12}": "amazonaws.com",
}
"""The regions of AWS's partitions, and the domain of each: `partitions.json` and `endpoints.json` of botocore 1.43."""
_PLACES = [rf"{name}-[0-9]{{1,2}}\.{re.escape(domain)}" for name, domain in _REGIONS.items()]
SNS_HOST = rf"sns\.(?:{'|'.join(_PLACES)})"
"""The hosts of SNS, as a pattern."""
_CERTIFICATE = re.compile(rf"https://{SNS_HOST}/SimpleNotificationService-[A-Za-z0-9]{{1,64}}\.pem")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnsSignature:
    """The signature in a message of SNS, of one of these topics (ARNs).

    With `timestamp`, it must have been published within its tolerance.
    """

    topics: frozenset[str]
    timestamp: Timestamp | None = None

    def check_head(self, head: Request, now: float) -> BodyCheck:  # noqa: ARG002 - everything is in the body
        return self._check_body

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:  # noqa: ARG002 - of the protocol
        raise OfSenderAloneError

    def query(self, now: float) -> str:  # noqa: ARG002 - of the protocol
        return ""

    def signing_spec(self) -> SigningSpec:
        proof = "RSA signature in the field Signature of the body"
        if self.timestamp is not None:
            proof += f", of a message published at most {self.timestamp.tolerance:g} s from now"
        return SigningSpec(proof=proof)

    def _check_body(self, request: Request, content: Content) -> None:  # noqa: ARG002 - the content is all of it
        message = content.json()
        fields = message if isinstance(message, dict) else {}
        kind, topic = _text(fields, "Type"), _text(fields, "TopicArn")
        if kind not in _SIGNED:
            raise refused(
                Reason.UNREADABLE_BODY, f"expected Type to be one of {', '.join(_SIGNED)}, got something else"
            )
        if topic not in self.topics:  # before a key is fetched for it
            raise refused(
                Reason.WRONG_RECIPIENT, "expected a message of one of the source's topics, got something else's"
            )
        if self.timestamp is not None:
            self.timestamp.check(_text(fields, "Timestamp").encode("utf-8", "surrogatepass"), content.now)
        algorithm = _ALGORITHMS.get(_text(fields, "SignatureVersion"))
        if algorithm is None:
            raise refused(Reason.MALFORMED_SIGNATURE, "expected SignatureVersion to be 1 or 2, got something else")
        signature = decode_signature(_text(fields, "Signature").encode(), algorithm, "base64")
        if signature is None:
            raise refused(
                Reason.MALFORMED_SIGNATURE, "expected Signature to be 256 to 1024 bytes in base64, got something else"
            )
        names = [name for name in _SIGNED[kind] if not _is_absent(fields, name)]
        signed = "".join([f"{name}\n{_signed_text(fields, name)}\n" for name in names])
        key = fetched_key(_certificate(fields), algorithm, content)
        if not key.verifies(signature, signed.encode()):
            raise refused(Reason.BAD_SIGNATURE, "the signature in the field Signature doesn't match this message")
        content.require_single([(name,) for name in (*_SIGNED[kind], *_BESIDE)])


def _text(fields: Mapping[str, object], name: str) -> str:
    """Return a field; 5 and "5" would have the same signature, so that only a string is one."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise refused(Reason.UNREADABLE_BODY, f"expected {name} to be a string, got something else")
    return value


def _signed_text(fields: Mapping[str, object], name: str) -> str:
    """Return a field of which the signed string has a line, after one with its name.

    A message may be several lines. If any other field could be, what is in a message could be taken for other fields;
    SNS allows no line breaks in a subject: https://docs.aws.amazon.com/sns/latest/api/API_Publish.html.
    """
    value = _text(fields, name)
    if name != "Message" and "\n" in value:
        raise refused(Reason.UNREADABLE_BODY, f"expected {name} to be one line, got several")
    return value


def _is_absent(fields: Mapping[str, object], name: str) -> bool:
    return name == "Subject" and name not in fields


def _certificate(fields: Mapping[str, object]) -> str:
    url = _text(fields, "SigningCertURL")
    if len(url) > MAX_URL or not _CERTIFICATE.fullmatch(url):
        raise refused(
            Reason.BAD_KEY, "expected SigningCertURL to be a certificate of SNS at a domain of AWS, got something else"
        )
    return url
