"""Which requests count as this machine's, and which ones a page of another site makes a browser send."""

import pytest
from multidict import CIMultiDict

from gateway.access.local_request import FORWARDING_HEADERS, is_foreign, is_local, is_loopback

HTTP_1_1 = (1, 1)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1", "::1%lo"])
def test_a_loopback_address_is_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", [None, "", "10.0.0.1", "0.0.0.0", "::ffff:10.0.0.1", "fe80::1", "localhost"])
def test_another_peer_is_not(address: str | None) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9090", "localhost:9090", "LOCALHOST", "[::1]:9090", "0.0.0.0:9090", "[::]:9090", "127.0.0.1"]
)
def test_a_request_to_the_loopback_address_by_itself_is_local(host: str) -> None:
    assert is_local("127.0.0.1", host, CIMultiDict(), HTTP_1_1)


@pytest.mark.parametrize(
    "host",
    [
        "gateway.example.com",
        "localhost.example.com:9090",
        "localhost.",
        "127.0.0.1.nip.io",
        "10.0.0.1:9090",
        "",
        "[::1",
        "evil.example@127.0.0.1:x",
        "127.0.0.1:99999999",
    ],
)
def test_a_name_that_dns_may_resolve_to_this_machine_is_not(host: str) -> None:
    assert not is_local("127.0.0.1", host, CIMultiDict(), HTTP_1_1)


@pytest.mark.parametrize("name", FORWARDING_HEADERS)
def test_a_proxy_on_this_machine_passes_on_strangers(name: str) -> None:
    assert not is_local("127.0.0.1", "localhost", CIMultiDict({name.lower(): ""}), HTTP_1_1)


def test_nginx_by_its_defaults_is_known_by_its_http_version() -> None:
    assert not is_local("127.0.0.1", "127.0.0.1:9090", CIMultiDict(), (1, 0))


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        ("GET", {}, False),  # no browser
        ("POST", {}, False),
        ("POST", {"Origin": "http://localhost:9090"}, False),
        ("POST", {"Origin": "https://localhost:9090"}, False),  # behind a proxy with TLS
        ("POST", {"Origin": "http://localhost:9090", "Sec-Fetch-Site": "same-origin"}, False),
        ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
        ("POST", {"Origin": "http://evil.example"}, True),
        ("GET", {"Origin": "http://evil.example"}, True),
        ("POST", {"Origin": "null"}, True),  # a sandboxed frame, a file
        ("POST", {"Origin": "http://localhost:9091"}, True),  # another program's page on this machine
        ("POST", {"Origin": "http://localhost"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site"}, True),
        ("GET", {"Sec-Fetch-Site": "same-site"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, True),
        # A link may be followed to a page, but not into a frame, and no form is sent.
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, True),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, True),
    ],
)
def test_a_page_of_another_site_may_only_link_here(method: str, headers: dict[str, str], *, foreign: bool) -> None:
    assert is_foreign(method, "localhost:9090", CIMultiDict(headers)) is foreign
