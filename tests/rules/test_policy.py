"""Who answers for what, and what the root file lets the files do that it includes."""

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Contact

ROOT = """
version: 1
include: teams/*.yaml
owner: platform
runbook: https://wiki.example/platform
{policy}
sources: {{root: {{verify: {{scheme: none}}, path: /any/where}}}}
destinations: {{root: {{url: "http://anywhere.example/", headers: {{X-A: b}}}}}}
routes: [{{name: root, from: root, to: root, owner: on-call}}]
"""
POLICY = """
policy:
  hosts: ["*.acme.example", hooks.slack.com]
  paths: [/in/team-*]
  max_rate: 50/s
  require: [owner, runbook]
  forbid: [unverified, headers]
"""
NO_HOST = "expected a host such as *.acme.example or hooks.slack.com, got another"
GITHUB = "scheme: github, secrets: [abcdefghijklmnopqrst]"
GOOD = """
owner: team-a
runbook: https://wiki.example/a
sources: {a: {path: /in/team-a, verify: {scheme: github, secrets: [abcdefghijklmnopqrst]}}}
destinations:
  a: {url: "https://ci.acme.example/", rate: 50/s}
  unresolved: {url: "${SOMEWHERE}", rate: 1/m, owner: team-b, runbook: "https://wiki.example/b"}
routes:
  - {name: a, from: a, to: [a, unresolved, {name: i, url: "https://hooks.slack.com/x", rate: 1/s}]}
"""


def write(folder: Path, team: str, policy: str = POLICY) -> Path:
    (folder / "teams").mkdir(exist_ok=True)
    (folder / "teams/a.yaml").write_text(team)
    (file := folder / "routes.yaml").write_text(ROOT.format(policy=policy))
    return file


def errors(file: Path) -> list[str]:
    _, problems = check_rules(file, environ={})
    return [
        f"{each.line}: {each.path}: {each.message.partition(': the policy of')[0]}"
        for each in problems
        if each.severity == "error"
    ]


def test_who_answers_is_the_nearest_that_says_so(tmp_path: Path) -> None:
    rules = load_rules(write(tmp_path, GOOD), environ={"SOMEWHERE": "https://x.acme.example/"})
    platform, team_a = Contact("platform", "https://wiki.example/platform"), Contact("team-a", "https://wiki.example/a")
    assert rules.contacts == {
        ("source", "root"): platform,
        ("destination", "root"): platform,
        ("route", "root"): Contact("on-call"),  # another owner has another runbook
        ("source", "a"): team_a,
        ("destination", "a"): team_a,
        ("destination", "i"): team_a,
        ("destination", "unresolved"): Contact("team-b", "https://wiki.example/b"),
        ("route", "a"): team_a,
    }


def test_what_includes_says_who_answers_for_what_is_included(tmp_path: Path) -> None:
    rules = load_rules(write(tmp_path, "destinations: {a: {url: 'http://a.example/'}}", policy=""), environ={})
    assert rules.contacts["destination", "a"] == Contact("platform", "https://wiki.example/platform")
    rules = load_rules(
        write(tmp_path, "owner: a\ndestinations: {a: {url: 'http://a.example/'}}", policy=""), environ={}
    )
    assert rules.contacts["destination", "a"] == Contact("a")


def test_what_the_policy_allows(tmp_path: Path) -> None:
    assert errors(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("https://ci.acme.example/", "https://ci.acme.example.evil/", f"6: destinations.a.url: {NO_HOST}"),
        ("https://hooks.slack.com/x", "https://hooks.slack.com@evil.example/x", None),
        ("https://hooks.slack.com/x", "https://evil.example/hooks.slack.com", f"9: routes[0].to[2].url: {NO_HOST}"),
        ("/in/team-a", "/in/github", "4: sources.a.path: expected a path such as /in/team-*, got /in/github"),
        ("path: /in/team-a, ", "", "4: sources.a: expected a path such as /in/team-*, got /in/a"),
        ("rate: 50/s", "rate: 51/s", "6: destinations.a.rate: expected a rate of at most 50/s, got 51/s"),
        (", rate: 50/s", "", "6: destinations.a: expected a rate of at most 50/s, got none"),
        (GITHUB, "scheme: none", "4: sources.a.verify: expected a scheme that verifies, got none"),
        ("rate: 50/s", "rate: 50/s, headers: {A: b}", "6: destinations.a.headers: expected no headers, got some"),
        (
            "{name: a, from: a,",
            "{name: a, from: a, request: {headers: {A: b}},",
            "9: routes[0].request.headers: expected no headers, got some",
        ),
        (
            "owner: team-a",
            "owner: team-a\ndefaults: {headers: {A: b}}",
            "3: defaults.headers: expected no headers, got some",
        ),
        ("rate: 50/s", "rate: 50/s, proxy: 'http://evil.example:1'", f"6: destinations.a.proxy: {NO_HOST}"),
        (
            "path: /in/team-a",
            "path: '${X:-/in/other}'",
            "4: sources.a.path: expected a path such as /in/team-*, got ${X:-***}",
        ),
        ("rate: 50/s", "rate: '${UNSET}'", ""),
        # Of what can't be resolved here, what is known counts.
        ("https://ci.acme.example/", "https://evil.example/${TOKEN}", f"6: destinations.a.url: {NO_HOST}"),
        ("https://ci.acme.example/", "https://evil.example?t=${TOKEN}", f"6: destinations.a.url: {NO_HOST}"),
        ("https://ci.acme.example/", "https://ci.acme.example/${TOKEN}", ""),
        ("https://ci.acme.example/", "https://evil.example${REST}/", ""),
        ("https://ci.acme.example/", "https://[${V6}]/", ""),
        (
            "path: /in/team-a",
            "path: '/in/other/${S}'",
            "4: sources.a.path: expected a path such as /in/team-*, got /in/other/${S}",
        ),
        ("path: /in/team-a", "path: '/in/${S}'", ""),
        ("path: /in/team-a", "path: '/in/team-a/${S}'", ""),
        ("path: /in/team-a", "path: '${S}'", ""),
        ("https://ci.acme.example/", "https://CI.Acme.Example/", ""),
        (', runbook: "https://wiki.example/b"', "", None),
        ("runbook: https://wiki.example/a", "", None),
    ],
)
def test_what_the_policy_forbids(before: str, after: str, expected: str | None, tmp_path: Path) -> None:
    assert GOOD.count(before) == 1
    found = errors(write(tmp_path, GOOD.replace(before, after)))
    if expected is None:
        assert found
    elif not expected:
        assert found == []
    else:
        assert found == [expected]


