"""Messages for services: their exact form, their limits, and what an event can't do in them."""

import contextlib
import html
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import EventView
from gateway.rules.load import check_rules, load_rules
from gateway.rules.request_presets import REQUEST_PRESETS
from gateway.rules.request_presets.field_kinds import field_kind
from gateway.rules.request_presets.preset import Kind, PresetRequest, cut, visible
from gateway.rules.request_templates import Message
from gateway.rules.templates import Template
from tests.builders import an_event

A = "${{ body.a }}"
_CHAT: dict[str, Any] = {"title": A, "facts": {"F": A}, "url": "https://x.example/?q=1", "button": A}
_MAIL: dict[str, Any] = {"service": "sendgrid", "from": "g@acme.example", "to": "jo@acme.example"}
FIELDS: dict[str, dict[str, Any]] = {
    "slack": {**_CHAT, "text": f"*{A}*"},
    "teams": {**_CHAT, "text": f"x {A}"},
    "discord": {**_CHAT, "text": f"**{A}**"},
    "google-chat": {**_CHAT, "text": f"<b>{A}</b>"},
    "pagerduty": {"routing_key": "key", "summary": f"s {A}", "dedup_key": A, "source": A, "details": {"d": A}},
    "opsgenie": {"message": f"m {A}", "alias": A, "description": A, "tags": [A], "facts": {"F": A}},
    "grafana-annotation": {"text": f"<b>{A}</b>", "tags": [A]},
    "github-dispatch": {"repository": "acme/app", "event_type": f"t {A}", "payload": {"p": A}},
    "gitlab-trigger": {"project": A, "ref": f"r {A}", "token": "t", "variables": {"V": A}},
    "jenkins": {"job": "folder/job", "parameters": {"P": A}},
    "email-api": {**_MAIL, "subject": f"s {A}", "text": f"t {A}"},
}
"""Of each preset, fields in which an event has its say."""
HOSTILE = {
    "mentions": "<!channel> <@U1> <!here|x> @everyone @here <users/all> </at> <at>x</at>",
    "links": "](https://evil.example) <https://evil.example|ok> [a](b) |b>",
    "tags": "</b><script>alert(1)</script><a href=\"x\" onclick='y'>&amp;&#60;",
    "lines": "a\r\nBcc: all@acme.example\r\n\r\nb\u2028c\x00d\x1b[31m",
    "quotes": '"}],"x":{"\'`\\\\\\',
    "direction": "\u202efdp.exe\u2066x\u2069\ufeff\u200e\u200f\u061c",
    "unseen": "a\u200b\u00ad\u2060\u3164\U000e0069\U000e0067\U000e0100b\U0001d173",
    "huge": "&<*" * 300_000,
    "empty": "",
    "spaces": " \n\t ",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 \u4e2d\u6587" * 50,
}

UNCHANGED = {"github-dispatch", "pagerduty"}
"""Presets with values as they are: in `payload`, and in `details`."""


def template_of(preset: str, **fields: Any) -> PresetRequest:
    known = REQUEST_PRESETS[preset]
    templates: Any = {name: field_kind(known.by_name[name]).parse(value) for name, value in fields.items()}
    return PresetRequest(known, templates)


def rendered(preset: str, body: object = None, **fields: Any) -> Message:
    view = EventView.of(an_event(body=body if isinstance(body, bytes) else json.dumps(body).encode()))
    return template_of(preset, **fields).render(view)


def body_of(preset: str, body: object = None, **fields: Any) -> Any:
    return json.loads(rendered(preset, body, **fields).content)


def strings_in(value: object) -> list[str]:
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.values() for text in strings_in(item)]
        case list():
            return [text for item in value for text in strings_in(item)]
        case _:
            return []


# --- The form of each ---


def test_slack() -> None:
    body = body_of(
        "slack",
        {"repo": "acme/app", "who": "Jo <jo>"},
        title="Push to ${{ body.repo }}",
        text="*${{ body.who }}* pushed",
        facts={"Branch": "main", "None": None, "Commits": 3},
        url="https://acme.example/1",
        button="Look",
        channel="C1",
    )
    assert body == {
        "text": "Push to acme/app",
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": "Push to acme/app"}},
            {"type": "section", "text": {"type": "mrkdwn", "text": "*Jo &lt;jo&gt;* pushed", "verbatim": True}},
            {
                "type": "section",
                "fields": [
                    {"type": "mrkdwn", "text": "*Branch*\nmain", "verbatim": True},
                    {"type": "mrkdwn", "text": "*Commits*\n3", "verbatim": True},
                ],
            },
            {
                "type": "actions",
                "elements": [
                    {"type": "button", "text": {"type": "plain_text", "text": "Look"}, "url": "https://acme.example/1"}
                ],
            },
        ],
        "unfurl_links": False,
        "unfurl_media": False,
        "channel": "C1",
    }


