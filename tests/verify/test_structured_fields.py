"""Structured fields, by the examples and the limits of RFC 8941; `make oracles` compares with http-sf."""

from decimal import Decimal

import pytest

from gateway.verify.structured_fields import Date, InnerList, Item, Token, parse_dictionary, parse_item, serialise

YES, NO = True, False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", {}),
        (b'en="Applepie", da=:w4ZibGV0w6ZydGU=:', {"en": Item("Applepie"), "da": Item("Æbletærte".encode())}),
        (b"a=?0, b, c; foo=bar", {"a": Item(NO), "b": Item(YES), "c": Item(YES, {"foo": Token("bar")})}),
        (
            b"rating=1.5, feelings=(joy sadness)",
            {"rating": Item(Decimal("1.5")), "feelings": InnerList((Item(Token("joy")), Item(Token("sadness"))))},
        ),
        (
            b"a=(1 2), b=3, c=4;aa=bb, d=(5 6);valid",
            {
                "a": InnerList((Item(1), Item(2))),
                "b": Item(3),
                "c": Item(4, {"aa": Token("bb")}),
                "d": InnerList((Item(5), Item(6)), {"valid": True}),
            },
        ),
        (b"a=1\t,\t b=2 ,a=3", {"a": Item(3), "b": Item(2)}),
        (b"a=@1659578233", {"a": Item(Date(1659578233))}),
        (b'a="\\"\\\\"', {"a": Item('"\\')}),
        (b"a=-999999999999999, b=-0.5", {"a": Item(-999999999999999), "b": Item(Decimal("-0.5"))}),
    ],
)
def test_dictionaries(text: bytes, expected: object) -> None:
    """Section 3.2."""
    assert parse_dictionary(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(b"a,", b",a", b"a=", b"a= 1", b"A=1", b"1=a", b"a b", b"a;=1", b"a;B", b"a=1;;b", "ä=1".encode(), b"a=\xff"),
        *(b"a=1.", b"a=1.2345", b"a=1234567890123.1", b"a=1234567890123456", b"a=-", b"a=--1", b"a=+1", b"a=.5"),
        *(b'a="', b'a="\\x"', b'a="\x7f"', b'a="\t"', 'a="ä"'.encode(), b"a='b'"),
        *(b"a=(", b"a=(1", b"a=(1,2)", b"a=((1))", b"a=(1 2", b'a=(1"2")', b"a=()x", b"a=)"),
        *(
            b"a=:YQ=:",
            b"a=:YQ:",
            b"a=:YR==:",
            b"a=:Y Q==:",
            b"a=:YQ==",
            b"a=:-_==:",
            b"a=?2",
            b"a=?",
            b"a=@1.5",
            b"a=%",
        ),
        *(b"a\n=1", b"a=1\r\n", b"a=1\x00", b'a=%"x"'),
    ],
)
def test_what_is_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"(?s)"):
        parse_dictionary(text)


def test_an_item_is_the_whole_text() -> None:
    assert parse_item(b' "a";b=1 ') == Item("a", {"b": 1})
    for text in (b"", b"1 2", b"1,", b"(1)"):
        with pytest.raises(ValueError, match=r"(?s)"):
            parse_item(text)


@pytest.mark.parametrize(
    "text",
    ['"a \\"b\\" \\\\";c;d=?0;e=1.5', '(1 "x";y :aGk=: tok/en:x @7 ?1 -2.0);z=*a', "()", "?1", "0"],
)
def test_what_is_written_is_read_again(text: str) -> None:
    assert serialise(parse_dictionary(f"a={text}".encode())["a"]) == text
