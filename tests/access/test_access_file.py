"""How the access file is read and changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.access_file import (
    MAX_ENTRIES,
    AccessFileError,
    AccessList,
    Grant,
    read_access,
    with_token,
    without_token,
)
from gateway.access.principal import AccessRole
from tests.builders import NOW

DIGEST = "9f" * 32


def read(text: str) -> AccessList:
    return read_access(text, "access.conf")


def test_a_file_has_a_token_or_a_person_on_each_line() -> None:
    found = read(f"""
# for the deploy job
token deploys operator sha256={DIGEST} source=github source=stripe owner='team b' expires=2027-03-01T00:00:00Z
  person ada@example.com operator   # on call
person *@example.com viewer owner=payments
""")
    (token,) = found.tokens
    assert token == Grant(
        name="deploys",
        role=AccessRole.OPERATOR,
        sources=frozenset({"github", "stripe"}),
        owners=frozenset({"team b"}),
        digest=bytes.fromhex(DIGEST),
        expires=1803859200.0,
    )
    assert [each.name for each in found.people] == ["ada@example.com", "*@example.com"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("ada@example.com", AccessRole.OPERATOR),
        ("ADA@Example.com", AccessRole.OPERATOR),
        ("bob@example.com", AccessRole.VIEWER),
        ("bob@ops.example.com", AccessRole.READER),
        ("bob@example.com.evil.test", None),
        ("@example.com", None),
        ("ada", None),
        ("*@example.com", AccessRole.VIEWER),
        ("", None),
    ],
)
def test_a_person_is_found_by_the_whole_name_first(name: str, role: AccessRole | None) -> None:
    people = "person *@example.com viewer\nperson ada@example.com operator\nperson *@*.example.com viewer\n"
    found = read(people.replace("*@*.example.com viewer", "*@ops.example.com reader")).person(name)
    assert (None if found is None else found.role) == role


@pytest.mark.parametrize("name", ["mi\u212ae", "\u017fam", "stra\u00dfe", "STRA\u1e9eE", "ad\u0430", "\uff41da"])
def test_a_person_whose_name_only_looks_like_anothers_is_another(name: str) -> None:
    """Of what a provider lets people call themselves: U+212A is a sign for kelvin, U+017F a long s."""
    people = [f"person {each}@example.com operator\n" for each in ("mike", "sam", "strasse", "ada")]
    assert read("".join(people)).person(f"{name}@example.com") is None
    found = read("".join(people) + "person *@example.com viewer\n").person(f"{name}@example.com")
    assert found is not None
    assert found.role == AccessRole.VIEWER
    assert len(read(f"{people[0]}person 'mi\u212ae@example.com' viewer").people) == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("user ada operator", "unknown kind of line; expected token, person"),
        ("person ada", "expected person NAME ROLE"),
        ("person ada admin", "unknown role; expected one of viewer, reader, operator"),
        ("person 'ada operator", "got a quote without an end"),
        ("person ada viewer expires=2027-01-01T00:00:00Z", "expected source=…, owner=… after the role"),
        ("person ada viewer source=", "expected source=…, owner=… after the role"),
        ("person ada viewer github", "expected source=…, owner=… after the role"),
        (f"token Ada viewer sha256={DIGEST}", "expected a name of at most 63 lower-case letters"),
        ("token ada viewer", "expected sha256= and 64 hexadecimal digits"),
        ("token ada viewer sha256=9f", "expected sha256= and 64 hexadecimal digits"),
        (f"token ada viewer sha256={DIGEST} sha256={DIGEST}", "expected sha256= and 64 hexadecimal digits"),
        (f"token ada viewer sha256={DIGEST} expires=tomorrow", "expected expires= and a time"),
        (f"token ada viewer sha256={DIGEST} expires=2027-02-30T00:00:00Z", "expected expires= and a time"),
        (f"token a viewer sha256={DIGEST}\ntoken a reader sha256={DIGEST}", "expected each name once, got 'a' again"),
        ("person ada viewer\nperson ADA operator", "expected each name once"),
    ],
)
def test_what_is_anything_else_is_refused_with_its_line(line: str, problem: str) -> None:
    with pytest.raises(AccessFileError) as caught:
        read(f"# one\n{line}\n")
    assert str(caught.value).startswith("access.conf:")
    assert problem in str(caught.value)
    assert "gwt_" not in str(caught.value)


def test_a_token_that_somebody_wrote_instead_of_its_digest_is_in_no_message() -> None:
    secret = "gwt_" + "s3cret" * 8
    for line in (f"token ada viewer sha256={secret}", f"token {secret} viewer", f"{secret} ada", f"token a {secret} x"):
        with pytest.raises(AccessFileError) as caught:
            read(line)
        assert "s3cret" not in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(AccessFileError) as caught:
        read("x y z\nperson ada viewer\nperson bob root\n")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["access.conf:1", "access.conf:3"]


def test_there_are_not_too_many() -> None:
    text = "".join([f"person p{number} viewer\n" for number in range(MAX_ENTRIES + 1)])
    with pytest.raises(AccessFileError, match="expected at most 1,000 tokens and people, got 1,001"):
        read(text)


OWNERS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp", "Cf")), min_size=1, max_size=20)


@given(
    st.from_regex(r"\A[a-z0-9][a-z0-9_.-]{0,62}\Z"),
    st.sampled_from(AccessRole),
    st.none() | st.frozensets(st.from_regex(r"\A[a-z0-9]{1,8}\Z"), min_size=1, max_size=3),
    st.none() | st.frozensets(OWNERS, min_size=1, max_size=3),
    st.none() | st.integers(0, 4_000_000_000).map(float),
)
def test_a_token_is_read_as_it_was_written_whatever_its_owners_are_called(
    name: str,
    role: AccessRole,
    sources: frozenset[str] | None,
    owners: frozenset[str] | None,
    expires: float | None,
) -> None:
    grant = Grant(name=name, role=role, sources=sources, owners=owners, digest=b"\x01" * 32, expires=expires)
    before = "# mine\nperson ada viewer"
    text = with_token(before, grant)
    assert read(text).tokens == (grant,)
    assert without_token(text, name) == before + "\n"


def test_what_else_is_in_a_file_stays_as_it_is_written() -> None:
    text = f"# a\n\ntoken a viewer sha256={DIGEST}\nperson  a   viewer  # b\n"
    assert without_token(text, "a") == "# a\n\nperson  a   viewer  # b\n"
    added = with_token("", Grant(name="b", role=AccessRole.VIEWER, digest=bytes.fromhex(DIGEST), expires=NOW))
    assert added == f"token b viewer sha256={DIGEST} expires=2023-11-14T22:13:20Z\n"
