"""What `gateway explain` shows."""

import json
from pathlib import Path

import pytest

from gateway.model import DeadReason, RefusedError, UsageError
from gateway.ops.explain import BatchError, Explained, explain
from gateway.rules.load import load_rules

RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: [s]}, key: body.repo}
  crm: {verify: {scheme: token, header: X-Token, secrets: [s]}, id: body.event, type: body.kind}
destinations:
  ci:
    url: "https://ci.test/hook?token=abc&b"
    headers: {X-Api-Key: secret}
    sign: {secrets: [whsec_c2VjcmV0]}
  chat: {url: "https://chat.test/plain"}
routes:
  - {name: build, from: github, match: {type: push}, when: "!body.deleted", to: [ci, chat]}
  - {name: rendered, from: github, match: {type: push}, to: chat, request: {body: {text: "${{ body.who }} pushed"}}}
  - {name: compared, from: github, when: "body.n < 3", to: chat}
  - {name: customers, from: crm, to: chat}
"""


def explained(
    folder: Path, body: bytes, *, source: str = "github", type_: str = "push", is_secret_shown: bool = False
) -> Explained:
    path = folder / "routes.yaml"
    path.write_text(RULES)
    headers = ((b"X-GitHub-Event", type_.encode()), (b"X-GitHub-Delivery", b"1"), (b"Authorization", b"Bearer no"))
    return explain(
        load_rules(path), source=source, headers=headers, query="", body=body, now=1e9, is_secret_shown=is_secret_shown
    )


def reasons(result: Explained) -> dict[str, str]:
    return {route.name: route.reason for route in result.routes}


def test_every_route_has_its_reason(tmp_path: Path) -> None:
    told = reasons(explained(tmp_path, b'{"deleted": true, "who": "jo"}'))
    assert told["build"] == "when: false: !body.deleted"
    assert told["rendered"] == "matched"
    assert told["compared"] == "when: body.n isn't there"
    assert told["customers"] == "from: expected crm, got github"


def test_the_event_is_the_one_that_the_ingress_would_make(tmp_path: Path) -> None:
    event = explained(tmp_path, b'{"repo": "shop"}').event
    assert (event.type, event.key, event.source) == ("push", "shop", "github")
    assert event.id == explained(tmp_path, b'{"repo": "other"}').event.id  # of the provider's own id
    assert b"Authorization" not in dict(event.headers)


def test_an_address_that_is_not_known_here_is_as_it_is_written(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(RULES.replace("https://chat.test/", "https://[${HOST}]/"))
    rules = load_rules(file, environ={}, resolve=False)
    told = explain(rules, source="crm", headers=(), query="", body=b'{"event": "1", "kind": "x"}', now=0.0)
    [planned] = [planned for route in told.routes for planned in route.requests]
    assert planned.request is not None
    assert planned.request.address == "https://[${HOST}]/plain"


def test_each_request_is_as_it_would_be_sent(tmp_path: Path) -> None:
    build, rendered, *_ = explained(tmp_path, b'{"deleted": false, "who": "jo"}', is_secret_shown=True).routes
    to_ci, to_chat = [planned.request for planned in build.requests]
    assert to_ci is not None
    assert to_chat is not None
    headers = dict(to_ci.headers)
    assert (headers[b"X-Api-Key"], headers[b"X-GitHub-Event"], headers[b"gateway-route"]) == (
        b"secret",
        b"push",
        b"build",
    )
    assert headers[b"webhook-signature"].startswith(b"v1,")
    assert to_ci.url == "https://ci.test/hook?token=abc&b"
    assert to_ci.body == b'{"deleted": false, "who": "jo"}'
    assert to_chat.url == "https://chat.test/plain"
    (planned,) = rendered.requests
    assert planned.request is not None
    assert planned.request.body == b'{"text":"jo pushed"}'


def test_secrets_are_masked_unless_asked_for(tmp_path: Path) -> None:
    build, *_ = explained(tmp_path, b'{"deleted": false}').routes
    request = build.requests[0].request
    assert request is not None
    headers = dict(request.headers)
    assert headers[b"X-Api-Key"] == headers[b"webhook-signature"] == b"***"
    assert headers[b"X-GitHub-Event"] == b"push"
    assert request.url == "https://ci.test/hook?***"


def test_credentials_of_every_kind_are_masked(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text("""
version: 1
sources: {in: {verify: {scheme: none}}}
destinations:
  basic: {url: "http://a.test", auth: {basic: {username: us, password: s3cret}}}
  bearer: {url: "http://a.test", auth: {bearer: {token: s3cret}}}
  oauth2: {url: "http://a.test", auth: {oauth2: {token_url: "http://s3cret", client_id: us, client_secret: s3cret}}}
  proxied: {url: "http://a.test", proxy: "http://proxy.test:1", proxy_auth: {username: us, password: s3cret}}