def test_teams() -> None:
    body = body_of("teams", title="T", text="one\n\n*two*", facts={"Branch": "main"}, url="https://acme.example/1")
    assert body == {
        "type": "message",
        "attachments": [
            {
                "contentType": "application/vnd.microsoft.card.adaptive",
                "content": {
                    "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
                    "type": "AdaptiveCard",
                    "version": "1.4",
                    "body": [
                        {
                            "type": "RichTextBlock",
                            "inlines": [{"type": "TextRun", "text": "T", "weight": "Bolder", "size": "Large"}],
                        },
                        {"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": "one"}]},
                        {"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": "*two*"}]},
                        {
                            "type": "RichTextBlock",
                            "inlines": [
                                {"type": "TextRun", "text": "Branch: ", "weight": "Bolder"},
                                {"type": "TextRun", "text": "main"},
                            ],
                        },
                    ],
                    "actions": [{"type": "Action.OpenUrl", "title": "Open", "url": "https://acme.example/1"}],
                },
            }
        ],
    }


def test_discord() -> None:
    body = body_of(
        "discord", {"who": "*Jo*"}, title="T", text="**${{ body.who }}**", facts={"F": "v"}, url="https://a.example/"
    )
    assert body == {
        "embeds": [
            {
                "title": "T",
                "description": r"**\*Jo\***",
                "fields": [{"name": "F", "value": "v", "inline": True}],
                "url": "https://a.example/",
            }
        ],
        "allowed_mentions": {"parse": []},
    }


def test_a_link_of_discord_without_a_title_is_an_authors() -> None:
    (embed,) = body_of("discord", text="x", url="https://a.example/")["embeds"]
    assert embed == {"description": "x", "author": {"name": "Open", "url": "https://a.example/"}}


def test_google_chat() -> None:
    body = body_of(
        "google-chat",
        {"who": "<Jo>"},
        title="T",
        text="<b>${{ body.who }}</b>",
        facts={"F": "v"},
        url="https://a.example/",
    )
    assert body == {
        "cardsV2": [
            {
                "cardId": "event",
                "card": {
                    "header": {"title": "T"},
                    "sections": [
                        {
                            "widgets": [
                                {"textParagraph": {"text": "<b>&lt;Jo&gt;</b>"}},
                                {"decoratedText": {"topLabel": "F", "text": "v", "wrapText": True}},
                                {
                                    "buttonList": {
                                        "buttons": [
                                            {"text": "Open", "onClick": {"openLink": {"url": "https://a.example/"}}}
                                        ]
                                    }
                                },
                            ]
                        }
                    ],
                },
            }
        ]
    }


def test_pagerduty() -> None:
    fields = {"routing_key": "R", "summary": "down", "dedup_key": "ci", "severity": "critical", "class": "probe"}
    assert body_of("pagerduty", **fields, details={"n": 1, "l": [True]}, url="https://a.example/") == {
        "routing_key": "R",
        "event_action": "trigger",
        "dedup_key": "ci",
        "payload": {
            "summary": "down",
            "source": "webhook-gateway",
            "severity": "critical",
            "class": "probe",
            "custom_details": {"n": 1, "l": [True]},
        },
        "links": [{"href": "https://a.example/", "text": "Open"}],
    }
    resolve = "${{ body.ok ? 'resolve' : 'trigger' }}"
    assert body_of("pagerduty", {"ok": True}, **fields, action=resolve) == {
        "routing_key": "R",
        "event_action": "resolve",
        "dedup_key": "ci",
    }
    assert body_of("pagerduty", {"ok": False}, **fields, action=resolve)["event_action"] == "trigger"


