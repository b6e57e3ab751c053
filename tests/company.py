"""The rules of a company that doesn't exist: 20 teams with 200 routes, and two tests for each of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TEAMS, ROUTES = 20, 10
"""The number of teams, and of routes of each."""
ROOT = """
version: 1
owner: platform
runbook: https://wiki.acme.example/webhooks
defaults: {rate: 50/s, timeout: 5s, retry: {max_age: 1d}}
policy: {require: [owner, runbook], forbid: [unverified], hosts: ["*.acme.example"]}
secrets: {pepper: "${PEPPER}"}
include: teams/*.yaml
sources:
  github: {verify: {scheme: github, secrets: ["${GITHUB_SECRET}"]}, key: body.repository.full_name}
  stripe: {verify: {scheme: stripe, secrets: ["${STRIPE_SECRET}"]}}
  shop:
    verify: {scheme: hmac, header: X-Shop-Signature, secrets: ["${SHOP_SECRET}"]}
    id: body.id
    type: body.type
    key: body.customer.id
  cms:
    verify: {scheme: hmac, header: X-Cms-Signature, secrets: ["${CMS_SECRET}"]}
    id: body.id
    type: body.type
"""
PUSH = {
    "ref": "refs/heads/main",
    "deleted": False,
    "repository": {"name": "app", "full_name": "acme/app"},
    "pusher": {"name": "jo"},
    "commits": [
        {"id": f"{number:040x}", "message": f"Change {number}", "added": ["a.py"], "author": {"name": "Jo"}}
        for number in range(3)
    ],
}
ORDER = {
    "type": "order.paid",
    "customer": {"id": "c-7", "email": "Jo@Acme.example", "name": "Jo"},
    "items": [{"sku": "tea", "count": 2}, {"sku": "pot", "count": 1}],
    "amount": 4711,
    "currency": "eur",
    "at": 1767323045,
}
PAGE = {"type": "page.published", "site": "www", "path": "/tea", "title": "Tea"}
CHARGE = {
    "type": "charge.failed",
    "data": {"object": {"id": "ch_1", "amount": 1999, "currency": "usd", "customer": "cus_7", "created": 1767323045}},
}


def write(folder: Path) -> Path:
    """Write the files of the company, and return the root."""
    (folder / "teams").mkdir(parents=True)
    (root := folder / "routes.yaml").write_text(ROOT)
    for team in range(TEAMS):
        content = yaml.safe_dump(_team(team), sort_keys=False, width=1000)
        (folder / "teams" / f"team-{team:02}.yaml").write_text(content)
    return root


def events() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield a source, a type and a body without end, as they come in the company: each team has some of its own."""
    number = 0
    while True:
        team = number % TEAMS
        yield "github", "push", PUSH | {"repository": {"name": f"app-{team}", "full_name": f"acme/app-{team}"}}
        yield "shop", "order.paid", ORDER | {"id": f"o-{number}", "shop": f"shop-{team}"}
        yield "cms", "page.published", PAGE | {"id": f"p-{number}", "site": f"site-{team}"}
        yield "stripe", "charge.failed", CHARGE | {"id": f"evt_{number}", "account": f"acct_{team}"}
        number += 1


def _team(team: int) -> dict[str, Any]:
    name = f"team-{team:02}"
    url = f"https://{name}.acme.example"
    kinds = list(_routes(team))
    assert len(kinds) == ROUTES
    return {
        "owner": name,
        "runbook": f"https://wiki.acme.example/{name}",
        "destinations": {
            f"{name}-api": {"url": f"{url}/api", "concurrency": 20},
            f"{name}-ci": {"url": f"{url}/ci", "rate": "5/s"},
            f"{name}-chat": {"url": f"{url}/chat", "rate": "1/s"},
        },
        "routes": [{"name": f"{name}-{what}", **route} for what, route, *_ in kinds],
        "tests": [test for kind in kinds for test in _tests(name, *kind)],
    }


def _routes(team: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Yield each route's name, keys, an event that it takes, one that it doesn't, and what it sends."""
    api, ci, chat = f"team-{team:02}-api", f"team-{team:02}-ci", f"team-{team:02}-chat"
    push = _event("github", PUSH | {"repository": {"name": f"app-{team}", "full_name": f"acme/app-{team}"}}, "push")
    of_others = _event("github", PUSH | {"repository": {"name": "x", "full_name": "acme/x"}}, "push")
    order = _event("shop", ORDER | {"id": "1", "shop": f"shop-{team}"})
    no_order = _event("shop", ORDER | {"id": "1", "shop": f"shop-{team}", "type": "order.opened"})
    page = _event("cms", PAGE | {"id": "1", "site": f"site-{team}"})
    no_page = _event("cms", PAGE | {"id": "1", "site": "other"})
    charge = _event("stripe", CHARGE | {"id": "evt_1", "account": f"acct_{team}"})
    no_charge = _event("stripe", CHARGE | {"id": "evt_1", "account": f"acct_{team}", "type": "charge.succeeded"})
    repository, shop = {"body.repository.full_name": f"acme/app-{team}"}, {"body.shop": f"shop-{team}"}
    yield "build", {"from": "github", "match": {"type": "push", **repository}, "to": ci}, push, of_others, {}
    yield (
        "tell",
        {
            "from": "github",
            "match": {"type": "push", **repository},
            "when": "size(body.commits) > 0 && body.ref == 'refs/heads/main'",
            "to": chat,
            "request": {
                "preset": "slack",
                "title": "${{ body.pusher.name }} pushed to ${{ body.repository.full_name }}",
                "text": {"for": "body.commits", "as": "c", "do": "• ${{ c.message }}", "join": "\n"},
            },
        },
        push,
        of_others,
        {},
    )
    yield (
        "commits",
        {
            "from": "github",
            "match": {"type": "push", **repository},
            "split": "body.commits",
            "to": api,
            "request": {"path": "/commits/${{ item.id }}", "method": "PUT", "body": {"by": "${{ item.author.name }}"}},
        },
        push,
        of_others,
        {"method": "PUT"},
    )
    yield (
        "orders",
        {"from": "shop", "match": {"type": "order.paid", **shop}, "order": "key", "to": api},
        order,
        no_order,
        {},
    )
    yield (
        "analytics",
        {
            "from": "shop",
            "match": {"type": "order.*", **shop, "body.amount": {"gt": 1000}},
            "let": {"who": "hmac(body.customer.email.lower(), 'pepper')"},
            "to": api,
            "request": {"body": {"who": "${{ who }}", "what": "${{ type }}", "for": "${{ body.amount }}"}},
        },
        order,
        _event("shop", ORDER | {"id": "1", "shop": f"shop-{team}", "amount": 1}),
        {"body_has": {"what": "order.paid", "for": 4711}},
    )
    yield (
        "mail",
        {
            "from": "shop",
            "match": {"type": "order.paid", **shop},
            "delay": "1h",
            "to": api,
            "request": {
                "path": "/mails",
                "form": {
                    "to": "${{ body.customer.email.lower() }}",
                    "text": "${{ money(body.amount, body.currency) }}, ${{ date(body.at, '%d %b', 'Europe/Berlin') }}",
                },
            },
        },
        order,
        no_order,
        {"method": "POST"},
    )
    yield (
        "stock",
        {
            "from": "shop",
            "match": {"type": "order.paid", **shop},
            "to": api,
            "request": {"path": "/stock", "body": {"for": "body.items", "as": "i", "do": {"sku": "${{ i.sku }}"}}},
        },
        order,
        no_order,
        {"body": [{"sku": "tea"}, {"sku": "pot"}]},
    )
    yield (
        "site",
        {
            "from": "cms",
            "match": {"type": ["page.published", "page.removed"], "body.site": f"site-{team}"},
            "debounce": {"key": "body.site", "quiet": "30s"},
            "to": ci,
            "request": {"body": {"site": "${{ body.site }}", "last": "${{ body.path }}"}},
        },
        page,
        no_page,
        {"body": {"site": f"site-{team}", "last": "/tea"}},
    )
    yield (
        "search",
        {
            "from": "cms",
            "match": {"body.site": f"site-{team}", "body.title": {"exists": True}},
            "to": api,
            "request": {"method": "PUT", "path": "/search/${{ body.path }}", "body": {"title": "${{ body.title }}"}},
        },
        page,
        no_page,
        {"url": f"https://team-{team:02}.acme.example/api/search/%2Ftea"},
    )
    yield (
        "failed",
        {
            "from": "stripe",
            "match": {"type": "charge.failed", "body.account": f"acct_{team}"},
            "let": {"charge": "body.data.object"},
            "to": chat,
            "request": {
                "preset": "slack",
                "title": "${{ money(charge.amount, charge.currency) }} failed",
                "text": "Customer ${{ charge.customer }}",
            },
        },
        charge,
        no_charge,
        {},
    )


def _event(source: str, body: Mapping[str, Any], event: str = "") -> dict[str, Any]:
    headers = {"headers": {"X-GitHub-Event": event}} if event else {}
    return {"source": source, **headers, "body": json.loads(json.dumps(body))}


def _tests(
    team: str, what: str, _: object, taken: object, left: Mapping[str, Any], request: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    name, body = f"{team}-{what}", left["body"]
    others: tuple[str, ...] = ()
    if body.get("type") == "order.opened":
        others = ("analytics",)
    elif body.get("amount") == 1:
        others = ("orders", "mail", "stock")
    routes = [f"{team}-{each}" for each in others]
    yield {"name": f"{name}: takes it", "event": taken, "expect": {"requests": [{"route": name, **request}]}}
    yield {"name": f"{name}: leaves it", "event": left, "expect": {"routes": routes}}
