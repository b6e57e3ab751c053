"""The services' own libraries and published models take our messages, or send the same themselves.

The fields are drawn anew in each run, and what is rendered of them is held against a judge that isn't ours:

    slack               slack-sdk, Slack's own: its blocks parse and validate ours, its clients send the same
    teams               microsoft-teams-api and -cards, Microsoft's own: models of the message and of each element
    discord             disnake: the limits of its embed, which are Discord's, and the same JSON
    google-chat         google-apps-chat, Google's own: the protobuf message has our fields, and no other
    pagerduty           pagerduty, PagerDuty's own, sends the same
    opsgenie            opsgenie-sdk, Atlassian's own, sends the same
    grafana-annotation  grafana-client sends the same
    github-dispatch     githubkit, made of GitHub's OpenAPI description: its model takes ours, and it sends the same
    gitlab-trigger      python-gitlab sends the same, as JSON
    jenkins             python-jenkins sends the same, in the query
    email-api           sendgrid, SendGrid's own, and postmarker send the same

The libraries of PagerDuty, Opsgenie, Grafana and Postmark check no length: those limits are from the documents that
`source` of the preset names. No library judges how a service shows a text, such as what it makes of an entity.
"""

import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from email.utils import getaddresses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import disnake
import gitlab
import grafana_client
import httpx2
import jenkins
import microsoft_teams.cards.core as teams_cards
import opsgenie_sdk
import pagerduty
import pytest
from githubkit import GitHub
from google.apps.chat_v1.types import Message as ChatMessage
from google.protobuf.json_format import MessageToDict
from microsoft_teams.api import Attachment, MessageActivityInput
from postmarker.core import PostmarkClient
from pydantic import BaseModel
from sendgrid import SendGridAPIClient
from sendgrid.helpers.mail import From, Mail, ReplyTo, To
from slack_sdk import WebClient, WebhookClient
from slack_sdk.models.blocks import Block
from typing_extensions import override

from gateway.model import ExpressionError
from gateway.rules.request_presets import REQUEST_PRESETS
from gateway.rules.request_presets.preset import MAX_LINE, Kind, cut, line, url, visible
from gateway.rules.request_templates import Message
from tests.oracles.conftest import SEED
from tests.rules.test_request_presets import rendered, strings_in

ROUNDS = 200
PIECES = [
    *("x", "main", "acme/app", " ", "  ", "\n", "\r\n", "\r", "\t", "\x00", "\x1b[31m", "\u2028", "\u202e", "\ufeff"),
    *("<!channel>", "<@U1>", "@everyone", "@here", "<at>x</at>", "</b>", "<script>", "&amp;", "&", "<", ">", '"', "'"),
    *("](https://evil.example)", "<https://evil.example|ok>", "*b*", "_i_", "`c`", "~~", "||", "# ", "- ", "\\", "%2F"),
    *(
        "{{DATE(2026-01-01T00:00:00Z)}}",
        "${{ body.x }}",
        "é",
        "中文",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469",
        "\ufffd",
    ),
]
NAMES = ["Branch", "By", "Took", "R&D", "Größe", "a b", "x" * 300]
PEOPLE = ["jo@acme.example", "Ann, O'Neill <ann@acme.example>", "JO@acme.example", "Zoë; Y <zoe@acme.example>"]
URLS = ["https://acme.example/1", "http://a.example:8080/x y|z>\"'<b>?q=%20&r=1#f", "https://ä.example/é\u202e", "nope"]
ANSWER = {"ok": True, "id": 1, "dedup_key": "k", "status": "success", "message": "m", "result": "r", "took": 0.1}
ANSWER |= {"requestId": "i", "ErrorCode": 0, "Message": "OK", "MessageID": "i", "SubmittedAt": "", "To": ""}
"""What each of the libraries looks for in the answer of its service."""