def test_opsgenie() -> None:
    fields = {"message": "down", "alias": "ci/1", "priority": "P1", "tags": ["a", "b"], "facts": {"F": 1}}
    found = rendered("opsgenie", **fields)
    assert json.loads(found.content) == {
        "message": "down",
        "alias": "ci/1",
        "tags": ["a", "b"],
        "priority": "P1",
        "details": {"F": "1"},
    }
    assert (found.path, found.query) == ("", "")
    closed = rendered("opsgenie", **fields, action="close", source="gateway")
    assert (closed.path, closed.query) == ("/ci%2F1/close", "identifierType=alias")
    assert json.loads(closed.content) == {"source": "gateway"}


def test_grafana() -> None:
    fields = {"text": "<b>deployed</b>", "tags": "deploy", "dashboard": "abc", "panel": 2, "time": "${{ body.ms }}"}
    assert body_of("grafana-annotation", {"ms": 1_700_000_000_000}, **fields) == {
        "text": "<b>deployed</b>",
        "tags": ["deploy"],
        "dashboardUID": "abc",
        "panelId": 2,
        "time": 1_700_000_000_000,
    }


def test_github() -> None:
    found = rendered(
        "github-dispatch", {"r": "app.js"}, repository="acme/${{ body.r }}", event_type="go", payload={"n": 1}
    )
    assert found.path == "/repos/acme/app.js/dispatches"
    assert json.loads(found.content) == {"event_type": "go", "client_payload": {"n": 1}}
    assert dict(found.headers) == {"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"}


def test_gitlab() -> None:
    found = rendered("gitlab-trigger", project="acme/app", ref="main", token="t&1", variables={"A": "x=1&y", "B": 2})
    assert found.path == "/api/v4/projects/acme%2Fapp/trigger/pipeline"
    assert found.content_type == "application/x-www-form-urlencoded"
    assert parse_qs(found.content.decode()) == {
        "token": ["t&1"],
        "ref": ["main"],
        "variables[A]": ["x=1&y"],
        "variables[B]": ["2"],
    }


def test_jenkins() -> None:
    with_parameters = rendered(
        "jenkins", {"e": "prod"}, job="apps/deploy-${{ body.e }}", parameters={"A": "x=1&y"}, token="t"
    )
    assert with_parameters.path == "/job/apps/job/deploy-prod/buildWithParameters"
    assert parse_qs(with_parameters.content.decode()) == {"A": ["x=1&y"], "token": ["t"]}
    assert rendered("jenkins", job="deploy").path == "/job/deploy/build"


def test_mail() -> None:
    fields = {"from": "Gateway <g@acme.example>", "to": ["jo@acme.example", "Ann, O'Neill <ann@acme.example>"]}
    fields |= {"subject": "Order", "text": "paid", "reply_to": "help@acme.example"}
    assert body_of("email-api", service="sendgrid", **fields) == {
        "personalizations": [
            {"to": [{"email": "jo@acme.example"}, {"email": "ann@acme.example", "name": "Ann O'Neill"}]}
        ],
        "from": {"email": "g@acme.example", "name": "Gateway"},
        "subject": "Order",
        "content": [{"type": "text/plain", "value": "paid"}],
        "reply_to": {"email": "help@acme.example"},
    }
    assert body_of("email-api", service="postmark", stream="outbound", **fields) == {
        "From": '"Gateway" <g@acme.example>',
        "To": 'jo@acme.example, "Ann, O\'Neill" <ann@acme.example>',
        "Subject": "Order",
        "TextBody": "paid",
        "ReplyTo": "help@acme.example",
        "MessageStream": "outbound",
    }


# --- What an event can't do ---


def test_each_preset_is_given_the_hostile() -> None:
    assert FIELDS.keys() == REQUEST_PRESETS.keys()


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("preset", FIELDS)
def test_a_hostile_value_stays_a_value(preset: str, value: str) -> None:
    event = json.dumps({"a": value}).encode()
    began = time.process_time()
    try:
        found = rendered(preset, event, **FIELDS[preset])
    except ExpressionError as error:
        is_too_large = "got more" in error.args[0] or (preset in UNCHANGED and value is HOSTILE["huge"])
        assert not value.strip() or is_too_large, "only what is empty, or too large and not cut, is refused"
        return
    finally:
        assert time.process_time() - began < 1
    harmless = rendered(preset, {"a": "ok"}, **FIELDS[preset])
    assert found.headers == harmless.headers
    assert found.query == harmless.query
    if found.content_type == "application/json":
        sent = json.loads(found.content)
        _assert_same_shape(sent, json.loads(harmless.content))
        for text in strings_in(sent):
            assert preset in UNCHANGED or not re.search(
                "[\x00-\x08\x0b-\x1f\x7f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\U000e0000-\U000e0fff\ud800-\udfff]",
                text,
            )
    else:
        assert parse_qs(found.content.decode()).keys() <= parse_qs(harmless.content.decode()).keys()
        assert found.path.count("/") == harmless.path.count("/")


