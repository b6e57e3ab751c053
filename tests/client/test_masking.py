"""What of our credentials a response may repeat, and what is left of it."""

import asyncio
import html
import json
import time
import tracemalloc
from base64 import b64encode, urlsafe_b64encode
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client.json_escapes import outside, unescaped
from gateway.client.masking import MASK, MIN_SECRET, Mask
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import PathTemplate, RequestTemplate, parameters
from gateway.rules.rules import Destination, DestinationAccess, OAuth2, Proxy
from gateway.rules.templates import Template
from gateway.turns import TooLongError, taking_turns
from tests.builders import a_destination

SECRET = 'hunter2/+"ö<&> tail'
RAW = SECRET.encode()
SECRETS = st.binary(min_size=MIN_SECRET, max_size=60).filter(lambda secret: b"***" not in secret)
SURROUNDINGS = st.binary(max_size=20)


def left(text: bytes, secret: bytes = RAW) -> bytes:
    return Mask([secret]).masked(text)


@pytest.mark.parametrize(
    "form",
    [
        RAW,
        quote(SECRET, safe="").encode(),
        quote(SECRET, safe="").lower().encode(),
        quote_plus(SECRET).encode(),
        quote(SECRET).encode(),
        json.dumps(SECRET)[1:-1].encode(),
        json.dumps(SECRET, ensure_ascii=False)[1:-1].encode(),
        json.dumps(SECRET)[1:-1].replace("/", "\\/").encode(),
        html.escape(SECRET).encode(),
    ],
)
def test_a_secret_is_masked_in_every_form_in_which_a_response_may_repeat_it(form: bytes) -> None:
    assert left(b"before " + form + b" after") == b"before *** after"


@pytest.mark.parametrize("encode", [b64encode, urlsafe_b64encode])
@given(secret=SECRETS, before=SURROUNDINGS, after=SURROUNDINGS)
def test_in_base64_it_is_masked_whatever_is_around_it(
    encode: object, secret: bytes, before: bytes, after: bytes
) -> None:
    assert callable(encode)
    encoded = encode(before + secret + after)
    first, end = -(-len(before) * 8 // 6), (len(before) + len(secret)) * 8 // 6
    if end - first < MIN_SECRET:
        return
    masked = Mask([secret]).masked(encoded)
    assert encoded[first:end] not in masked or encoded[first:end] in (encoded[:first] + encoded[end:])
    assert MASK in masked


@given(SECRETS, SURROUNDINGS, SURROUNDINGS)
def test_a_masked_text_has_no_secret(secret: bytes, before: bytes, after: bytes) -> None:
    assert secret not in Mask([secret]).masked(before + secret + after)


@given(SECRETS, st.data())
def test_of_a_text_that_was_cut_off_nothing_of_a_secret_is_left_but_three_bytes(
    secret: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(secret)))
    left = Mask([secret]).masked_beginning(b"the token is " + secret[:cut])
    if cut >= MIN_SECRET:
        assert secret[:MIN_SECRET] not in left or secret[:MIN_SECRET] in b"the token is " + MASK
    else:
        assert left.startswith(b"the token is")


def test_the_end_of_a_text_that_was_cut_off_is_searched_for_the_longest_beginning() -> None:
    assert Mask([b"abababcd"]).masked_beginning(b"x ababab") == b"x ***"


@pytest.mark.parametrize("text", [b"no such order: " * 100_000, b'{\\"a\\": \\"value-000001\\"}' * 40_000])
def test_who_looks_for_many_in_much_is_stopped_in_time(text: bytes) -> None:
    secrets = [f"value-{number:06}".encode() for number in range(1000)]
    mask = Mask(secrets)
    loop = asyncio.new_event_loop()
    loop.close()  # which nobody waits for
    began = time.thread_time()
    with taking_turns(loop, 0.02), pytest.raises(TooLongError):
        mask.masked(text)
    with taking_turns(loop, 0.001), pytest.raises(TooLongError):
        Mask(secrets)
    with taking_turns(loop, 0.02), pytest.raises(TooLongError):
        outside(b"\\n" * 1_000_000, b"\1" * 1_000_000)
    assert time.thread_time() - began < 0.5


