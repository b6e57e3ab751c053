"""XML as rules read it: no document type, no entities, and bounds."""

import time
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies.forms import gathered
from gateway.bodies.xml import MAX_DEPTH, MAX_ELEMENTS, read_xml
from gateway.model import UnreadableBodyError
from tests.bodies.cost import MOST_SECONDS, peak_bytes, seconds

XML = "application/xml"


def refusal(content: bytes, content_type: str = XML) -> tuple[int, str]:
    with pytest.raises(UnreadableBodyError) as caught:
        read_xml(content, content_type)
    return caught.value.status, caught.value.reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<a/>", {"a": ""}),
        ("<a></a>", {"a": ""}),
        ("<a> x\n y </a>", {"a": " x\n y "}),
        ("<a>x<!-- c -->y<?pi z?><![CDATA[<b>&]]>&lt;&#233;</a>", {"a": "xy<b>&<é"}),
        ("<a><b>1</b><c/><b>2</b></a>", {"a": {"b": ["1", "2"], "c": ""}}),
        ("<a> <b/> </a>", {"a": {"b": ""}}),
        ("<a>x<b/> y </a>", {"a": {"b": "", "#text": "x y"}}),
        ("<a id='7'/>", {"a": {"@id": "7"}}),
        ("<a id='7' n=''>x</a>", {"a": {"@id": "7", "@n": "", "#text": "x"}}),
        ("<a id='1'><id>2</id></a>", {"a": {"@id": "1", "id": "2"}}),
        ("<p:a xmlns:p='u' xmlns='v' p:id='1'><p:b/><q:b/></p:a>", {"a": {"@id": "1", "b": ["", ""]}}),
        ("<a p:x='1' q:x='2'/>", {"a": {"@x": ["1", "2"]}}),
        ("<a xml:lang='en'/>", {"a": {"@lang": "en"}}),
        ("<?xml version='1.0'?>\n<!-- <!DOCTYPE x> --><?p <!DOCTYPE?> <a/>\n<!-- end -->", {"a": ""}),
        ("<a><![CDATA[<!DOCTYPE html>]]></a>", {"a": "<!DOCTYPE html>"}),
    ],
)
def test_a_document_is_its_root_element(content: str, expected: dict[str, Any]) -> None:
    assert read_xml(content.encode(), XML) == expected


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        ("<a>é€</a>".encode(), XML),
        ("\ufeff<a>é€</a>".encode(), XML),
        ("<a>é€</a>".encode("utf-16"), XML),
        ("\ufeff<?xml version='1.0' encoding='UTF-16'?><a>é€</a>".encode("utf-16-be"), XML),
        ("<?xml version='1.0' encoding=\"windows-1252\"?><a>é€</a>".encode("cp1252"), XML),
        ("<?xml version='1.0' encoding='utf-8'?><a>é€</a>".encode("cp1252"), "text/xml; charset=Windows-1252"),
    ],
)
def test_it_is_decoded_by_its_mark_its_type_or_its_declaration(content: bytes, content_type: str) -> None:
    assert read_xml(content, content_type) == {"a": "é€"}