def _assert_same_shape(sent: object, harmless: object) -> None:
    """Check that nothing is there that isn't for a harmless value, but for more lines, and less where it is empty."""
    if isinstance(sent, dict):
        assert isinstance(harmless, dict)
        assert sent.keys() <= {*harmless.keys(), "author"}  # which has Discord's link if the title is empty
        for key in sent:
            has_more = key in {"body", "blocks", "widgets", "content", "sections"} and isinstance(sent[key], list)
            if key in harmless and not has_more:
                _assert_same_shape(sent[key], harmless[key])
    elif isinstance(sent, list):
        assert isinstance(harmless, list)
        for one, other in zip(sent, harmless, strict=False):
            _assert_same_shape(one, other)
    else:
        assert type(sent) is type(harmless)


def test_nothing_of_an_event_mentions_or_links_in_slack() -> None:
    for value in HOSTILE.values():
        try:
            sent = body_of("slack", json.dumps({"a": value}).encode(), **FIELDS["slack"])
        except ExpressionError:
            continue
        for text in strings_in(sent):
            assert "<" not in text
            assert ">" not in text
            assert not re.search(r"&(?!amp;|lt;|gt;)", text) or text.startswith("https://")


def test_a_body_of_ones_own_is_json_and_no_markup_of_a_service() -> None:
    """Which service it is for isn't known. A body that is one string isn't even JSON: it is sent as it comes out."""
    view = EventView.of(an_event(body=json.dumps({"a": '<!channel>"}'}).encode()))
    written, _ = Template({"text": A}).render_bytes(view)
    assert json.loads(written) == {"text": '<!channel>"}'}
    as_string, content_type = Template(f'{{"text": "{A}"}}').render_bytes(view)
    assert (as_string, content_type) == (b'{"text": "<!channel>"}"}', None)


def test_nothing_of_an_event_is_markup_in_google_chat_or_grafana() -> None:
    for value in (HOSTILE["tags"], HOSTILE["mentions"]):
        event = json.dumps({"a": value}).encode()
        chat = body_of("google-chat", event, **FIELDS["google-chat"])
        text = chat["cardsV2"][0]["card"]["sections"][0]["widgets"][0]["textParagraph"]["text"]
        annotation = body_of("grafana-annotation", event, **FIELDS["grafana-annotation"])["text"]
        for each in (text, annotation):
            assert re.findall("<[^>]*>", each) == ["<b>", "</b>"]
            assert html.unescape(each.removeprefix("<b>").removesuffix("</b>")) == value


def test_nothing_of_an_event_is_markup_in_discord() -> None:
    event = {"a": HOSTILE["links"] + HOSTILE["mentions"] + "\\* # - > `x` ||y|| ~~z~~ __u__"}
    (embed,) = body_of("discord", event, **FIELDS["discord"])["embeds"]
    inner = embed["description"].removeprefix("**").removesuffix("**")
    assert re.sub(r"\\(.)", r"\1", inner) == event["a"]
    assert not re.search(r"(?<!\\)(?:\\\\)*[*_~`|<>\[\]()#@]", inner)


@pytest.mark.parametrize(
    "value", ["javascript:alert(1)", "data:text/html,x", "//evil.example", "ftp://a", "", "https://", "http://[", "x"]
)
@pytest.mark.parametrize("preset", ["slack", "teams", "discord", "google-chat", "pagerduty"])
def test_a_link_is_a_web_address(preset: str, value: str) -> None:
    with pytest.raises(ExpressionError, match="url: expected an http or https URL"):
        rendered(preset, {"a": value}, **{**FIELDS[preset], "url": "${{ body.a }}"})


def test_a_link_ends_nothing_that_it_is_in() -> None:
    body = body_of(
        "slack", {"a": "https://a.example/x y|z>\"'<b>\n\u202e\u00e9?q=%20&r=1#f"}, text="x", url="${{ body.a }}"
    )
    assert body["blocks"][1]["elements"][0]["url"] == ("https://a.example/x%20y%7Cz%3E%22'%3Cb%3E%0A%C3%A9?q=%20&r=1#f")


