"""A rule file as people see it: every line in its place, and nothing that is or may be a secret."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ops.rule_file_views import file_views, is_template_of
from gateway.ops.shown_rules import Entry, shown_file
from gateway.rules.load import check_rules
from tests.api.conftest import rules_of

RULES = """\
version: 1
owner: platform  # anna's, since 2026
# the old one was whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw, of March
# password of the wiki: swordfish
sources:
  github:
    path: /in/github
    verify:
      scheme: github
      secrets: ["${GITHUB_SECRET}", {secret: hunter2-hunter2-hunter2, until: 2027-01-31}]
  shop: {verify: {scheme: token, header: X-Token, secrets: ['it''s a secret', "${file:secrets/shop}"]}}
  web: {verify: {scheme: basic, username: admin, password: "${WEB:-letmein-letmein}"}}
destinations:
  ci:
    url: https://ci.example/hooks/T0KEN/x
    headers: {Authorization: Bearer abcdef, X-Team: platform}
    tls:
      ca: "${file:ca.pem}"
      key: |
        -----BEGIN PRIVATE KEY-----
        MIIEvQ
        -----END PRIVATE KEY-----
  chat: {url: "${CHAT_URL}", sign: {secrets: [whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw]}}
  crm:
    url: "https://crm.example/"
    auth: {oauth2: {token_url: "https://id.example/token", client_id: me, client_secret: shush}}
routes:
  - name: build
    from: github
    match: {type: push}
    to: ci   # hunter2-hunter2-hunter2 is the secret of ours
    request:
      headers: {X-Api-Key: k-123, X-Kind: "${{ event.type }}"}

  - {name: tell, from: github, to: chat}
tests:
  - name: a push
    event: {source: github, body: {card: 4242424242424242}}
    expect: {routes: [build]}
"""
SECRETS = (
    *("whsec_", "swordfish", "hunter2", "it''s", "letmein", "T0KEN", "abcdef", "MIIEvQ", "shush", "k-123", "4242"),
    *("admin", "client_id: me"),
)


def test_what_may_be_a_secret_is_hidden_and_the_rest_is_as_it_is_written() -> None:
    shown = shown_file(RULES)
    text = "\n".join(shown.lines)
    assert [each for each in SECRETS if each in text] == []
    assert len(shown.lines) == RULES.count("\n")
    for kept in (
        "owner: platform  # anna's, since 2026",
        'secrets: ["${GITHUB_SECRET}", {secret: ***, until: 2027-01-31}]',
        "{scheme: token, header: X-Token, secrets: ['***', \"${file:secrets/shop}\"]}".replace("'***'", '"***"'),
        'password: "${WEB:-***}"',
        "url: https://ci.example/***",
        '      ca: "${file:ca.pem}"\n      key: ***',
        '  chat: {url: "${CHAT_URL}", sign: {secrets: [***]}}',
        '    url: "https://crm.example/"\n    auth: {oauth2: {token_url: "https://id.example/***"',
        "    match: {type: push}",
        "    to: ci   # ***",
        'X-Kind: "${{ event.type }}"',
        "  - {name: tell, from: github, to: chat}",
        "# ***",
    ):
        assert kept in text, kept


def test_lines_and_entries_stay_where_they_are() -> None:
    shown, written = shown_file(RULES), RULES.splitlines()
    for entry in shown.entries:
        assert entry.name in written[entry.first - 1]
        assert entry.name in shown.lines[entry.first - 1]
    build = next(each for each in shown.entries if each.name == "build")
    assert written[build.last - 1].startswith("      headers: {X-Api-Key")
    assert shown.entries[0] == Entry("source", "github", 6, 10)
    assert [each.name for each in shown.entries] == ["github", "shop", "web", "ci", "chat", "crm", "build", "tell"]
    assert shown.tests is not None
    assert written[shown.tests[0] - 1] == "tests:"
    assert shown.tests[1] == len(written)
    assert set(shown.lines[shown.tests[0] - 1 :]) == {""}


@pytest.mark.parametrize(
    "text",
    ["a: [", "- a", "", "hunter2", "a: &a [*a]\nb: *a", "\t", "x: " + "[" * 100 + "]" * 100, "!!x y: z"],
    ids=repr,
)
def test_what_isnt_a_rule_file_shows_nothing(text: str) -> None:
    shown = shown_file(text)
    assert shown.problem or not any(each.strip("[]*\"'{} :!&,\nabx") for each in shown.lines), shown.lines


def test_what_the_schema_doesnt_know_is_hidden() -> None:
    text = "version: 1\nsecret_of_ours: {hunter2: hunter3}\nsources: {a: {verify: {scheme: token, pasword: hunter4}}}\n"
    shown = "\n".join(shown_file(text).lines)
    assert "hunter" not in shown
    assert "secret_of_ours" not in shown, "it may be one, in braces"


def test_anchors_are_hidden_where_they_stand() -> None:
    text = "sources:\n  a: {owner: &x hunter2-hunter2, verify: {scheme: token, header: X, secrets: [*x]}}\n"
    assert "hunter2" not in "\n".join(shown_file(text).lines)


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"\\'{}$"), min_size=16, max_size=40)
)
def test_no_literal_secret_is_shown_wherever_a_secret_belongs(secret: str) -> None:
    text = (
        f'secrets: {{ours: "{secret}"}}\n'
        f'sources: {{a: {{verify: {{scheme: token, header: X-Token, secrets: ["{secret}"]}}}}}}\n'
        f'destinations: {{b: {{url: "https://b.example/{secret}", auth: {{bearer: {{token: "{secret}"}}}}}}}}\n'
        f"# {secret}\n"
    )
    shown = shown_file(text)
    assert not shown.problem
    assert secret not in "\n".join(shown.lines)


def test_files_are_those_with_rules_and_their_version_is_that_of_the_rules(tmp_path: Path) -> None:
    root = tmp_path / "routes.yaml"
    (tmp_path / "teams").mkdir()
    (tmp_path / "secret").write_text("hunter2-hunter2-hunter2")
    (tmp_path / "teams" / "a.yaml").write_text(
        "routes:\n  - {name: 'to-${{ each }}', foreach: [ci, cd], from: github, to: '${{ each }}'}\n"
    )
    rules = rules_of(
        root,
        "version: 1\ninclude: teams/*.yaml\n"
        "sources: {github: {verify: {scheme: github, secrets: ['${file:secret}']}}}\n"
        'destinations: {ci: {url: "https://ci.example/"}, cd: {url: "https://cd.example/"}}\n',
    )
    views = file_views(root, rules.files)
    assert [each.path for each in views.files] == [root, tmp_path / "teams" / "a.yaml"]
    assert views.version == rules.version
    place = views.place_of("route", "to-cd")
    assert place is not None
    assert (place.file, place.entry.first) == (1, 2)
    assert views.place_of("route", "nothing") is None
    assert views.place_of("destination", "to-cd") is None
    assert check_rules(root)[0] is not None
    (tmp_path / "teams" / "a.yaml").write_text("routes: []\n")
    assert file_views(root, rules.files).version != rules.version


def test_a_name_of_several_routes_is_that_of_its_template() -> None:
    assert is_template_of("to-${{ each.name }}-x", "to-ci-x")
    assert not is_template_of("to-${{ each }}", "from-ci")
    assert not is_template_of("to-ci", "to-ci")
