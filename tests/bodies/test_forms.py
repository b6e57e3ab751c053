"""Forms, URL-encoded and multipart, as rules read them."""

import json
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies.forms import (
    JSON_FIELDS,
    MAX_FIELDS,
    MAX_PART_HEAD,
    MAX_PART_LINES,
    MAX_PARTS,
    PIECE,
    form_pairs,
    gathered,
    read_form,
    read_multipart,
)
from gateway.bodies.media_types import MAX_PARAMETERS, parameters
from gateway.model import UnreadableBodyError
from tests.bodies.cost import MOST_SECONDS, peak_bytes, seconds

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(
    lambda name: name not in JSON_FIELDS and not {"%", "\\"} & {*name}
)


def part(value: bytes | str, *head: str, name: str = "a") -> bytes:
    lines = head or (f'Content-Disposition: form-data; name="{name}"',)
    data = value.encode() if isinstance(value, str) else value
    return "\r\n".join([f"--{BOUNDARY}", *lines, "", ""]).encode() + data + b"\r\n"


def a_form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def refusal(content: bytes, content_type: str | None = None) -> tuple[int, str]:
    with pytest.raises(UnreadableBodyError) as caught:
        _read(content, content_type)
    return caught.value.status, caught.value.reason


def _read(content: bytes, content_type: str | None) -> dict[str, Any]:
    return read_form(content) if content_type is None else read_multipart(content, content_type)


# URL-encoded


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a=1&b=2", {"a": "1", "b": "2"}),
        (b"a=1&b=x&a=2&a=", {"a": ["1", "2", ""], "b": "x"}),
        (b"a&b=&=c&&", {"a": "", "b": "", "": "c"}),
        (b"a=b=c", {"a": "b=c"}),
        (b"a+b=%41+%2B%26%3d", {"a b": "A +&="}),
        (b"a=%", {"a": "%"}),
        (b"a=%4&b=%zz", {"a": "%4", "b": "%zz"}),
        (b"a=%C3%A9\xc3\xa9", {"a": "éé"}),
        (b"a=%ff\xff", {"a": "\ufffd\ufffd"}),
        (b"a=1;b=2", {"a": "1;b=2"}),
        (b"a[]=1&a[]=2", {"a[]": ["1", "2"]}),
    ],
)
def test_fields_are_texts_and_repeated_ones_lists_of_texts(content: bytes, expected: dict[str, Any]) -> None:
    assert read_form(content) == expected


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=20)), max_size=20))
def test_what_is_encoded_is_read(fields: list[tuple[str, str]]) -> None:
    plain = [(name, value) for name, value in fields if name not in JSON_FIELDS]
    assert read_form(urlencode(plain, errors="replace").encode()) == gathered(
        [(name.encode(errors="replace").decode(), value.encode(errors="replace").decode()) for name, value in plain]
    )


@given(st.binary(max_size=100) | st.text("ab=&%+4g\xe9;", max_size=60).map(lambda text: text.encode("latin-1")))
def test_the_standard_library_finds_the_same_pairs_in_any_bytes(content: bytes) -> None:
    expected = parse_qsl(content.decode("latin-1"), keep_blank_values=True, encoding="latin-1", separator="&")
    found = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in form_pairs(content, MAX_FIELDS)]
    assert found == expected


@pytest.mark.parametrize("shift", range(4))
def test_a_long_value_is_decoded_in_pieces_without_cutting_an_escape(shift: int) -> None:
    value = "x" * (PIECE - 4 + shift) + "%41%42" * 4 + "%C3%A9" * PIECE
    assert read_form(f"a={value}".encode()) == {"a": "x" * (PIECE - 4 + shift) + "AB" * 4 + "é" * PIECE}


@pytest.mark.parametrize("name", sorted(JSON_FIELDS))
def test_a_field_that_holds_json_by_its_vendors_document_is_its_value(name: str) -> None:
    for value in ({"a": [1, None]}, [{"b": 2}], []):
        assert read_form(urlencode({name: json.dumps(value)}).encode()) == {name: value}
    for text in ('{"a"', "[1", "text", "7", "null", '"x"', "", " "):
        assert read_form(urlencode({name: text}).encode()) == {name: text}
    two = urlencode([(name, "[1]"), (name, "[2]"), (name, "3")]).encode()
    assert read_form(two) == {name: [[1], [2], "3"]}


def test_whoever_writes_a_text_does_not_choose_its_type() -> None:
    assert read_form(b"text=%7B%22a%22%3A1%7D") == {"text": '{"a":1}'}
    assert read_multipart(a_form(part("[1]", name="text")), TYPE) == {"text": "[1]"}