routes: [{name: r, from: in, to: [basic, bearer, oauth2, proxied]}]
""")
    rules = load_rules(path)

    def told(*, is_secret_shown: bool) -> list[bytes | None]:
        result = explain(rules, source="in", headers=(), query="", body=b"", now=1e9, is_secret_shown=is_secret_shown)
        requests = [planned.request for planned in result.routes[0].requests]
        assert "s3cret" not in repr(result)
        return [dict(request.headers).get(b"authorization") for request in requests if request]

    assert told(is_secret_shown=False) == [b"***", b"***", b"Bearer ***", None]
    assert told(is_secret_shown=True) == [b"Basic dXM6czNjcmV0", b"Bearer s3cret", b"Bearer ***", None]


def test_a_failing_template_is_shown_as_its_dead_letter(tmp_path: Path) -> None:
    _, rendered, *_ = explained(tmp_path, b"{}").routes
    (planned,) = rendered.requests
    assert rendered.is_matched
    assert planned.request is None
    assert planned.problem == "request.body: body.who isn't there (check with has(body.who))"
    _, rendered, *_ = explained(tmp_path, b'{"whom": "jo", "when": 1}').routes
    assert rendered.requests[0].available_fields == "body has: whom, when"


def test_a_condition_that_fails_is_the_dead_letter_of_each_destination(tmp_path: Path) -> None:
    compared = explained(tmp_path, b'{"n": "three"}').routes[2]
    assert compared.is_matched
    assert compared.reason.startswith("when: failed: ")
    assert [(each.destination, each.request, each.problem, each.reason) for each in compared.requests] == [
        ("chat", None, compared.reason, DeadReason.EXPRESSION_ERROR)
    ]


def test_an_event_that_the_ingress_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"400 body_not_json: id: expected a JSON body"):
        explained(tmp_path, b"text", source="crm")


UNREAD, GOT, A_PART = "rules can't read the body: expected ", ", got something else", ", got only part of one"


@pytest.mark.parametrize(
    ("media_type", "body", "warnings"),
    [
        (
            b"multipart/form-data; boundary=x",
            b"--x--y",
            (f"{UNREAD}a multipart form up to its last boundary{A_PART}",),
        ),
        (
            b"text/xml",
            b"<!DOCTYPE a><a/>",
            (f"{UNREAD}XML that begins with an element, not a document type, got another start",),
        ),
        (b"application/x-www-form-urlencoded", b"tag=a&tag=b&n=1", ()),
        (b"application/json", b'{"tag": ["a", "b"]}', ()),
        (b"application/json", b'{"tag": ', ("rules can't read the body: expected a JSON body, got something else",)),
        (b"text/plain", b"", ()),
    ],
)
def test_a_body_that_rules_cannot_read_is_explained(
    tmp_path: Path, media_type: bytes, body: bytes, warnings: tuple[str, ...]
) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text("version: 1\nsources:\n  in: {verify: {scheme: none}}\n")
    headers = ((b"Content-Type", media_type),)
    assert (
        explain(load_rules(path), source="in", headers=headers, query="", body=body, now=1e9).body_warnings == warnings
    )


def test_an_unknown_source_is_reported_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--source: unknown source 'gitub', did you mean 'github'[?]$"):
        explained(tmp_path, b"{}", source="gitub")


def test_a_resolved_reference_is_never_shown(tmp_path: Path) -> None:
    """Wherever it ends up: in a URL, a template's header or body, the words of a condition."""
    (tmp_path / "routes.yaml").write_text("""
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}}
destinations:
  chat: {url: "${CHAT_URL}"}
routes:
  - name: told
    from: github
    to: chat
    request:
      headers: {X-Key: "Bearer ${SECRET}"}
      body: {key: "${SECRET}", text: "${{ body.n }} by ${SECRET}", plain: "${PLAIN:-shown by default}"}
  - {name: typed, from: github, match: {body.token: "${SECRET}"}, to: chat}
  - {name: raw, from: github, to: chat}
  - {name: sent, from: github, to: chat, request: {path: "/${{ '${PATH_KEY}' }}/x", query: {key: "${SECRET}"}}}
  - {name: filled, from: github, to: chat, request: {form: {key: "${SECRET}", n: "${{ body.n }}"}}}
  - name: computed
    from: github
    to: chat
    request:
      headers: {Authorization: "Basic ${{ base64('u:${PATH_KEY}') }}", X-Own: "1"}
      path: /${{ sha256('${PATH_KEY}') }}
      query: {a: "${{ '${PATH_KEY}'.upper() }}"}
      body: {key: "${{ '${PATH_KEY}'.replace('s', 'z') }}"}
""")
    secret = "s'e\"cré\\t"
    environ = {"SECRET": secret, "PATH_KEY": "s crite", "CHAT_URL": "https://chat.test/T0/B1?x=1"}
    rules = load_rules(tmp_path / "routes.yaml", environ=environ)

    def told(*, is_secret_shown: bool) -> str:
        body = json.dumps({"n": 1, "token": "x", "echo": secret}, ensure_ascii=False).encode()
        result = explain(
            rules, source="github", headers=(), query="", body=body, now=1e9, is_secret_shown=is_secret_shown
        )
        requests = [planned.request for route in result.routes for planned in route.requests]
        parts = [(request.address, request.headers, request.body) for request in requests if request]
        return repr([(route.name, route.reason) for route in result.routes]) + repr(parts)

    masked = told(is_secret_shown=False)
    assert "cr" not in masked
    assert "T0" not in masked
    assert "https://chat.test/***/***?***" in masked
    assert "https://chat.test/***/***/***?***&key=***" in masked
    assert "key=***&n=1" in masked
    assert "https://chat.test/***/***/***?***&***" in masked
    assert "crite" not in masked
    assert "CRITE" not in masked
    assert "dTpzIGNyaXRl" not in masked
    assert "X-Own" in masked
    assert "dTpzIGNyaXRl" in told(is_secret_shown=True)
    assert "Bearer ***" in masked
    assert '"text":"1 by ***"' in masked
    assert '"plain":"shown by default"' in masked
    assert "typed" in masked
    assert "https://chat.test/T0/B1?x=1" in told(is_secret_shown=True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:9101/hooks", "http://127.0.0.1:9101/hooks"),
        ("http://127.0.0.1:9101/hooks/", "http://127.0.0.1:9101/hooks/"),
        ("http://127.0.0.1:9101/hooks/github", "http://127.0.0.1:9101/hooks/***"),
        ("https://hooks.slack.com/services/T012AB3CD/B012AB3CD/abcdef", "https://hooks.slack.com/services/***"),
        ("https://[::1]:80/?k=v", "https://[::1]:80/?***"),
        ("https://a.test", "https://a.test/"),
    ],
)
def test_of_a_url_only_the_first_part_of_the_path_is_shown(tmp_path: Path, url: str, shown: str) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(f"""
version: 1
sources: {{in: {{verify: {{scheme: none}}}}}}
routes: [{{name: r, from: in, to: {{name: d, url: "{url}"}}}}]
""")
    result = explain(load_rules(path), source="in", headers=(), query="", body=b"", now=1e9)
    request = result.routes[0].requests[0].request
    assert request is not None
    assert request.url == shown


