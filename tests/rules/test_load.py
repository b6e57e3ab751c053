"""What a rule file means, and every problem of one that means nothing, with its location."""

import base64
import gc
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.log.topics import Topics
from gateway.model import Disposition, RefusedError, RulesError
from gateway.required_topics import specs_of
from gateway.rules.conditions import parse_condition
from gateway.rules.expressions import Expression
from gateway.rules.load import InvalidRulesError, check_rules, load_rules
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import Destination, Egress, Rules, SourceLimits
from gateway.rules.templates import Template
from gateway.rules.yaml_document import Problem
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from tests.certificates import Authority

SOURCES = "sources: {github: {verify: {scheme: github, secrets: [s3cret-s3cret-s3cret]}}}\n"
DESTINATIONS = "destinations: {ci: {url: https://ci.internal/hook}}\n"
ROUTES = "routes: [{name: build, from: github, to: ci}]\n"
GOOD = "version: 1\n" + SOURCES + DESTINATIONS + ROUTES

EVERY_KEY = r"""
version: 1
egress: {private: refuse, allow: [10.0.0.0/8, "fd00::1"]}
sources:
  github:
    path: /hooks/github
    verify: {scheme: github, secrets: ["${SECRET}", "${file:old}"]}
    id: headers['x-github-delivery']
    type: headers['x-github-event']
    key: body.repository.full_name
    topic: company.github
    dedupe: 36h
    quarantine: true
    public_url: https://hooks.example.com/hooks/github
  open:
    verify: {scheme: none}
destinations:
  ci:
    url: ${CI:-https://ci.internal/hook}
    headers: {Authorization: "Bearer ${TOKEN}", X-Price: "$${5}"}
    sign: {secrets: [whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw, c2Vjb25kLXNlY29uZC1zZWNvbmQ]}
    forward_headers: [X-Forwarded-For]
    drop_headers: [X-Hub-Signature-256]
    timeout: 1m30s
    concurrency: ${CONCURRENCY}
    rate: 90/m
routes:
  - name: build
    from: [github, open]
    match: {type: push, body.ref: [refs/heads/main]}
    when: '!body.deleted'
    to:
      - ci
      - {name: mirror, url: "http://10.1.2.3:8080/?a=b", timeout: 500ms, rate: 36/h}
    request:
      headers: {X-Ref: "${{ body.ref }}", X-Where: "${WHERE}"}
      body: {ref: "${{ body.ref }}", on: yes, at: 12:30, n: 1e3, list: [1, true, null, "${WHERE}"]}
    retry:
      schedule: [5s, 2m, 1h30m, 3d]
      max_attempts: 8
      max_age: 1d
      jitter: 0
      results: {4xx: dead_letter, 404: drop, timeout: retry_short}
  - {name: keep, from: open, to: mirror}
"""


def load(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> Rules:
    path = folder / "routes.yaml"
    path.write_text(text)
    return load_rules(path, environ=environ or {})


def problems(folder: Path, text: str, environ: Mapping[str, str] | None = None, *, resolve: bool = True) -> list[str]:
    path = folder / "routes.yaml"
    path.write_text(text)
    return lines(folder, check_rules(path, environ=environ or {}, resolve=resolve)[1])


def lines(folder: Path, found: list[Problem]) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in found]


def test_a_file_with_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("older-older-older\n")
    rules = load(
        tmp_path, EVERY_KEY, {"SECRET": "s3cret-s3cret-s3cret", "TOKEN": "t0ken", "CONCURRENCY": "7", "WHERE": "here"}
    )

    github, public = rules.sources["github"], rules.sources["open"]
    assert (github.name, github.path, github.topic) == ("github", "/hooks/github", "company.github")
    assert github.dedupe == 36 * 3600
    assert github.quarantine
    assert not public.quarantine
    assert github.verifier.scheme == "github"
    assert github.id == Expression("headers['x-github-delivery']")
    assert github.type == Expression("headers['x-github-event']")
    assert github.key == Expression("body.repository.full_name")
    assert (public.path, public.verifier.scheme, public.id, public.topic) == ("/in/open", "none", None, None)

    assert rules.destinations == {
        "ci": Destination(
            name="ci",
            url="https://ci.internal/hook",
            headers=(("Authorization", "Bearer t0ken"), ("X-Price", "${5}")),
            sign=(base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), b"second-second-second"),
            forward_headers=("X-Forwarded-For",),
            drop_headers=("X-Hub-Signature-256",),
            timeout=90.0,
            concurrency=7,
            rate=1.5,
        ),
        "mirror": Destination(name="mirror", url="http://10.1.2.3:8080/?a=b", timeout=0.5, rate=0.01),
    }
    build, keep = rules.routes["build"], rules.routes["keep"]
    assert (build.name, build.sources, build.destinations) == ("build", ("github", "open"), ("ci", "mirror"))
    assert build.match == parse_condition({"type": "push", "body.ref": ["refs/heads/main"]})
    assert build.when == Expression("!body.deleted")
    assert build.request == RequestTemplate(
        headers=(("X-Ref", Template("${{ body.ref }}")), ("X-Where", Template("here"))),
        body=Template(
            {"ref": "${{ body.ref }}", "on": "yes", "at": "12:30", "n": 1000.0, "list": [1, True, None, "here"]}
        ),
    )
    assert build.retry == RetryPolicy(
        schedule=(5, 120, 5400, 259200),
        max_attempts=8,
        max_age=86400,
        jitter=0,
        results=(("404", Disposition.DROP), ("4xx", Disposition.DEAD_LETTER), ("timeout", Disposition.RETRY_SHORT)),
    )
    assert (keep.sources, keep.destinations) == (("open",), ("mirror",))
    assert (keep.match, keep.when, keep.request, keep.retry) == (None, None, None, RetryPolicy())
    assert rules.egress == Egress(is_private_allowed=False, allow=(ip_network("10.0.0.0/8"), ip_network("fd00::1")))
    assert rules.files == (tmp_path / "routes.yaml", tmp_path / "old")
    assert [warning.replace(f"{tmp_path}/", "") for warning in rules.warnings] == [
        (
            "routes.yaml:16:13: sources.open.verify: expected a scheme that verifies, got none: "
            "anybody who reaches /in/open can send"
        )
    ]


