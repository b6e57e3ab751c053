"""Messages of Amazon SNS: every signed field counts, only the source's topics are good, a confirmation is no event."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import RefusedError, UsageError
from gateway.verify.presets import SchemeError
from gateway.verify.remote_keys import KeyCache
from gateway.verify.request import Request
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import NOW, a_request, reason, refusal
from tests.verify.test_remote_keys import a_certificate, known, the_key
from tests.verify.vectors import Vector, vectors

VECTORS = [vector for vector in vectors() if vector.scheme == "sns"]
TOPIC = "arn:aws:sns:us-west-2:123456789012:MyTopic"
VERIFIER = build_verifier({"scheme": "sns", "topics": [TOPIC, f"{TOPIC}2"]})
URL = "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-9c6465fa7f48f5cacd23014631ec1136.pem"
SUBSCRIBE = "https://sns.us-west-2.amazonaws.com/?Action=ConfirmSubscription&TopicArn=arn:aws:sns:us-west-2:1:a&Token=2"
KEYS = known(a_certificate(the_key()), URL)


def a_message(**fields: Any) -> dict[str, Any]:
    kinds = {"Token": "2336412f37", "SubscribeURL": SUBSCRIBE}
    return {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": TOPIC,
        "Message": "Hello",
        "Timestamp": "2024-05-02T00:54:06.655Z",
        "SignatureVersion": "2",
        "SigningCertURL": URL,
        **(kinds if fields.get("Type", "Notification") != "Notification" else {}),
        **fields,
    }


def signed(**fields: Any) -> Request:
    message = a_message(**fields)
    names = ["Message", "MessageId", "Subject", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
    text = "".join([f"{name}\n{message[name]}\n" for name in names if name in message])
    version = hashes.SHA1() if message["SignatureVersion"] == "1" else hashes.SHA256()
    signature = the_key().sign(text.encode(), padding.PKCS1v15(), version)
    return sent({**message, "Signature": base64.b64encode(signature).decode()})


def sent(message: Any) -> Request:
    return a_request([("Content-Type", "text/plain; charset=UTF-8")], body=json.dumps(message).encode())


@pytest.mark.parametrize("vector", VECTORS, ids=["version 1", "version 2"])
def test_every_field_that_aws_signs_counts(vector: Vector) -> None:
    message = json.loads(vector.request.body)
    for name in ("Message", "MessageId", "Subject", "Timestamp", "Type", "Signature", "SignatureVersion", "TopicArn"):
        for changed in (
            {**message, name: message.get(name, "") + "x"},
            {k: v for k, v in message.items() if k != name},
        ):
            if changed != message:
                request = sent(changed)
                assert reason(vector.verifier(), request, now=vector.now, keys=vector.keys) != "accepted", name
    other = {"UnsubscribeURL": "x", "MessageAttributes": {}, **message}
    assert reason(vector.verifier(), sent(other), now=vector.now, keys=vector.keys) == "accepted"


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_subject_is_signed_if_there_is_one(version: str) -> None:
    for fields in ({}, {"Subject": "S"}, {"Subject": ""}, {"Message": "a\nSubject\nb"}):
        assert reason(VERIFIER, signed(SignatureVersion=version, **fields), keys=KEYS) == "accepted"


def test_fields_that_run_into_each_other_are_another_message() -> None:
    """Fields are only told apart by line breaks, which a message alone may have."""
    request = signed(Message="a\nMessageId\nb\nSubject\nc")
    assert reason(VERIFIER, request, keys=KEYS) == "accepted"
    message = json.loads(request.body)
    other = {"Message": "a", "MessageId": "b", "Subject": f"c\nMessageId\n{message['MessageId']}"}
    assert refusal(VERIFIER, sent({**message, **other})).detail == "expected Subject to be one line, got several"


@pytest.mark.parametrize("name", ["Message", "Type", "TopicArn", "Signature", "SigningCertURL"])
def test_a_message_has_each_signed_field_once(name: str) -> None:
    request = signed()
    other = b'{"%b":"other",' % name.encode() + request.body[1:]
    error = refusal_of(request._replace(body=other))
    assert error == f"expected {name}, which is signed, once, got the key {name} twice"
    unsigned = b'{"UnsubscribeURL":"a","UnsubscribeURL":"b",' + request.body[1:]
    assert reason(VERIFIER, request._replace(body=unsigned), keys=KEYS) == "accepted"


def refusal_of(request: Request) -> str:
    with pytest.raises(RefusedError) as caught:
        VERIFIER.verify(request, now=NOW, keys=KEYS)
    return caught.value.detail


def test_only_strings_are_signed() -> None:
    request = signed(Message="5")
    assert reason(VERIFIER, request, keys=KEYS) == "accepted"
    for value in (5, 5.0, ["5"], {"5": 5}, None, True):
        assert reason(VERIFIER, sent({**json.loads(request.body), "Message": value}), keys=KEYS) == "unreadable_body"
    assert reason(VERIFIER, sent({**json.loads(request.body), "Subject": None}), keys=KEYS) == "unreadable_body"


def test_another_topic_is_refused_before_a_key_is_asked_for() -> None:
    assert reason(VERIFIER, signed(TopicArn=f"{TOPIC}2"), keys=KEYS) == "accepted"
    for topic in (f"{TOPIC}3", TOPIC.replace("123456789012", "999999999999"), TOPIC.lower()):
        error = refusal(VERIFIER, signed(TopicArn=topic))
        assert error.reason == "wrong_recipient"
    assert reason(VERIFIER, signed()) == URL


def test_a_message_is_good_at_any_time_unless_a_source_says_otherwise() -> None:
    """SNS retries for an hour, and the time in a message is that at which it was published."""
    within = build_verifier({"scheme": "sns", "topics": [TOPIC], "tolerance": "2h"})
    published = {"Timestamp": "2023-11-14T22:13:20.000Z"}  # NOW
    for kind in ("Notification", "SubscriptionConfirmation", "UnsubscribeConfirmation"):
        request = signed(Type=kind, **published)
        for ahead, expected in ((0, "accepted"), (7200, "accepted"), (7201, "stale"), (-7201, "stale")):
            now, keys = NOW + ahead, KeyCache()
            keys.keep(URL, a_certificate(the_key()), now)
            assert reason(VERIFIER, request, now=now, keys=keys) == "accepted"
            assert reason(within, request, now=now, keys=keys).removesuffix("_timestamp") == expected
    assert reason(within, signed(**published), now=NOW + 7201) == "stale_timestamp", "before a key is asked for"
    for text in ("2023-11-14", "1700000000", "2023-11-14T22:13:20.000", ""):
        assert reason(within, signed(Timestamp=text), keys=KEYS) == "malformed_timestamp"
    moved = json.loads(signed(**published).body) | {"Timestamp": "2023-11-14T22:13:21.000Z"}
    assert reason(within, sent(moved), keys=KEYS) == "bad_signature"


def test_a_tolerance_is_told_and_none_of_it_is_a_weakness() -> None:
    [spec] = build_verifier({"scheme": "sns", "topics": [TOPIC], "tolerance": "2h"}).signing_specs
    assert spec.proof.endswith("of a message published at most 7200 s from now")
    assert [path for path, _ in VERIFIER.warnings] == []
    endless = build_verifier({"scheme": "sns", "topics": [TOPIC], "tolerance": "none"})
    assert [path for path, _ in endless.warnings] == [("tolerance",)]


@pytest.mark.parametrize("url", [
    "https://sns.s3-us-west-2.amazonaws.com/SimpleNotificationService-1.pem",  # the bucket `sns`
    "https://sns.s3.amazonaws.com/SimpleNotificationService-1.pem",
    "https://sns.s3.us-west-2.amazonaws.com/SimpleNotificationService-1.pem",
    "https://s3.us-west-2.amazonaws.com/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.amazonaws.com.evil.com/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.evil.com/SimpleNotificationService-1.pem",
    "https://evil.com/sns.us-east-1.amazonaws.com/SimpleNotificationService-1.pem",
    "http://sns.us-east-1.amazonaws.com/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.amazonaws.com:8443/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-1.pem?x",
    "https://sns.us-east-1.amazonaws.com/?Action=x/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-1.pem\n", "", "x",
    "https://sns.us-east-1.amazonaws.com.cn/SimpleNotificationService-1.pem",
    "https://sns.us-east-1.amazonaws.eu/SimpleNotificationService-1.pem",
    "https://sns.eusc-de-east-1.amazonaws.com/SimpleNotificationService-1.pem",
    "https://sns.s3.eusc-de-east-1.amazonaws.eu/SimpleNotificationService-1.pem",
    "https://sns.us-iso-east-1.sc2s.sgov.gov/SimpleNotificationService-1.pem",
])  # fmt: skip
def test_a_certificate_elsewhere_is_refused(url: str) -> None:
    assert reason(VERIFIER, signed(SigningCertURL=url)) == "bad_key"


@pytest.mark.parametrize(
    "host",
    [
        "us-gov-west-1.amazonaws.com", "cn-northwest-1.amazonaws.com.cn", "ap-southeast-5.amazonaws.com",
        "eusc-de-east-1.amazonaws.eu", "us-iso-west-1.c2s.ic.gov", "us-isob-east-1.sc2s.sgov.gov",
        "eu-isoe-west-1.cloud.adc-e.uk", "us-isof-south-1.csp.hci.ic.gov",
    ],
)  # fmt: skip
def test_each_region_has_certificates(host: str) -> None:
    url = f"https://sns.{host}/SimpleNotificationService-9c6465fa7f48f5cacd23014631ec1136.pem"
    assert reason(VERIFIER, signed(SigningCertURL=url)) == url


@pytest.mark.parametrize("kind", ["SubscriptionConfirmation", "UnsubscribeConfirmation"])
def test_a_confirmation_is_verified_and_no_event(kind: str) -> None:
    request = signed(Type=kind)
    VERIFIER.verify(request, now=NOW, keys=KEYS)
    response = VERIFIER.handshake(request, now=NOW)
    assert response is not None
    assert response.confirm_url == (SUBSCRIBE if kind == "SubscriptionConfirmation" else "")
    assert VERIFIER.handshake(signed(), now=NOW) is None
    message = json.loads(signed(Type=kind).body)
    assert reason(VERIFIER, sent({**message, "Token": "x"}), keys=KEYS) == "bad_signature"


@pytest.mark.parametrize(
    "url",
    [
        SUBSCRIBE.replace("us-west-2.", "s3-us-west-2."),
        SUBSCRIBE.replace("https", "http"),
        SUBSCRIBE.replace(".com/", ".com.evil/"),
        SUBSCRIBE.replace("ConfirmSubscription", "DeleteTopic"),
        SUBSCRIBE + "\n",
        SUBSCRIBE + "#",
        SUBSCRIBE + "x" * 1500,
        "",
        "x",
    ],
)
def test_nothing_but_a_confirmation_at_sns_is_visited(url: str) -> None:
    with pytest.raises(RefusedError) as caught:
        VERIFIER.handshake(signed(Type="SubscriptionConfirmation", SubscribeURL=url), now=NOW)
    assert (caught.value.status, caught.value.reason) == (400, "bad_handshake")


def test_what_is_no_message_is_refused() -> None:
    for message, expected in (
        ([], "unreadable_body"),
        ("x", "unreadable_body"),
        ({}, "unreadable_body"),
        ({**a_message(), "Type": "Other"}, "unreadable_body"),
        ({**a_message(), "SignatureVersion": "3", "Signature": "x"}, "malformed_signature"),
        ({**a_message(), "Signature": "x"}, "malformed_signature"),
        (a_message(), "unreadable_body"),
    ):
        assert reason(VERIFIER, sent(message), keys=KEYS) == expected
    assert reason(VERIFIER, a_request(body=b"{"), keys=KEYS) == "unreadable_body"
    assert reason(VERIFIER, a_request(body=rb'{"Type": "\ud800"}'), keys=KEYS) == "unreadable_body"


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*a_message(), "Signature"]), inner),
))  # fmt: skip
def test_nothing_crashes_or_passes(message: Any) -> None:
    assert reason(VERIFIER, sent(message), keys=KEYS) != "accepted"


def test_topics_are_arns() -> None:
    with pytest.raises(SchemeError) as caught:
        build_verifier({"scheme": "sns", "topics": ["MyTopic", TOPIC, 7]})
    assert str(caught.value).splitlines() == [
        "verify.topics.2: expected a non-empty string, got a number",
        "verify.topics.0: expected the ARN of a topic, got 'MyTopic'",
    ]
    with pytest.raises(SchemeError, match="expected the key 'topics', got none"):
        build_verifier({"scheme": "sns"})


def test_only_aws_signs_test_events() -> None:
    with pytest.raises(UsageError, match="only the sender has the private key"):
        VERIFIER.sign(b"{}", now=NOW, id="e1", type="t", headers={})