SPLIT = """
version: 1
sources: {in: {verify: {scheme: none}, split: body.records}}
destinations: {d: {url: "https://a.test/"}, e: {url: "https://b.test/"}}
routes: [{name: r, from: in, to: [d, e], delay: 5m, split: body.rows}]
"""


def of_split(folder: Path, body: bytes, *, is_event: bool = False) -> Explained:
    path = folder / "routes.yaml"
    path.write_text(SPLIT)
    headers = ((b"Content-Type", b"application/json"),)
    return explain(
        load_rules(path), source="in", headers=headers, query="", body=body, now=1e9, identity="a", is_event=is_event
    )


def test_what_a_route_delays_and_splits_is_shown_as_it_is_sent(tmp_path: Path) -> None:
    (route,) = of_split(tmp_path, b'{"rows": [1, 2]}').routes
    assert [(each.destination, each.part, each.problem) for each in route.requests] == [
        ("d", 0, ""),
        ("d", 1, ""),
        ("e", 0, ""),
        ("e", 1, ""),
    ]
    assert [each.request and each.request.body for each in route.requests] == [b"1", b"2"] * 2
    assert route.wait == "delivered 5m after its receipt"
    (route,) = of_split(tmp_path, b"{}").routes
    assert [each.problem for each in route.requests] == ["split: body.rows isn't there"] * 2


def test_a_body_that_is_several_events_is_none(tmp_path: Path) -> None:
    for body, number in ((b'{"records": [{"rows": []}, {}]}', "2 events"), (b'{"records": []}', "0 events")):
        told = rf"^the ingress makes {number} of this body \(split\): pass one of its items as the event$"
        with pytest.raises(BatchError, match=told):
            of_split(tmp_path, body)
    with pytest.raises(RefusedError, match=r"^400 malformed_batch"):
        of_split(tmp_path, b"text")
    assert of_split(tmp_path, b'{"records": [1]}', is_event=True).routes, "one that has been stored so"


def test_an_event_without_an_identity_has_the_id_that_is_given(tmp_path: Path) -> None:
    assert len({of_split(tmp_path, body).event.id for body in (b'{"rows": []}', b"{}")}) == 1
    ids = {explained(tmp_path, b'{"event": %d, "kind": "x"}' % number, source="crm").event.id for number in (1, 2)}
    assert len(ids) == 2


def test_a_long_reference_is_looked_for_before_a_condition_is_cut(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text("""
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}}
destinations:
  ci: {url: "https://ci.test/"}
routes:
  - {name: typed, from: github, match: {body.token: "${SECRET}"}, to: ci}
  - {name: others, from: github, match: {not: {body.token: {not: "${SECRET}"}}}, to: ci}
""")
    rules = load_rules(tmp_path / "routes.yaml", environ={"SECRET": "long-secret-" * 8})
    told = reasons(explain(rules, source="github", headers=(), query="", body=b'{"token": "x"}', now=1e9))
    assert told["typed"] == "body.token: expected ***, got x"
    assert told["others"] == "not: body.token: not (***)"
