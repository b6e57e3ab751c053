"""Messages for people: Slack, Microsoft Teams, Discord and Google Chat."""

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

from gateway.model import ExpressionError
from gateway.rules.json_values import dumps
from gateway.rules.request_presets.preset import (
    Fact,
    Field,
    Kind,
    RequestPreset,
    as_message,
    cut,
    escaped_html,
    facts_within,
    fitted,
)
from gateway.rules.request_templates import Message

_MARKDOWN = re.compile(r"([\\`*_~|\[\]()<>#@:+-])")


def _fields(markup: str, *, title: int, text: int, fact: int) -> tuple[Field, ...]:
    """Return the fields of a chat message with their limits."""
    return (
        Field(name="title", kind=Kind.LINE, about="A heading, in one line.", limit=title),
        Field(name="text", kind=Kind.TEXT, about=f"What has happened{markup}.", limit=text),
        Field(name="facts", kind=Kind.FACTS, about="Names with their values, such as `Branch: main`.", limit=fact),
        Field(name="url", kind=Kind.URL, about="Where a button leads."),
        Field(name="button", kind=Kind.LINE, about="What is on the button: `Open`.", limit=75),
    )


def _expect_content(values: Mapping[str, Any]) -> None:
    if not (values.get("title") or values.get("text", "").strip() or _facts(values)):
        raise ExpressionError("expected something in title, text or facts, got nothing")


def _facts(values: Mapping[str, Any]) -> list[Fact]:
    return [(name, value) for name, value in values.get("facts", ()) if value.strip()]


def _json_size(overhead: int) -> Callable[[Fact], int]:
    """Return a function for the bytes of a fact in JSON, plus an overhead for what is around it."""
    return lambda fact: len(dumps(fact)) + overhead


MAX_LINES = 200
"""Maximum lines of a Teams card. Each is an element."""

# --- Slack ---


def _slack(values: Mapping[str, Any]) -> Message:
    _expect_content(values)
    title, text = values.get("title", ""), values.get("text", "")
    blocks: list[dict[str, Any]] = []
    if title:
        blocks.append({"type": "header", "text": {"type": "plain_text", "text": title}})
    if text := text.strip():
        blocks.append({"type": "section", "text": _mrkdwn(text)})
    facts = [_mrkdwn(cut(f"*{name}*\n{value}", 2000)) for name, value in _facts(values)[:30]]
    blocks += [{"type": "section", "fields": facts[at : at + 10]} for at in range(0, len(facts), 10)]
    if "url" in values:
        label = {"type": "plain_text", "text": values.get("button") or "Open"}
        blocks.append({"type": "actions", "elements": [{"type": "button", "text": label, "url": values["url"]}]})
    summary = title or text or ", ".join(f"{name}: {value}" for name, value in _facts(values))
    body = {"text": cut(summary, 3000), "blocks": blocks, "unfurl_links": False, "unfurl_media": False}
    return as_message(body | ({"channel": values["channel"]} if "channel" in values else {}))


def _mrkdwn(text: str) -> dict[str, Any]:
    """Return a text object. Without `verbatim`, Slack makes links and mentions of some plain words.

    https://docs.slack.dev/reference/block-kit/composition-objects/text-object
    """
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def _escaped_mrkdwn(text: str) -> str:
    """Escape the characters with which mentions, links and commands begin. Slack has no entities for quotes.

    https://docs.slack.dev/messaging/formatting-message-text#escaping
    """
    return html.escape(text, quote=False)


SLACK = RequestPreset(
    name="slack",
    about="A message in Block Kit, for an incoming webhook, or with `channel` for chat.postMessage.",
    url="https://hooks.slack.com/services/…, or https://slack.com/api/chat.postMessage with `auth: {bearer: …}`",
    source="https://docs.slack.dev/reference/block-kit/blocks",
    fields=(
        *_fields(", in mrkdwn: `*bold*`, `<https://…|link>`", title=150, text=3000, fact=1900),
        Field(name="channel", kind=Kind.LINE, about="The channel's id, for chat.postMessage.", limit=80, is_exact=True),
    ),
    build=_slack,
    escape=_escaped_mrkdwn,
    link_after=re.compile(r"<$"),
)


# --- Microsoft Teams ---


def _teams(values: Mapping[str, Any]) -> Message:
    _expect_content(values)
    text = "\n".join(values.get("text", "").split("\n")[:MAX_LINES])
    return Message(fitted(text, 27_000, lambda text: dumps(_card(values, text))))


