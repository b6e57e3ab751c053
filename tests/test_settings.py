"""Settings: where each comes from, what each means, and how what is wrong is told."""

import re
from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway.model import UsageError
from gateway.settings import (
    Address,
    ConnectionSettings,
    EmbeddedTarget,
    IndexSettings,
    KafkaTarget,
    Role,
    Settings,
    SpoolSettings,
    from_sources,
    refuse_useless_spool,
)


def test_nothing_given_is_a_laptop() -> None:
    assert from_sources({}, {}) == Settings(
        rules=Path("routes.yaml"),
        log=EmbeddedTarget(Path("gateway.db")),
        listen=Address("0.0.0.0", 8080),
        admin=Address("127.0.0.1", 9090),
        role=Role.ALL,
        topic_prefix="gateway.",
        dev=False,
    )


def test_an_address_is_written_as_urls_have_it() -> None:
    assert [str(Address("::1", 80)), str(Address("localhost", 80))] == ["[::1]:80", "localhost:80"]


def test_every_flag_has_a_variable() -> None:
    flags = {
        "rules": "/etc/gateway/routes.yaml",
        "log": "kafka://a:9092,b:9093",
        "listen": "127.0.0.1:0",
        "admin": "[::1]:9191",
        "role": "router",
        "topic_prefix": "hooks.",
        "dev": "true",
        "tls_certificate": "/tls/a.crt, /tls/b.pem",
        "tls_key": "/tls/a.key,/tls/b.pem",
        "proxy_protocol": "10.0.0.0/8,fd00::/8, 192.0.2.7",
    }
    expected = Settings(
        rules=Path("/etc/gateway/routes.yaml"),
        log=KafkaTarget(("a:9092", "b:9093")),
        listen=Address("127.0.0.1", 0),
        admin=Address("::1", 9191),
        role=Role.ROUTER,
        topic_prefix="hooks.",
        dev=True,
        connections=ConnectionSettings(
            certificates=((Path("/tls/a.crt"), Path("/tls/a.key")), (Path("/tls/b.pem"), Path("/tls/b.pem"))),
            proxies=(ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("192.0.2.7")),
        ),
    )
    assert from_sources(flags, {}) == expected
    assert from_sources({}, {f"GATEWAY_{name.upper()}": text for name, text in flags.items()}) == expected


def test_an_index_is_kept_by_a_console_and_where_it_is_named() -> None:
    flags = {"index": "/var/lib/index.db", "index_days": "1.5", "index_bytes": "100GiB"}
    expected = IndexSettings(file=Path("/var/lib/index.db"), days=1.5, bytes=100 << 30, is_named=True)
    assert from_sources(flags, {}).index == expected
    assert from_sources({}, {f"GATEWAY_{name.upper()}": text for name, text in flags.items()}).index == expected
    assert from_sources({}, {}).index == IndexSettings(file=Path("index.db"), days=7.0, bytes=8 << 30)
    for role, by_default, named in (
        (Role.CONSOLE, True, True),
        (Role.ALL, False, True),
        (Role.INGRESS, False, False),
        (Role.ROUTER, False, False),
    ):
        assert from_sources({"role": role}, {}).keeps_index is by_default
        assert from_sources({"role": role, **flags}, {}).keeps_index is named


def test_a_spool_is_a_file_with_limits() -> None:
    flags = {"spool": "sqlite:////var/spool.db", "spool_days": "2", "spool_bytes": "1GiB"}
    expected = SpoolSettings(file=Path("/var/spool.db"), days=2.0, bytes=1 << 30)
    assert from_sources(flags, {}).spool == expected
    assert from_sources({}, {f"GATEWAY_{name.upper()}": text for name, text in flags.items()}).spool == expected
    assert from_sources({}, {}).spool == SpoolSettings(file=None, days=1.0, bytes=4 << 30)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"role": "router", "log": "kafka://a:1"}, "expected it with the role all or ingress, got router"),
        ({"role": "console", "log": "kafka://a:1"}, "expected it with the role all or ingress, got console"),
        ({"log": "sqlite:///a.db"}, "expected it with --log kafka://…, got an embedded log"),
    ],
)
def test_a_spool_that_would_not_help_is_refused(flags: dict[str, str], problem: str) -> None:
    settings = from_sources({"spool": "sqlite:///spool.db", **flags}, {})
    with pytest.raises(UsageError, match=re.escape(f"--spool: {problem}")):
        refuse_useless_spool(settings)