def test_the_number_of_fields_is_bounded() -> None:
    assert read_form(b"&".join([b"a=1"] * MAX_FIELDS)) == {"a": ["1"] * MAX_FIELDS}
    assert refusal(b"&".join([b"a=1"] * (MAX_FIELDS + 1))) == (413, "content_too_large")


# Multipart


def test_parts_are_texts_and_files_are_described() -> None:
    content = a_form(
        part("one"),
        part("tw\r\no\r\n", name="b"),
        part(b"", name="c"),
        part("again"),
        part(
            b"\0\1\r\n--x",
            'Content-Disposition: form-data; name="f"; filename="a \\"b\\".bin"',
            "Content-Type: Image/PNG",
        ),
        part("t", 'content-disposition: form-data; filename=""; name=f'),
    )
    assert read_multipart(content, TYPE) == {
        "a": ["one", "again"],
        "b": "tw\r\no\r\n",
        "c": "",
        "f": [
            {"filename": 'a "b".bin', "content_type": "image/png", "size": 7},
            {"filename": "", "content_type": "text/plain", "size": 1},
        ],
    }


@pytest.mark.parametrize(
    ("head", "value", "expected"),
    [
        ("Content-Type: application/json; charset=utf-8", b'{"n": 1.5}', {"n": 1.5}),
        ("Content-Type: application/json", b"7", 7),
        ("Content-Type: application/json", b"{", "{"),
        ("Content-Type: text/plain; charset=ISO-8859-1", b"caf\xe9", "café"),
        ("Content-Type: text/plain; charset=windows-1252", b"\x80", "€"),
        ("Content-Type: text/plain; charset=utf-7", b"+AOk-", "+AOk-"),
        ("Content-Type: text/plain", "é".encode(), "é"),
        ("X-Any: 1", b"\xff", "\ufffd"),
        ("Content-Type:", b"x", "x"),
    ],
)
def test_a_part_is_decoded_by_its_own_type(head: str, value: bytes, expected: object) -> None:
    content = a_form(part(value, 'Content-Disposition: form-data; name="a"', head))
    assert read_multipart(content, TYPE) == {"a": expected}


@pytest.mark.parametrize(
    ("disposition", "name", "filename"),
    [
        ("form-data; name=a; filename=b", "a", "b"),
        ('form-data; name="a%22b"; filename="c%22d%0D%0A"', 'a"b', 'c"d\r\n'),
        (r'form-data; name="a"; filename="C:\dir\f.txt"', "a", r"C:\dir\f.txt"),
        ('FORM-DATA;NAME="a";FILENAME="é✓"', "a", "é✓"),
        ("form-data; name=a; filename*=UTF-8''na%C3%AFve.txt", "a", "naïve.txt"),
        ("form-data; name=a; filename=b; filename*=UTF-8''c", "a", "b"),
        ("form-data; name=a;\r\n filename=b;", "a", "b"),
        ('form-data; name="a;b=c"; filename="d"; name="e"', "a;b=c", "d"),
    ],
)
def test_names_are_read_as_browsers_and_libraries_write_them(disposition: str, name: str, filename: str) -> None:
    content = a_form(part("x", f"Content-Disposition: {disposition}"))
    assert read_multipart(content, TYPE) == {name: {"filename": filename, "content_type": "text/plain", "size": 1}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"--",
        a_form()[:-6],
        a_form(part("x"))[: -len(BOUNDARY) - 6],
        a_form(part("x"))[:-4],
        a_form(part("x")).replace(b"\r\n", b"\n"),
        a_form(part("x")) + a_form(part("y")),
        a_form(part("x"), b"--" + BOUNDARY.encode() + b"no line\r\n\r\n\r\n"),
        a_form(b"--" + BOUNDARY.encode() + b"\r\nno end of a head\r\n"),
        a_form(part("x", "Content-Type: text/plain")),
        a_form(part("x", "Content-Disposition: form-data")),
        a_form(part("x", "Content-Disposition: attachment; name=a")),
        a_form(part("x", 'Content-Disposition: form-data; name="a')),
        a_form(part("x", "Content-Disposition: form-data; name")),
        a_form(part("x", f"Content-Disposition: form-data; name=a{'; b=c' * MAX_PARAMETERS}")),
        a_form(part("x", "Content-Disposition: form-data; name=a", f"X: {'x' * MAX_PART_HEAD}")),
        a_form(part("x", "Content-Disposition: form-data; name=a", *(["X: 1"] * MAX_PART_LINES))),
    ],
)
def test_a_multipart_form_that_is_malformed_or_cut_off_is_not_read(content: bytes) -> None:
    assert refusal(content, TYPE) == (400, "malformed_content")


