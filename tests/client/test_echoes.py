"""What texts may repeat of an event's hidden values, however long these are."""

import html
import json
from base64 import b64encode
from urllib.parse import quote, quote_plus

import pytest

from gateway.bodies.redaction import Redacted
from gateway.client.echoes import Echoes
from gateway.client.masking import Mask
from gateway.model import ResponseExcerpt

LONG = 'a \u00e9/"<' * 1000


def hiding(*values: bytes, has_more: bool = False) -> Redacted:
    return Redacted(headers=(), query="", body=b"", values=values, has_more=has_more)


@pytest.mark.parametrize("kept", [*range(4, 40), 500, 501, 502, 503])
@pytest.mark.parametrize(
    "form",
    [
        LONG.encode(),
        b64encode(LONG.encode()),
        json.dumps(LONG)[1:-1].encode(),
        json.dumps(LONG, ensure_ascii=False)[1:-1].encode(),
        html.escape(LONG).encode(),
        quote(LONG).encode(),
        quote_plus(LONG).encode(),
    ],
)
def test_a_text_that_is_cut_off_in_a_much_longer_value_ends_before_it(form: bytes, kept: int) -> None:
    cut = b"> " + form[:kept]
    assert Echoes(hiding(LONG.encode())).bytes(cut, is_cut=True) == b"> ***"
    assert Mask([LONG.encode()]).masked_beginning(cut) == b"> ***"


def test_a_longer_text_after_a_short_one_is_looked_through_for_longer_values() -> None:
    echoes = Echoes(hiding(LONG.encode(), b"short-one", b"9"))
    assert echoes.text("got 9 short-one") == "got *** ***"
    assert echoes.text(f"got {LONG}.") == "got ***."
    assert echoes.text(f"got {json.dumps(LONG)} 9") == 'got "***" ***'
    assert echoes.text("got 9 short-one") == "got *** ***"
    for excess in range(12):
        value = b"v" * 100
        assert Echoes(hiding(value, b"w" * 3000)).bytes(b"x" * excess + value) == b"x" * excess + b"***"


def test_what_several_events_hide_is_hidden_together() -> None:
    shown = Echoes(hiding(b"Anna"), hiding(b"Anna Smith")).excerpt(ResponseExcerpt(body=b"no Anna Smith, Anna"))
    assert shown.body == b"no ***, ***"
    assert Echoes(hiding(b"Anna"), hiding(has_more=True)).text("no") == "[redacted]"
    assert Echoes().text("no Anna") == "no Anna"