def test_who_looks_for_many_short_values_or_escapes_is_stopped_in_time() -> None:
    numbers = [f"{number:02}".encode() for number in range(100)]
    words = Mask(words=[b",", *[b"," + each for each in numbers], *[b"-" + each for each in numbers]])
    every_byte = bytes(range(128, 256))
    for work in (
        lambda: words.masked(b"," * (1 << 20)),
        lambda: Mask([b",,,,"]).masked(b",,,," * (1 << 18)),
        lambda: Mask([b" " * (1 << 20)]),
        lambda: unescaped(b"\\u0041" * 175_000),
        lambda: unescaped(every_byte + b"\\u0041" * 175_000),
    ):
        loop = asyncio.new_event_loop()
        loop.close()  # which nobody waits for
        began = time.thread_time()
        with taking_turns(loop, 0.005), pytest.raises(TooLongError):
            work()
        assert time.thread_time() - began < 0.5


def test_of_short_values_that_begin_alike_or_overlap_each_is_masked_whole() -> None:
    for words in ([b"1", b"1.5"], [b"1.5", b"1"]):
        assert Mask(words=words).masked(b"got 1.5, 1, 1.52 and 21") == b"got ***, ***, ***.52 and 21"
    assert Mask(words=[b",,"]).masked(b"a ,,, b") == b"a *** b"
    assert Mask(words=[b"a-b", b"b-c"]).masked(b"a-b-c") == b"***"


def test_a_secret_that_contains_another_is_masked_as_a_whole() -> None:
    assert Mask([b"token", b"token-of-ci"]).masked(b"token-of-ci, token") == b"***, ***"


def test_what_is_short_is_not_masked_as_it_is_everywhere() -> None:
    assert Mask([b"abc"]).masked(b"abcdef") == b"abcdef"


# What the rules say.


def echoed(
    text: str, *, request: RequestTemplate | None = None, references: tuple[str, ...] = (), **destination: object
) -> str:
    mask = Mask.of(a_destination(**destination), request, references)  # type: ignore[arg-type] # whatever a test is about
    return mask.masked(text.encode()).decode()


def test_headers_of_a_destination_are_masked_with_the_credentials_in_them() -> None:
    basic = "Basic " + b64encode(b"gateway:s3cret-of-ci").decode()
    headers = (("Authorization", basic), ("X-Api-Key", "k3y-of-ci"), ("X-Multi", 'Token token="abcdefgh"'))
    assert echoed(f"got {basic}", headers=headers) == "got ***"
    assert echoed("gateway:s3cret-of-ci", headers=headers) == "***"
    assert echoed("password s3cret-of-ci", headers=headers) == "password ***"
    assert echoed("key k3y-of-ci", headers=headers) == "key ***"
    assert echoed("token abcdefgh", headers=headers) == "token ***"


def test_a_header_that_is_no_secret_is_not_masked() -> None:
    headers = (("Accept", "application/json"), ("User-Agent", "acme-gateway/1.0"))
    assert echoed("application/json acme-gateway/1.0", headers=headers) == "application/json acme-gateway/1.0"


@pytest.mark.parametrize(
    ("url", "text", "expected"),
    [
        ("https://hooks.example/services/T012345678/B0/x8", "POST /services/T012345678/B0/x8", "POST /services/***"),
        ("https://hooks.example/services/T012345678/B0/x8", "no team T012345678", "no team ***"),
        ("https://ci.example/build", "no /build here", "no /build here"),
        ("https://ci.example/abcdefghijklmnop", "/abcdefghijklmnop", "/***"),
        ("https://ci.example/a?token=abcdefgh&n=1", "/a?token=abcdefgh&n=1", "/a?***"),
        ("https://ci.example/a?token=abc%2Fefgh", "the token abc/efgh", "the token ***"),
    ],
)
def test_what_may_be_a_token_in_a_url_is_masked(url: str, text: str, expected: str) -> None:
    assert echoed(text, url=url) == expected


def test_signing_secrets_client_secrets_and_proxies_passwords_are_masked() -> None:
    oauth2 = OAuth2(token_url="https://login.example", client_id="gateway", client_secret="client-s3cret")
    proxy = Proxy(host="proxy", port=3128, authorization="Basic " + b64encode(b"me:pr0xy-pass").decode())
    access = DestinationAccess(oauth2=oauth2, proxy=proxy)
    key = bytes(range(24))
    text = f"client-s3cret pr0xy-pass whsec_{b64encode(key).decode()}"
    assert echoed(text, sign=(key,), access=access) == "*** *** whsec_***"


