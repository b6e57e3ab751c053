"""Each `verify` of a source also as a provider of one's own: what one may have the other may have, and nothing else."""

from collections.abc import Mapping

import pytest

from gateway.verify import schemes
from gateway.verify.config_keys import GENERIC
from gateway.verify.config_reader import ConfigPath, Path
from gateway.verify.presets import Preset, SchemeError, read_preset
from gateway.verify.verifier import Verifier

NONE: Mapping[str, Preset] = {}
OF_USERS = ("secrets", "public_keys", "verify_tokens")
"""What a source has, where its provider has the rest."""

OTHERWISE = (
    "unknown key ",  # the secrets are apart from the algorithm that has no use for them
    "expected the key 'public_keys', got none",
    "expected the key 'secrets', got none",
    "expected {given:NAME} of a name under 'asks'",  # a source has nobody to ask
    "expected one signing method, by secrets",  # handshakes that a source can't have at all
)
"""How messages begin that are others where there is a provider."""


def build_verifier(
    config: Mapping[str, object], *, public_url: str | None = None, providers: Mapping[str, Preset] = NONE
) -> Verifier:
    """Build the verifier of a source; of a generic scheme, see that it is the same with a provider, or refused."""
    if config.get("scheme") not in [*GENERIC]:
        return schemes.build_verifier(config, public_url=public_url, providers=providers)
    try:
        verifier = schemes.build_verifier(config, public_url=public_url)
    except SchemeError as error:
        with pytest.raises(SchemeError) as caught:
            with_provider(config, public_url=public_url)
        told = {text for _, text in error.problems}
        others = [text for _, text in caught.value.problems if text not in told and not text.startswith(OTHERWISE)]
        assert not others, (config, others)
        raise
    other = with_provider(config, public_url=public_url)
    assert other.checks == verifier.checks
    assert (other.id, other.ids, other.is_open) == (verifier.id, verifier.ids, verifier.is_open)
    assert other.lifetimes == verifier.lifetimes
    assert {text for _, text in verifier.warnings} <= {_as_of_source(text) for _, text in other.warnings}
    assert other.handshake_keys == verifier.handshake_keys
    assert other.credential_headers == verifier.credential_headers
    assert other.credential_query == verifier.credential_query
    return verifier


def with_provider(config: Mapping[str, object], *, public_url: str | None = None) -> Verifier:
    """Build the verifier of a source that has only the secrets of a `verify`, and a provider with all else."""
    method = {name: each for name, each in config.items() if name not in {*OF_USERS, "handshake"}}
    entry = {"verify": method} | ({"handshake": config["handshake"]} if "handshake" in config else {})
    problems: dict[tuple[Path, str], None] = {}
    preset = read_preset(entry, ConfigPath((), problems))
    if preset is None or problems:
        raise SchemeError(list(problems))
    given = {name: config[name] for name in OF_USERS if name in config}
    return schemes.build_verifier({"scheme": "own", **given}, public_url=public_url, providers={"own": preset})


def _as_of_source(text: str) -> str:
    return text.replace("a provider whose tolerance is a duration", "a duration")