def test_each_preset_has_a_judge() -> None:
    judged = [name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")]
    assert REQUEST_PRESETS.keys() <= {*judged}


# --- Drawing ---


class Round(NamedTuple):
    """What has been drawn for a preset: the texts by the names of its fields, and the message."""

    texts: Mapping[str, Any]
    message: Message
    preset: str

    @property
    def body(self) -> Any:
        return json.loads(self.message.content)

    @property
    def form(self) -> dict[str, str]:
        pairs = parse_qsl(self.message.content.decode(), keep_blank_values=True)
        assert len(pairs) == len(dict(pairs))
        return dict(pairs)

    def read(self, name: str) -> Any:
        """Return what a field is, cut and without what isn't shown: the same input for the library."""
        if isinstance(value := self.texts[name], dict):
            return {key: self._text(name, text) for key, text in value.items()}
        return [self._text(name, text) for text in value] if isinstance(value, list) else self._text(name, value)

    def _text(self, name: str, text: str) -> str:
        known = REQUEST_PRESETS[self.preset].by_name[name]
        if known.kind is Kind.URL:
            return url(text)
        if known.kind not in {Kind.LINE, Kind.LINES, Kind.TEXT, Kind.FACTS}:
            return text
        limit = MAX_LINE if known.limit is None else known.limit
        text = REQUEST_PRESETS[self.preset].escape(visible(text[: limit + 1]))
        return cut(line(text) if known.kind in {Kind.LINE, Kind.LINES} else text, known.limit)

    def given(self, **names: str) -> dict[str, Any]:
        """Return the fields that are there and aren't empty, by the library's names of them."""
        return {theirs: self.read(ours) for theirs, ours in names.items() if ours in self.texts and self.read(ours)}


def rounds(preset: str, draw_texts: Callable[[random.Random], Mapping[str, Any]]) -> Iterator[Round]:
    """Yield what isn't refused, such as for an empty text."""
    refused = 0
    for n in range(ROUNDS):
        texts = draw_texts(random.Random(f"{SEED}/{preset}/{n}"))
        try:
            message = rendered(preset, dict(texts), **{name: a_template(name, texts[name]) for name in texts})
        except ExpressionError:
            refused += 1
        else:
            yield Round(texts, message, preset)
    assert refused < ROUNDS * 0.8


def a_template(name: str, value: object) -> object:
    """Return what takes a field's value from the event, as rules would write it."""
    if name in {"job", "repository"}:  # each / is of the rule's author
        return value
    if name in {"facts", "variables", "parameters"} and isinstance(value, dict):
        return {key: f"${{{{ body['{name}']['{key}'] }}}}" for key in value}
    return f"${{{{ body['{name}'] }}}}"


def a_text(draw: random.Random, limit: int) -> str:
    """Return a text that is empty, short, or about as long as the limit, or much longer."""
    length = draw.choice([0, 1, 7, 40, 40, limit - 1, limit, limit + 1, 3 * limit])
    return draw.choice(["  ", "\n"]) if length == 1 else "".join(draw.choices(PIECES, k=length))[:length]


def some(draw: random.Random, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if draw.random() < 0.8}


def a_chat(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randrange(len(NAMES) + 1)) + [f"n{n}" for n in range(draw.choice([0, 0, 40]))]
    long = draw.choice([50, 2000])
    facts = {name: a_text(draw, long) for name in names}
    if draw.random() < 0.1:
        facts = dict.fromkeys(facts, draw.choice(PIECES) * 2000)
    return some(draw, {
        "title": a_text(draw, draw.choice([150, 256, 500])),
        "text": a_text(draw, draw.choice([3000, 4096, 20_000])),
        "facts": facts,
        "url": draw.choice(URLS) if draw.random() < 0.9 else "https://acme.example/" + "x" * 1979,
        "button": a_text(draw, 75),
    })  # fmt: skip


# --- A service on loopback ---


class Sent(NamedTuple):
    """A request that a library has sent."""

    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class Service(NamedTuple):
    """Stands for each of the services: keeps what is posted."""

    url: str
    posted: list[Sent]

    def last(self) -> Sent:
        sent = self.posted.pop()
        assert not self.posted
        return sent

    def assert_same_json(self, each: Round, path: str) -> None:
        sent = self.last()
        assert (sent.path, sent.query) == (path + each.message.path, each.message.query)
        assert sent.headers["content-type"].split(";")[0] == each.message.content_type
        assert json.loads(sent.body) == each.body


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    posted: list[Sent] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            parts = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            posted.append(Sent(parts.path, parts.query, headers, body))
            self._respond(200)

        def do_GET(self) -> None:
            self._respond(404)

        def _respond(self, status: int) -> None:
            content = json.dumps(ANSWER).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Location", "/queue/item/1/")  # of Jenkins
            self.end_headers()
            self.wfile.write(content)

        @override
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="service")
    thread.start()
    yield Service(f"http://127.0.0.1:{server.server_port}", posted)
    server.shutdown()
    thread.join()
    server.server_close()


# --- Chats ---


