"""What is told of a provider is what its preset does."""

import yaml

from gateway.ops.fixtures import fixture, fixtures
from gateway.ops.provider_guide import provider_guide, provider_guides
from gateway.verify.presets import PRESETS, Preset
from gateway.verify.schemes import user_keys


def test_the_rules_to_copy_have_all_that_a_provider_asks_for() -> None:
    for guide in provider_guides():
        source = yaml.safe_load(guide.snippet)["sources"][guide.name]
        keys = user_keys(guide.name)
        required = {name for name, key in keys.items() if key.is_required}
        assert required | {"scheme"} <= source["verify"].keys() <= keys.keys() | {"scheme"}


def test_an_identity_is_somewhere_or_there_is_none_or_nobody_knows() -> None:
    def shown(preset: Preset) -> str:
        return dict(provider_guide("it", preset).details())["identity"]

    methods = PRESETS["stripe"].methods
    assert shown(Preset(methods=methods, id="body.id", about={})) == "`body.id`"
    assert shown(Preset(methods=methods, about={"no_id": "its id is the object's"})) == "none: its id is the object's"
    assert shown(Preset(methods=methods, about={})) == "not confirmed"


def test_what_of_the_fixtures_is_not_confirmed_is_told_once_or_of_each() -> None:
    def shown(provider: str) -> str | None:
        return dict(provider_guide(provider, PRESETS[provider]).details()).get("unconfirmed in them")

    assert shown("linear") == fixture("linear", "Issue").unconfirmed == fixture("linear", "Comment").unconfirmed
    assert shown("twilio") == "; ".join([f"`{each.name}`: {each.unconfirmed}" for each in fixtures("twilio")])
    assert shown("alertmanager") is None
    assert shown("notion") is None


def test_keys_that_are_fetched_are_told_with_where_their_address_is() -> None:
    paypal = provider_guide("paypal", PRESETS["paypal"])
    (signing,) = paypal.signing
    assert signing == (
        "RSA-SHA256 in base64 of `{header:PAYPAL-TRANSMISSION-ID}|{timestamp}|{given:webhook_id}|{body:crc32}`, in the "
        "header `PAYPAL-TRANSMISSION-SIG`; timestamp in the header `PAYPAL-TRANSMISSION-TIME`, from any time, with the "
        "key at the address in the header `PAYPAL-CERT-URL`"
    )
    assert paypal.snippet.splitlines()[-1] == '    verify: {scheme: paypal, webhook_id: "${PAYPAL_WEBHOOK_ID}"}'
    sns = provider_guide("sns", PRESETS["sns"])
    assert sns.signing == ("RSA-SHA1 or RSA-SHA256, as its version says, in the field `Signature` of the body",)
    assert sns.snippet.splitlines()[-1] == '    verify: {scheme: sns, topics: ["${SNS_TOPIC}"]}'
