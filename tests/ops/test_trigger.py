"""Fixtures as requests: signed as the provider signs, identified as its preset says."""

import json
import random
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.cli import main
from gateway.model import RefusedError, UsageError, event_id
from gateway.ops.fixtures import Fixture, fixture, fixtures
from gateway.ops.fixtures.renewal import renewed, with_identity
from gateway.ops.send import Signed, source_of
from gateway.ops.trigger import body_of, curl, parse_setting, request_of, source_of_provider, with_settings
from gateway.rules.batches import split
from gateway.rules.event_builder import FALLBACK_TYPE, EventBuilder
from gateway.rules.rules import Source
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.ops.providers_rules import private_keys, rules

FIXTURES = fixtures()
NOW = 1_830_000_000.25
URL = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "routes.yaml"
    path.write_text(rules())
    return path


@cache
def signer_of(file: Path, provider: str) -> tuple[Source, Verifier]:
    return source_of(file, provider, secret=private_keys().get(provider))


def triggered(file: Path, found: Fixture, *, now: float = NOW, is_forged: bool = False) -> Signed:
    source, verifier = signer_of(file, found.provider)
    return request_of(found, source, verifier, url=URL, now=now, is_forged=is_forged)


def received(sent: Signed) -> Request:
    headers = tuple([(key.encode(), value.encode()) for key, value in sent.headers])
    return Request(
        method="POST", path=sent.url.raw_path, query=sent.url.raw_query_string, headers=headers, body=sent.body
    )


@pytest.mark.parametrize("found", FIXTURES, ids=lambda found: f"{found.provider}-{found.name}")
def test_a_fixture_is_verified_and_has_the_identity_and_type_of_its_preset(file: Path, found: Fixture) -> None:
    source, _ = signer_of(file, found.provider)
    builder = EventBuilder(source)
    for new in (found, renewed(found, now=NOW, draw=random.Random(1))):
        request = received(triggered(file, new))
        verified = source.verifier.verify(request, now=NOW)
        parts = None if source.split is None else split(request.body, source.split)
        if parts is None:
            events = [builder.event(request, received_at=NOW, identity_expression=verified.identity)]
        else:
            events = builder.events(request, parts, received_at=NOW, identity_expression=verified.identity)
        assert [event.type for event in events] == [found.type] * len(events)
        if new.identity:
            assert [event.id for event in events] == [event_id(found.provider, each) for each in new.identity]
        else:
            assert all(event.id[16] == "7" for event in events)  # of a UUID by time: it has no identity
        if found.name != found.type:
            assert found.type == FALLBACK_TYPE
        with pytest.raises(RefusedError, match=r"^401 "):
            source.verifier.verify(received(triggered(file, new, is_forged=True)), now=NOW)


@pytest.mark.parametrize("found", FIXTURES, ids=lambda found: f"{found.provider}-{found.name}")
def test_the_same_fixture_is_the_same_event_a_day_later(file: Path, found: Fixture) -> None:
    today, tomorrow = [triggered(file, found, now=now) for now in (NOW, NOW + 86_400)]
    has_time_in_body = found.provider in {"linear", "mailgun"}  # it is signed there, so it has to be that of now
    assert (today.body == tomorrow.body) is not has_time_in_body


def test_a_body_has_the_time_and_the_signature_that_its_provider_writes_there(file: Path) -> None:
    issue = orjson.loads(triggered(file, fixture("linear", "Issue")).body)
    assert issue["webhookTimestamp"] == int(NOW * 1000)
    mail = orjson.loads(triggered(file, fixture("mailgun", "delivered")).body)["signature"]
    assert mail["timestamp"] == str(int(NOW))
    assert re.fullmatch(r"[0-9a-f]{64}", mail["signature"])
    [item] = orjson.loads(triggered(file, fixture("adyen", "REFUND")).body)["notificationItems"]
    assert re.fullmatch(r"[\w+/]{43}=", item["NotificationRequestItem"]["additionalData"]["hmacSignature"])


def setting(text: str) -> Any:
    return parse_setting(text)[1:3]


def test_a_value_is_json_if_it_can_be() -> None:
    assert setting("body.a=42") == (["a"], 42)
    assert setting('body.a.b-c[0]["x"]=1'.replace('"', "'")) == (["a", "b-c", 0, "x"], 1)
    assert setting("body['event-data'].event=opened") == (["event-data", "event"], "opened")
    assert setting('body[1].x={"y":[null]}') == ([1, "x"], {"y": [None]})
    assert setting("body.x==") == (["x"], "=")
    assert setting("body.x=") == (["x"], "")
    assert setting('body.x="7"') == (["x"], "7")


