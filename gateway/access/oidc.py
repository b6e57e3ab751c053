"""OpenID Connect: what an identity provider is asked, and what of its answers is believed. Pure.

    authorization code flow (OpenID Connect Core 1.0, section 3.1), with PKCE (RFC 7636, S256), state and nonce

oauthlib makes the requests and reads the answers of OAuth 2.0; PyJWT verifies the signature, the issuer and the
audience of an ID token. What is left for us to check: times, by our clock; `azp`, `nonce` and `at_hash`; `iss` of the
answer (RFC 9207); and whether what names a person is theirs.
"""

import hmac
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, quote_plus

import orjson

from gateway.access.access_file import MAX_NAME
from gateway.access.sessions import SKEW, SignInFlow
from gateway.access.sign_in_lines import EMAIL, Oidc, is_https
from gateway.model import GatewayError, immutable, shown
from gateway.verify.remote_keys import type_of_key

if TYPE_CHECKING:
    from oauthlib.oauth2 import WebApplicationClient

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""Those by which an ID token may be signed: none that takes the client's secret, or nothing, for a key."""
MAX_ID_TOKEN = 32 * 1024
MAX_KEY_ID = 256
MAX_GROUPS = 1000
MAX_TOKEN_AGE = 600.0
"""Seconds since an ID token was issued: it has just been fetched."""
CALLBACK = "/ui/sign-in/callback"
"""The path to which an identity provider sends people back, of the address at which they sign in."""
_GOOGLE = "https://accounts.google.com"
"""It verifies an address once; only of its own, and of those of domains that it manages, it knows who has it today."""
_BASIC, _POST = "client_secret_basic", "client_secret_post"
_ERRORS = frozenset(
    (
        *("access_denied", "invalid_client", "invalid_grant", "invalid_request", "invalid_scope", "server_error"),
        *("temporarily_unavailable", "unauthorized_client", "unsupported_grant_type", "unsupported_response_type"),
        *("account_selection_required", "consent_required", "interaction_required", "login_required"),
    )
)
"""Errors that are told by their names: nothing else of an answer is shown."""


class SignInError(GatewayError):
    """A sign-in fails: the text says where, what was expected, and what came, without tokens and codes."""


class StateError(SignInError):
    """An answer isn't to what this browser was sent away with."""


class RefusedByProviderError(SignInError):
    """The identity provider says no."""


class IdTokenError(SignInError):
    """An ID token proves nothing."""


@immutable
class Metadata:
    """What an identity provider says of itself (OpenID Connect Discovery 1.0, section 3).

    `says_issuer` is whether each of its answers names it. `end_session` is where people end their session with it, ""
    if that isn't told.
    """

    authorization: str
    token: str
    keys: str
    algorithms: tuple[str, ...]
    is_secret_in_body: bool
    says_issuer: bool
    end_session: str


@immutable
class Identity:
    """Who an identity provider says that somebody is, and of which groups."""

    name: str
    groups: tuple[str, ...]
    are_groups_left_out: bool = False
    """The identity provider doesn't list them, as there are too many (Entra: `_claim_names`)."""


def load_libraries() -> None:
    """Import what the first sign-in needs, which takes tens of milliseconds."""
    import jwt  # noqa: F401, PLC0415 - only where somebody signs in so
    import oauthlib.oauth2  # noqa: F401, PLC0415 - as above


def discovery_address(issuer: str) -> str:
    return f"{issuer.removesuffix('/')}/.well-known/openid-configuration"