def test_a_provider_of_ones_own_that_verifies_nothing_is_forbidden_like_none(tmp_path: Path) -> None:
    providers = "owner: team-a\nproviders: {open: {verify: {scheme: none}}}"
    team = GOOD.replace(GITHUB, "scheme: open").replace("owner: team-a", providers)
    assert errors(write(tmp_path, team)) == ["5: sources.a.verify: expected a scheme that verifies, got none"]


@pytest.mark.parametrize(
    "verify", ['{scheme: hash, header: X-S, signed: "{body}"}', "{scheme: token}", "[{header: X-S}, {scheme: none}]"]
)
def test_a_provider_of_ones_own_that_proves_nothing_is_refused_before_the_policy(verify: str, tmp_path: Path) -> None:
    providers = f"owner: team-a\nproviders: {{open: {{verify: {verify}}}}}"
    team = GOOD.replace(GITHUB, "scheme: open, secrets: [s]").replace("owner: team-a", providers)
    [found] = errors(write(tmp_path, team))
    assert "providers.open.verify" in found


def test_a_source_whose_key_is_unknown_is_not_one_that_verifies_nothing(tmp_path: Path) -> None:
    team = GOOD.replace(GITHUB, "scheme: discord, public_keys: ['${KEY}']")
    assert errors(write(tmp_path, team)) == []


def test_what_is_required_may_be_the_files(tmp_path: Path) -> None:
    missing = errors(write(tmp_path, GOOD.replace("owner: team-a", "").replace("runbook: https://wiki.example/a", "")))
    assert missing == []  # the root file's own
    (root := tmp_path / "routes.yaml").write_text(
        root.read_text().replace("owner: platform\n", "").replace("runbook: https://wiki.example/platform\n", "")
    )
    assert len(errors(root)) == 8  # two keys of a source, two destinations and a route


def test_a_policy_confines_no_reference(tmp_path: Path) -> None:
    """What a file may send where is bounded by `hosts` alone: it may use whatever the process can read."""
    (secret := tmp_path / "another-teams").write_text("abcdefghijklmnopqrst")
    team = GOOD.replace("ci.acme.example/", f"ci.acme.example/${{SOMEWHERE}}${{file:{secret}}}")
    _, problems = check_rules(write(tmp_path, team), environ={"SOMEWHERE": "https://x.acme.example/"})
    assert [str(each) for each in problems if each.severity == "error"] == []


def test_a_policy_confines_no_file_to_its_own_sources(tmp_path: Path) -> None:
    """A route may take what comes for others, and with `stop` keep it from the routes below it."""
    team = GOOD.replace("{name: a, from: a,", "{name: a, from: [a, root], stop: true,")
    assert errors(write(tmp_path, team)) == []


def test_the_root_file_is_bound_by_nothing(tmp_path: Path) -> None:
    assert errors(write(tmp_path, "")) == ["1: : expected a mapping, got an empty file"]
    assert errors(write(tmp_path, "version: 1")) == []


def test_who_answers_is_no_reference(tmp_path: Path) -> None:
    """It is a label of a metric."""
    for text in ("owner: '${TEAM}'", "runbook: 'https://wiki.example/${TEAM}'"):
        (found,) = errors(write(tmp_path, text))
        assert found.endswith("expected a string without references, got one with ${…}, which everybody would see")


def test_an_included_file_makes_no_policy(tmp_path: Path) -> None:
    assert errors(write(tmp_path, "policy: {hosts: ['*']}")) == [
        "1: policy: unknown key 'policy': only the main file may have it"
    ]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("policy: {require: [team]}", "expected one of owner, runbook, got 'team'"),
        ("policy: {forbid: [all]}", "expected one of unverified, headers, secrets, got 'all'"),
        ("policy: {max_rate: 5}", "expected a rate such as 100/s, 10/m or 5/h, got 5"),
        ("policy: {hots: [a]}", "unknown key 'hots', did you mean 'hosts'?"),
    ],
)
def test_mistakes(policy: str, message: str, tmp_path: Path) -> None:
    (found,) = errors(write(tmp_path, "version: 1", policy=policy))
    assert found.endswith(message)


def test_explain_says_who_answers_for_a_route(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, GOOD.replace("${SOMEWHERE}", "https://x.acme.example/"))
    (body := tmp_path / "body.json").write_text("{}")
    assert main(["explain", str(file), str(body), "--source", "a"]) == 0
    assert "✓ a  matched\n    owner: team-a, https://wiki.example/a\n" in capsys.readouterr().out
    assert main(["explain", str(file), str(body), "--source", "root", "--json"]) == 0
    assert '"owner":"on-call","runbook":null' in capsys.readouterr().out