REFERENCES = ("r3f-in-url", "r3f-in-header", "r3f-in-body", "r3f-in-path", "r3f-in-form", "r3f-in-cel", "r3f-of-others")


def test_values_of_references_are_masked_wherever_the_request_has_them_and_no_others() -> None:
    request = RequestTemplate(
        headers=(("X-Key", Template("r3f-in-header")),),
        path=PathTemplate("/r3f-in-path/${{ body.id }}"),
        form=parameters({"key": Template("r3f-in-form"), "n": Template("${{ 'r3f-in-cel' + body.n }}")}),
    )
    text = " ".join(REFERENCES)
    found = echoed(text, request=request, references=REFERENCES, url="https://ci.example/?k=r3f-in-url")
    assert found == "*** *** r3f-in-body *** *** *** r3f-of-others"
    body = RequestTemplate(body=Template({"list": [{"key": "r3f-in-body"}]}))
    assert echoed(text, request=body, references=REFERENCES).split()[2] == "***"


def test_an_expression_is_searched_as_it_is_written() -> None:
    assert echoed("s3cret", request=RequestTemplate(body=Template("${{ 's3cret' }}")), references=("s3cret",)) == "***"
    assert Expression("'s3cret'").text == "'s3cret'"


# What one request alone has had.


def test_signatures_tokens_and_computed_headers_of_the_request_are_masked() -> None:
    request = RequestTemplate(headers=(("X-Digest", Template("${{ body.x }}")),))
    mask = Mask.of(a_destination(sign=(b"0123456789abcdef",)), request, ())
    headers = (
        (b"x-github-event", b"push-of-the-sender"),
        (b"webhook-signature", b"v1,c2lnbmF0dXJl v1,YW5vdGhlci1vbmU="),
        (b"X-Digest", b"c0mputed-digest"),
    )
    sent = mask.with_sent(headers, [b"Bearer t0ken-of-now"])
    text = b"push-of-the-sender v1,YW5vdGhlci1vbmU= c2lnbmF0dXJl c0mputed-digest t0ken-of-now"
    assert sent.masked(text) == b"push-of-the-sender *** *** *** ***"
    assert mask.masked(text) == text


def test_without_any_of_them_the_mask_is_the_same() -> None:
    mask = Mask.of(a_destination(), None, ())
    assert mask.with_sent(((b"x-github-event", b"push-of-the-sender"),)) is mask


def test_a_form_that_repeats_a_secret_is_masked() -> None:
    assert left(urlencode({"secret": SECRET}).encode()) == b"secret=***"


def test_a_destination_that_has_nothing_to_hide_masks_nothing() -> None:
    destination = Destination(name="ci", url="http://127.0.0.1:1/")
    assert Mask.of(destination, None, ()).masked(b"anything at all") == b"anything at all"


def test_what_is_a_credential_for_sure_has_no_guesses() -> None:
    """Where a mistake would hurt: parts of a URL and of headers, the host, and short passwords occur by chance."""
    destination = a_destination(
        url="https://chat.example.com/interactive-commands/tok-4711-secret",
        headers=(("X-Team", "platform-team"), ("X-Api-Key", "key-of-0815-chat"), ("Authorization", "Basic dTpwYXNz")),
    )
    mask = Mask.of_credentials(destination, None, ["chat.example.com", "tok-4711-secret", "key-of-0815-chat"])
    for text in (b"chat.example.com", b"interactive-commands", b"platform-team", b"pass", b"u:pass"):
        assert not mask.is_in(text)
    for text in (b"dTpwYXNz", b"tok-4711-secret", b"key-of-0815-chat", b64encode(b"> key-of-0815-chat")):
        assert mask.is_in(b"before " + text + b" after")


# What JSON may write otherwise: .NET `\u002B`, Go `\u0026`, PHP `\/`, each in the case of its own.

SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=MIN_SECRET, max_size=20)


@st.composite
def escaped(draw: st.DrawFn, text: str) -> bytes:
    """Write a text as JSON may: each character as it is, by its number, or by an escape of its own."""
    written = []
    for character in text:
        units = character.encode("utf-16-be").hex()
        number = "".join([f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)])
        ways = [number, number.upper().replace("U", "u"), SHORT_ESCAPES.get(character, character)]
        ways += [character] if character not in '\\"' else []
        written.append(draw(st.sampled_from(ways)))
    return "".join(written).encode()