def metadata_of(document: bytes, idp: Oidc) -> Metadata:
    """Read what an identity provider says of itself. Raises SignInError."""
    try:
        found = orjson.loads(document)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SignInError(f"{discovery_address(idp.issuer)}: expected JSON")
    if found.get("issuer") != idp.issuer:
        raise _said(idp, "issuer", f"expected {idp.issuer}", found.get("issuer"))
    offered = _texts(found.get("id_token_signing_alg_values_supported", ["RS256"]))
    algorithms = tuple([each for each in ALGORITHMS if each in offered])
    if not algorithms:
        expected = f"expected one of {', '.join(ALGORITHMS)}"
        raise _said(idp, "id_token_signing_alg_values_supported", expected, ", ".join(offered))
    methods = _texts(found.get("token_endpoint_auth_methods_supported", [_BASIC]))
    if _BASIC not in methods and _POST not in methods:
        expected = f"expected {_BASIC} or {_POST}"
        raise _said(idp, "token_endpoint_auth_methods_supported", expected, ", ".join(methods))
    end_session = found.get("end_session_endpoint")
    return Metadata(
        authorization=_address(idp, found, "authorization_endpoint"),
        token=_address(idp, found, "token_endpoint"),
        keys=_address(idp, found, "jwks_uri"),
        algorithms=algorithms,
        is_secret_in_body=_BASIC not in methods,
        says_issuer=found.get("authorization_response_iss_parameter_supported") is True,
        end_session=end_session if isinstance(end_session, str) and is_https(end_session) else "",
    )


def authorization_address(idp: Oidc, metadata: Metadata, flow: SignInFlow, redirect: str) -> str:
    """Return where a browser is sent, for somebody to sign in."""
    client = _client(idp)
    return str(
        client.prepare_request_uri(
            metadata.authorization,
            redirect_uri=redirect,
            scope=["openid", *idp.scopes],
            state=flow.state,
            nonce=flow.nonce,
            code_challenge=client.create_code_challenge(flow.code_verifier, "S256"),
            code_challenge_method="S256",
        )
    )


def state_in(query: str) -> str:
    """Return the state that an answer names, "" if it is none."""
    states = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == "state"]
    return states[0] if len(states) == 1 else ""


def code_in(query: str, idp: Oidc, metadata: Metadata, flow: SignInFlow) -> str:
    """Return the code that an identity provider has answered with. Raises SignInError."""
    from oauthlib.oauth2 import OAuth2Error  # noqa: PLC0415 - only where somebody signs in so
    from oauthlib.oauth2.rfc6749.errors import MismatchingStateError  # noqa: PLC0415 - as above

    given = parse_qsl(query, keep_blank_values=True)
    for name in ("code", "state", "iss", "error"):
        if len([each for each, _ in given if each == name]) > 1:
            raise StateError(f"answer of {idp.host}: {name}: expected it once, got it again")
    issuer = dict(given).get("iss")
    if issuer != idp.issuer and (issuer is not None or metadata.says_issuer):
        got = "none" if issuer is None else shown(issuer)
        raise StateError(f"answer of {idp.host}: iss: expected {idp.issuer}, got {got}")
    try:
        # Only the query counts; oauthlib wants an https address before it.
        answer = _client(idp).parse_request_uri_response(f"https://callback/?{query}", state=flow.state)
    except MismatchingStateError:
        raise StateError(f"answer of {idp.host}: state: it isn't that of this browser") from None
    except OAuth2Error as error:
        raise RefusedByProviderError(f"{idp.host} answers {_named(error.error)}") from None
    return str(answer["code"])