@pytest.mark.parametrize(
    "text", ["body=1", "body.x", "headers.x=1", "body..x=1", "body.x[]=1", "body.x y=1", "bodyx=1", "=1", ""]
)
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) or "^$"):
        parse_setting(text)


def with_set(found: Fixture, *texts: str) -> tuple[Any, list[str]]:
    new, added = with_settings(found, [parse_setting(text) for text in texts])
    return new.body, list(added)


def test_values_are_set_where_they_are_and_what_is_new_is_told() -> None:
    stored = fixture("stripe", "invoice.payment_failed")
    body, added = with_set(
        stored,
        "body.data.object.amount_due=42",
        "body.data.object.lines.data[0].description=Two",
        "body.data.object.amount_du=1",
        "body.data.object.metadata.team=billing",
    )
    invoice = body["data"]["object"]
    assert (invoice["amount_due"], invoice["lines"]["data"][0]["description"]) == (42, "Two")
    assert (invoice["amount_du"], invoice["metadata"]) == (1, {"team": "billing"})
    assert added == ["body.data.object.amount_du, did you mean 'amount_due'?", "body.data.object.metadata.team"]
    assert "amount_du" not in stored.body["data"]["object"]
    assert stored.body["data"]["object"]["amount_due"] == 4900


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body.dta.x=1", "expected a field that is there, got dta, did you mean 'data'?"),
        ("body.data.object.lines.data[1].x=1", "expected an item below 1, got 1"),
        ("body.data.object.lines.data[7]=1", "expected an item below 1, got 7"),
        ("body[0]=1", "expected an object for a name, a list for a number, got an object at 0"),
        ("body.data.object.lines.data.x=1", "expected an object for a name, a list for a number, got a list at x"),
        ("body.type.x=1", "expected an object for a name, a list for a number, got neither of both at x"),
    ],
)
def test_a_setting_without_a_place_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        with_set(fixture("stripe", "invoice.payment_failed"), text)
    assert str(error.value) == f"--set: {text.partition('=')[0]}: {message}"


def test_a_form_gets_the_text_as_it_is_written() -> None:
    form, _ = with_settings(fixture("twilio", "message-status"), [parse_setting("body.MessageStatus=1e3")])
    assert b"&MessageStatus=1e3&" in body_of(form)
    assert b"&To=%2B15550006789&" in body_of(form)


def test_a_list_of_events_is_set_by_item(file: Path) -> None:
    new, added = with_settings(fixture("sendgrid", "delivered"), [parse_setting("body[1].event=bounce")])
    assert not added
    assert [each["event"] for each in orjson.loads(triggered(file, new).body)] == ["delivered", "bounce"]


def test_an_identity_of_a_header_is_signed_where_the_provider_signs_it(file: Path) -> None:
    sent = triggered(file, with_identity(fixture("openai", "response.completed"), "mine"))
    source, _ = signer_of(file, "openai")
    assert dict(sent.headers)["webhook-id"] == "mine"
    source.verifier.verify(received(sent), now=NOW)