def _card(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    body: list[dict[str, Any]] = []
    if title := values.get("title"):
        body.append(_runs({"text": title, "weight": "Bolder", "size": "Large"}))
    body += [_runs({"text": each}) for each in text.split("\n") if each.strip()]
    for name, value in facts_within(_facts(values)[:20], 18_000, _json_size(120)):
        body.append(_runs({"text": f"{name}: ", "weight": "Bolder"}, {"text": value}))
    card: dict[str, Any] = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": body,
    }
    if "url" in values:
        card["actions"] = [{"type": "Action.OpenUrl", "title": values.get("button") or "Open", "url": values["url"]}]
    return {
        "type": "message",
        "attachments": [{"contentType": "application/vnd.microsoft.card.adaptive", "content": card}],
    }


def _runs(*runs: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a card. A TextRun has no Markdown and no mentions, unlike a TextBlock."""
    return {"type": "RichTextBlock", "inlines": [{"type": "TextRun", **run} for run in runs]}


TEAMS = RequestPreset(
    name="teams",
    about="An Adaptive Card, for the workflow that posts to a channel when a webhook request is received.",
    url="what the workflow shows: https://….logic.azure.com/workflows/…",
    source="https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/connectors-using",
    fields=_fields(", without markup", title=500, text=20_000, fact=1000),
    build=_teams,
)


# --- Discord ---


def _discord(values: Mapping[str, Any]) -> Message:
    _expect_content(values)
    embed: dict[str, Any] = {}
    left = 6000  # characters of all texts in an embed together
    if title := values.get("title"):
        embed["title"] = title
        left -= len(title)
    if "url" in values:
        # Only a title or an author is a link.
        author = values.get("button") or "Open"
        embed |= {"url": values["url"]} if title else {"author": {"name": author, "url": values["url"]}}
        left -= 0 if title else len(author)
    facts = [(cut(name, 256), value) for name, value in _facts(values)[:25]]
    facts = facts_within(facts, left - 1000, lambda fact: len(fact[0]) + len(fact[1]))
    if facts:
        embed["fields"] = [{"name": name, "value": value, "inline": True} for name, value in facts]
        left -= sum(len(name) + len(value) for name, value in facts)
    if text := values.get("text", "").strip():
        embed["description"] = cut(text, min(4096, left))
    return as_message({"embeds": [embed], "allowed_mentions": {"parse": []}})


def _escaped_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


DISCORD = RequestPreset(
    name="discord",
    about="A message with an embed, which mentions nobody.",
    url="https://discord.com/api/webhooks/…",
    source="https://discord.com/developers/docs/resources/webhook#execute-webhook",
    fields=_fields(", in Markdown", title=256, text=4096, fact=1024),
    build=_discord,
    escape=_escaped_markdown,
    link_after=re.compile(r"\]\($"),
)


# --- Google Chat ---


def _google_chat(values: Mapping[str, Any]) -> Message:
    _expect_content(values)
    return Message(fitted(values.get("text", ""), 31_000, lambda text: dumps(_cards(values, text))))


def _cards(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    widgets: list[dict[str, Any]] = []
    if text.strip():
        widgets.append({"textParagraph": {"text": text}})
    for name, value in facts_within(_facts(values)[:50], 18_000, _json_size(70)):
        widgets.append({"decoratedText": {"topLabel": name, "text": value, "wrapText": True}})
    if "url" in values:
        button = {"text": values.get("button") or "Open", "onClick": {"openLink": {"url": values["url"]}}}
        widgets.append({"buttonList": {"buttons": [button]}})
    card: dict[str, Any] = {}
    if title := values.get("title"):
        card["header"] = {"title": title}
    if widgets:
        card["sections"] = [{"widgets": widgets}]
    return {"cardsV2": [{"cardId": "event", "card": card}]}


GOOGLE_CHAT = RequestPreset(
    name="google-chat",
    about="A message with a card.",
    url="https://chat.googleapis.com/v1/spaces/…/messages?key=…&token=…",
    source="https://developers.google.com/workspace/chat/api/reference/rest/v1/cards",
    fields=_fields(", with tags: `<b>`, `<i>`, `<a href>`", title=200, text=20_000, fact=1000),
    build=_google_chat,
    escape=escaped_html,
    link_after=re.compile(r"(?:href\s*=\s*[\"']?|<)$"),
)
