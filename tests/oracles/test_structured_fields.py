"""Our parser of structured fields and http-sf agree, on dictionaries that are drawn and changed anew."""

import binascii
import random
import re

import http_sf

from gateway.verify.structured_fields import parse_dictionary, serialise
from tests.oracles.conftest import SEED

PIECES = [
    *("a", "b=1", "c=-12.50", 'd="x \\" \\\\"', "e=:aGk=:", "f=tok/en:x*", "g=?0", 'h=("a" b;c 1);d', "i=()", "a;x"),
    *("j=@17;y=?1", "*k=1;z=:Zg==:", "l=:Zh==:", "m=:Zg:", "n=1.", "o=1.2345", "p=1234567890123456", 'q="é"', "A=1"),
    *("r=(1  2 )", "s=(1,2)", "t=( 1)", "u = 1", "v;  w=1", "v ;w", "x=--1", "y=?2", "z='a'", "a=", "b=;c", '"a"=1'),
]


def test_the_same_dictionaries_are_read_and_written() -> None:
    draw = random.Random(SEED)
    read = 0
    for _ in range(20_000):
        text = draw.choice([", ", ",", " , ", "\t,\t"]).join(draw.sample(PIECES, draw.randrange(4)))
        for _ in range(draw.choice([0, 0, 1, 2])):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(["", *' ,;=:"()?-.*a1\t\\\x7f']) + text[at + draw.randrange(2) :]
        ours, theirs = our_reading(text), their_reading(text)
        read += ours is not None
        assert ours == theirs or (ours is None and has_another_spelling(text)), text
    assert read > 2_000


def has_another_spelling(text: str) -> bool:
    """Return whether bytes in it are written in another method than the one that we read."""
    written = re.findall(r":([A-Za-z0-9+/=]*):", text)
    return any(
        each != binascii.b2a_base64(binascii.a2b_base64(each + "=="), newline=False).decode() for each in written
    )


def our_reading(text: str) -> dict[str, str] | None:
    try:
        return {key: serialise(member).removeprefix("?1") for key, member in parse_dictionary(text.encode()).items()}
    except ValueError:
        return None


def their_reading(text: str) -> dict[str, str] | None:
    try:
        members = http_sf.parse(text.encode(), tltype="dictionary")
    except ValueError:
        return None
    return {key: http_sf.ser({"a": member}).removeprefix("a").removeprefix("=") for key, member in members.items()}
