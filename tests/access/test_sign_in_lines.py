"""The lines of the access file by which people sign in, and the secrets that they name."""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.access.access import Access
from gateway.access.access_file import AccessFileError, AccessList, Grant, read_access, with_token, without_token
from gateway.access.principal import AccessRole
from gateway.access.read_file import files_of, read_file
from gateway.access.sign_in_lines import Oidc, SignInAddress
from gateway.settings import AccessSettings

ROOT = Path(__file__).parent.parent.parent
SIGN_IN = "sign-in https://gateway.example.com"
OIDC = "oidc https://id.example.com client=gateway secret=${SECRET}"


def read(text: str) -> AccessList:
    return read_access(text, "access.conf")


def test_a_file_says_where_people_sign_in_and_by_whom() -> None:
    found = read("""
sign-in https://Gateway.example.com:8443 key=${file:session.key}   # one address
oidc https://id.example.com/realms/acme client='web hooks' secret=${SECRET} scope=openid scope=groups name=sub groups=g
group sre operator
group /Support reader owner=payments
""")
    assert found.sign_in == SignInAddress(origin="https://gateway.example.com:8443", key="${file:session.key}")
    assert found.oidc == Oidc(
        issuer="https://id.example.com/realms/acme",
        client="web hooks",
        secret="${SECRET}",
        scopes=("groups",),
        name="sub",
        groups="g",
    )
    assert [each.name for each in found.groups] == ["sre", "/Support"]
    assert found.known_groups(["x", "/Support", "sre"]) == ("sre", "/Support")


def test_an_address_is_asked_for_unless_scopes_are_named() -> None:
    found = read(f"{SIGN_IN}\n{OIDC}\n").oidc
    assert found is not None
    assert (found.scopes, found.name, found.groups, found.host) == (("email",), "email", None, "id.example.com")


def test_of_several_lines_that_fit_the_exact_one_counts_else_the_first() -> None:
    found = read(f"""
{SIGN_IN}
{OIDC} groups=groups
group a viewer
person *@example.com reader
group b operator
person ada@example.com operator source=github
""")

    def role(name: str, *groups: str) -> str | None:
        grant = found.person(name, groups)
        return None if grant is None else f"{grant.role} {grant.name}"

    assert role("ada@example.com", "a") == "operator ada@example.com"
    assert role("bob@example.com", "b", "a") == "viewer a"
    assert role("bob@example.com", "b") == "reader *@example.com"
    assert role("bob@example.org", "b") == "operator b"
    assert role("bob@example.org", "B") is None
    assert role("a") is None  # a person is no group


@pytest.mark.parametrize("origin", ["http://localhost:9090", "http://127.0.0.1:9090", "http://[::1]", "https://a.b"])
def test_an_address_is_https_or_on_this_machine(origin: str) -> None:
    found = read(f"sign-in {origin}\n").sign_in
    assert found is not None
    assert found.origin == origin
    assert found.is_secure is origin.startswith("https")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sign-in", "expected an https address without a path"),
        ("sign-in http://gateway.example.com", "expected an https address without a path"),
        ("sign-in https://gateway.example.com/", "expected an https address without a path"),
        ("sign-in https://gateway.example.com/ui", "expected an https address without a path"),
        ("sign-in https://ada:pw@gateway.example.com", "expected an https address without a path"),
        ("sign-in gateway.example.com", "expected an https address without a path"),
        (f"{SIGN_IN} age=1h", "expected key=… after the address"),
        (f"{SIGN_IN} key=s3cret", "expected key=${file:PATH} or key=${NAME} once"),
        (f"{SIGN_IN}\n{SIGN_IN}", "access.conf:2: expected only one line sign-in"),
        (OIDC, "access.conf:1: expected a line sign-in with the address"),
        (f"{SIGN_IN}\n{OIDC}\n{OIDC}", "access.conf:3: expected only one line oidc"),
        (f"{SIGN_IN}\noidc", "expected the issuer, an https address"),
        (f"{SIGN_IN}\noidc http://id.example.com client=a secret=${{A}}", "expected the issuer, an https address"),
        (f"{SIGN_IN}\noidc https://id.example.com?a=b client=a secret=${{A}}", "expected the issuer, an https address"),
        (f"{SIGN_IN}\noidc https://id.example.com secret=${{A}}", "expected client= and at most 254"),
        (f"{SIGN_IN}\noidc https://id.example.com client=a", "expected secret=${file:PATH} or secret=${NAME} once"),
        (f"{SIGN_IN}\noidc https://id.example.com client=a secret=s3cret", "expected secret=${file:PATH} or"),
        (f"{SIGN_IN}\n{OIDC} scope='a b'", "expected at most 20 scopes without spaces"),
        (f"{SIGN_IN}\n{OIDC} name=a name=b", "expected name= and at most 254 printable characters once"),
        (f"{SIGN_IN}\n{OIDC} email=x", "expected client=…, secret=…, scope=…, name=…, groups=… after the issuer"),
        (f"{SIGN_IN}\n{OIDC}\ngroup sre operator", "access.conf:3: expected a line oidc with groups=…"),
        ("group sre operator", "access.conf:1: expected a line oidc with groups=…"),
        ("group sre", "expected group NAME ROLE"),
        (f"{SIGN_IN}\n{OIDC} groups=g\ngroup a viewer\ngroup a reader", "expected each name once, got 'a' again"),
    ],
)
def test_what_is_anything_else_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(AccessFileError) as caught:
        read(text)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("access.conf:")
    assert "s3cret" not in str(caught.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "access.conf"
    file.write_text(text)
    return file


def test_secrets_are_read_from_files_beside_it_and_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "session.key").write_text("k" * 32 + "\n")
    file = written(tmp_path, f"{SIGN_IN} key=${{file:session.key}}\n{OIDC}\n")
    found = read_file(file, {"SECRET": "s3cret"})
    assert found.sign_in is not None
    assert found.oidc is not None
    assert (found.sign_in.key, found.oidc.secret) == ("k" * 32, "s3cret")
    assert "s3cret" not in repr(found)
    assert "kkk" not in repr(found)
    assert files_of(file) == (file, tmp_path / "session.key")