def test_the_flag_wins_over_the_variable() -> None:
    settings = from_sources({"role": "ingress", "dev": None}, {"GATEWAY_ROLE": "router", "GATEWAY_DEV": "1"})
    assert settings.role is Role.INGRESS
    assert settings.dev is True


def test_an_empty_variable_is_unset_and_an_empty_flag_is_not() -> None:
    assert from_sources({}, {"GATEWAY_TOPIC_PREFIX": "", "GATEWAY_LISTEN": ""}) == Settings()
    assert from_sources({"topic_prefix": ""}, {}).topic_prefix == ""


@pytest.mark.parametrize(
    ("text", "path"), [("sqlite:///gateway.db", "gateway.db"), ("sqlite:////var/lib/gateway.db", "/var/lib/gateway.db")]
)
def test_an_embedded_log_is_a_file(text: str, path: str) -> None:
    assert from_sources({"log": text}, {}).log == EmbeddedTarget(Path(path))


ANY_LOG = "expected sqlite:///path or kafka://host:port[,host:port]"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("listen", ":x", "expected host:port, got ':x'"),
        ("listen", ":8080", "expected host:port, got ':8080'"),
        ("listen", "8080", "expected host:port, got '8080'"),
        ("listen", "0.0.0.0:65536", "expected host:port, got '0.0.0.0:65536'"),
        ("listen", "::1:80", "expected host:port, got '::1:80'"),
        ("listen", "[]:80", "expected host:port, got '[]:80'"),
        ("listen", "a:-1", "expected host:port, got 'a:-1'"),
        ("listen", "a:\u0661", "expected host:port, got 'a:\u0661'"),
        ("admin", "http://a:80", "expected host:port, got 'http://a:80'"),
        ("log", "gateway.db", f"{ANY_LOG}, got 'gateway.db'"),
        ("log", "sqlite://gateway.db", f"{ANY_LOG}, got 'sqlite://gateway.db'"),
        ("log", "sqlite:///", f"{ANY_LOG}, got 'sqlite:///'"),
        ("log", "sqlite:///dir/", f"{ANY_LOG}, got 'sqlite:///dir/'"),
        ("log", "kafka://", f"{ANY_LOG}, got 'kafka://'"),
        ("log", "kafka://a", f"{ANY_LOG}, got 'kafka://a'"),
        ("log", "kafka://a:0", f"{ANY_LOG}, got 'kafka://a:0'"),
        ("log", "kafka://a:1,", f"{ANY_LOG}, got 'kafka://a:1,'"),
        ("log", "redis://a:1", f"{ANY_LOG}, got 'redis://a:1'"),
        ("log", "kafka://u:hunter2@a:1", "expected an address without credentials, got one with '@'"),
        ("role", "both", "expected all, ingress, router, console, got 'both'"),
        ("index", " ", "expected a file's path, got ' '"),
        ("index_days", "0", "expected a number of days from 0.001 to 3660, got '0'"),
        ("index_days", "7d", "expected a number of days from 0.001 to 3660, got '7d'"),
        ("index_bytes", "63MiB", "expected a size from 64MiB to 16TiB, such as 8GiB, got '63MiB'"),
        ("index_bytes", "8G", "expected a size from 64MiB to 16TiB, such as 8GiB, got '8G'"),
        ("spool", "spool.db", "expected sqlite:///path"),
        ("spool", "kafka://a:1", "expected sqlite:///path"),
        ("spool_days", "0", "expected a number of days from 0.001 to 3660, got '0'"),
        ("spool_bytes", "1MiB", "expected a size from 64MiB to 16TiB, such as 8GiB, got '1MiB'"),
        ("topic_prefix", "a b", "expected at most 100 letters, digits, '.', '_' or '-', got 'a b'"),
        ("dev", "maybe", "expected true or false, got 'maybe'"),
        ("rules", " ", "expected a file's path, got ' '"),
        ("tls_certificate", "a.pem,", "expected a file's path, got ''"),
        ("identity_header", "X Email", "expected the name of a header such as X-Forwarded-Email, got 'X Email'"),
        ("identity_header", "Host", "expected the name of a header such as X-Forwarded-Email, got 'Host'"),
        *[
            ("public_url", text, "expected an http or https URL without user, query and fragment")
            for text in (
                "hooks.example.com",
                "https://u:p@x",
                "https://x/?a",
                "https://x/#a",
                "ftp://x",
                "https://x y",
                "https://",
            )
        ],
        ("identity_proxies", "proxy", "expected networks such as 10.0.0.0/8,fd00::/8, got 'proxy'"),
        ("access", " ", "expected a file's path, got ' '"),
        ("proxy_protocol", "10.0.0.1/8", "expected networks such as 10.0.0.0/8,fd00::/8, got '10.0.0.1/8'"),
        ("proxy_protocol", "lb.example", "expected networks such as 10.0.0.0/8,fd00::/8, got 'lb.example'"),
        ("proxy_protocol", "::ffff:10.0.0.1", "expected networks such as 10.0.0.0/8,fd00::/8, got '::ffff:10.0.0.1'"),
    ],
)
def test_an_error_is_reported_with_its_place(name: str, text: str, problem: str) -> None:
    variable = f"GATEWAY_{name.upper()}"
    with pytest.raises(UsageError) as by_variable:
        from_sources({}, {variable: text})
    assert str(by_variable.value) == f"{variable}: {problem}"
    with pytest.raises(UsageError) as by_flag:
        from_sources({name: text}, {})
    assert str(by_flag.value) == f"--{name.replace('_', '-')}: {problem}"


