"""What the log keeps of the rules' routes: it is read back as it was, and holds no secret."""

import json
import resource
import zlib
from base64 import b64encode
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.model import Event
from gateway.rules.conditions import parse_condition, written
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import PastRoute, decode, encode, past_route, routing_revision
from gateway.rules.rules import RoutingRevision
from tests.builders import a_route, an_event
from tests.engine.test_worker import rules_of

scalars = st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(-1e6, 1e6), st.text(max_size=5))
numbers = st.integers(-100, 100) | st.floats(-1e6, 1e6)
tests = st.recursive(
    scalars | st.lists(scalars | st.sampled_from(("a*", "*.b")), min_size=1, max_size=3),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={"is": scalars, "gt": numbers, "lte": numbers, "exists": st.booleans(), "not": inner},
    ).filter(bool),
    max_leaves=3,
)
paths = st.sampled_from(("type", "source", "headers.x-a", "query.n", "body.a.b", 'body."a.b".0'))
conditions = st.recursive(
    st.dictionaries(paths, tests, min_size=1, max_size=3),
    lambda inner: st.one_of(
        st.builds(lambda each: {"any_of": each}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda each: {"all_of": each}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda each: {"not": each}, inner),
    ),
    max_leaves=4,
)


@given(conditions)
def test_a_condition_is_written_as_it_is_read(match: dict[str, object]) -> None:
    condition = parse_condition(match)
    assert parse_condition(json.loads(json.dumps(written(condition)))) == condition


def read(name: str, text: str) -> PastRoute:
    then = past_route(name, text)
    assert then is not None
    return then


def matched(text: str, event: Event) -> bool:
    route = read("build", text).route
    assert route is not None
    return bool(RouteTable((route,)).match(EventView.of(event)))


def test_a_revision_has_a_routes_condition() -> None:
    rules = rules_of(a_route(match={"type": ["push", "tag*"]}, when="body.n > 3", to=("ci", "audit")))
    text = routing_revision(rules).routes["build"]
    assert matched(text, an_event(type="tag_made", body={"n": 4}))
    assert not matched(text, an_event(type="tag_made", body={"n": 3}))
    then = read("build", text)
    assert (then.sources, then.destinations) == (frozenset({"github"}), frozenset({"ci", "audit"}))


def test_revisions_differ_where_routes_send_otherwise_and_nowhere_else() -> None:
    name = routing_revision(rules_of(a_route(match={"type": "push"}))).name
    assert routing_revision(rules_of(a_route(match={"type": "push"}, halts=True))).name == name
    for other in (
        a_route(),
        a_route(match={"type": "tag"}),
        a_route(match={"type": "push"}, when="true"),
        a_route(match={"type": "push"}, to=("audit",)),
        a_route(match={"type": "push"}, sources=("github", "gitlab")),
        a_route("other", match={"type": "push"}),
    ):
        assert routing_revision(rules_of(other)).name != name


def test_a_revision_is_encoded_in_full_or_by_its_differences() -> None:
    many = [a_route(f"r{number}", match={"type": f"t{number}"}) for number in range(300)]
    base = routing_revision(rules_of(*many))
    full = encode(base, None)
    assert decode(base.name, full, None) == base
    changed = routing_revision(rules_of(*many[1:], a_route("r1", when="true"), a_route("new")))
    told = encode(changed, base)
    assert decode(changed.name, told, base) == changed
    assert len(told) < len(full) / 8
    for text in ("", "!", full[:40], encode(base, None)[:-8]):
        with pytest.raises(ValueError, match=r"expected a revision|Incorrect padding|base64|Invalid"):
            decode("x", text, None)


def test_a_revision_that_unpacks_to_more_than_any_has_is_not_decoded() -> None:
    packing = zlib.compressobj(9)
    parts = [packing.compress(b'{"gone":[],"routes":{"a":"')]
    parts += [packing.compress(b"a" * (1 << 20)) for _ in range(300)]
    parts += [packing.compress(b'"}}'), packing.flush()]
    text = b64encode(b"".join(parts)).decode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="at most 8388608 B"):
        decode("x", text, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(("from", "to", "dedupe", "match", "when", "hidden")) | st.text(max_size=4)
texts = st.lists(st.text(max_size=4), max_size=2)
documents = st.dictionaries(names, json_values, max_size=6) | st.fixed_dictionaries(
    {"from": texts, "to": texts}, optional={"match": conditions | json_values, "when": st.text(), "dedupe": json_values}
)


@given(st.text(max_size=20) | (documents | json_values).map(json.dumps))
@example("[" * 100_000)
@example('{"from": [], "to": [], "match": ' + '{"not": ' * 5_000 + "1" + "}" * 5_001)
def test_any_text_is_a_route_of_the_past_or_none(text: str) -> None:
    then = past_route("build", text)
    if then is not None and then.route is not None:
        RouteTable((then.route,)).match(EventView.of(an_event()))


@given(json_values | st.fixed_dictionaries({"routes": json_values, "gone": json_values}))
def test_any_document_is_a_revision_or_refused(document: object) -> None:
    text = b64encode(zlib.compress(json.dumps(document).encode())).decode()
    for base in (None, RoutingRevision("base", {"a": "{}"})):
        with suppress(ValueError):
            assert all(isinstance(each, str) for each in decode("x", text, base).routes.values())


def test_a_document_that_is_too_deep_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a revision"):
        decode("x", b64encode(zlib.compress(b"[" * 100_000)).decode(), None)


def test_a_condition_with_a_resolved_reference_is_not_kept() -> None:
    rules = rules_of(a_route(when='headers["x-token"] == "s3cr3t-\\"one"'), a_route("plain", when='type == "abc"'))
    rules = replace(rules, secret_values=frozenset({'s3cr3t-\\"one', "abc"}))
    revision = routing_revision(rules)
    assert "s3cr3t" not in str(revision.routes)
    assert read("build", revision.routes["build"]).route is None
    assert read("plain", revision.routes["plain"]).route is not None, "three letters may stand anywhere"


def test_a_condition_of_a_newer_version_is_one_that_is_not_known() -> None:
    for told in ({"when": "a ==="}, {"when": 3}, {"match": {"type": {"newer": 1}}}, {"match": 3}):
        then = read("build", json.dumps({"from": ["github"], "to": ["ci"], **told}))
        assert then.route is None