@pytest.mark.parametrize(
    "address",
    ["a@b.example, c@d.example", "a@b.example\r\nBcc: x@y.example", "a", "a@", "<a@b>x", 'a" <b@c.example>, "x'],
)
@pytest.mark.parametrize("service", ["sendgrid", "postmark"])
def test_an_address_adds_no_other(service: str, address: str) -> None:
    fields = {"service": service, "from": "g@acme.example", "subject": "s", "text": "t"}
    with pytest.raises(ExpressionError, match="expected one address"):
        rendered("email-api", {"a": address}, to="${{ body.a }}", **fields)


def test_a_path_is_never_another(tmp_path: Path) -> None:  # noqa: ARG001
    for value in ("a/b", "..", ".", "", "a/../../x"):
        for preset, field in (("github-dispatch", "repository"), ("jenkins", "job")):
            fields = {**FIELDS[preset], field: "acme/${{ body.a }}"}
            with pytest.raises(ExpressionError, match=f"{field}: expected"):
                rendered(preset, {"a": value}, **fields)


# --- Limits ---


def test_texts_are_cut_where_the_services_are() -> None:
    event = {"a": "x" * 100_000}
    slack = body_of("slack", event, **FIELDS["slack"])
    title, text, facts, _ = slack["blocks"]
    assert (len(title["text"]["text"]), len(text["text"]["text"])) == (150, 3000)
    assert len(facts["fields"][0]["text"]) <= 2000
    assert len(slack["text"]) <= 3000
    (embed,) = body_of(
        "discord", event, **{**FIELDS["discord"], "facts": {f"f{n}": "${{ body.a }}" for n in range(25)}}
    )["embeds"]
    assert len(embed["title"]) == 256
    assert sum(map(len, strings_in({**embed, "url": ""}))) <= 6000
    assert all(len(each["value"]) <= 1024 for each in embed["fields"])
    assert len(rendered("teams", {"a": "\u4e2d\n" * 50_000}, **FIELDS["teams"]).content) <= 28_000
    assert len(rendered("google-chat", {"a": "\u4e2d&" * 50_000}, **FIELDS["google-chat"]).content) <= 32_000
    pagerduty = body_of("pagerduty", event, **{**FIELDS["pagerduty"], "dedup_key": "k"})
    assert len(pagerduty["payload"]["summary"]) == 1024
    opsgenie = body_of("opsgenie", event, **{**FIELDS["opsgenie"], "alias": "a"})
    assert [len(opsgenie[each]) for each in ("message", "description")] == [130, 15_000]


@pytest.mark.parametrize("value", ["\u4e2d" * 3000, '"' * 3000, "x" * 3000])
def test_many_long_facts_are_within_the_limits(value: str) -> None:
    many = {f"fact {n}": "${{ body.a }}" for n in range(60)}
    for preset, limit in (("teams", 28_000), ("google-chat", 32_000)):
        fields = {**_CHAT, "text": A, "facts": many}
        content = rendered(preset, {"a": value}, **fields).content
        assert limit / 3 < len(content) <= limit
        assert value[:100] in " ".join(strings_in(json.loads(content))).replace("&quot;", '"')
    (embed,) = body_of("discord", {"a": value}, text=A, facts=many, url="https://a.example/", button=A)["embeds"]
    assert 5000 < sum(map(len, strings_in(embed))) - len("https://a.example/") <= 6000
    details = body_of("opsgenie", {"a": value}, message="m", facts=many)["details"]
    assert 7000 < sum(map(len, [*details, *details.values()])) <= 8000


def test_an_address_is_sent_to_once() -> None:
    fields = {"from": "g@acme.example", "subject": "s", "text": "t"}
    people = ["Jo <jo@acme.example>", "ann@acme.example", "JO@acme.example", "jo@acme.example"]
    body = body_of("email-api", {"to": people}, service="sendgrid", to="${{ body.to }}", **fields)
    assert body["personalizations"] == [
        {"to": [{"email": "jo@acme.example", "name": "Jo"}, {"email": "ann@acme.example"}]}
    ]
    body = body_of("email-api", {"to": people}, service="postmark", to="${{ body.to }}", **fields)
    assert body["To"] == '"Jo" <jo@acme.example>, ann@acme.example'