def test_the_only_source_of_a_provider_is_found(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(
        "version: 1\nsources:\n"
        "  shop: {verify: {scheme: stripe, secrets: ['${NOT_HERE}']}}\n"
        "  a: {verify: {scheme: github, secrets: [s]}}\n"
        "  b: {verify: {scheme: github, secrets: [s]}}\n"
        "destinations: {}\nroutes: []\n"
    )
    assert source_of_provider(path, "stripe") == "shop"
    with pytest.raises(
        UsageError, match=r"^--source: expected one of a, b, which all have `scheme: github`, got none$"
    ):
        source_of_provider(path, "github")
    with pytest.raises(UsageError, match=r"yaml: expected a source with `scheme: slack`, got none: `gateway providers"):
        source_of_provider(path, "slack")


def test_a_curl_command_has_the_request_whatever_is_in_it(file: Path) -> None:
    found, _ = with_settings(fixture("github", "issues"), [parse_setting('body.issue.title=It\'s "$HOME" `x` \\n é')])
    sent = triggered(file, found)
    words = shlex.split(curl(sent))
    assert words[:2] == ["curl", "-i"]
    assert words[words.index("--data-raw") + 1].encode() == sent.body
    given = [words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H"]
    assert [tuple(pair) for pair in given] == list(sent.headers)
    assert words[-1] == f"{URL}/in/github"


def test_who_has_no_private_key_is_told_how_to_sign(file: Path) -> None:
    source, verifier = source_of(file, "sendgrid", secret=None)
    with pytest.raises(
        UsageError, match=r"only the sender has the private key; if the public one is yours, give yours"
    ):
        request_of(fixture("sendgrid", "delivered"), source, verifier, url=URL, now=NOW)
    for secret in ("no key", private_keys()["sendgrid"].replace("MI", "XX")):
        with pytest.raises(UsageError, match=r"^--secret: expected the private key of a P-256 public key in PEM"):
            source_of(file, "sendgrid", secret=secret)


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["trigger", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_without_a_type_the_types_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys)
    assert code == 0
    assert re.search(r"^gitlab +merge_request, pipeline, push *$", out, re.MULTILINE)
    out = command(capsys, "gitlab")[1]
    assert re.search(r"^push +A commit was pushed to main\. *$", out, re.MULTILINE)
    assert "invoice" not in out
    lines = [json.loads(line) for line in command(capsys, "twilio", "--json")[1].splitlines()]
    assert [(each["name"], each["type"]) for each in lines] == [
        ("incoming-message", "webhook"),
        ("message-status", "webhook"),
    ]
    assert all(each["made_from"] for each in lines)
    assert [each["unconfirmed"] for each in lines] == [each.unconfirmed for each in fixtures("twilio")]


def test_what_is_not_confirmed_is_listed_once_with_the_fixtures_that_have_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = fixtures("twilio")
    lines = command(capsys, "twilio")[1].splitlines()
    assert f"not confirmed in incoming-message: {first.unconfirmed}" in lines
    assert f"not confirmed in message-status: {second.unconfirmed}" in lines
    [same] = {each.unconfirmed for each in fixtures("linear")}
    assert command(capsys, "linear")[1].endswith(f"\nnot confirmed in Comment, Issue: {same}\n")
    assert "not confirmed" not in command(capsys, "alertmanager")[1]


def test_a_request_is_printed_and_not_sent(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("stripe", "invoice.paid", "--rules", str(file), "--url", "http://192.0.2.1:9/x", "--print")
    code, out, err = command(capsys, *words, "--set", "body.id=evt_mine", "--set", "body.lifemode=true", "--count", "2")
    assert code == 0
    assert err == "--set: body.lifemode, did you mean 'livemode'?: the fixture has no such field, and gets it\n"
    assert out.count("curl -i ") == out.count('"id":"evt_mine"') == out.count(" http://192.0.2.1:9/x\n") == 2
    request = json.loads(command(capsys, *words, "--json", "--id", "evt_7")[1])
    assert (request["method"], request["url"]) == ("POST", "http://192.0.2.1:9/x")
    assert json.loads(request["body"])["id"] == "evt_7"
    assert json.loads(request["body"])["created"] == fixture("stripe", "invoice.paid").at


def test_each_run_is_of_another_event_and_what_is_set_stays(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = fixture("stripe", "invoice.paid")
    words = ("stripe", "invoice.paid", "--rules", str(file), "--print", "--json", "--set", f"body.created={stored.at}")
    first, second = [json.loads(json.loads(command(capsys, *words)[1])["body"]) for _ in range(2)]
    assert len({first["id"], second["id"], stored.identity[0]}) == 3
    assert first["created"] == second["created"] == stored.at
    assert first["data"]["object"]["status_transitions"]["paid_at"] > stored.at


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stripe", "invoice.payd"), "expected a fixture of stripe, got 'invoice.payd', did you mean 'invoice.paid'?"),
        (("adyen", "REFUND", "--id", "1"), "--id: expected a provider whose events have an identity, got adyen"),
        (
            ("stripe", "invoice.paid", "--set", "amount=1"),
            "--set: expected PATH=VALUE such as body.data.amount=42, got",
        ),
        (("stripe", "invoice.paid", "--source", "stripes"), "unknown source 'stripes', did you mean 'stripe'?"),
        (("stripe", "invoice.paid", "--url", "localhost:8080"), "--url: expected http://host:port/path, got"),
    ],
)
def test_what_cannot_be_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    try:
        code = main(["trigger", *words, "--rules", str(file)])
    except SystemExit as end:  # the parser's
        code = end.code if isinstance(end.code, int) else 0
    assert code == 2
    assert message in capsys.readouterr().err