def token_request(
    idp: Oidc, metadata: Metadata, flow: SignInFlow, code: str, redirect: str
) -> tuple[Sequence[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body of the request that exchanges a code."""
    in_body = {"client_secret": idp.secret} if metadata.is_secret_in_body else {}
    body = _client(idp).prepare_request_body(
        code=code,
        redirect_uri=redirect,
        code_verifier=flow.code_verifier,
        include_client_id=metadata.is_secret_in_body,
        **in_body,
    )
    headers = [(b"accept", b"application/json"), (b"content-type", b"application/x-www-form-urlencoded")]
    if not metadata.is_secret_in_body:  # RFC 6749, section 2.3.1: each is form-encoded first
        credentials = f"{quote_plus(idp.client)}:{quote_plus(idp.secret)}"
        headers.append((b"authorization", b"Basic " + b64encode(credentials.encode())))
    return headers, str(body).encode()


def tokens_in(status: int, body: bytes | None, idp: Oidc) -> tuple[str, str]:
    """Return the ID token and the access token of an answer. Raises SignInError."""
    from oauthlib.oauth2 import OAuth2Error  # noqa: PLC0415 - as above

    try:
        found = orjson.loads(body or b"")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        got = f"got {status} with something else"
        raise SignInError(f"token endpoint of {idp.host}: expected a JSON object, {got}")
    try:
        answer = _client(idp).parse_request_body_response(orjson.dumps(found).decode())
    except OAuth2Error as error:
        raise RefusedByProviderError(
            f"token endpoint of {idp.host}: expected tokens, got {status} with {_named(error.error)}"
        ) from None
    except (ValueError, TypeError, AttributeError, Warning):
        raise SignInError(f"token endpoint of {idp.host}: expected tokens, got {status} with others") from None
    token, access_token = answer.get("id_token"), answer.get("access_token")
    if not isinstance(token, str) or not isinstance(access_token, str):
        raise IdTokenError(f"token endpoint of {idp.host}: id_token: expected a string, got none")
    return token, access_token


def key_id_of(token: str) -> str:
    """Return the name of the key by which an ID token says that it is signed. Raises IdTokenError."""
    import jwt  # noqa: PLC0415 - only where somebody signs in

    try:
        found = jwt.get_unverified_header(token).get("kid") if len(token) <= MAX_ID_TOKEN else None
    except (jwt.PyJWTError, ValueError):
        found = None
    if not isinstance(found, str) or not 0 < len(found) <= MAX_KEY_ID:
        raise IdTokenError("id token: kid: expected the name of a key, got none")
    return found


def claims_of(
    token: str,
    keys: Mapping[str, object],
    idp: Oidc,
    metadata: Metadata,
    *,
    flow: SignInFlow,
    access_token: str,
    now: float,
) -> Mapping[str, Any]:
    """Return what an ID token claims, once all of it is known to be good. Raises IdTokenError.

    `keys` are those of the name that it gives, by their types (`kty`).
    """
    claims, algorithm = _verified(token, keys, idp, metadata)
    _check_times(claims, now)
    audiences, party = claims["aud"], claims.get("azp")
    is_shared = isinstance(audiences, list) and len(audiences) > 1
    if party != idp.client and (party is not None or is_shared):
        got = "none" if party is None else shown(party)
        raise IdTokenError(f"id token: azp: expected {idp.client}, got {got}")
    nonce = claims.get("nonce")
    if not isinstance(nonce, str) or not hmac.compare_digest(nonce.encode(errors="replace"), flow.nonce.encode()):
        raise IdTokenError("id token: nonce: it isn't that of this sign-in")
    at_hash = claims.get("at_hash")
    if at_hash is not None and (
        not isinstance(at_hash, str)
        or not hmac.compare_digest(at_hash.encode(errors="replace"), _half_hash(algorithm, access_token))
    ):
        raise IdTokenError("id token: at_hash: it isn't that of the access token")
    return claims


def identity_of(claims: Mapping[str, Any], idp: Oidc) -> Identity:
    """Return who an ID token is about. Raises IdTokenError."""
    name = claims.get(idp.name)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise IdTokenError(f"id token: {idp.name}: expected a person's name")
    # Some identity providers write booleans as text.
    if idp.name == EMAIL and claims.get("email_verified") not in (True, "true"):
        raise IdTokenError("id token: email_verified: it isn't true: whose address it is isn't known")
    if idp.name == EMAIL and idp.issuer == _GOOGLE and not name.endswith("@gmail.com") and "hd" not in claims:
        expected = "expected the domain whose addresses Google manages"
        raise IdTokenError(f"id token: hd: {expected}, got none: the address may be somebody else's by now")
    groups = claims.get(idp.groups) if idp.groups is not None else None
    elsewhere = claims.get("_claim_names")
    return Identity(
        name=name,
        groups=_texts([groups] if isinstance(groups, str) else groups)[:MAX_GROUPS],
        are_groups_left_out=isinstance(elsewhere, dict) and idp.groups in elsewhere,
    )


def _verified(token: str, keys: Mapping[str, object], idp: Oidc, metadata: Metadata) -> tuple[Mapping[str, Any], str]:
    """Return the claims and the algorithm of a token that is signed, by the identity provider, for us."""
    import jwt  # noqa: PLC0415 - as above

    needed = ["iss", "sub", "aud", "exp", "iat"]
    reader = jwt.PyJWT(options={"enforce_minimum_key_length": True})
    try:
        key = keys.get(type_of_key(jwt.get_unverified_header(token).get("alg")))
        found = reader.decode_complete(
            token,
            cast("Any", key),  # of the library's types, as it has read it; with None, no algorithm of ours verifies
            algorithms=list(metadata.algorithms),
            audience=idp.client,
            issuer=idp.issuer,
            options={"require": needed, "verify_exp": False, "verify_iat": False, "verify_nbf": False},
        )
    except jwt.InvalidAlgorithmError:
        expected = f"expected {' or '.join(metadata.algorithms)}"
        raise IdTokenError(f"id token: alg: {expected}") from None
    except jwt.MissingRequiredClaimError as error:
        raise IdTokenError(f"id token: {error.claim}: expected it, got none") from None
    except jwt.InvalidIssuerError:
        raise IdTokenError(f"id token: iss: expected {idp.issuer}") from None
    except jwt.InvalidAudienceError:
        raise IdTokenError(f"id token: aud: expected {idp.client}") from None
    except jwt.InvalidSignatureError:
        raise IdTokenError("id token: signature: it isn't by a key of the identity provider") from None
    except (jwt.PyJWTError, ValueError, TypeError):
        raise IdTokenError("id token: expected a signed JSON Web Token") from None
    return found["payload"], str(found["header"]["alg"])


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    times = {name: claims[name] for name in ("exp", "iat", "nbf") if claims.get(name) is not None}
    for name, value in times.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise IdTokenError(f"id token: {name}: expected a time in Unix seconds")
    if now >= times["exp"] + SKEW:
        ago = now - times["exp"]
        raise IdTokenError(f"id token: exp: expected a token that is good, got one that ended {ago:.0f} s ago")
    if now >= times["iat"] + MAX_TOKEN_AGE:
        raise IdTokenError(f"id token: iat: expected a new token, got one of {now - times['iat']:.0f} s ago")
    for name in ("iat", "nbf"):
        if times.get(name, now) > now + SKEW:
            ahead = times[name] - now
            got = f"got one {ahead:.0f} s ahead: check the clocks"
            raise IdTokenError(f"id token: {name}: expected a time until now, {got}")


def _half_hash(algorithm: str, access_token: str) -> bytes:
    """Return the left half of a token's hash, as `at_hash` has it (OpenID Connect Core 1.0, section 3.1.3.6)."""
    import jwt  # noqa: PLC0415 - as above

    digest = jwt.get_algorithm_by_name(algorithm).compute_hash_digest(access_token.encode("ascii", "replace"))
    return urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=")


def _client(idp: Oidc) -> "WebApplicationClient":
    from oauthlib.oauth2 import WebApplicationClient  # noqa: PLC0415 - as above

    return WebApplicationClient(idp.client)


def _said(idp: Oidc, field: str, expected: str, got: object) -> SignInError:
    return SignInError(f"{discovery_address(idp.issuer)}: {field}: {expected}, got {shown(got)}")


def _address(idp: Oidc, found: Mapping[str, Any], field: str) -> str:
    value = found.get(field)
    if not isinstance(value, str) or not is_https(value) or "#" in value:
        raise _said(idp, field, "expected an https address", value)
    return value


def _texts(value: object) -> tuple[str, ...]:
    return tuple([each for each in value if isinstance(each, str)]) if isinstance(value, list) else ()


def _named(error: object) -> str:
    return f"the error {error}" if isinstance(error, str) and error in _ERRORS else "another error"