@pytest.mark.parametrize(
    ("key", "environ", "problems"),
    [
        (None, {"SECRET": "s"}, ["access.conf:1: key: expected a file at "]),
        ("k" * 31, {"SECRET": "s"}, ["access.conf:1: key: expected at least 32 characters, got 31"]),
        ("k" * 32, {}, ["access.conf:2: secret: expected the environment variable SECRET, got none"]),
        ("k" * 32, {"SECRET": "sé"}, ["access.conf:2: secret: expected printable characters of ASCII"]),
        ("", {}, ["access.conf:1: key: ", "access.conf:2: secret: "]),
    ],
)
def test_secrets_that_are_missing_or_too_short_are_told_at_once(
    tmp_path: Path, key: str | None, environ: Mapping[str, str], problems: list[str]
) -> None:
    if key is not None:
        (tmp_path / "session.key").write_text(key)
    file = written(tmp_path, f"{SIGN_IN} key=${{file:session.key}}\n{OIDC}\n")
    with pytest.raises(AccessFileError) as caught:
        read_file(file, environ)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert problem in line


async def test_a_new_secret_counts_without_a_restart_and_one_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "oidc"
    secret.write_text("one")
    file = written(tmp_path, f"{SIGN_IN}\n{OIDC.replace('SECRET', 'file:oidc')}\n")
    looks = 0

    class EnoughError(Exception):
        pass

    async def sleep(_: float) -> None:
        nonlocal looks
        looks -= 1
        if looks < 0:
            raise EnoughError

    access = Access(AccessSettings(file=file), sleep=sleep)
    await asyncio.to_thread(access.load)

    async def look() -> str:
        nonlocal looks
        looks = 3
        with pytest.raises(EnoughError):
            await access.watch()
        assert access.in_force.oidc is not None
        return access.in_force.oidc.secret

    assert await look() == "one"
    secret.write_text("another")
    assert await look() == "another"
    secret.unlink()
    assert await look() == "another"
    (note,) = access.notes()
    assert f"access: {file}:2: secret: expected a file at {secret}" in note
    secret.write_text("a third")
    assert await look() == "a third"
    assert access.notes() == []


def test_a_token_is_added_and_revoked_beside_them() -> None:
    text = f"{SIGN_IN} key=${{file:session.key}}\n{OIDC} groups=g\ngroup deploys viewer\n"
    grant = Grant(name="deploys", role=AccessRole.READER, digest=b"\x01" * 32)
    added = with_token(text, grant)
    assert read(added).tokens == (grant,)
    assert without_token(added, "deploys") == text


EXAMPLES = re.findall(
    r"^```text\n(.*?)^```", (ROOT / "docs" / "access.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_of_the_document_is_right(text: str) -> None:
    found = read(text.replace("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "9f" * 32))
    assert found.people or found.groups


def test_there_is_an_example_of_each_provider_that_is_named() -> None:
    issuers = [oidc.host for each in EXAMPLES[1:] if (oidc := read(each).oidc) is not None]
    assert issuers == [
        "id.example.com",
        "keycloak.example.com",
        "accounts.google.com",
        "login.microsoftonline.com",
        "acme.okta.com",
    ]