def test_slack(service: Service) -> None:
    webhook, web = (
        WebhookClient(f"{service.url}/services/T0/B0/x"),
        WebClient(token="t", base_url=f"{service.url}/api/"),
    )
    for each in rounds("slack", lambda draw: a_chat(draw) | some(draw, {"channel": "C0123"})):
        body = each.body
        blocks = [Block.parse(block) for block in body["blocks"]]
        assert len(blocks) <= 50
        for block, ours in zip(blocks, body["blocks"], strict=True):
            assert block is not None
            block.validate_json()
            assert block.to_dict() == ours
        more: dict[str, Any] = {"blocks": blocks, "unfurl_links": False, "unfurl_media": False}
        if "channel" in each.texts:
            web.chat_postMessage(channel=each.read("channel"), text=body["text"], **more)
            service.assert_same_json(each, "/api/chat.postMessage")
        else:
            webhook.send(text=body["text"], **more)
            service.assert_same_json(each, "/services/T0/B0/x")
        assert len(body["text"]) <= 4000


TEAMS_MODELS: Mapping[str, Any] = {
    model.model_fields["type"].default: model
    for model in vars(teams_cards).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and "type" in model.model_fields
}


def test_teams() -> None:
    for each in rounds("teams", a_chat):
        message = MessageActivityInput.model_validate(each.body)
        assert not message.model_extra
        (ours,) = each.body["attachments"]
        attachment = Attachment.model_validate(ours)
        assert not attachment.model_extra
        assert attachment.model_dump(by_alias=True, exclude_none=True) == ours
        assert ours["contentType"] == "application/vnd.microsoft.card.adaptive"
        assert_is_element(ours["content"])
        assert ours["content"]["body"]
        assert len(each.message.content) <= 28_000  # https://learn.microsoft.com/connectors/teams/#message-size-limit


def assert_is_element(ours: dict[str, Any]) -> None:
    """Check a card or one of its elements; the models of what has elements leave these unchecked."""
    model = TEAMS_MODELS[ours["type"]].model_validate(ours)
    assert {*(model.model_extra or ())} <= {"$schema"}  # which the model has without the $
    assert json.loads(model.model_dump_json(by_alias=True, exclude_unset=True)) == ours
    for name in ("body", "inlines", "actions"):
        for element in ours.get(name, ()):
            assert_is_element(element)


def test_discord() -> None:
    for each in rounds("discord", a_chat):
        (ours,) = each.body["embeds"]
        embed = disnake.Embed.from_dict(ours)
        embed.check_limits()
        assert len(embed) <= 6000
        assert {name: value for name, value in embed.to_dict().items() if name != "type"} == ours
        assert all(text.strip() for text in strings_in(ours))
        assert len(ours.get("url", "")) <= 2048
        assert each.body["allowed_mentions"] == disnake.AllowedMentions.none().to_dict()


def test_google_chat() -> None:
    for each in rounds("google-chat", a_chat):
        message = ChatMessage.from_json(each.message.content.decode())  # which fails for a field that it doesn't know
        assert MessageToDict(ChatMessage.pb(message)) == each.body
        # https://developers.google.com/workspace/chat/api/reference/rest/v1/spaces.messages/create
        assert len(each.message.content) <= 32_000
        sections = each.body["cardsV2"][0]["card"].get("sections", ())
        assert all(0 < len(section["widgets"]) <= 100 for section in sections)


# --- Alerts ---


def test_pagerduty() -> None:
    sent: list[httpx2.Request] = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(202, json=ANSWER)

    def draw_texts(draw: random.Random) -> dict[str, Any]:
        names = ("dedup_key", "source", "component", "group", "class", "timestamp", "button")
        optional: dict[str, Any] = {name: a_text(draw, 300) for name in names}
        optional |= {"severity": draw.choice(["critical", "error", "warning", "info"]), "url": draw.choice(URLS)}
        optional |= {"action": draw.choice(["trigger", "trigger", "acknowledge", "resolve"])}
        optional |= {"details": {name: draw.choice([a_text(draw, 50), 1, None, [True]]) for name in NAMES}}
        return {"routing_key": "R" * 32, "summary": a_text(draw, 1024), **some(draw, optional)}

    # It sends nothing to a URL without https.
    client = pagerduty.EventsApiV2Client("R" * 32, transport=httpx2.MockTransport(respond))
    for each in rounds("pagerduty", draw_texts):
        if each.texts.get("action", "trigger") != "trigger":
            getattr(client, each.texts["action"])(each.read("dedup_key"))
        else:
            link = (
                [{"href": each.read("url"), "text": each.given(x="button").get("x", "Open")}]
                if "url" in each.texts
                else []
            )
            client.trigger(
                each.read("summary"),
                each.given(x="source").get("x", "webhook-gateway"),
                severity=each.texts.get("severity", "error"),
                payload=each.given(component="component", group="group", timestamp="timestamp", **{"class": "class"}),
                custom_details=each.texts.get("details"),
                links=link or None,
                **each.given(dedup_key="dedup_key"),
            )
        request = sent.pop()
        assert str(request.url) == REQUEST_PRESETS["pagerduty"].url
        theirs, ours = json.loads(request.content), each.body
        assert theirs.pop("routing_key", request.headers.get("x-routing-key")) == ours.pop("routing_key")
        assert theirs == ours
        assert len(ours.get("dedup_key", "")) <= 255
        assert len(ours.get("payload", {}).get("summary", "")) <= 1024