def test_no_recipient_is_left_out() -> None:
    fields = {"service": "sendgrid", "from": "g@acme.example", "subject": "s", "text": "t"}
    people = [*["jo@acme.example"] * 100, "ann@acme.example"]
    with pytest.raises(ExpressionError, match=r"^to: expected at most 100 of them, got 101$"):
        rendered("email-api", {"to": people}, to="${{ body.to }}", **fields)


@pytest.mark.parametrize("text", ["a" + " " * 9_990 + "b", "," + " " * 9_900 + "x <jo@acme.example>", "<" * 9_990])
def test_a_long_address_takes_no_time_that_anybody_notices(text: str) -> None:
    """It is an event's, and all others wait while it is read."""
    fields = {"service": "sendgrid", "from": "g@acme.example", "subject": "s", "text": "t"}
    began = time.process_time()
    with contextlib.suppress(ExpressionError):
        rendered("email-api", {"to": [*["jo@acme.example"] * 49, text]}, to="${{ body.to }}", **fields)
    with contextlib.suppress(ExpressionError):
        rendered("email-api", {"to": [text] * 100}, to="${{ body.to }}", **fields)
    assert time.process_time() - began < 0.5  # 0.05 s; 16 s where a search begins at each of its spaces


def test_the_name_of_a_recipient_is_no_address() -> None:
    fields = {"service": "sendgrid", "from": "g@acme.example", "subject": "s", "text": "t"}
    body = body_of("email-api", {"a": "x, eve@evil.example; y <jo@acme.example>"}, to="${{ body.a }}", **fields)
    assert body["personalizations"] == [{"to": [{"email": "jo@acme.example", "name": "x eve@evil.example y"}]}]


@pytest.mark.parametrize(
    ("preset", "field", "limit"),
    [
        ("pagerduty", "dedup_key", 255),
        ("opsgenie", "alias", 512),
        ("gitlab-trigger", "ref", 255),
        ("github-dispatch", "event_type", 100),
        ("slack", "channel", 80),
    ],
)
def test_what_names_something_is_not_cut(preset: str, field: str, limit: int) -> None:
    fields = {**FIELDS[preset], field: "${{ body.name }}"}
    rendered(preset, {"a": "x", "name": "n" * limit}, **fields)
    with pytest.raises(ExpressionError, match=f"^{field}: expected at most {limit} characters, got more$"):
        rendered(preset, {"a": "x", "name": "n" * (limit + 1)}, **fields)


@pytest.mark.parametrize("preset", ["gitlab-trigger", "jenkins"])
def test_no_parameter_of_a_build_is_left_out(preset: str) -> None:
    key = "variables" if preset == "gitlab-trigger" else "parameters"
    with pytest.raises(ExpressionError, match=f"{key}: expected at most 100 keys, got 101"):
        rendered(preset, {"a": "x"}, **{**FIELDS[preset], key: {f"K{n}": "v" for n in range(101)}})


def test_a_long_card_takes_no_time() -> None:
    """Lines beyond those of a card don't make it smaller, and a byte at a time is no way to shorten it."""
    text = "\n".join(["x" * 50] * 200) + "\n" * 9000
    began = time.process_time()
    assert len(rendered("teams", {"a": text}, text=A).content) <= 28_000
    assert time.process_time() - began < 0.2


def test_a_link_in_a_text_is_a_web_address_or_fails() -> None:
    slack = {"text": "<${{ body.url }}|open>"}
    assert body_of("slack", {"url": "https://a.example/x|y>z"}, **slack)["blocks"][0]["text"]["text"] == (
        "<https://a.example/x%7Cy%3Ez|open>"
    )
    chat = {"text": '<a href="${{ body.url }}">open</a>'}
    text = body_of("google-chat", {"url": 'https://a.example/"x&y'}, **chat)
    widget = text["cardsV2"][0]["card"]["sections"][0]["widgets"][0]["textParagraph"]["text"]
    assert widget == '<a href="https://a.example/%22x&amp;y">open</a>'
    discord = {"text": "[open](${{ body.url }})"}
    for preset, fields in (("slack", slack), ("google-chat", chat), ("discord", discord)):
        for url in ("!channel", "javascript:alert(1)", "@U1", "subteam^S1"):
            with pytest.raises(ExpressionError, match="text: expected an http or https URL, got something else"):
                rendered(preset, {"url": url}, **fields)