def test_a_public_url_has_no_slash_at_its_end() -> None:
    for text in ("https://hooks.example.com", "https://hooks.example.com/"):
        assert from_sources({"public_url": text}, {}).public_url == "https://hooks.example.com"
    assert from_sources({"public_url": "http://[::1]:8080/base/"}, {}).public_url == "http://[::1]:8080/base"
    assert from_sources({}, {}).public_url == ""


def test_a_key_is_in_the_certificates_file_unless_there_is_one_for_each() -> None:
    assert from_sources({"tls_certificate": "a.pem"}, {}).connections.certificates == ((Path("a.pem"), Path("a.pem")),)
    for certificates, keys, told in (
        ("a,b", "a.key", "2, got 1"),
        (None, "a.key", "0, got 1"),
        ("a", "b,c", "1, got 2"),
    ):
        with pytest.raises(UsageError) as caught:
            from_sources({"tls_certificate": certificates, "tls_key": keys}, {})
        assert str(caught.value) == f"GATEWAY_TLS_KEY: expected a file for each certificate, {told}"


def test_who_may_ask_is_in_a_file_and_a_proxys_header() -> None:
    flags = {"access": "/etc/access.conf", "identity_header": "X-Forwarded-Email", "identity_proxies": "10.0.0.0/8"}
    found = from_sources(flags, {}).access
    assert (found.file, found.identity_header, found.is_configured) == (
        *(Path("/etc/access.conf"), "X-Forwarded-Email"),
        True,
    )
    assert found.identity_proxies == (ip_network("10.0.0.0/8"),)
    assert from_sources({}, {f"GATEWAY_{name.upper()}": text for name, text in flags.items()}).access == found
    assert not from_sources({}, {}).access.is_configured


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"identity_header", "identity_proxies"}, "ACCESS: expected a file that says what each person may"),
        ({"identity_header", "access"}, "IDENTITY_PROXIES: expected it with GATEWAY_IDENTITY_HEADER"),
        ({"identity_proxies", "access"}, "IDENTITY_HEADER: expected it with GATEWAY_IDENTITY_PROXIES"),
    ],
)
def test_settings_of_access_that_do_not_go_together_are_reported(given: set[str], missing: str) -> None:
    flags = {"access": "access.conf", "identity_header": "X-Forwarded-Email", "identity_proxies": "10.0.0.0/8"}
    with pytest.raises(UsageError) as caught:
        from_sources({name: text for name, text in flags.items() if name in given}, {})
    assert str(caught.value) == f"GATEWAY_{missing}, got none"


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        from_sources({"role": "both"}, {"GATEWAY_LISTEN": ":x"})
    assert str(caught.value).splitlines() == [
        "GATEWAY_LISTEN: expected host:port, got ':x'",
        "--role: expected all, ingress, router, console, got 'both'",
    ]
