"""How values are shown: texts, times, sizes, JSON."""

import json
import shutil
import subprocess
from socket import create_server

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.console.body_views import View, download_name, view_of
from gateway.console.curl import ADDRESS, curl_of, quoted
from gateway.console.json_layout import laid_out
from gateway.console.text import address, duration, marked, relative, shown, size, term
from gateway.index.query import parse_query


@given(st.text())
def test_a_text_is_never_markup_and_hides_nothing(text: str) -> None:
    found = str(marked(text))
    bare = found.replace('<span class="unseen">', "").replace("</span>", "")
    assert "<" not in bare
    assert '"' not in bare
    assert all(each.isprintable() for each in found)


def test_what_isnt_seen_is_marked() -> None:
    assert marked("a\u202eb") == 'a<span class="unseen">\\u202e</span>b'
    assert shown("<b>") == "<bdi>&lt;b&gt;</bdi>"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "now"), (-0.4, "now"), (-61, "1 min ago"), (3700, "in 1 h"), (-86400 * 3, "3 d ago"), (5.9, "in 5 s")],
)
def test_a_time_is_told_relative_to_now(seconds: float, expected: str) -> None:
    assert relative(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0123, "12 ms"),
        (0.9999, "1 s"),
        (1.5, "1.50 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (90061, "1 d 1 h"),
    ],
)
def test_a_duration_has_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_size_has_a_unit() -> None:
    assert [size(each) for each in (0, 1023, 1024, 1 << 20, 1_600_000)] == [
        "0 B",
        "1,023 B",
        "1 KiB",
        "1 MiB",
        "1.5 MiB",
    ]


def test_an_address_encodes_what_is_in_it() -> None:
    assert address("events", "a/b?c#d%", query='"x" & y', live=False, cursor=None) == (
        "/ui/events/a%2Fb%3Fc%23d%25?query=%22x%22%20%26%20y"
    )


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=30))
def test_a_term_finds_its_value(value: str) -> None:
    (condition,) = parse_query(term("key", value), now=0.0).conditions
    assert [each.text for each in condition.values] == [value]
    assert not condition.values[0].is_prefix


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_laid_out_json_is_the_same_json(value: object) -> None:
    text = json.dumps(value)
    layout = laid_out(text, longest=1_000_000)
    assert layout is not None
    assert layout.is_whole
    laid = "".join([piece.text for piece in layout.pieces])
    assert json.loads(laid) == value
    assert "".join(laid.split()) == "".join(text.split())


@pytest.mark.parametrize("text", ["", "{", "[1,2", "]", "{]", "hello", "{'a': 1}", '"open', "[1] x"])
def test_what_isnt_json_isnt_laid_out(text: str) -> None:
    assert laid_out(text, longest=1000) is None


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "[1," * 300_000, '{"a":' * 200_000, "[" + "[]," * 300_000, "[" + " " * 900_000]
)
def test_a_layout_is_bounded(text: str) -> None:
    layout = laid_out(text, longest=1000)
    assert layout is None or sum([len(piece.text) for piece in layout.pieces]) == 1000


@given(st.binary(max_size=200), st.sampled_from([None, *View]))
def test_any_body_has_a_view(body: bytes, asked: View | None) -> None:
    found = view_of(body, asked)
    assert found.is_whole
    assert all(each.isprintable() or each in "\n\t" for each in found.markup)


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_text_that_is_cut_within_a_character_is_text(character: str) -> None:
    for shift in range(4):
        found = view_of(b"x" * shift + character.encode() * 200_000, View.RAW)
        assert (found.view, found.is_whole) == (View.RAW, False)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_a_word_of_a_shell_is_its_text_and_can_be_seen(text: str) -> None:
    word = quoted(text)
    assert word.isprintable()
    assert shell(f"printf %s {word}") == text.encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a": "it\'s"}', b'{"a": "it\'s"}'),
        (b"line\n'; rm -rf / #\x1b[31m", b"line\n'; rm -rf / #\x1b[31m"),
        (b"@/etc/passwd", b"@evt_1.body"),
        (b"\xff", b"@evt_1.body"),
        (b"x" * 10_000, b"@evt_1.body"),
    ],
)
def test_a_command_has_the_body_or_names_its_file(body: bytes, expected: bytes) -> None:
    command = curl_of("/github", "a=1", [("Host", "h"), ("X-A", "it's\u202e")], body, file="evt_1.body")
    arguments = shell("curl() { printf '%s\\0' \"$@\"; }; " + command).split(b"\0")
    assert arguments[:-1] == [
        b"http://127.0.0.1:8080/github?a=1",
        b"-H",
        "X-A: it's\u202e".encode(),
        b"--data-binary",
        expected,
    ]


@pytest.mark.parametrize("query", ["a[0]=1&a[]=2", "x=[1-1000]", "x={a,b}", "x=}", "a=1&b=%5B"])
def test_curl_is_told_that_brackets_of_a_query_are_no_patterns(query: str) -> None:
    command = curl_of("/shop", query, [], b"", file="evt_1.body")
    assert ("--globoff" in command) is any(each in query for each in "[]{}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("query", ["a[0]=1&a[]=2", "x=[1-1000]", "x={a,b}", "x=}", "a=1&b=%5B"])
def test_curl_sends_one_request_with_the_query_as_it_came(query: str) -> None:
    with create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = curl_of("/shop", query, [], b"", file="evt_1.body").replace(ADDRESS, address)
        with subprocess.Popen(["bash", "-c", f"{command} -s --max-time 10"], stdout=subprocess.PIPE) as curl:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(4096).startswith(f"POST /shop?{query} HTTP/1.1\r\n".encode())
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            assert curl.wait(10) == 0  # and has no further request, which would find nobody


def shell(script: str) -> bytes:
    return subprocess.run(["bash", "-c", script], capture_output=True, check=True, timeout=30).stdout


def test_a_file_is_named_safely() -> None:
    assert download_name('../../etc/passwd"\r\n') == "______etc_passwd___.body"