@pytest.mark.parametrize("value", ["..", ".", ""])
def test_a_name_climbs_out_of_no_path(value: str) -> None:
    with pytest.raises(ExpressionError, match="expected a segment of a path"):
        rendered("gitlab-trigger", {"a": value}, project=A, ref="main", token="t")
    with pytest.raises(ExpressionError, match="expected"):
        rendered("opsgenie", {"a": value}, message="m", alias=A, action="close")


def test_a_repository_may_be_one_value() -> None:
    fields = {"repository": A, "event_type": "go"}
    assert rendered("github-dispatch", {"a": "acme/app"}, **fields).path == "/repos/acme/app/dispatches"
    for value in ("acme", "acme/app/x", "acme/..", "/app", "acme/"):
        with pytest.raises(ExpressionError, match="repository: expected"):
            rendered("github-dispatch", {"a": value}, **fields)


def test_a_form_has_no_plus_for_a_space() -> None:
    """So that a secret in it is found where secrets are masked."""
    assert b"token=correct%20horse" in rendered("jenkins", job="j", token="correct horse").content


@pytest.mark.parametrize("length", range(2, 14))
def test_nothing_is_cut_in_two(length: int) -> None:
    assert re.fullmatch(r"x?(&amp;)*…|x?(&amp;)*", cut("x&amp;&amp;", length))
    assert re.fullmatch(r"x?(\\\*)*…|x?(\\\*)*", cut(r"x\*\*\*\*\*", length))
    assert len(cut("x&amp;&amp;", length)) <= length


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("slack", {"title": "${{ body.none }}"}, "expected something in title, text or facts, got nothing"),
        ("teams", {"text": "${{ body.none }}"}, "expected something in title, text or facts"),
        ("discord", {"facts": {"a": "${{ body.none }}"}}, "expected something in title, text or facts"),
        ("google-chat", {"text": " \n"}, "expected something in title, text or facts"),
        ("slack", {"text": "${{ body.list }}"}, "text: expected a string, got a list"),
        ("slack", {"text": "x", "facts": {"a": "${{ body.list }}"}}, "facts: expected a string, got a list"),
        ("pagerduty", {"routing_key": "k", "summary": "${{ body.none }}"}, "summary: expected a string with something"),
        ("pagerduty", {"routing_key": "k", "summary": "s", "action": "resolve"}, "expected a dedup_key to resolve"),
        (
            "pagerduty",
            {"routing_key": "k", "summary": "s", "action": "resolve", "dedup_key": "${{ body.none }}"},
            "expected a dedup_key to resolve",
        ),
        (
            "pagerduty",
            {"routing_key": "k", "summary": "s", "severity": "${{ body.list[0] }}"},
            "severity: expected one of",
        ),
        (
            "pagerduty",
            {"routing_key": "k", "summary": "s", "details": {"x": "${{ body.big }}"}},
            "expected a body of at most 524288 bytes, got 600",
        ),
        ("opsgenie", {"message": "m", "action": "close"}, "alias: expected one to close, got none"),
        ("grafana-annotation", {"text": "x", "time": "${{ body.none }}"}, "time: expected an integer, got a string"),
        ("github-dispatch", {"repository": "app", "event_type": "x"}, "repository: expected an owner and a name"),
        (
            "github-dispatch",
            {"repository": "a/b", "event_type": "x", "payload": {str(n): 1 for n in range(11)}},
            "payload: expected at most 10 keys",
        ),
        (
            "github-dispatch",
            {"repository": "a/b", "event_type": "x", "payload": {"x": "${{ body.big }}"}},
            "payload: expected at most 65,535 bytes, got 600",
        ),
        (
            "github-dispatch",
            {"repository": "a/b", "event_type": "${{ body.none }}"},
            "event_type: expected a string with",
        ),
        (
            "email-api",
            {**_MAIL, "to": "${{ body.many }}", "subject": "s", "text": "t"},
            "to: expected 1 to 50 addresses, got 51",
        ),
        ("email-api", {**_MAIL, "subject": "${{ body.none }}", "text": "t"}, "expected a subject and a text"),
    ],
)
def test_what_a_service_would_refuse_is_not_sent(preset: str, fields: dict[str, Any], message: str) -> None:
    event = {"none": "", "list": ["x"], "many": [f"jo{n}@acme.example" for n in range(51)], "big": "x" * 600_000}
    with pytest.raises(ExpressionError, match=message):
        rendered(preset, event, **fields)


def test_a_missing_field_is_named_with_the_field_of_the_message() -> None:
    with pytest.raises(MissingFieldError, match=r"^text: body\.nothing isn't there$"):
        rendered("slack", {"a": 1}, text="${{ body.nothing }}")