def test_opsgenie(service: Service) -> None:
    def draw_texts(draw: random.Random) -> dict[str, Any]:
        optional: dict[str, Any] = {name: a_text(draw, 512) for name in ("alias", "entity", "source")}
        optional |= {"description": a_text(draw, 15_000), "tags": [a_text(draw, 50) for _ in range(draw.randrange(30))]}
        optional |= {"facts": {name: a_text(draw, 500) for name in NAMES[: draw.randrange(6)]}}
        optional |= {"priority": draw.choice(["P1", "P5"]), "action": draw.choice(["create", "create", "close"])}
        return {"message": a_text(draw, 130), **some(draw, optional)}

    configuration = opsgenie_sdk.Configuration()
    configuration.host = service.url
    configuration.api_key["Authorization"] = "k"
    client = opsgenie_sdk.AlertApi(opsgenie_sdk.ApiClient(configuration))
    for each in rounds("opsgenie", draw_texts):
        if each.texts.get("action") == "close":
            note = opsgenie_sdk.CloseAlertPayload(**each.given(source="source"))
            client.close_alert(each.read("alias"), identifier_type="alias", close_alert_payload=note)
        else:
            names = ("message", "alias", "description", "entity", "source", "priority")
            alert = each.given(**{name: name for name in names}, details="facts")
            if "tags" in each.texts and each.read("tags"):
                alert["tags"] = [tag for tag in each.read("tags")[:20] if tag]
            client.create_alert(opsgenie_sdk.CreateAlertPayload(**alert))
            assert len(each.body["message"]) <= 130
        service.assert_same_json(each, "/v2/alerts")


def test_grafana_annotation(service: Service) -> None:
    def draw_texts(draw: random.Random) -> dict[str, Any]:
        optional: dict[str, Any] = {"tags": [a_text(draw, 100) for _ in range(draw.randrange(5))]}
        optional |= {
            "dashboard": "abc-1",
            "panel": draw.randrange(9),
            "time": draw.randrange(10**13),
            "time_end": 10**13,
        }
        return {"text": a_text(draw, 4000), **some(draw, optional)}

    port = urlsplit(service.url).port
    client = grafana_client.GrafanaApi("t", host="127.0.0.1", port=port).annotations
    for each in rounds("grafana-annotation", draw_texts):
        client.add_annotation(
            text=each.read("text"),
            tags=each.read("tags") if "tags" in each.texts else None,
            dashboard_uid=each.texts.get("dashboard"),
            panel_id=each.texts.get("panel"),
            time_from=each.texts.get("time"),
            time_to=each.texts.get("time_end"),
        )
        sent = service.last()
        assert sent.path == "/api/annotations"
        assert {name: value for name, value in json.loads(sent.body).items() if value is not None} == each.body


# --- Builds ---


def test_github_dispatch(service: Service) -> None:
    def draw_texts(draw: random.Random) -> dict[str, Any]:
        payload = {f"k{n}": draw.choice([a_text(draw, 1000), None, 1, {"n": [1]}]) for n in range(draw.randrange(11))}
        repository = draw.choice(["acme/app", "a-b/c_d.e"])
        return {"repository": repository, "event_type": a_text(draw, 100), **some(draw, {"payload": payload})}

    with GitHub("t", base_url=service.url) as client:
        for each in rounds("github-dispatch", draw_texts):
            owner, _, name = each.texts["repository"].partition("/")
            payload = each.texts.get("payload", {})
            client.rest.repos.create_dispatch_event(
                owner, name, event_type=each.read("event_type"), client_payload=payload
            )
            service.assert_same_json(each, "")
            client.rest.repos.create_dispatch_event(owner, name, data=each.body)  # which its model checks
            ours, theirs = dict(each.message.headers), service.last().headers
            assert ours["accept"] == theirs["accept"]
            assert (
                ours.keys() <= theirs.keys()
            )  # x-github-api-version is a later one, which has changed nothing of this
            assert len(payload) <= 10


