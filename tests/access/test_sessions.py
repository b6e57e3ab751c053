"""What the cookies of sessions say, how they are sealed, and when a session is over."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.access_file import AccessList, Grant
from gateway.access.principal import AccessRole
from gateway.access.sealed import MAX_TEXT, NONCE_BYTES, Seal
from gateway.access.sessions import (
    AGE,
    FLOW_AGE,
    IDLE,
    MAX_PATH,
    MAX_REVOKED,
    OIDC,
    SKEW,
    TOKEN_SESSION,
    RevokedIds,
    Session,
    SignInFlow,
    binding_of_identity_provider,
    binding_of_token,
    decode_flow,
    decode_session,
    grant_of,
    kept_groups,
)
from gateway.access.sign_in_lines import Oidc
from tests.builders import NOW

NONCE = b"\x01" * NONCE_BYTES
SESSION = Session(id="a", how=OIDC, name="ada", binding="p", groups=("b", "c"), signed_in_at=NOW, seen_at=NOW)
FLOW = SignInFlow(state="s", nonce="n", code_verifier="v", return_path="/ui", binding="p", began_at=NOW)


def test_what_is_sealed_is_opened_by_the_same_secret_for_the_same_purpose_alone() -> None:
    seal = Seal(b"one")
    text = seal.close("a", b"content", NONCE)
    assert "content" not in text
    assert seal.open("a", text) == b"content"
    assert Seal(b"one").open("a", text) == b"content"
    assert seal.open("b", text) is None
    assert Seal(b"two").open("a", text) is None


@given(st.data())
def test_no_changed_text_is_opened(data: st.DataObject) -> None:
    seal = Seal(b"one")
    text = seal.close("a", b"content", NONCE)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    changed = text[:at] + other + text[at + 1 :]
    assert seal.open("a", changed) == (b"content" if changed == text else None)


@given(st.text(max_size=200) | st.sampled_from(["A" * (MAX_TEXT + 1), "A" * 36, "A" * 37, "é"]))
def test_any_other_text_is_none(text: str) -> None:
    assert Seal(b"one").open("a", text) is None


def test_what_is_too_long_for_a_cookie_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 3800 characters"):
        Seal(b"one").close("a", b"x" * MAX_TEXT, NONCE)


def test_the_longest_session_and_the_longest_flow_have_room() -> None:
    groups = kept_groups(["ä" * 254] * 50)
    session = replace(SESSION, id="x" * 22, name="\N{GRINNING FACE}" * 254, binding="p" * 64, groups=groups)
    flow = SignInFlow(
        state="x" * 43,
        nonce="x" * 43,
        code_verifier="x" * 64,
        return_path="/" * MAX_PATH,
        binding="p" * 64,
        began_at=NOW,
    )
    for each in (session, flow):
        assert len(Seal(b"one").close("__Host-signed-in", each.encoded(), NONCE)) < MAX_TEXT


def test_as_many_groups_are_kept_as_there_is_room_for_the_first_ones() -> None:
    assert kept_groups(["a", "b"]) == ("a", "b")
    groups = [f"group-{number:04}" for number in range(1000)]
    assert kept_groups(groups) == tuple(groups[: 1500 // len('"group-0000",')])


def test_a_session_is_read_as_it_was_written() -> None:
    assert decode_session(SESSION.encoded()) == SESSION
    assert decode_flow(FLOW.encoded()) == FLOW


@pytest.mark.parametrize("content", [None, b"[2]", b"[1]", b'[2,"a","b","c","d",[],1,2]'])
def test_what_another_version_has_sealed_is_no_session(content: bytes | None) -> None:
    assert decode_session(content) is None
    assert decode_flow(content) is None
    assert decode_session(FLOW.encoded()) is None
    assert decode_flow(SESSION.encoded()) is None


def test_a_session_is_over_by_its_age_or_unused() -> None:
    assert not SESSION.is_over(NOW)
    assert not SESSION.is_over(NOW + IDLE - 1)
    assert SESSION.is_over(NOW + IDLE)
    used = SESSION.with_seen_at(NOW + AGE - 1)
    assert not used.is_over(NOW + AGE - 1)
    assert used.is_over(NOW + AGE)


def test_clocks_may_differ_by_a_minute_and_no_more() -> None:
    assert not SESSION.is_over(NOW - SKEW)
    assert SESSION.is_over(NOW - SKEW - 1)
    assert not FLOW.is_over(NOW - SKEW)
    assert FLOW.is_over(NOW - SKEW - 1)
    assert not FLOW.is_over(NOW + FLOW_AGE - 1)
    assert FLOW.is_over(NOW + FLOW_AGE)


def test_a_session_has_what_the_file_says_now() -> None:
    token = Grant(name="ada", role=AccessRole.VIEWER, digest=b"\x01" * 32)
    by_token = replace(SESSION, how=TOKEN_SESSION, binding=binding_of_token(token))
    assert grant_of(by_token, AccessList(tokens=(token,)), NOW) == token
    for other in (
        replace(token, digest=b"\x02" * 32),
        replace(token, name="bob"),
        replace(token, expires=NOW),
    ):
        assert grant_of(by_token, AccessList(tokens=(other,)), NOW) is None
    # A person of the same name is nobody's token, and the other way round.
    person = Grant(name="ada", role=AccessRole.OPERATOR)
    provider = Oidc(issuer="https://id.example.com", client="a", secret="b")
    by_provider = replace(SESSION, binding=binding_of_identity_provider(provider))
    assert grant_of(by_token, AccessList(people=(person,), oidc=provider), NOW) is None
    assert grant_of(by_provider, AccessList(people=(person,), oidc=provider), NOW) == person
    assert grant_of(by_provider, AccessList(tokens=(token,), oidc=provider), NOW) is None
    assert grant_of(by_provider, AccessList(people=(person,)), NOW) is None
    group = Grant(name="c", role=AccessRole.READER, is_group=True)
    assert grant_of(by_provider, AccessList(groups=(group,), oidc=provider), NOW) == group
    # A new secret is the same provider's.
    renewed = replace(provider, secret="c")
    assert grant_of(by_provider, AccessList(people=(person,), oidc=renewed), NOW) == person


def test_what_has_ended_is_remembered_until_its_time_in_bounded_memory() -> None:
    ended = RevokedIds()
    for number in range(MAX_REVOKED + 10):
        ended.add(str(number), NOW + 10, NOW)
    assert len(ended) == MAX_REVOKED
    assert "9" not in ended
    assert "10" in ended
    ended.add("later", NOW + 30, NOW + 10)
    assert len(ended) == 1