# Text → every problem, in order.
BROKEN = {
    "": ["routes.yaml:1:1: expected a mapping, got an empty file"],
    "# nothing yet\n": ["routes.yaml:1:1: expected a mapping, got an empty file"],
    "- version: 1\n": ["routes.yaml:1:1: expected a mapping with `version`, got a list"],
    "sources: {}\n": ["routes.yaml:1:1: expected the key 'version', got none"],
    "version: 2\n": ["routes.yaml:1:10: version: expected the version 1, got 2"],
    "version: true\n": ["routes.yaml:1:10: version: expected the version 1, got true"],
    "version: '1'\n": [
        "routes.yaml:1:10: version: expected the version 1, got '1', a string: it is written without quotes"
    ],
    "version: 1\nversion: 1\n": [
        "routes.yaml:2:1: expected each key once, got 'version' again, first on line 1",
    ],
    "version: 1\nroutes: [\n": [
        (
            "routes.yaml:3:1: expected YAML, got a syntax error: while parsing a flow node, "
            "did not find expected node content"
        ),
    ],
    "version: 1\n---\nversion: 1\n": ["routes.yaml:2:1: expected one document, got another after it"],
    "version: 1\nroutes: *nowhere\n": ["routes.yaml:2:9: expected YAML, got a syntax error: found undefined alias"],
    "version: !int 1\n": [
        (
            "routes.yaml:1:10: version: expected no tag but YAML's own, got another: a value that "
            "begins with ! needs quotes"
        )
    ],
    "version: !!int one\n": ["routes.yaml:1:10: version: expected a value of the tag !!int, got 'one'"],
    "version: 1\nroutes: !!python/name:os.system x\n": [
        "routes.yaml:2:9: routes: expected no tag but YAML's own, got another: a value that begins with ! needs quotes",
    ],
    "version: \a\n": [r"routes.yaml:1:10: expected text, got the character '\x07'"],
    "version: .inf\n": ["routes.yaml:1:10: version: expected a finite number, got another (in quotes it is a string)"],
    "version: 18446744073709551616\n": [
        (
            "routes.yaml:1:10: version: expected an integer of at most 64 bits, got a larger one (in "
            "quotes it is a string)"
        ),
    ],
    "version: 1\n1: x\n": ["routes.yaml:2:1: 1: expected a string as a key, got 1 (in quotes it is one)"],
    "version: 1\non: x\n": ["routes.yaml:2:1: on: unknown key 'on'"],
    "version: 1\n? [a]\n: x\n": ["routes.yaml:2:3: expected a string as a key, got a list or a mapping"],
    "version: 1\n<<: {sources: {}}\n": [
        "routes.yaml:2:1: expected a key, got a merge (<<), which YAML 1.2 doesn't have: see `defaults`",
    ],
    "version: 1\nsource: {}\n": ["routes.yaml:2:1: source: unknown key 'source', did you mean 'sources'?"],
    "version: 1\nsources:\n": ["routes.yaml:2:9: sources: expected a mapping of names to sources, got null"],
    "version: 1\nroutes: {name: a}\n": [
        "routes.yaml:2:9: routes: expected a list of routes (- name: …), got a mapping"
    ],
    "version: 1\nsources:\n  github: none\n": [
        "routes.yaml:3:11: sources.github: expected a mapping with `verify`, got a string",
    ],
    "version: 1\nsources:\n  github: {}\n": [
        "routes.yaml:3:11: sources.github: expected the key 'verify', got none",
    ],
    "version: 1\nsources:\n  github:\n    verify: none\n": [
        (
            "routes.yaml:4:13: sources.github.verify: expected a mapping such as {scheme: github, secrets: [...]}, "
            "or {scheme: none}, got a string"
        ),
    ],
    "version: 1\nsources:\n  github:\n    verify: {scheme: githb, secrets: [x]}\n": [
        "routes.yaml:4:22: sources.github.verify.scheme: unknown scheme 'githb', did you mean 'github'?",
    ],
    "version: 1\nsources:\n  github:\n    verify: {scheme: github, secrts: [x]}\n": [
        "routes.yaml:4:13: sources.github.verify: expected the key 'secrets', got none",
        "routes.yaml:4:30: sources.github.verify.secrts: unknown key 'secrts', did you mean 'secrets'?",
    ],
    "version: 1\nsources:\n  github:\n    verify: {scheme: github, secrets: [x], 5: y}\n": [
        "routes.yaml:4:44: sources.github.verify.5: expected a string as a key, got 5 (in quotes it is one)",
    ],
    "version: 1\nsources: {GitHub: {verify: {scheme: github, secrets: [x]}}}\n": [
        (
            "routes.yaml:2:11: sources.GitHub: expected a name of lower-case letters, digits, '-', '_' and '.', "
            "at most 63, that starts with a letter or a digit, got 'GitHub'"
        ),
    ],
    "version: 1\nsources:\n  a:\n    verify: {scheme: github, secrets: [x]}\n    dedupe: 8d\n": [
        (
            "routes.yaml:5:13: sources.a.dedupe: expected a duration from 1s to 7d, such as 5s, 2m or 1h30m, or off, "
            "got '8d'"
        ),
    ],
    "version: 1\nsources:\n  a:\n    verify: {scheme: github, secrets: [x]}\n    id: bdy.x\n    key: 5\n": [
        (
            "routes.yaml:5:9: sources.a.id: expected a CEL expression, got 'bdy.x': "
            "unknown name 'bdy' at character 1, did you mean 'body'?"
        ),
        "routes.yaml:6:10: sources.a.key: expected a CEL expression, got 5",
    ],
    "version: 1\nsources:\n  a:\n    verify: {scheme: github, secrets: [x]}\n    id: headers.x-message-id\n"
    "    type: headers.X-Id\n    key: query.a-b-2 + body.a-b\n": [
        (
            "routes.yaml:5:9: sources.a.id: expected a CEL expression, got 'headers.x-message-id': "
            "expected headers['x-message-id'], got headers.x-message-id at character 1"
        ),
        (
            "routes.yaml:6:11: sources.a.type: expected a CEL expression, got 'headers.X-Id': "
            "expected headers['x-id'], got headers.X-Id at character 1"
        ),
        (
            "routes.yaml:7:10: sources.a.key: expected a CEL expression, got 'query.a-b-2 + body.a-b': "
            "expected query['a-b-2'], got query.a-b-2 at character 1; "
            "unknown name 'b' at character 22, expected body, headers, query, type, source, id, key"
        ),
    ],
    "version: 1\nsources:\n  a:\n    verify: {scheme: github, secrets: [x]}\n    path: /in?x\n    topic: ..\n": [
        "routes.yaml:5:11: sources.a.path: expected an absolute path without a query, such as /in/github, got '/in?x'",
        "routes.yaml:6:12: sources.a.topic: expected a topic's name of letters, digits, '.', '_' and '-', got '..'",
    ],
    "version: 1\nsources: {a: {path: /healthz, verify: {scheme: github, secrets: [x]}}}\n": [
        "routes.yaml:2:21: sources.a.path: expected another path, got /healthz, which the gateway itself serves",
    ],
    "version: 1\nsources:\n  a: {path: /in/b, verify: {scheme: github, secrets: [x]}}\n"
    "  b: {verify: {scheme: github, secrets: [x]}}\n": [
        "routes.yaml:4:6: sources.b: duplicate source at /in/b, first defined at routes.yaml:3:13",
    ],
    "version: 1\ndestinations:\n  a: {url: ftp://x}\n  b: {url: 'http://u:p@x/'}\n  c: {url: 'https://'}\n"
    "  d: {url: 'http://h:99999'}\n  e: {url: 'https://${{ body.host }}/'}\n  f: {}\n  g: {url: 5}\n"
    "  h: {url: hooks.slack.com/x}\n  i: {url: http://h/#x}\n": [
        "routes.yaml:3:12: destinations.a.url: expected an http or https URL, got the scheme 'ftp'",
        (
            "routes.yaml:4:12: destinations.b.url: expected a URL without user and password (write them under `auth`), "
            "got one with them"
        ),
        "routes.yaml:5:12: destinations.c.url: expected a URL with a host, got none",
        "routes.yaml:6:12: destinations.d.url: expected an http or https URL, got one that can't be parsed",
        (
            "routes.yaml:7:12: destinations.e.url: expected no ${{ … }} here: no host comes from an "
            "event. `to` may choose "
            "a destination by a template, and `request` have a `path`"
        ),
        "routes.yaml:8:6: destinations.f: expected the key 'url', got none",
        "routes.yaml:9:12: destinations.g.url: expected an http or https URL, got something else",
        "routes.yaml:10:12: destinations.h.url: expected an http or https URL, got one without a scheme",
        (
            "routes.yaml:11:12: destinations.i.url: expected a URL without a fragment, spaces or control characters, "
            "got one with them"
        ),
    ],
    "version: 1\ndestinations:\n  a:\n    url: http://x\n    headers:\n      Host: x\n      a b: c\n"
    '      X-A: "a\\r\\nB: c"\n      X-B: 1\n': [
        (
            "routes.yaml:6:7: destinations.a.headers.Host: "
            "expected a header that the gateway doesn't write itself, got 'Host'"
        ),
        "routes.yaml:7:7: destinations.a.headers.a b: expected a header's name, such as X-Team, got 'a b'",
        (
            "routes.yaml:8:12: destinations.a.headers.X-A: expected a header value without control characters, "
            "got one with them"
        ),
        "routes.yaml:9:12: destinations.a.headers.X-B: expected a string, got something else",
    ],
    "version: 1\ndestinations:\n  a:\n    url: http://x\n    sign: {secrets: [whsec_, '!!']}\n    timeout: 1h\n"
    "    concurrency: 0\n    rate: 0/s\n": [
        (
            "routes.yaml:5:22: destinations.a.sign.secrets[0]: expected a secret of the form whsec_ and base64, "
            "got another string"
        ),
        (
            "routes.yaml:5:30: destinations.a.sign.secrets[1]: expected a secret of the form whsec_ and base64, "
            "got another string"
        ),
        (
            "routes.yaml:6:14: destinations.a.timeout: expected a duration from 100ms to 5m, such as 5s, 2m or 1h30m, "
            "got '1h'"
        ),
        "routes.yaml:7:18: destinations.a.concurrency: expected an integer from 1 to 1000, got 0",
        "routes.yaml:8:11: destinations.a.rate: expected a rate such as 100/s, 10/m or 5/h, got '0/s'",
    ],
    "version: 1\ndestinations:\n  a:\n    url: http://x\n    forward_headers: [x-real-ip, X-Team, Host]\n"
    "    drop_headers: [X_Real_IP, 'a b', gateway_route]\n": [
        (
            "routes.yaml:5:34: destinations.a.forward_headers[1]: expected a header that isn't forwarded by default, "
            "such as X-Forwarded-For, got 'X-Team'"
        ),
        (
            "routes.yaml:5:42: destinations.a.forward_headers[2]: "
            "expected a header that the gateway doesn't write itself, got 'Host'"
        ),
        (
            "routes.yaml:6:20: destinations.a.drop_headers[0]: "
            "expected a header that isn't among `forward_headers`, got 'X_Real_IP'"
        ),
        "routes.yaml:6:31: destinations.a.drop_headers[1]: expected a header's name, such as X-Team, got 'a b'",
        (
            "routes.yaml:6:38: destinations.a.drop_headers[2]: "
            "expected a header that the gateway doesn't write itself, got 'gateway_route'"
        ),
    ],
    "version: 1\ndestinations:\n  a: {url: http://x, forward_headers: [X-Real-IP], drop_headers: [X-A, x_real_ip]}\n": [
        (
            "routes.yaml:3:72: destinations.a.drop_headers[1]: "
            "expected a header that isn't among `forward_headers`, got 'x_real_ip'"
        ),
    ],
    "version: 1\ndestinations: {a: {url: http://x, sign: {secrets: []}, timeout: 5, concurrency: true}}\n": [
        (
            "routes.yaml:2:51: destinations.a.sign.secrets: expected a list of secrets, with at least one item, "
            "got an empty list"
        ),
        (
            "routes.yaml:2:65: destinations.a.timeout: expected a duration from 100ms to 5m, such as 5s, 2m or 1h30m, "
            "got 5"
        ),
        "routes.yaml:2:81: destinations.a.concurrency: expected an integer from 1 to 1000, got true",
    ],
    "version: 1\nroutes:\n  - {}\n": [
        "routes.yaml:3:5: routes[0]: expected the key 'from', got none",
        "routes.yaml:3:5: routes[0]: expected the key 'name', got none",
        "routes.yaml:3:5: routes[0]: expected the key 'to', got none",
    ],
    "version: 1\n" + SOURCES + DESTINATIONS + "routes:\n  - {name: a, from: githib, to: [ci, cii]}\n": [
        "routes.yaml:5:21: routes[0].from: unknown source 'githib', did you mean 'github'?",
        "routes.yaml:5:38: routes[0].to[1]: unknown destination 'cii', did you mean 'ci'?",
    ],
    "version: 1\n" + SOURCES + DESTINATIONS + "routes:\n  - {name: a, from: [github, github], to: [ci, ci]}\n"
    "  - {name: a, from: [], to: {name: ci, url: http://y}}\n": [
        "routes.yaml:5:30: routes[0].from[1]: expected each source once, got 'github' again",
        "routes.yaml:5:48: routes[0].to[1]: expected each destination once, got 'ci' again",
        "routes.yaml:6:12: routes[1].name: duplicate route 'a', first defined at routes.yaml:5:12",
        (
            "routes.yaml:6:21: routes[1].from: expected a source's name or a list of them, with at least one item, "
            "got an empty list"
        ),
        "routes.yaml:6:36: routes[1].to.name: duplicate destination 'ci', first defined at routes.yaml:3:16",
    ],
    "version: 1\nsources: {github: 5}\n" + DESTINATIONS + ROUTES: [
        "routes.yaml:2:19: sources.github: expected a mapping with `verify`, got 5",
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    order: key\n    tests: []\n"
    + SOURCES
    + DESTINATIONS: [
        "routes.yaml:6:5: routes[0].order: `order: key` needs a `key` of each source, got none at 'github'",
        "routes.yaml:7:5: routes[0].tests: unknown key 'tests'",
    ],
    "version: 1\nsources:\n"
    "  a: {respond: {after_delivery: {destination: cii}}, verify: {scheme: bearer, secrets: [0123456789abcdef]}}\n"
    "  b:\n    respond: {after_delivery: {destination: ci, timeout: 1m}}\n    split: body\n"
    "    verify: {scheme: bearer, secrets: [0123456789abcdef]}\n"
    "  c: {respond: {after_delivery: {timeout: 1s}}, verify: {scheme: bearer, secrets: [0123456789abcdef]}}\n"
    "  d: {respond: {after_delivery: {destination: other}}, verify: {scheme: bearer, secrets: [0123456789abcdef]}}\n"
    "routes:\n  - {name: a, from: [a, b, d], to: ci}\n  - {name: b, from: a, to: other}\n"
    'destinations: {ci: {url: "https://ci.example"}, other: {url: "https://other.example"}}\n': [
        (
            "routes.yaml:3:47: sources.a.respond.after_delivery.destination: "
            "unknown destination 'cii', did you mean 'ci'?"
        ),
        (
            "routes.yaml:5:15: sources.b.respond.after_delivery: "
            "expected `split: off` with `after_delivery`, got requests with several events"
        ),
        (
            "routes.yaml:5:58: sources.b.respond.after_delivery.timeout: "
            "expected a duration from 100ms to 30s, such as 5s, 2m or 1h30m, got '1m'"
        ),
        "routes.yaml:8:33: sources.c.respond.after_delivery: expected the key 'destination', got none",
        (
            "routes.yaml:9:47: sources.d.respond.after_delivery.destination: "
            "expected a destination of a route from 'd', got 'other'"
        ),
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    on_exhausted: halt\n"
    "  - {name: b, from: github, to: ci, order: random}\n" + SOURCES + DESTINATIONS: [
        "routes.yaml:6:5: routes[0].on_exhausted: `on_exhausted` needs `order: key`, got none",
        (
            "routes.yaml:7:44: routes[1].order: expected the word key (the expression is the `key` of the "
            "source), got 'random'"
        ),
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    match: {typo: push, body.n: {gte: x}}\n"
    "    when: 'body.a =='\n" + SOURCES + DESTINATIONS: [
        "routes.yaml:6:13: routes[0].match.typo: unknown path 'typo', did you mean 'type'?",
        "routes.yaml:6:39: routes[0].match.body.n.gte: expected a number, got 'x'",
        (
            "routes.yaml:7:11: routes[0].when: expected a CEL expression, got 'body.a ==': "
            "syntax error at character 10: mismatched input '<EOF>'"
        ),
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    request:\n      headers: {X-A: 5, X-B: a}\n"
    "      body:\n        x: [1, '${{ bdy.a }}']\n" + SOURCES + DESTINATIONS: [
        "routes.yaml:7:22: routes[0].request.headers.X-A: expected a string, got 5",
        (
            "routes.yaml:9:16: routes[0].request.body.x[1]: expected CEL in ${{ … }}, got '${{ bdy.a }}': "
            "unknown name 'bdy' at character 1, did you mean 'body'?"
        ),
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    request:\n      method: post\n"
    "      path: a/${{ body.a }}\n      query: {a: {b: 1}, b: [[1]]}\n      form: {a: '${{ body.a }'}\n"
    "  - {name: b, from: github, to: ci, request: {method: GET, path: '/a b', body: {a: 1}}}\n"
    "  - {name: c, from: github, to: ci, request: {path: '/${{ a }}', body: a, form: {a: b}}}\n"
    + SOURCES
    + DESTINATIONS: [
        "routes.yaml:7:15: routes[0].request.method: expected one of POST, PUT, PATCH, DELETE, GET, got 'post'",
        "routes.yaml:8:13: routes[0].request.path: expected a path that begins with /, got one that doesn't",
        (
            "routes.yaml:9:18: routes[0].request.query.a: expected a string, a number, a boolean, a list of "
            "these or null, got a mapping"
        ),
        (
            "routes.yaml:9:29: routes[0].request.query.b: expected a list of strings, numbers and booleans, got "
            "something else in it"
        ),
        (
            "routes.yaml:10:17: routes[0].request.form.a: expected CEL in ${{ … }}, got '${{ body.a }': expected "
            "}} after ${{ at character 1, got the end of the text"
        ),
        (
            "routes.yaml:11:66: routes[1].request.path: expected a path with what RFC 3986 allows in it (a space "
            "is %20, parameters are under `query`), got one with ' '"
        ),
        "routes.yaml:11:74: routes[1].request.body: expected no `body` with `method: GET`, which has none, got one",
        (
            "routes.yaml:12:53: routes[2].request.path: expected CEL in ${{ … }}, got '${{ a }}': unknown name "
            "'a' at character 1, expected body, headers, query, type, source, id, key"
        ),
        "routes.yaml:12:75: routes[2].request.form: expected `body` or `form`, got both",
    ],
    "version: 1\nroutes:\n  - name: a\n    from: github\n    to: ci\n    retry:\n      scedule: [5s]\n"
    "      max_attempts: 0\n      max_age: 5x\n      jitter: 2\n      results: {404: rety, 200: drop, timout: drop}\n"
    + SOURCES
    + DESTINATIONS: [
        "routes.yaml:7:7: routes[0].retry.scedule: unknown key 'scedule', did you mean 'schedule'?",
        "routes.yaml:8:21: routes[0].retry.max_attempts: expected an integer of at least 1, got 0",
        (
            "routes.yaml:9:16: routes[0].retry.max_age: expected a duration from 1s to 30d, such as 5s, 2m or 1h30m, "
            "got '5x'"
        ),
        "routes.yaml:10:15: routes[0].retry.jitter: expected a number from 0 to 1, got 2",
        (
            "routes.yaml:11:22: routes[0].retry.results.404: expected one of retry, retry_short, dead_letter, drop, "
            "got 'rety', did you mean 'retry'?"
        ),
        (
            "routes.yaml:11:28: routes[0].retry.results.200: expected a status such as 404, or one of 3xx, 4xx, 5xx, "
            "timeout, connect, dns, tls, transport, auth, egress_refused, got '200'"
        ),
        (
            "routes.yaml:11:39: routes[0].retry.results.timout: expected a status such as 404, or one of 3xx, 4xx, "
            "5xx, timeout, connect, dns, tls, transport, auth, egress_refused, got 'timout', did you mean 'timeout'?"
        ),
    ],
    "version: 1\negress: {private: refused, allow: [10.0.0.1/8, 5], alow: []}\n": [
        "routes.yaml:2:19: egress.private: expected one of allow, refuse, got 'refused', did you mean 'refuse'?",
        (
            "routes.yaml:2:36: egress.allow[0]: expected a network without host bits, "
            "10.0.0.0/8, or 10.0.0.1 "
            "alone, got '10.0.0.1/8'"
        ),
        "routes.yaml:2:48: egress.allow[1]: expected an address or a network such as 10.0.0.0/8, got 5",
        "routes.yaml:2:52: egress.alow: unknown key 'alow', did you mean 'allow'?",
    ],
    "version: 1\ndestinations:\n  a: {url: '${UNSET}'}\n  b: {url: '${file:/nowhere}'}\n  c: {url: '${X'}\n"
    "  d: {url: '${1}'}\n  e: {url: http://x, timeout: '${UNSET:-5}'}\n": [
        "routes.yaml:3:12: destinations.a.url: the environment variable UNSET isn't set",
        "routes.yaml:4:12: destinations.b.url: expected a file at /nowhere, got no such file or directory",
        (
            "routes.yaml:5:12: destinations.c.url: expected ${NAME}, ${NAME:-default}, ${file:/path} "
            "or $${, got another form"
        ),
        "routes.yaml:6:12: destinations.d.url: expected ${NAME}, ${NAME:-default}, ${file:/path} or $${, got '${1}'",
        (
            "routes.yaml:7:31: destinations.e.timeout: expected a duration from 100ms to 5m, such as 5s, 2m or 1h30m, "
            "got '${UNSET:-5}'"
        ),
    ],
    "version: 1\ninclude: nowhere.yaml\n" + ROUTES: [
        "routes.yaml:2:10: include: expected a file at 'nowhere.yaml', got none",
    ],
    "version: 1\ninclude: [routes.yaml]\n": [
        ("routes.yaml:2:11: include[0]: include cycle: routes.yaml → routes.yaml"),
    ],
    "version: 1\nroutes: &a [*a, *a]\n": ["routes.yaml:2:9: expected at most 64 levels, got more"],
}


@pytest.mark.parametrize(
    "text",
    [
        "destinations: {ci: {url: 'https://ci.example/', auth: {bearer: LITERAL}}}",
        "destinations: {ci: {url: 'https://ci.example/', auth: LITERAL}}",
        "destinations: {ci: {url: 'https://ci.example/', sign: {secrets: LITERAL}}}",
        "destinations: {ci: {url: 'https://ci.example/', headers: LITERAL}}",
        "destinations: {ci: LITERAL}",
        "destinations: {ci: {url: 'https://ci.example/', tls: LITERAL}}",
        "sources: {github: {verify: {scheme: github, secrets: LITERAL}}}",
        "sources: {github: {verify: LITERAL}}",
        "sources: {github: LITERAL}",
        "secrets: LITERAL",
        "defaults: {headers: LITERAL}",
        "destinations: {ci: {url: 'https://ci.example/', auth: {bearer: {LITERAL}}}}",
        "destinations: {ci: {url: 'https://ci.example/', auth: {bearer: {token: !LITERAL}}}}",
        "destinations: {ci: {url: 'https://ci.example/', auth: {basic, LITERAL}}}",
        "destinations: {ci: {url: 'https://ci.example/', auth: {bearer: {token: 'x${LITERAL!y'}}}}",
        "sources: {github: {verify: {scheme: github, LITERAL}}}",
        "routes: [{name: a, from: b, to: c, request: {headers: {X: 'LITERAL ${{ nothing }}'}}}]",
        "routes: [{name: a, from: b, to: c, request: {body: {x: \"${{ hmac(body.a, 'LITERAL') }}\"}}}]",
    ],
)
def test_a_literal_secret_of_the_wrong_shape_is_not_shown(tmp_path: Path, text: str) -> None:
    found = problems(tmp_path, f"version: 1\n{text.replace('LITERAL', 'whsec_c2VjcmV0')}\n")
    assert found
    assert [each for each in found if "whsec_c2" in each] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("sources: {github: {verify: {scheme: github, secrets: ['$GITHUB_SECRET_OF_OURS']}}}", 1),
        ("destinations: {ci: {url: 'https://ci.example/', auth: {bearer: {token: '%CI_TOKEN%'}}}}", 1),
        ("destinations: {ci: {url: 'https://ci.example/', headers: {Authorization: 'Bearer $(CI_TOKEN)'}}}", 1),
        ("destinations: {ci: {url: 'https://ci.example/', headers: {Authorization: 'Bearer {{ CI_TOKEN }}'}}}", 1),
        ("destinations: {ci: {url: 'https://ci.example/', headers: {X-Cost: 'in $'}}}", 0),
    ],
)
def test_a_secret_that_looks_like_a_reference_elsewhere_is_warned_of(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "routes.yaml").write_text(f"version: 1\n{text}\n")
    _, found = check_rules(tmp_path / "routes.yaml", environ={})
    assert [each.code for each in found].count("literal") == count


def test_a_template_without_its_dollar_is_warned_of(tmp_path: Path) -> None:
    request = "{headers: {X-Id: 'a {{ body.id }}'}, body: {at: '${{ body.at }}', who: '{{ headers }} and {{ who }}'}}"
    (tmp_path / "routes.yaml").write_text(
        "version: 1\nsources: {a: {verify: {scheme: none}}}\ndestinations: {b: {url: 'https://b.example/'}}\n"
        f"routes: [{{name: c, from: a, to: b, request: {request}}}]\n"
    )
    _, found = check_rules(tmp_path / "routes.yaml", environ={})
    assert [each.path for each in found if each.code == "literal"] == [
        "routes[0].request.headers.X-Id",
        "routes[0].request.body.who",
    ]


@pytest.mark.parametrize(("text", "expected"), BROKEN.items())
def test_each_problem_of_a_broken_file_is_reported_with_its_place(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    assert problems(tmp_path, text) == expected


PROVIDERS = r"""
version: 1
providers:
  acme:
    title: Acme
    docs: [https://acme.example/docs, https://acme.example/sdk]
    secret: the webhook's secret
    setup: Create a webhook.
    deadline: 5 s
    retries: three times
    evidence: {sdk: acme 1.2}
    notes: none
    verify:
      - header: X-Acme-Signature
        algorithm: sha512
        encoding: base64
        separator: ","
        prefix: "{given:key}="
        timestamp: {prefix: "t=", unit: ms}
        id_header: X-Acme-Id
        signed: "{id}.{timestamp}.{given:key}.{body}"
        tolerance: 10m
        secret_encoding: hex
        secret_prefix: "00"
        id: headers['x-acme-id']
      - {scheme: public-key, algorithm: ed25519, field: a.b, recipient: {field: a.c, is: "{given:key}"}}
      - scheme: public-key
        algorithm: rsa-sha256
        query: s
        key_url: {header: X-Url, hosts: [keys.acme.example], path: /v1/}
      - {scheme: hash, query: s, signed: "{body}.{secret}", secret_prefix: "0"}
      - {scheme: jwt, algorithms: [HS256, HS512], claims: {aud: "{given:key}", verified: true}, tolerance: 1h}
      - {scheme: jwt, algorithms: ES256, key_set: https://acme.example/keys}
      - {scheme: http-message-signature, algorithm: ed25519, covered: ["@method"], tag: acme}
      - {scheme: basic, username: acme}
      - {scheme: token, field: "a.*.b"}
    id: body.id
    type: body.kind
    dedupe: 1d
    asks: {key: the id of the key}
    sends: {X-Acme-Kind: "{type}"}
    handshake: meta
    respond: {status: 200, body: {ok: "yes"}}
    split: body.events
    batch_type: application/json
  forge: {like: hubspot, split: off, dedupe: off, title: Forge}
  later: {verify: {header: X-L}, handshake: notion}
sources:
  acme:
    verify:
      scheme: acme
      key: k1
      tolerance: 5m
      secrets: ["0011223344556677", "00112233445566778899"]
      public_keys: [JrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=]
      verify_tokens: [hush]
    public_url: https://hooks.example.com
  forge: {verify: {scheme: forge, secrets: [s3cret]}, public_url: "https://hooks.example.com"}
  later: {verify: {scheme: later, pending: true}}
destinations: {ci: {url: https://ci.internal/hook}}
routes: [{name: build, from: [acme, forge, later], to: ci}]
"""
"""Every key of a provider, and each scheme."""


@given(data=st.data(), whole=st.sampled_from([EVERY_KEY, PROVIDERS]))
@settings(max_examples=300, deadline=None)
def test_no_text_does_more_than_have_problems(data: st.DataObject, whole: str) -> None:
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 12))
    inserted = data.draw(st.text("{}[]:,-*&!#|>'\"\\$ \n\t\0é😀a1.", max_size=6))
    text = whole[:start] + inserted + whole[start + length :]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "routes.yaml"
        path.write_text(text)
        rules, found = check_rules(path, environ={}, resolve=True)
    assert (rules is None) == any(problem.severity == "error" for problem in found)
    assert all(problem.line <= text.count("\n") + 2 for problem in found)


ODD: list[object] = [
    None,
    True,
    5,
    0.5,
    "",
    " ",
    "x y",
    "a.b",
    "{body}",
    [],
    [[]],
    [5],
    ["a"],
    {},
    {"a": "b"},
    {"a": {}},
]


@pytest.mark.rotated
@pytest.mark.parametrize("value", ODD[::2], ids=str)
def test_no_value_of_a_provider_does_more_than_have_a_problem(value: object, tmp_path: Path) -> None:
    """In the place of each value, however deep, of providers and of `verify` in sources."""
    whole = yaml.safe_load(PROVIDERS)
    load(tmp_path, PROVIDERS)
    count = 0
    for path in [*places(whole["providers"], ("providers",)), *places(whole["sources"], ("sources",))]:
        (tmp_path / "routes.yaml").write_text(json.dumps(with_value(whole, path, value)))
        rules, found = check_rules(tmp_path / "routes.yaml", environ={}, resolve=True)
        assert (rules is None) == any(problem.severity == "error" for problem in found), path
        count += rules is None
    assert count > 30


def places(value: object, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all values in a value, and its own."""
    yield path
    if isinstance(value, dict | list):
        for step, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, step))


def with_value(whole: Any, path: Sequence[str | int], value: object) -> Any:
    """Return a copy with another value in a place."""
    if not path:
        return value
    copied = whole.copy()
    copied[path[0]] = with_value(whole[path[0]], path[1:], value)
    return copied


@pytest.mark.parametrize("key", ["id", "type", "dedupe", "split"])
@pytest.mark.parametrize(
    "value", [*ODD, "off", "1s", "7d", "8d", "30d", "500ms", "1h", "body", "body.a", "body[0]", "1 +"]
)
def test_a_provider_may_have_what_a_source_may_have(key: str, value: object, tmp_path: Path) -> None:
    """Its keys are of the same kinds."""
    refused = []
    for where in ("providers", "sources"):
        rules: dict[str, Any] = {
            "version": 1,
            "providers": {"own": {"verify": {"header": "X-S"}}},
            "sources": {"own": {"verify": {"scheme": "own", "secrets": ["s3cret"]}}},
        }
        rules[where]["own"][key] = value
        (tmp_path / "routes.yaml").write_text(json.dumps(rules))
        _, found = check_rules(tmp_path / "routes.yaml", environ={})
        refused.append([each.path.partition(".")[2] for each in found if each.severity == "error"])
    assert refused[0] == refused[1]


@pytest.mark.parametrize(
    ("scheme", "written", "dedupe"),
    [
        ("github", "", None),
        ("github", ", dedupe: 1s", 1.0),
        ("stripe", "", 3600.0),
        ("stripe", ", dedupe: off", None),
        ("stripe", ", dedupe: 7d", 7 * 86400.0),
    ],
)
def test_dedupe_is_as_the_provider_needs_it_unless_the_source_says_otherwise(
    tmp_path: Path, scheme: str, written: str, dedupe: float | None
) -> None:
    source = f"sources: {{github: {{verify: {{scheme: {scheme}, secrets: [s3cret]}}{written}}}}}\n"
    assert load(tmp_path, "version: 1\n" + source + DESTINATIONS + ROUTES).sources["github"].dedupe == dedupe


WEAK = """
version: 1
sources:
  raw: {verify: {scheme: github, secrets: [sixteen-bytes-ok, fifteen-bytes-s]}}
  decoded: {verify: {scheme: standard-webhooks, secrets: [whsec_c2l4dGVlbi1ieXRlcy1vaw, whsec_ZmlmdGVlbi1ieXRlcy1z]}}
  gitlab: {verify: {scheme: gitlab, secrets: [whsec_ZmlmdGVlbi1ieXRlcy1z, short]}}
  hex: {verify: {scheme: hmac, header: X-S, secret_encoding: hex, secrets: [00112233445566778899aabbccddee]}}
  user: {verify: {scheme: basic, username: u, secrets: [password]}}
  later: {verify: {scheme: zendesk, secrets: ["${SECRET}"], tolerance: none}}
  unknown: {verify: {scheme: github, secrets: ["${UNSET}"]}}
destinations:
  signed: {url: "https://x", sign: {secrets: [whsec_c2l4dGVlbi1ieXRlcy1vaw, whsec_ZmlmdGVlbi1ieXRlcy1z]}}
  basic: {url: "http://x.internal", auth: {basic: {username: u, password: p}}}
  header: {url: "http://10.0.0.1:80/", headers: {X-Team: a, X-Key: "${SECRET}"}}
  literal: {url: "http://x", headers: {AUTHORIZATION: Bearer x}}
  key: {url: "http://x", headers: {X-Team: a, X-Api-Key: x}}
  query: {url: "http://x/?team=a&access_token=x"}
  later_query: {url: "http://x/?sig=${UNSET}"}
  token: {url: "https://x", auth: {oauth2: {token_url: "http://x", client_id: us, client_secret: a}}}
  harmless: {url: "http://x?team=a&author=b&token=", headers: {X-Price: "$${5}", Idempotency-Key: a, X-Author: b}}
  local_query: {url: "http://127.0.0.1/?token=x", headers: {X-Token: x}}
  unresolved: {url: "${UNSET}", auth: {bearer: {token: x}}}
  loopback: {url: "http://127.8.0.1", auth: {bearer: {token: x}}}
  loopback6: {url: "http://[::1]:80", auth: {bearer: {token: x}}}
  localhost: {url: "http://LocalHost:80", auth: {bearer: {token: x}}}
  proxied: {url: "https://x", proxy: "http://proxy.internal:3128", proxy_auth: {username: u, password: p}}
  sidecar: {url: "https://x", proxy: "http://[::1]:3128", proxy_auth: {username: u, password: p}}
  nobody: {url: "https://x", proxy: "http://proxy.internal:3128"}
  somewhere: {url: "https://x", proxy: "${UNSET}", proxy_auth: {username: u, password: p}}
routes:
  - name: all
    from: [raw, decoded, gitlab, hex, user, later, unknown]
    to: [signed, basic, header, literal, key, query, later_query, token, harmless, local_query,
      unresolved, loopback, loopback6, localhost, proxied, sidecar,
      nobody, somewhere]
"""


OWN = """
version: 1
providers:
  acme:
    title: Acme
    verify: {header: X-Acme-Signature, prefix: "v1=", signed: "{header:X-Acme-Time}.{body}"}
    id: body.id
    type: body.kind
    dedupe: 2h
  forge: {like: gitlab, dedupe: 2h}
sources:
  shop: {verify: {scheme: acme, secrets: [s3cret-s3cret-s3cret]}}
  code: {verify: {scheme: forge, secrets: [s3cret-s3cret-s3cret]}}
"""


def test_a_provider_of_ones_own_does_what_a_preset_does(tmp_path: Path) -> None:
    rules = load(tmp_path, OWN + DESTINATIONS + ROUTES.replace("github", "[shop, code]"))
    shop, forge = rules.sources["shop"].verifier, rules.sources["code"].verifier
    assert (shop.scheme, shop.id, shop.type, shop.dedupe) == ("acme", "body.id", "body.kind", 7200)
    assert rules.sources["shop"].dedupe == 7200
    pairs = shop.sign(b"{}", now=0, id="1", type="sold", headers={"X-Acme-Time": "noon"})
    sent = Request("POST", "/", "", tuple((name.encode(), value.encode()) for name, value in pairs), b"{}")
    shop.verify(sent, now=0)
    with pytest.raises(RefusedError):
        shop.verify(sent._replace(body=b"{ }"), now=0)
    gitlab = build_verifier({"scheme": "gitlab", "secrets": ["s3cret-s3cret-s3cret"]})
    assert (forge.scheme, forge.id, forge.checks, forge.dedupe) == ("forge", gitlab.id, gitlab.checks, 7200)


@pytest.mark.parametrize(
    ("provider", "batch_type"),
    [
        ("like: cloudevents", "application/cloudevents-batch+json"),
        ("like: cloudevents, split: body.events", None),
        ("like: cloudevents, batch_type: Application/JSON", "application/json"),
    ],
)
def test_a_batchs_media_type_is_that_of_its_list(tmp_path: Path, provider: str, batch_type: str | None) -> None:
    source = "shop: {verify: {scheme: acme, secrets: [s3cret-s3cret-s3cret]}}"
    rules = load(tmp_path, f"version: 1\nproviders: {{acme: {{{provider}}}}}\nsources:\n  {source}\n")
    assert rules.sources["shop"].batch_type == batch_type


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("acme: 7", "acme: expected a mapping with `verify`, as in a source, but for the secrets, got 7"),
        ("acme: {title: x}", "acme: expected the signing method, or a list of them, got nothing"),
        ("acme: {verify: {header: X, secrets: [a]}}", "acme.verify.secrets: unknown key 'secrets'"),
        ("acme: {verify: {hedaer: X}}", "acme.verify.hedaer: unknown key 'hedaer', did you mean 'header'?"),
        ("acme: {verify: [{scheme: hmca}]}", "acme.verify[0].scheme: expected one of hmac, hash, public-key, token"),
        ("acme: {verify: {scheme: bearer}, ids: x}", "acme.ids: unknown key 'ids', did you mean 'id'?"),
        ("acme: {verify: {scheme: bearer}, id: 'body.'}", "acme.id: expected a CEL expression, got 'body.'"),
        ("acme: {verify: [{scheme: bearer, id: '1 +'}]}", "acme.verify[0].id: expected a CEL expression, got '1 +'"),
        ("acme: {like: cloudevents, batch_type: json}", "acme.batch_type: expected a media type such as application/"),
        ("acme: {like: stripe, batch_type: a/b}", "acme.batch_type: expected the key 'split' beside it, got none"),
        ("acme: {like: stripe, no_id: x}", "acme.no_id: expected no key 'id' beside it, got one"),
        ("acme: {like: sripe}", "acme.like: expected a provider's name, got 'sripe', did you mean 'stripe'?"),
        ("acme: {verify: {scheme: bearer}, handshake: xx}", "acme.handshake: expected one of slack, zoom"),
        ("acme: {verify: {scheme: bearer}, dedupe: soon}", "acme.dedupe: expected a duration from 1s to 7d, such "),
        ("acme: {verify: {scheme: hash, header: X}}", "acme.verify: expected {secret} in 'signed', as anybody"),
        ("acme: {verify: {header: X}, docs: 5}", "acme.docs: expected a non-empty string, got 5"),
        ("acme: {verify: {header: X}, title: {a: b}}", "acme.title: expected a non-empty string, got a mapping"),
        ("acme: {verify: {header: X}, sends: {X Y: a}}", "acme.sends.X Y: expected a header's name, got 'X Y'"),
        ("acme: {verify: {header: X}, asks: {scheme: x}}", "acme.asks.scheme: expected a key that a source doesn't"),
        ("acme: {verify: {header: X, secret_prefix: 5}}", "acme.verify.secret_prefix: expected a non-empty string, "),
        ("acme: {verify: {header: X, id: 5}}", "acme.verify.id: expected a CEL expression, got 5"),
        ("acme: {verify: {scheme: [a], header: X}}", "acme.verify.scheme: expected one of hmac, hash, public-key, "),
        ("acme: {verify: {header: X}, respond: {status: 200, body: '$${{ 1 + }}'}}", "acme.respond.body: "),
        ("acme: {verify: {header: X}, respond: {status: 200, body: {for: 1, do: 2}}}", "acme.respond.body.for: "),
        ("acme: {verify: {header: X}, respond: {status: 200, body: {a: {as: i, do: 2}}}}", "acme.respond.body.a: "),
        ("acme: {verify: {scheme: bearer}, handshake: notion}", "acme.handshake: expected one signing method, by "),
        ("stripe: {verify: {scheme: bearer}}", "stripe: expected a name that no built-in scheme has"),
        ("hmac: {verify: {scheme: bearer}}", "hmac: expected a name that no built-in scheme has"),
    ],
)
def test_a_provider_of_ones_own_is_checked_as_all_else(tmp_path: Path, provider: str, expected: str) -> None:
    found = problems(tmp_path, GOOD.replace("version: 1\n", f"version: 1\nproviders:\n  {provider}\n"))
    assert any(f"providers.{expected}" in line for line in found), found


def test_a_provider_that_lets_everyone_in_is_warned_of_like_none(tmp_path: Path) -> None:
    own = "providers: {lax: {verify: {scheme: none}}}\nsources: {github: {verify: {scheme: lax}}}\n"
    [found] = problems(tmp_path, "version: 1\n" + own + DESTINATIONS + ROUTES)
    assert "sources.github.verify: expected a scheme that verifies, got none: anybody" in found
    kept = own.replace("lax}", "lax}, quarantine: true")
    [_, found] = problems(tmp_path, "version: 1\n" + kept + DESTINATIONS + ROUTES)
    assert "quarantine: expected a scheme whose requests can be verified again, got none" in found


def test_a_deceptively_weak_protection_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(WEAK)
    rules, found = check_rules(path, environ={"SECRET": "a" * 16})
    assert rules is not None
    assert {problem.severity for problem in found} == {"warning"}
    weak = [(problem.path, problem.message) for problem in found if problem.code == "weak"]
    short = "expected a secret of at least 16 bytes, got a shorter one, which can be guessed"
    assert weak == [
        ("sources.raw.verify.secrets[1]", short),
        ("sources.decoded.verify.secrets[1]", short),
        ("sources.gitlab.verify.secrets[0]", short),
        ("sources.gitlab.verify.secrets[1]", short),
        ("sources.hex.verify.secrets[0]", short),
        ("sources.user.verify.secrets[0]", short),
        (
            "sources.later.verify.scheme",
            (
                "written from the provider's documentation alone, and not compared with a signature of its own: "
                "see that its events are accepted"
            ),
        ),
        (
            "sources.later.verify.tolerance",
            "expected a duration, got none: a recorded request can be replayed at any time",
        ),
        ("destinations.signed.sign.secrets[1]", short),
        ("destinations.basic.url", "expected https with `auth`, got http: it is sent unencrypted"),
        ("destinations.header.url", "expected https with `headers.X-Key`, got http: it is sent unencrypted"),
        ("destinations.literal.url", "expected https with `headers.AUTHORIZATION`, got http: it is sent unencrypted"),
        ("destinations.key.url", "expected https with `headers.X-Api-Key`, got http: it is sent unencrypted"),
        (
            "destinations.query.url",
            "expected https with `access_token` in its query, got http: it is sent unencrypted",
        ),
        ("destinations.later_query.url", "expected https with `sig` in its query, got http: it is sent unencrypted"),
        (
            "destinations.token.auth.oauth2.token_url",
            "expected https with `client_secret`, got http: it is sent unencrypted",
        ),
        (
            "destinations.proxied.proxy",
            "expected a proxy on this machine with `proxy_auth`, got another: it is sent unencrypted",
        ),
    ]


@pytest.mark.parametrize("name", ["routes.yaml", "dev/stack.yaml", "deploy/compose/rules/routes.yaml"])
def test_our_own_rules_accept_no_secret_that_everybody_can_read(name: str) -> None:
    found = check_rules(Path(__file__).parent.parent.parent / name, environ={})[1]
    assert {problem.code for problem in found} <= {"unresolved"}


def test_a_flood_of_unknown_names_is_reported_without_a_guess_each(tmp_path: Path) -> None:
    routes = "".join(f"  - {{name: r{n}, from: github, to: c{n}i}}\n" for n in range(60))
    found = problems(tmp_path, "version: 1\n" + SOURCES + DESTINATIONS + "routes:\n" + routes)
    assert found[0] == "routes.yaml:5:34: routes[0].to: unknown destination 'c0i', did you mean 'ci'?"
    assert found[-1] == "routes.yaml:64:35: routes[59].to: unknown destination 'c59i'"


def test_the_uses_of_a_route_with_a_taken_name_are_checked_too(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD.replace("to: ci}", "to: ci}, {name: build, from: github, to: cii}")) == [
        "routes.yaml:4:54: routes[1].name: duplicate route 'build', first defined at routes.yaml:4:17",
        "routes.yaml:4:79: routes[1].to: unknown destination 'cii', did you mean 'ci'?",
    ]


def test_a_file_that_grows_by_its_aliases_is_refused(tmp_path: Path) -> None:
    levels = [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 9)]
    text = "version: 1\nsources:\n  l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(levels)
    (problem,) = problems(tmp_path, text)
    assert problem.endswith("expected at most 1000000 values, aliases included, got more")


def test_an_alias_stands_for_its_anchors_value(tmp_path: Path) -> None:
    text = GOOD.replace(
        "to: ci}", "to: ci, retry: &often {schedule: [5s]}}, {name: b, from: github, to: ci, retry: *often}"
    )
    rules = load(tmp_path, text)
    assert rules.routes["b"].retry == rules.routes["build"].retry == RetryPolicy(schedule=(5,))


def test_an_alias_of_a_whole_route_is_told_as_one(tmp_path: Path) -> None:
    text = GOOD.replace("[{name: build", "[&r {name: build").replace("to: ci}]", "to: ci}, *r]")
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("routes.yaml:4:20: routes[1].name: duplicate route 'build'")
    assert problem.endswith(": an alias (*) repeats it from routes[0].name, expected another name")


def test_an_anchor_that_is_there_twice_is_named_with_both_places(tmp_path: Path) -> None:
    text = GOOD + "tests:\n  - &one {name: a}\n  - !!map &one {name: b}\n"
    assert problems(tmp_path, text) == [
        "routes.yaml:7:5: expected each anchor once, got &one again, first in line 6, column 5"
    ]


@pytest.mark.parametrize("key", ["split: items", "when: items == 1", "when: itm == 1"])
def test_nobody_is_told_to_use_the_item_where_it_is_not(tmp_path: Path, key: str) -> None:
    (problem,) = problems(
        tmp_path,
        GOOD.replace("to: ci}", f"to: ci, split: body.items, {key}}}" if "when" in key else f"to: ci, {key}}}"),
    )
    assert "unknown name" in problem
    assert "'item'" not in problem.partition("unknown name")[2].partition(",")[2]


def test_a_name_in_another_case_is_guessed(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, GOOD.replace("to: ci", "to: CI"))
    assert problem.endswith("unknown destination 'CI', did you mean 'ci'?")


def test_a_long_template_is_told_cut(tmp_path: Path) -> None:
    text = GOOD.replace("to: ci}", f'to: ci, request: {{body: "${{{{ {"body.a + " * 20}nope }}}}"}}}}')
    (problem,) = problems(tmp_path, text)
    assert "got '${{ body.a + body.a + " in problem
    assert "…': unknown name 'nope' at character 181" in problem


def test_a_file_that_is_not_there_is_a_problem_without_a_line(tmp_path: Path) -> None:
    rules, found = check_rules(tmp_path / "routes.yaml", environ={})
    assert rules is None
    assert lines(tmp_path, found) == ["routes.yaml: expected a file that can be read, got no such file or directory"]


def test_a_file_that_is_not_utf_8_is_refused_where_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_bytes("version: 1\n# ü ".encode() + b"\xff\n")
    found = check_rules(tmp_path / "routes.yaml", environ={})[1]
    assert lines(tmp_path, found) == ["routes.yaml:2:5: expected UTF-8, got the byte 0xff"]


def test_loading_raises_every_error_at_once_and_no_warning(tmp_path: Path) -> None:
    text = GOOD.replace("{scheme: github, secrets: [s3cret]}", "{scheme: none}").replace("to: ci", "to: cj, whn: x")
    with pytest.raises(InvalidRulesError) as raised:
        load(tmp_path, text)
    assert isinstance(raised.value, RulesError)
    assert [(problem.line, problem.code, problem.severity) for problem in raised.value.problems] == [
        (4, "unknown_name", "error"),
        (4, "unknown_key", "error"),
    ]
    assert str(raised.value) == "\n".join(map(str, raised.value.problems))


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("http://é" + "x" * 70 + ".com/", "one that can't be parsed"),
        ("http://" + "a" * 64 + ".com/", "one with another host"),
        ("http://h:0/", "0"),
        ("http://a..b/", "one with another host"),
        ('http://a"b/', "one with another host"),
        ("http://h<x>/", "one with another host"),
        ("http://h;x/", "one with another host"),
        ("http://ex%61mple/", "one with another host"),
        ("http://[::1%25lo]/", "one with another host"),
    ],
)
def test_a_url_that_nothing_could_be_sent_to_is_refused(tmp_path: Path, url: str, got: str) -> None:
    found = problems(tmp_path, f"version: 1\ndestinations: {{a: {{url: '{url}'}}}}\n")
    assert [line for line in found if "destinations.a.url: expected " in line and line.endswith(f", got {got}")]
    assert url not in "".join(found)


@pytest.mark.parametrize(
    "url",
    ["http://☃.net/", "http://a_b:1/", "http://H.EXAMPLE./", "http://10.1.2.3/", "http://[::1]:65535/", "http://h?x"],
)
def test_a_url_with_a_name_or_an_address_is_taken(tmp_path: Path, url: str) -> None:
    rules = load(tmp_path, f"version: 1\ndestinations: {{a: {{url: '{url}'}}}}\n")
    assert rules.destinations["a"].url == url


@pytest.mark.parametrize("name", ["Expect", "TE", "Gateway-Attempt", "gateway-route", "Content-Length"])
def test_a_header_that_would_not_be_sent_is_refused(tmp_path: Path, name: str) -> None:
    """For a destination and for a route: delivery drops it, and nobody would know."""
    text = f"""version: 1
destinations: {{ci: {{url: http://x, headers: {{{name}: x}}}}}}
routes: [{{name: a, from: github, to: ci, request: {{headers: {{{name}: x}}}}}}]
{SOURCES}"""
    reason = f"expected a header that the gateway doesn't write itself, got '{name}'"
    assert problems(tmp_path, text) == [
        f"routes.yaml:2:46: destinations.ci.headers.{name}: {reason}",
        f"routes.yaml:3:62: routes[0].request.headers.{name}: {reason}",
    ]


def test_a_header_that_the_signature_replaces_is_refused(tmp_path: Path) -> None:
    text = f"""version: 1
destinations:
  signed: {{url: http://x, headers: {{Webhook-Id: x, X-A: a}}, sign: {{secrets: [whsec_c2VjcmV0]}}}}
  plain: {{url: http://x, headers: {{Webhook-Id: x}}}}
routes:
  - {{name: a, from: github, to: [plain, signed], request: {{headers: {{webhook-extra: x}}}}}}
  - {{name: b, from: github, to: plain, request: {{headers: {{webhook-extra: x}}}}}}
{SOURCES}"""
    reason = "expected no webhook-… where a destination has `sign`, got"
    assert problems(tmp_path, text) == [
        f"routes.yaml:3:37: destinations.signed.headers.Webhook-Id: {reason} 'Webhook-Id'",
        f"routes.yaml:6:70: routes[0].request.headers.webhook-extra: {reason} 'webhook-extra'",
    ]


def test_the_rules_know_their_resolved_references(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    written = "${A} ${B:-default} ${C:-default} ${file:key}"
    text = f"version: 1\ndestinations: {{a: {{url: http://x, headers: {{X-A: '{written}'}}}}}}\n"
    rules = load(tmp_path, text, {"A": "one", "C": "two"})
    assert rules.destinations["a"].headers == (("X-A", "one default two from a file"),)
    assert rules.secret_values == {"one", "two", "from a file"}


def test_expressions_that_a_response_to_several_events_does_not_have_are_warned_of(tmp_path: Path) -> None:
    text = (
        "version: 1\nsources:\n  a:\n    verify: {scheme: bearer, secrets: [0123456789abcdef]}\n    split: body.l\n"
        "    respond: {headers: {X-A: '${{ id }}', X-B: b}, body: {a: '${{ id }}'}}\n"
        "destinations: {d: {url: 'https://d.example/'}}\nroutes: [{name: r, from: a, to: d}]\n"
    )
    assert problems(tmp_path, text) == [
        "routes.yaml:6:5: sources.a.respond: `body` has expressions: the response to several events is their ids",
        (
            "routes.yaml:6:5: sources.a.respond: `headers.X-A` has expressions: "
            "the response to several events doesn't have it"
        ),
    ]


def test_an_unused_definition_is_a_warning(tmp_path: Path) -> None:
    text = GOOD.replace("routes: [", "routes: [] #")
    assert problems(tmp_path, text) == [
        "routes.yaml:2:11: sources.github: no route takes from 'github'",
        "routes.yaml:3:16: destinations.ci: no route delivers to 'ci'",
    ]
    assert len(load(tmp_path, text).warnings) == 2


# --- References ---


def test_checking_only_warns_of_unresolved_references(tmp_path: Path) -> None:
    text = """
    version: 1
    sources:
      github: {verify: {scheme: github, secrets: ["${SECRET}", "${file:nowhere}"]}}
    destinations:
      ci: {url: "https://${HOST}/", sign: {secrets: ["${SIGN}"]}, headers: {X-A: "${A}"}, concurrency: "${N}"}
    routes:
      - {name: a, from: github, to: ci, match: {type: "${TYPE}"}, request: {body: "${BODY}"}}
    """
    path = tmp_path / "routes.yaml"
    path.write_text(dedent(text))
    rules, found = check_rules(path, environ={})
    assert {problem.severity for problem in found} == {"warning"}
    assert lines(tmp_path, found) == [
        "routes.yaml:4:47: sources.github.verify.secrets[0]: the environment variable SECRET isn't set",
        (
            "routes.yaml:4:60: sources.github.verify.secrets[1]: expected a file at nowhere, "
            "got no such file or directory"
        ),
        "routes.yaml:6:13: destinations.ci.url: the environment variable HOST isn't set",
        "routes.yaml:6:50: destinations.ci.sign.secrets[0]: the environment variable SIGN isn't set",
        "routes.yaml:6:78: destinations.ci.headers.X-A: the environment variable A isn't set",
        "routes.yaml:6:100: destinations.ci.concurrency: the environment variable N isn't set",
        "routes.yaml:8:51: routes[0].match.type: the environment variable TYPE isn't set",
        "routes.yaml:8:79: routes[0].request.body: the environment variable BODY isn't set",
    ]
    assert rules is not None
    ci = rules.destinations["ci"]
    assert (ci.url, ci.headers, ci.concurrency, len(ci.sign)) == ("https://${HOST}/", (("X-A", "${A}"),), 50, 1)
    assert load_rules(path, environ={}, resolve=False).warnings == rules.warnings


def test_an_unresolved_public_key_is_no_wrong_one(tmp_path: Path) -> None:
    text = """
    version: 1
    sources:
      partner:
        public_url: https://hooks.example/in/partner
        verify:
          scheme: http-message-signature
          algorithm: ed25519
          covered: ["@method"]
          public_keys: [{secret: "${KEY}", keyid: key-1}, "${OLD}"]
    """
    (path := tmp_path / "routes.yaml").write_text(dedent(text))
    _, found = check_rules(path, environ={})
    assert {problem.code for problem in found} == {"unresolved", "unused"}
    wrong = {"KEY": "no key", "OLD": "no key"}
    assert "value" in {problem.code for problem in check_rules(path, environ=wrong)[1]}


def test_rules_that_hang_on_an_unresolved_reference_are_none_without_an_error(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(GOOD.replace("name: build", "name: '${NAME}'"))
    rules, found = check_rules(path, environ={})
    assert rules is None
    assert [problem.severity for problem in found] == ["warning"]
    with pytest.raises(InvalidRulesError, match="environment variable NAME"):
        load_rules(path, environ={}, resolve=False)


PATHS = """
version: 1
sources:
  crm: {path: "/in/${A}", verify: {scheme: none}}
  erp: {path: "/in/${B:-default}", verify: {scheme: none}}
  shop: {path: "/in/shop", verify: {scheme: none}}
destinations: {ci: {url: "https://x"}}
routes: [{name: all, from: [crm, erp, shop], to: ci}]
"""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"A": "s3cret", "B": "s3cret"}, "duplicate source at /in/${B:-***}, first defined at"),
        ({"A": "shop"}, "duplicate source at /in/shop, first defined at"),
        ({"A": "s3cret?"}, "expected an absolute path without a query, such as /in/github, got '/in/${A}'"),
        ({"A": "s3cret", "B": "s3cret %"}, "such as /in/github, got '/in/${B:-default}'"),
        ({"A": "s3cret"}, "anybody who reaches /in/${A} can send"),
    ],
)
def test_a_secret_path_is_in_no_message(tmp_path: Path, environ: Mapping[str, str], expected: str) -> None:
    found = problems(tmp_path, PATHS, environ)
    assert any(expected in line for line in found), found
    assert "s3cret" not in str(found)


def test_a_path_with_references_is_shown_as_it_is_written(tmp_path: Path) -> None:
    rules = load(tmp_path, PATHS, {"A": "s3cret"})
    paths = {name: (source.path, source.shown_path) for name, source in rules.sources.items()}
    assert paths == {
        "crm": ("/in/s3cret", "/in/${A}"),
        "erp": ("/in/default", "/in/${B:-***}"),
        "shop": ("/in/shop", "/in/shop"),
    }
    assert "s3cret" not in repr(rules.sources)
    assert "s3cret" not in str(rules.warnings)


def test_unresolved_paths_are_different_ones(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(PATHS.replace("/in/shop", "/in/crm").replace(":-default", ""))
    rules, found = check_rules(path, environ={})
    assert rules is not None, found
    assert [source.shown_path for source in rules.sources.values()] == ["/in/${A}", "/in/${B}", "/in/crm"]


@pytest.mark.parametrize(
    ("path", "is_short"),
    [
        ("/in/${SHORT}", True),
        ("/in/${LONG}", False),
        ("/in/${SHORT}/${SHORT}", False),  # both have to be guessed
        ("/in/${SHORT:-other}", True),
        ("/in/${EMPTY}", True),
        ("/in/${EMPTY:-other}", False),
        ("/in/${UNSET:-other}", False),  # it is in the file: no secret
        ("/in/${UNSET}", False),
        ("/in/${SHORT}/${UNSET}", False),  # not known here
        ("/in/crm", False),
    ],
)
def test_a_short_secret_in_a_path_is_a_warning(tmp_path: Path, path: str, *, is_short: bool) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(PATHS.replace("/in/${A}", path))
    _, found = check_rules(file, environ={"EMPTY": "", "SHORT": "fifteen-letters", "LONG": "sixteen-letters."})
    message = "expected a secret of at least 16 characters, got a shorter one, which can be guessed"
    weak = [(problem.path, problem.message) for problem in found if problem.code == "weak"]
    assert weak == ([("sources.crm.path", message)] if is_short else [])


DEMANDS = """
version: 1
ingress: {trusted_proxies: ["::ffff:10.1.0.0/112", "fd00::/8"]}
sources:
  shop:
    verify: {scheme: none}
    allow_from: [192.0.2.0/24, 198.51.100.7, "2001:db8::/32", "::ffff:10.0.0.0/104", "::ffff:192.0.2.9", "::/0", "${A}"]
    limits: {body: 3MiB, rate: 30/m, concurrent: 7}
  open: {verify: {scheme: none}}
"""


def test_who_may_send_and_how_much(tmp_path: Path) -> None:
    rules = load(tmp_path, DEMANDS, {"A": "203.0.113.7"})
    shop, public = rules.sources["shop"], rules.sources["open"]
    assert shop.allow_from is not None
    assert list(map(str, shop.allow_from)) == [
        *("192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32", "10.0.0.0/8", "192.0.2.9/32", "::/0", "203.0.113.7/32"),
    ]
    assert shop.limits == SourceLimits(body=3 << 20, rate=0.5, concurrent=7)
    assert list(map(str, rules.trusted_proxies)) == ["10.1.0.0/16", "fd00::/8"]
    assert (public.allow_from, public.limits) == (None, SourceLimits())


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "allow_from: [10.0.0.1/8]",
            "allow_from[0]: expected a network without host bits, 10.0.0.0/8, or 10.0.0.1 alone, got",
        ),
        ("allow_from: ['fe80::1%eth0']", "allow_from[0]: expected an address or a network"),
        ("allow_from: [hooks.example.com]", "allow_from[0]: expected an address or a network"),
        ("allow_from: []", "allow_from: expected a list of addresses or networks, with at least one item"),
        ("limits: {body: 0B}", "limits.body: expected a size such as 512B, 256KiB or 1MiB, got '0B'"),
        ("limits: {body: 256}", "limits.body: expected a size such as 512B, 256KiB or 1MiB, got 256"),
        ("limits: {rate: 0/s}", "limits.rate: expected a rate such as 100/s, 10/m or 5/h, got '0/s'"),
        ("limits: {concurrent: 0}", "limits.concurrent: expected an integer from 1 to 100000, got 0"),
        ("limits: {concurrency: 5}", "limits.concurrency: unknown key 'concurrency', did you mean 'concurrent'?"),
    ],
)
def test_a_demand_that_cannot_be_met_is_reported_with_its_place(tmp_path: Path, written: str, expected: str) -> None:
    found = problems(tmp_path, PATHS.replace('path: "/in/shop"', written), {"A": "a"})
    assert any(f": sources.shop.{expected}" in line for line in found), found


def test_proxies_that_are_everybody_are_a_warning(tmp_path: Path) -> None:
    text = PATHS + "ingress: {trusted_proxies: [10.0.0.0/8, 0.0.0.0/0, '::/0']}\n"
    message = "expected the networks of proxies, got every address: any client could spoof its address"
    found = [line.partition(": ")[2] for line in problems(tmp_path, text, {"A": "a" * 16}) if "proxies" in line]
    assert found == [f"ingress.trusted_proxies[{number}]: {message}" for number in (1, 2)]


CERTIFICATES = """
version: 1
ingress: {trusted_proxies: [10.0.0.0/8], certificate_header: {name: Client-Cert, format: rfc9440}}
sources:
  bank:
    verify: {scheme: none}
    client_certificate:
      ca: ${file:ca.pem}
      subjects: ["CN=hooks, O=Bank,C=DE", "CN=a\\\\,b"]
      dns: [Hooks.Bank.example]
      uris: [spiffe://bank/hooks]
      emails: [Hooks@BANK.example]
  open: {verify: {scheme: none}}
"""


def test_a_source_may_demand_a_certificate(tmp_path: Path) -> None:
    first, second = Authority("first"), Authority("second")
    (tmp_path / "ca.pem").write_text(f"two of them\n{first.pem}\n{second.pem}{first.pem}")
    rules = load(tmp_path, CERTIFICATES.replace("CN=hooks, O", "CN=hooks,O"))
    demanded = rules.sources["bank"].client_certificate
    assert demanded is not None
    assert len(demanded.authorities) == 2
    assert rules.client_authorities == frozenset(demanded.authorities)
    assert demanded.subjects == {"CN=hooks,O=Bank,C=DE", "CN=a\\,b"}
    assert demanded.dns == {"hooks.bank.example"}
    assert demanded.uris == {"spiffe://bank/hooks"}
    assert demanded.emails == {"Hooks@bank.example"}
    assert rules.sources["open"].client_certificate is None
    for source in rules.sources.values():
        assert {b"client-cert", b"client-cert-chain"} <= source.proxy_headers
    assert [line for line in rules.warnings if "can send" in line and "/in/bank" in line] == []
    assert tmp_path / "ca.pem" in rules.files, "it is read again when it changes"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("ca: nothing", "ca: expected certificates in PEM, such as ${file:ca.pem}, got a string without one"),
        ('ca: "-----BEGIN CERTIFICATE-----\\nAAAA\\n-----END CERTIFICATE-----"', "ca: expected certificates in PEM"),
        ("subjects: [hooks]", "client_certificate: expected the key 'ca', got none"),
        ("subjects: [hooks]", "subjects[0]: expected a subject as RFC 4514 writes it, such as CN=hooks,O=Bank,C=DE"),
        ("subjects: ['']", "subjects[0]: expected a subject as RFC 4514 writes it"),
        ("dns: ['a b']", "dns[0]: expected a host's name, got 'a b'"),
        ("uris: [hooks]", "uris[0]: expected a URI with a scheme, got 'hooks'"),
        ("emails: [hooks]", "emails[0]: expected an email address, got 'hooks'"),
        ("san: [hooks]", "san: unknown key 'san'"),
    ],
)
def test_a_certificate_that_cannot_be_demanded_is_reported_with_its_place(
    tmp_path: Path, written: str, expected: str
) -> None:
    found = problems(tmp_path, PATHS.replace('path: "/in/shop"', f"client_certificate: {{{written}}}"), {"A": "a"})
    assert any(f"sources.shop.client_certificate.{expected}" in line or expected in line for line in found), found
    assert not any("AAAA" in line for line in found)


def test_a_header_that_counts_from_nobody_is_a_warning(tmp_path: Path) -> None:
    text = PATHS + "ingress: {certificate_header: {name: Client-Cert, format: pem}}\n"
    [found] = [line for line in problems(tmp_path, text, {"A": "a" * 16}) if "certificate_header" in line]
    assert found.endswith("`certificate_header` needs `trusted_proxies`, got none: the header is ignored")


def test_an_included_file_has_no_say_about_proxies(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ingress: {trusted_proxies: [0.0.0.0/0]}\n")
    assert problems(tmp_path, GOOD + "include: a.yaml\n") == [
        "a.yaml:1:1: ingress: unknown key 'ingress': only the main file may have it"
    ]


def test_a_value_that_came_from_a_reference_is_never_shown(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD.replace("to: ci", "to: '${TO}', when: '${WHEN}'"), {"TO": "a b", "WHEN": "s3cret("})
    assert [line for line in found if "s3cret" in line] == []
    assert "got '${WHEN}'" in found[1]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${SET}", "value"),
        ("${EMPTY}", ""),
        ("${SET:-other}", "value"),
        ("${EMPTY:-other}", "other"),
        ("${UNSET:-}", ""),
        ("${UNSET:-a:-b c}", "a:-b c"),
        ("a${SET}b${SET}c", "avaluebvaluec"),
        ("$${SET}", "${SET}"),
        ("$SET $ {SET} $$", "$SET $ {SET} $$"),
        ("${NESTED}", "${SET}"),
    ],
)
def test_a_reference_is_resolved_in_any_text(tmp_path: Path, written: str, expected: str) -> None:
    text = GOOD.replace("{url: https://ci.internal/hook}", f'{{url: http://x, headers: {{X-A: "{written}"}}}}')
    rules = load(tmp_path, text, {"SET": "value", "EMPTY": "", "NESTED": "${SET}"})
    assert rules.destinations["ci"].headers == (("X-A", expected),)


@pytest.mark.parametrize(
    ("content", "expected"), [(b"a\n", "a"), (b"a", "a"), (b"a\r\n", "a"), (b" a\n\n", " a\n"), (b"\n", "")]
)
def test_a_secret_file_loses_one_line_end(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "body").write_bytes(content)
    rules = load(tmp_path, GOOD.replace("to: ci", "to: ci, request: {body: '${file:body}'}"))
    assert rules.routes["build"].request == RequestTemplate(body=Template(expected))
    assert tmp_path / "body" in rules.files


def test_a_secret_file_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"x" * (1 << 20) + b"x")
    (problem,) = problems(tmp_path, GOOD.replace("to: ci", "to: ci, request: {body: '${file:body}'}"))
    assert problem.endswith("body: expected at most 1048576 bytes in body, got more")


# --- Includes ---


def test_a_refusal_names_the_files_that_were_missing_since_they_may_come(tmp_path: Path) -> None:
    text = "version: 1\ninclude: more.yaml\n" + SOURCES.replace("secrets: [", 'secrets: ["${file:token}", ')
    (tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(InvalidRulesError) as refusal:
        load_rules(tmp_path / "routes.yaml", environ={})
    assert {tmp_path / name for name in ("routes.yaml", "more.yaml", "token")} <= refusal.value.stamps.keys()


def test_included_files_add_to_the_rules(tmp_path: Path) -> None:
    (tmp_path / "routes.d" / "deep").mkdir(parents=True)
    (tmp_path / "routes.d" / "a.yaml").write_text("include: deep/*.yaml\n" + SOURCES)
    (tmp_path / "routes.d" / "deep" / "c.yaml").write_text("version: 1\n" + DESTINATIONS)
    (tmp_path / "routes.d" / "b.yaml").write_text("include: deep/c.yaml\n" + ROUTES)
    (tmp_path / "routes.d" / "ignored.txt").write_text("not: yaml: at all")
    rules = load(tmp_path, "version: 1\ninclude: routes.d/*.yaml\n")
    assert (list(rules.sources), list(rules.destinations), list(rules.routes)) == (["github"], ["ci"], ["build"])
    read = ["routes.yaml", "routes.d/a.yaml", "routes.d/deep/c.yaml", "routes.d/b.yaml"]
    folders = ["routes.d", "routes.d/deep"]  # where a file that is added counts from the next reload on
    assert set(rules.files) == {tmp_path / name for name in read + folders}


def test_a_name_in_two_files_is_reported_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SOURCES + DESTINATIONS + ROUTES)
    assert problems(tmp_path, GOOD + f"include: {tmp_path}/a.yaml\n") == [
        "a.yaml:1:11: sources.github: duplicate source 'github', first defined at routes.yaml:2:11",
        "a.yaml:2:16: destinations.ci: duplicate destination 'ci', first defined at routes.yaml:3:16",
        "a.yaml:3:17: routes[0].name: duplicate route 'build', first defined at routes.yaml:4:17",
    ]


def test_an_included_file_has_no_say_about_egress(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("egress: {private: allow}\n")
    found = problems(tmp_path, GOOD + "include: a.yaml\n")
    assert found == ["a.yaml:1:1: egress: unknown key 'egress': only the main file may have it"]


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert problems(tmp_path, GOOD + "include: a.yaml\n") == [
        ("b.yaml:1:10: include: include cycle: routes.yaml → a.yaml → b.yaml → a.yaml")
    ]


def test_a_glob_may_find_nothing(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD + "include: routes.d/*.yaml\n") == [
        "routes.yaml:5:10: include: expected a file at 'routes.d/*.yaml', got none"
    ]
    assert len(load(tmp_path, GOOD + "include: routes.d/*.yaml\n").warnings) == 1


def test_problems_are_sorted_by_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\n")
    (tmp_path / "z.yaml").write_text("x: 1\n")
    found = problems(tmp_path, "y: 1\nversion: 1\ninclude: [z.yaml, a.yaml]\nb: 1\n")
    assert [line.split(": ")[0] for line in found] == ["a.yaml:1:1", "routes.yaml:1:1", "routes.yaml:4:1", "z.yaml:1:1"]


# --- YAML ---


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("on", "on"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("=", "="),
        ("0b1", "0b1"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("017", 17),
        ("0o17", 15),
        ("0xFF", 255),
        ("-3", -3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("!!float 1", 1.0),
    ],
)
def test_scalars_are_those_of_the_core_schema(tmp_path: Path, written: str, expected: object) -> None:
    request = load(tmp_path, f"{GOOD[:-3]}, request: {{body: {written} }}}}]\n").routes["build"].request
    assert request is not None
    assert request.body is not None
    assert (request.body.value, type(request.body.value)) == (expected, type(expected))


def test_the_garbage_collector_runs_again_after_loading(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    assert gc.isenabled()


def test_ten_thousand_routes_load(tmp_path: Path) -> None:
    routes = "".join(
        f"  - {{name: r{n}, from: github, match: {{body.repository.full_name: org/{n}}}, to: ci}}\n"
        for n in range(10_000)
    )
    rules = load(tmp_path, "version: 1\n" + SOURCES + DESTINATIONS + "routes:\n" + routes)
    assert len(rules.routes) == 10_000


def test_an_ordered_route_is_tried_for_an_hour_by_default(tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(
        "version: 1\nsources: {github: {verify: {scheme: none}, key: body.k}}\ndestinations: {ci: {url: 'http://ci/'}}\n"
        "routes:\n  - {name: a, from: github, to: ci, order: key, on_exhausted: halt}\n"
        "  - {name: b, from: github, to: ci, order: key, retry: {max_age: 1d, jitter: 0}}\n"
        "  - {name: c, from: github, to: ci}\n"
    )
    routes = load_rules(file, environ={}).routes
    assert [(route.order, route.on_exhausted, route.retry.max_age) for route in routes.values()] == [
        ("key", "halt", 3600.0),
        ("key", "dead_letter", 86400.0),
        (None, "dead_letter", 3 * 86400.0),
    ]


ENDS = """
version: 1
sources:
  fine: {verify: {scheme: github, secrets: [{secret: "${SECRET}", until: 2027-03-01}]}}
  soon: {verify: {scheme: github, secrets: ["${SECRET}", {secret: "${SECRET}", until: 2027-01-31T12:00:00Z}]}}
  over:
    verify:
      scheme: github
      secrets:
        - "${SECRET}"
        - secret: "${SECRET}"
          until: 2027-01-20
  dead: {verify: {scheme: github, secrets: [{secret: "${SECRET}", until: 2027-01-20}]}}
"""


def test_a_secret_that_has_ended_or_soon_does_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(ENDS)
    now = 1801180800.0  # 2027-01-29T00:00:00Z
    rules, found = check_rules(path, environ={"SECRET": "a" * 16}, now=now)
    assert rules is not None
    assert {problem.severity for problem in found} == {"warning"}
    told = [str(problem).removeprefix(f"{path}:") for problem in found if problem.code in ("expiring", "expired")]
    expected = "until: expected a secret for more than 14 days, got one that"
    assert told == [
        f"5:87: sources.soon.verify.secrets[1].{expected} expires within 3 days",
        f"12:18: sources.over.verify.secrets[1].{expected} has expired, and verifies nothing any more",
        "13:44: sources.dead.verify.secrets: expected a secret that hasn't expired, got none: every request is refused",
    ]
    # A process that restarts serves all other sources, and the other secrets of these.
    assert load_rules(path, environ={"SECRET": "a" * 16}, now=now).sources.keys() == rules.sources.keys()
    assert rules.warnings
    before, nothing = check_rules(path, environ={"SECRET": "a" * 16}, now=now - 40 * 86400)
    assert before is not None
    assert not [problem for problem in nothing if problem.code in ("expiring", "expired")]


def test_the_end_of_a_secret_may_be_a_reference_and_its_secret_is_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(ENDS.replace("2027-01-31T12:00:00Z", '"${UNTIL}"'))
    rules, found = check_rules(path, environ={"SECRET": "hush" * 4, "UNTIL": "hush-hush"})
    assert rules is None
    assert "sources.soon.verify.secrets[1].until: expected a date such as 2027-01-31" in "".join(map(str, found))
    assert "hush" not in "".join(map(str, found))
    rules, _ = check_rules(path, environ={"SECRET": "hush" * 4, "UNTIL": "2999-01-01"})
    assert rules is not None
    assert rules.sources["soon"].secret_expiries[1] > rules.sources["fine"].secret_expiries[0]


def test_quarantine_is_for_sources_whose_requests_can_be_verified_again(tmp_path: Path) -> None:
    text = """
        version: 1
        sources:
          fine: {verify: {scheme: github, secrets: [ssssssssssssssss]}, quarantine: true}
          off: {verify: {scheme: none}, quarantine: false}
          open: {verify: {scheme: none}, quarantine: true}
          bare: {verify: {scheme: jwt, algorithms: [HS256], claims: {}, secrets: [ssssssssssssssss]}, quarantine: true}
          odd: {verify: {scheme: github, secrets: [ssssssssssssssss]}, quarantine: sometimes}
        destinations: {ci: {url: "https://ci.example"}}
        routes: [{name: all, from: [fine, off, open, bare, odd], to: ci}]
        """
    expected = "quarantine: expected a scheme whose requests can be verified again, got"
    found = [problem for problem in problems(tmp_path, dedent(text)) if "quarantine" in problem]
    assert any(f"sources.open.quarantine: {expected} none, which refuses nothing" in problem for problem in found)
    assert any(f"sources.bare.quarantine: {expected} a token that is good for any body" in problem for problem in found)
    assert any("sources.odd.quarantine: expected true or false, got 'sometimes'" in problem for problem in found)
    assert len(found) == 3


def test_only_a_source_with_quarantine_needs_its_topic(tmp_path: Path) -> None:
    text = """
        version: 1
        sources: {{github: {{verify: {{scheme: github, secrets: [ssssssssssssssss]}}, quarantine: {on}}}}}
        destinations: {{ci: {{url: "https://ci.example"}}}}
        routes: [{{name: all, from: github, to: ci}}]
        """
    for is_on in (True, False):
        rules = load(tmp_path, dedent(text.format(on=str(is_on).lower())))
        assert rules.sources["github"].quarantine is is_on
        names = [spec.name for spec in specs_of(rules, Topics())]
        assert ("gateway.rejected" in names) is is_on


def test_no_source_may_use_the_topic_of_refused_requests() -> None:
    with pytest.raises(RulesError, match=r"gateway\.rejected"):
        Topics().specs(["gateway.rejected"])


def test_a_version_is_of_the_texts_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "routes.yaml").write_text("version: 1\ninclude: more.yaml\n")
        (tmp_path / folder / "more.yaml").write_text("routes: []\n")
    versions = [load_rules(tmp_path / folder / "routes.yaml").version for folder in ("a", "b", "a")]
    assert len(set(versions)) == 1, "wherever they are"
    assert re.fullmatch("[0-9a-f]{8}", versions[0])
    (tmp_path / "b" / "more.yaml").write_text("routes: [] # none\n")
    assert load_rules(tmp_path / "b" / "routes.yaml").version != versions[0]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("hook}", 'hook, forward_headers: ["${VALUE}"]}', "a header that isn't forwarded by default"),
        ("to: ci", 'to: ci, request: {preset: pagerduty, routing_key: a, summary: b, severity: "${VALUE}"}', "one of"),
    ],
)
def test_a_wrong_value_of_a_reference_is_not_told(tmp_path: Path, before: str, after: str, message: str) -> None:
    told = problems(tmp_path, GOOD.replace(before, after), {"VALUE": "x-s3cret"})
    assert any(f"expected {message}" in each for each in told), told
    assert "x-s3cret" not in str(told)


@pytest.mark.parametrize(
    "text",
    [
        "sources: {a: {verify: {scheme: [github], secrets: [x]}}}",
        "sources: {a: {verify: {scheme: {hmac: x}}}}",
        "destinations: {a: {url: 'https://a.example/', timeout: '.inf', concurrency: '99999999999999999999'}}",
        "destinations: {a: {url: 'https://a.example/', concurrency: '${N}', rate: '1e999'}}",
        "policy: {max_rate: 5/s}\ninclude: b.yaml",
    ],
)
def test_whatever_is_written_has_a_message_and_no_bug(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.yaml").write_text(
        "destinations:\n"
        + "\n".join(
            [
                f"  d{number}: {{url: 'https://a.example/', rate: {rate}}}"
                for number, rate in enumerate(["5", "null", "[5/s]", "500/s", "x"])
            ]
        )
    )
    (tmp_path / "routes.yaml").write_text(f"version: 1\n{text}\n")
    rules, found = check_rules(tmp_path / "routes.yaml", environ={"N": "1e999"})
    assert rules is None
    assert [each for each in found if each.severity == "error"]


def test_ten_thousand_unknown_keys_take_no_longer_than_as_many_routes(tmp_path: Path) -> None:
    lines = [f"  - {{name: r{number}, from: s, to: d, rate: 5/s, wen: x, k{number}: 1}}" for number in range(3_000)]
    (tmp_path / "routes.yaml").write_text("version: 1\nroutes:\n" + "\n".join(lines) + "\n")
    began = time.process_time()
    _, found = check_rules(tmp_path / "routes.yaml", environ={})
    assert sum(each.code == "unknown_key" for each in found) == 9_000
    assert time.process_time() - began < 10.0


def test_a_line_of_many_marks_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(f"version: 1\nowner: a {'#' * 1_000_000}\nrunbook: {'x(' * 100_000}\n")
    began = time.process_time()
    check_rules(tmp_path / "routes.yaml", environ={})
    assert time.process_time() - began < 5.0