@pytest.mark.parametrize(
    "parameter", ["", f"; boundary={'x' * 71}", "; boundary=é", '; boundary=""', "; boundary", "; x"]
)
def test_without_a_boundary_nothing_is_read(parameter: str) -> None:
    assert refusal(a_form(part("x")), f"multipart/form-data{parameter}") == (400, "malformed_content")


@pytest.mark.parametrize("boundary", ["x", '"a b"', "----=_Part_1_99.1'()+,./:?", '"x y:z"'])
def test_a_boundary_is_any_of_rfc_2046_quoted_or_not(boundary: str) -> None:
    bare = boundary.strip('"')
    content = f'--{bare}\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--{bare}--'.encode()
    assert read_multipart(content, f"multipart/form-data; charset=utf-8; Boundary={boundary}") == {"a": "x"}


def test_another_multipart_type_is_not_read() -> None:
    assert refusal(a_form(part("x")), TYPE.replace("form-data", "mixed")) == (400, "malformed_content")


def test_what_is_around_the_parts_is_ignored_and_a_form_may_have_none() -> None:
    content = b"preamble\r\n" + a_form(part("x")).replace(b"0gW\r\n", b"0gW \t\r\n") + b"epilogue"
    assert read_multipart(content, TYPE) == {"a": "x"}
    assert read_multipart(a_form(), TYPE) == {}


def test_a_boundary_within_a_line_is_content() -> None:
    assert read_multipart(a_form(part(f"x--{BOUNDARY}--")), TYPE) == {"a": f"x--{BOUNDARY}--"}


def test_the_number_of_parts_is_bounded() -> None:
    assert read_multipart(a_form(*[part("x")] * MAX_PARTS), TYPE) == {"a": ["x"] * MAX_PARTS}
    assert refusal(a_form(*[part("x")] * (MAX_PARTS + 1)), TYPE) == (413, "content_too_large")


@given(st.lists(st.tuples(NAMES, st.binary(max_size=30), st.none() | NAMES), max_size=8))
def test_what_is_sent_is_read_as_the_standard_library_reads_it(fields: list[tuple[str, bytes, str | None]]) -> None:
    def quoted(text: str) -> str:
        return text.replace('"', "%22")

    parts = [
        part(
            value,
            f'Content-Disposition: form-data; name="{quoted(name)}"'
            + ("" if filename is None else f'; filename="{quoted(filename)}"'),
        )
        for name, value, filename in fields
    ]
    assert read_multipart(a_form(*parts), TYPE) == gathered(
        [
            (
                name,
                value.decode("utf-8", "replace")
                if filename is None
                else {"filename": filename, "content_type": "text/plain", "size": len(value)},
            )
            for name, value, filename in fields
        ]
    )
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {TYPE}\r\n\r\n".encode() + a_form(*parts))
    plain = all(value.isascii() and b"\r" not in value and b"\n" not in value for _, value, _ in fields)
    if plain and fields:
        assert [each.get_payload(decode=True) for each in message.iter_parts()] == [value for _, value, _ in fields]


# Any bytes


@given(st.text(';=" \\abx*', max_size=40) | st.text(max_size=40))
def test_parameters_are_read_or_refused(text: str) -> None:
    try:
        found = parameters(text)
    except ValueError:
        return
    assert len(found) <= MAX_PARAMETERS


BACKSLASHES = "\\" * 2000
WORST = {
    "escapes": (b"a=" + b"%41" * 700_000, None),
    "escapes in many fields": (b"&".join([b"%41" * 70] * MAX_FIELDS), None),
    "fields": (b"&".join([b"a%d=x" % n for n in range(MAX_FIELDS)]), None),
    "empty fields": (b"&" * (2 << 20), None),
    "delimiters": (f"--{BOUNDARY}\r\n".encode() * 50_000, TYPE),
    "heads": (
        a_form(*[part("x", f"Content-Disposition: form-data; name=a{'; b=' + chr(34) + chr(34)}" * 1)] * 900),
        TYPE,
    ),
    "quotes": (a_form(*[part("x", f'Content-Disposition: form-data; name="{BACKSLASHES}')] * 900), TYPE),
    "lines": (a_form(*[part("x", *["a:b"] * 1500)] * 900), TYPE),
    "a file": (a_form(part(b"\r\n--" * 500_000, 'Content-Disposition: form-data; name="a"; filename=b')), TYPE),
}


@pytest.mark.parametrize("name", WORST)
def test_no_form_takes_long_or_much(name: str) -> None:
    content, content_type = WORST[name]
    assert seconds(lambda: _read(content, content_type)) < MOST_SECONDS
    assert peak_bytes(lambda: _read(content, content_type)) < 16 << 20