@pytest.mark.parametrize("encoding", ["utf-7", "idna", "rot13", "x.y", "utf-32", "cp037", "big5", "a" * 60])
def test_another_encoding_is_not_read_and_not_looked_for(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codecs.lookup", lambda name: pytest.fail(f"{name} was looked for"))
    content = f"<?xml version='1.0' encoding='{encoding}'?><a/>".encode()
    assert encoding == "a" * 60 or refusal(content) == (400, "malformed_content")
    assert refusal(b"<a/>", f"{XML}; charset={encoding}") == (400, "malformed_content")


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
TYPES = {
    "a billion laughs": f'<!DOCTYPE l [<!ENTITY l0 "ha">{LAUGHS}]><l>&l9;</l>',
    "quadratic blowup": f'<!DOCTYPE l [<!ENTITY a "{"a" * 50_000}">]><l>{"&a;" * 50_000}</l>',
    "an external entity": '<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]><l>&x;</l>',
    "a parameter entity": '<!DOCTYPE l [<!ENTITY % x SYSTEM "http://127.0.0.1:1/x"> %x;]><l/>',
    "an external subset": '<!DOCTYPE l SYSTEM "http://127.0.0.1:1/l.dtd"><l/>',
    "a public one": '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0//EN" "http://127.0.0.1:1/x.dtd"><html/>',
    "a type alone": "<!DOCTYPE l><l/>",
    "default attributes": '<!DOCTYPE l [<!ATTLIST l a CDATA "x">]><l/>',
    "behind a declaration": "<?xml version='1.0'?> <!-- c --> <!DOCTYPE l><l/>",
    "behind many comments": "<!---->" * 200 + "<!DOCTYPE l><l/>",
    "in UTF-16": "<!DOCTYPE l><l/>",
}


@pytest.mark.parametrize("name", TYPES)
def test_a_document_type_is_refused_before_anything_of_it_is_read(name: str) -> None:
    content = TYPES[name].encode("utf-16" if name == "in UTF-16" else "utf-8")
    began = time.thread_time()
    assert refusal(content) == (400, "malformed_content")
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize(
    "content",
    [b"", b" ", b"text", b"{}", b"<a>", b"<a></b>", b"<a/><b/>", b"<a/>x", b"<a>&x;</a>", b"<a>&#0;</a>", b"<a b=c/>",
     b"<a b='1' b='2'/>", b"<a>\0</a>", b"<a>\xff</a>", b"<a>]]></a>", b"<!a>", b"<a><!DOCTYPE a></a>",
     b" <?xml version='1.0'?><a/>",
     "<a>é</a>".encode("utf-16-le"), b"\xff\xfe<\xd8", b"<!--"],
)  # fmt: skip
def test_what_is_not_well_formed_is_not_read(content: bytes) -> None:
    assert refusal(content) == (400, "malformed_content")


def test_elements_attributes_and_depth_are_bounded() -> None:
    assert read_xml(b"<a>" + b"<b/>" * (MAX_ELEMENTS - 1) + b"</a>", XML) == {"a": {"b": [""] * (MAX_ELEMENTS - 1)}}
    assert refusal(b"<a>" + b"<b/>" * MAX_ELEMENTS + b"</a>") == (413, "content_too_large")
    assert refusal(b"<a>" + b"<b c=''/>" * (MAX_ELEMENTS // 2) + b"</a>") == (413, "content_too_large")
    assert read_xml(b"<a>" * MAX_DEPTH + b"</a>" * MAX_DEPTH, XML)
    assert refusal(b"<a>" * (MAX_DEPTH + 1) + b"</a>" * (MAX_DEPTH + 1)) == (413, "content_too_large")


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
TAGS = st.sampled_from(["a", "b", "Id", "x-y"])
TREES: st.SearchStrategy[Any] = st.recursive(
    st.tuples(TAGS, st.dictionaries(TAGS, TEXT, max_size=2), TEXT, st.just([])),
    lambda inner: st.tuples(TAGS, st.dictionaries(TAGS, TEXT, max_size=2), TEXT, st.lists(inner, max_size=4)),
    max_leaves=12,
)


def element(tree: Any) -> ET.Element:
    tag, attributes, text, inner = tree
    made = ET.Element(tag, attributes)
    made.text = text
    made.extend([element(each) for each in inner])
    return made


def expected(tree: Any) -> Any:
    _, attributes, text, inner = tree
    pairs = [(f"@{name}", value) for name, value in attributes.items()] + [(each[0], expected(each)) for each in inner]
    if not pairs:
        return text
    return gathered([*pairs, *([("#text", text.strip(" \t\r\n"))] if text.strip(" \t\r\n") else [])])


@given(TREES, st.sampled_from(["utf-8", "utf-16", "us-ascii", "iso-8859-1"]))
def test_what_the_standard_library_writes_is_read(tree: Any, encoding: str) -> None:
    content = ET.tostring(element(tree), encoding=encoding)
    assert read_xml(content, XML) == {tree[0]: expected(tree)}


WORST = {
    "elements": b"<r>" + b"<a/>" * 500_000 + b"</r>",
    "attributes": b"<r " + b" ".join([b'a%d=""' % n for n in range(90_000)]) + b"/>",
    "namespaces": b"<r " + b" ".join([b'xmlns:a%d="u"' % n for n in range(60_000)]) + b"/>",
    "a long namespace": b'<p:a xmlns:p="' + b"u" * 900_000 + b'">' + b"<p:b/>" * 9000 + b"</p:a>",
    "depth": b"<a>" * 600_000,
    "comments before": b"<!---->" * 290_000 + b"<a/>",
    "comments within": b"<a>" + b"<!---->" * 290_000 + b"</a>",
    "comments that never end": b"<!--" * 500_000,
    "references": b"<a>" + b"&#65;" * 400_000 + b"</a>",
    "lines": b"<a>" + b"\n" * (2 << 20) + b"</a>",
    "a long name": b"<" + b"a" * (2 << 20),
    "a declaration": b"<?xml " + b"encoding=" * 200_000,
}


@pytest.mark.parametrize("name", WORST)
def test_no_document_takes_long_or_much(name: str) -> None:
    content = WORST[name]
    assert seconds(lambda: read_xml(content, XML)) < MOST_SECONDS
    assert peak_bytes(lambda: read_xml(content, XML)) < 48 << 20