def test_gitlab_trigger(service: Service) -> None:
    def draw_texts(draw: random.Random) -> dict[str, Any]:
        variables = {name.upper().replace("&", "_"): a_text(draw, 1000) for name in NAMES[: draw.randrange(6)]}
        project = draw.choice(["1", "acme/app", "acme/sub group/é"])
        return {
            "project": project,
            "ref": a_text(draw, 255),
            "token": "glptt-1&2",
            **some(draw, {"variables": variables}),
        }

    client = gitlab.Gitlab(service.url)
    for each in rounds("gitlab-trigger", draw_texts):
        project = client.projects.get(each.read("project"), lazy=True)
        variables = each.read("variables") if "variables" in each.texts else {}
        project.trigger_pipeline(each.read("ref"), each.read("token"), variables)
        sent = service.last()
        assert (sent.path, sent.query) == (each.message.path, each.message.query)
        theirs = json.loads(sent.body)
        assert theirs.pop("inputs", {}) == {}
        # We send a form, as the examples of https://docs.gitlab.com/ci/triggers/ do.
        nested = {f"variables[{name}]": value for name, value in theirs.pop("variables").items()}
        assert each.form == theirs | nested
        assert each.message.content_type == "application/x-www-form-urlencoded"


def test_jenkins(service: Service) -> None:
    def draw_texts(draw: random.Random) -> dict[str, Any]:
        parameters = {name: a_text(draw, 200) for name in NAMES[: draw.randrange(6)]}
        job = draw.choice(["deploy", "apps/deploy", "a/b%20c/d"])
        return {"job": job, **some(draw, {"parameters": parameters, "token": "t&1"})}

    client = jenkins.Jenkins(service.url, "user", "password")
    for each in rounds("jenkins", draw_texts):
        parameters = list(each.read("parameters").items()) if "parameters" in each.texts else None
        client.build_job(each.texts["job"].replace("%20", " "), parameters, each.texts.get("token"))
        sent = service.last()
        assert (sent.path, sent.body) == (each.message.path, b"")
        # It has them in the URL, which others log, and which can't be as long.
        assert each.form == dict(parse_qsl(sent.query, keep_blank_values=True))
        assert each.message.content_type == "application/x-www-form-urlencoded"


# --- Mail ---


def a_mail(draw: random.Random, service: str) -> dict[str, Any]:
    people = draw.choices(PEOPLE, k=draw.randrange(6))
    optional = {"reply_to": draw.choice(PEOPLE), "stream": "outbound"}
    texts = {"service": service, "from": draw.choice(PEOPLE), "to": people, **some(draw, optional)}
    return texts | {"subject": a_text(draw, 500), "text": a_text(draw, 1000)}


def person(text: str) -> tuple[str, str]:
    name, _, address = text.rpartition(" <")
    return name, address.removesuffix(">")


def test_email_api(service: Service) -> None:
    client = SendGridAPIClient("k", host=service.url)
    for each in rounds("email-api", lambda draw: a_mail(draw, "sendgrid")):
        to = [(name.replace(",", "").replace(";", ""), address) for name, address in map(person, each.texts["to"])]
        name, address = person(each.texts["from"])
        mail = Mail(
            From(address, name or None),
            [To(address, name or None) for name, address in to],  # of which it takes each address once
            each.read("subject"),
            plain_text_content=each.read("text"),
        )
        if "reply_to" in each.texts:
            name, address = person(each.texts["reply_to"])
            mail.reply_to = ReplyTo(address, name or None)
        client.send(mail)
        service.assert_same_json(each, "/v3/mail/send")


def test_mails_by_postmark(service: Service) -> None:
    client = PostmarkClient(server_token="t", root_api_url=f"{service.url}/")
    for each in rounds("email-api", lambda draw: a_mail(draw, "postmark")):
        unique = {address.lower(): (name, address) for name, address in map(person, reversed(each.texts["to"]))}
        assert sorted(getaddresses([each.body["To"]])) == sorted(unique.values())
        assert getaddresses([each.body["From"]]) == [person(each.texts["from"])]
        client.emails.send(
            From=each.body["From"],
            To=each.body["To"],
            Subject=each.read("subject"),
            TextBody=each.read("text"),
            ReplyTo=each.body["ReplyTo"] if "reply_to" in each.texts else None,
            MessageStream=each.texts.get("stream"),
        )
        sent = service.last()
        assert sent.path == "/email"
        theirs = json.loads(sent.body)
        assert {name: value for name, value in theirs.items() if value and value != "None"} == each.body