@pytest.mark.parametrize("token", [b"Bearer aGVs+bG8gd29ybGQ/Pz8=", "key-\u00e4<>&'\U0001f600".encode()])
@pytest.mark.parametrize("is_upper", [False, True])
def test_a_credential_is_recognised_by_whatever_number_json_has_for_a_character(
    token: bytes, *, is_upper: bool
) -> None:
    units = [f"{unit:04X}" if is_upper else f"{unit:04x}" for unit in _utf16(token.decode())]
    page = b'{"headers": {"authorization": "' + "".join([f"\\u{unit}" for unit in units]).encode() + b'"}}'
    assert Mask([token]).is_in(page)
    assert Mask([token]).masked(page) == b'{"headers": {"authorization": "***"}}'


def _utf16(text: str) -> list[int]:
    raw = text.encode("utf-16-be")
    return [int.from_bytes(raw[at : at + 2], "big") for at in range(0, len(raw), 2)]


@given(st.data(), TEXTS.filter(lambda text: "*" not in text))
def test_a_value_is_recognised_and_masked_however_json_escapes_it(data: st.DataObject, value: str) -> None:
    before, after = data.draw(SURROUNDINGS).replace(b"\\", b"/"), data.draw(SURROUNDINGS)
    form = data.draw(escaped(value))
    mask = Mask([value.encode()])
    assert mask.is_in(before + form + after)
    shown = mask.masked(before + form + after)
    assert not mask.is_in(shown)
    if not mask.is_in(before + b"\n" + after):
        assert shown.startswith(before)


@given(st.data(), TEXTS.filter(lambda text: "*" not in text))
def test_so_it_is_in_json_that_is_a_string_of_json(data: st.DataObject, value: str) -> None:
    once = data.draw(escaped(value)).decode()
    form = data.draw(escaped(once))
    mask = Mask([value.encode()])
    assert mask.is_in(form)
    assert not mask.is_in(mask.masked(b"{" + form + b"}"))


@given(st.data(), TEXTS.filter(lambda text: "*" not in text))
def test_of_an_escaped_value_that_was_cut_off_nothing_is_left_but_three_characters(
    data: st.DataObject, value: str
) -> None:
    form = data.draw(escaped(value))
    cut = form[: data.draw(st.integers(0, len(form)))]
    shown = Mask([value.encode()]).masked_beginning(b"> " + cut)
    mask = Mask([value.encode()[:MIN_SECRET]])
    assert not mask.is_in(shown)


@given(st.binary(max_size=60), st.sampled_from([b"\\u002", b"\\ud83d", b"\\\\", b"\\", b'\\"', b"\\u00e9"]))
def test_what_a_destination_wrote_for_others_stays_as_it_is(text: bytes, escape: bytes) -> None:
    mask = Mask([b"a-token-of-ours"])
    assert mask.masked(text + escape + text) == text + escape + text
    assert mask.masked(text + escape + b" a-token\\u002dof-ours") in (
        text + escape + b" ***",
        text + escape + b" a-token\\u002dof-ours",
    )


LONG = b"\\u0073ecret-0815-of-this-destination"


@pytest.mark.parametrize(
    "hostile",
    [
        b"\\",
        b"\\\\",
        b"\\n",
        b"\\u002B",
        b"\\u0061",
        b"\\ud83d",
        b"\\ud83d\\ude00",
        b"a\\u",
        b'"\\',
        b"\\u0073ecret-0815",
        LONG,
    ],
)
def test_hostile_escapes_take_time_in_proportion_and_little_memory(hostile: bytes) -> None:
    mask = Mask([b"secret-0815-of-this-destination", b"a" * 100])

    def seconds(size: int) -> float:
        text = hostile * (size // len(hostile))
        began = time.thread_time()
        mask.is_in(text)
        mask.masked_beginning(text)
        return time.thread_time() - began

    once = min(seconds(1 << 15) for _ in range(3))
    assert min(seconds(1 << 18) for _ in range(2)) < max(0.05, 16 * once)
    tracemalloc.start()
    try:
        mask.is_in(hostile * ((1 << 16) // len(hostile)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20