# --- In a rule file ---

RULES = """
version: 1
sources: {{gh: {{verify: {{scheme: none}}}}}}
destinations: {{d: {{url: "http://127.0.0.1:1/"}}}}
routes: [{{name: told, from: gh, to: d, request: {request}}}]
"""


@pytest.mark.parametrize(
    ("request_", "messages"),
    [
        ("{preset: slac, text: x}", ["expected one of slack, teams, "]),
        ("{preset: slack, txt: x}", ["unknown key 'txt', did you mean 'text'?"]),
        ("{preset: [slack]}", ["expected one of slack, teams, "]),
        ("{preset: slack, body: x}", ["unknown key 'body'"]),
        ("{preset: slack, text: x, url: 'javascript:x'}", ["expected an http or https URL, got something else"]),
        ("{preset: slack, text: [x]}", ["expected a string, got a list"]),
        ("{preset: slack, text: '${{ bdy.x }}'}", ["expected CEL in ${{ … }}, got '${{ bdy.x }}': unknown name 'bdy'"]),
        ("{preset: pagerduty, summary: x}", ["expected the key 'routing_key', got none"]),
        (
            "{preset: pagerduty, routing_key: k, summary: x, severity: bad}",
            ["expected one of critical, error, warning, info, got 'bad'"],
        ),
        ("{preset: grafana-annotation, text: x, panel: a}", ["expected an integer, got 'a'"]),
        ("{preset: jenkins, job: ../x}", ["expected a path without the segments . and .., got one with .."]),
        ("{text: x}", ["unknown key 'text'"]),
        ("{preset: slack}", ["expected something in title, text or facts, got nothing"]),
        ("{preset: github-dispatch, repository: acme, event_type: x}", ["repository: expected an owner and a name"]),
        (
            "{preset: pagerduty, routing_key: k, summary: s, action: resolve}",
            ["expected a dedup_key to resolve, got none"],
        ),
        (
            "{preset: slack, text: {for: body.l, as: i, do: x}}",
            ["expected a string, or a mapping with for, as, do and"],
        ),
    ],
)
def test_mistakes(request_: str, messages: list[str], tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.format(request=request_))
    rules, problems = check_rules(file)
    assert rules is None
    found = [each.message for each in problems if each.severity == "error"]
    assert len(found) == len(messages)
    for each, message in zip(found, messages, strict=True):
        assert each.startswith(message)


def test_kinds_of_fields_that_are_cut_have_a_limit_or_no_end() -> None:
    for preset in REQUEST_PRESETS.values():
        for field in preset.fields:
            if field.kind in {Kind.TEXT, Kind.FACTS}:
                assert field.limit is not None, (preset.name, field.name)


def test_headers_go_along(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(
        RULES.format(request="{preset: slack, text: 'by ${{ body.who }}', headers: {X-Who: '${{ body.who }}'}}")
    )
    request = load_rules(file).routes["told"].request
    assert request is not None
    assert not request.sends_event
    assert [name for name, _ in request.headers] == ["X-Who"]
    assert unquote(request.message.render(EventView.of(an_event(body={"who": "jo"}))).path) == ""  # type: ignore[union-attr]


IGNORABLE = (
    "00AD 034F 061C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFF8 "
    "1BCA0-1BCA3 1D173-1D17A E0000-E0FFF"
)
"""Default_Ignorable_Code_Point of https://www.unicode.org/Public/17.0.0/ucd/DerivedCoreProperties.txt.

Among them is all of Bidi_Control, of PropList.txt: 061C, 200E-200F, 202A-202E and 2066-2069.
"""
KEPT = "\u200c\u200d\u180b\u180c\u180d\u180f" + "".join(map(chr, range(0xFE00, 0xFE10)))


def test_what_is_not_seen_is_left_out_but_for_what_emoji_and_scripts_need() -> None:
    ranges = [[int(each, 16) for each in part.split("-")] for part in IGNORABLE.split()]
    characters = [chr(code) for first, *last in ranges for code in range(first, (last or [first])[0] + 1)]
    assert [each for each in characters if visible(f"a{each}b") != "ab"] == sorted(KEPT)
    for text in (
        "\U0001f469\U0001f3fd\u200d\U0001f4bb",
        "\u2764\ufe0f",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "a\tb\nc",
    ):
        assert visible(text) == text
