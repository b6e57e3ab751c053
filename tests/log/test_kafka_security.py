"""A log on Kafka by TLS and SASL: each mechanism of a real broker, and the errors when it refuses us."""

import asyncio
import base64
import json
import os
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from dev.kafka import Broker
from gateway import kafka_credentials
from gateway.cli import main
from gateway.commands.base import SETTINGS
from gateway.kafka_credentials import kafka_certificate_expiries
from gateway.log.base import Assignment, Commit, Log, Partition, TopicSpec
from gateway.log.kafka import connection
from gateway.model import LogUnavailableError, UsageError
from gateway.open_log import open_log
from gateway.settings import KafkaSecurity, SaslMechanism, SecurityProtocol, from_sources
from tests.acceptance.conftest import RULES
from tests.certificates import Authority
from tests.conftest import start_broker
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post
from tests.sink import Answer, Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 5, group="kafka security")

PATIENCE = 20.0
PASSWORD = "correct horse"
ISSUER = "https://login.example/"
MODULES = "org.apache.kafka.common.security"


class Issuer:
    """Signs tokens as an identity provider does (RFC 7519), for brokers that know its key."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def keys(self) -> str:
        """Its public key, as brokers fetch it (RFC 7517)."""
        numbers = self._key.public_key().public_numbers()
        key = {"kty": "RSA", "kid": "1", "alg": "RS256", "use": "sig"}
        return json.dumps({"keys": [{**key, "n": _number(numbers.n), "e": _number(numbers.e)}]})

    def token(self, *, life: float = 3600.0) -> str:
        now = time.time()
        claims = {"iss": ISSUER, "aud": "kafka", "sub": "gateway", "iat": int(now), "exp": now + life}
        signed = ".".join([_base64(json.dumps(part).encode()) for part in ({"alg": "RS256", "kid": "1"}, claims)])
        return f"{signed}.{_base64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def answer(self, *, life: float = 3600.0) -> Callable[[Request], Answer]:
        """Answer as a token endpoint."""

        def answer(_: Request) -> Answer:
            said = {"access_token": self.token(life=life), "token_type": "Bearer", "expires_in": life}
            return Answer(body=json.dumps(said).encode())

        return answer


def _base64(octets: bytes) -> str:
    return urlsafe_b64encode(octets).rstrip(b"=").decode()


def _number(number: int) -> str:
    return _base64(number.to_bytes((number.bit_length() + 7) // 8, "big"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """A broker with a listener for each way in; see `secured`. The files are what an operator mounts."""

    broker: Broker
    issuer: Issuer
    ca: Path
    other_ca: Path
    client: Path
    stranger: Path
    password: Path
    wrong: Path

    def environ(self, listener: str, protocol: str, **settings: object) -> dict[str, str]:
        """Return the variables by which a gateway reaches a listener."""
        fields = {"KAFKA_SECURITY_PROTOCOL": protocol, "LOG": f"kafka://127.0.0.1:{self.broker.port_of(listener)}"}
        if protocol.endswith("SSL"):
            fields["KAFKA_SSL_CA"] = str(self.ca)
        fields |= {f"KAFKA_{name.upper()}": str(value) for name, value in settings.items()}
        return {f"GATEWAY_{name}": value for name, value in fields.items()}

    def by_password(self, mechanism: str, **settings: object) -> dict[str, str]:
        given = {"sasl_username": "gateway", "sasl_password_file": self.password, **settings}
        return self.environ("SASL", "SASL_SSL", sasl_mechanism=mechanism, **given)

    def by_token(self, url: str) -> dict[str, str]:
        return self.by_password("OAUTHBEARER", oauth_token_url=url, oauth_scope="hooks", oauth_audience="kafka")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority, other, issuer = Authority(), Authority("Another CA"), Issuer()

    def file(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(text)
        return path

    def identity(name: str, *names: str, of: Authority = authority, life: timedelta = timedelta(days=1)) -> Path:
        return file(f"{name}.pem", "".join(of.issue(*names, life=life)))

    ca, keys = file("ca.pem", authority.pem), file("keys.json", issuer.keys).as_uri()
    good = identity("broker", "127.0.0.1")
    shown = {
        "tls": good,
        "mutual": good,
        "sasl": good,
        "expired": identity("expired", "127.0.0.1", life=timedelta(hours=-1)),
        "elsewhere": identity("elsewhere", "kafka.example"),
    }
    settings = {
        **{f"listener.name.{name}.ssl.keystore.location": str(path) for name, path in shown.items()},
        **{f"listener.name.{name}.ssl.keystore.type": "PEM" for name in shown},
        "listener.name.mutual.ssl.truststore.location": str(ca),
        "listener.name.mutual.ssl.truststore.type": "PEM",
        "listener.name.mutual.ssl.client.auth": "required",
        "listener.name.sasl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        "listener.name.sasl.plain.sasl.jaas.config": (
            f'{MODULES}.plain.PlainLoginModule required user_gateway="{PASSWORD}";'
        ),
        "listener.name.sasl.oauthbearer.sasl.jaas.config": f"{MODULES}.oauthbearer.OAuthBearerLoginModule required;",
        "listener.name.sasl.oauthbearer.sasl.server.callback.handler.class": (
            f"{MODULES}.oauthbearer.OAuthBearerValidatorCallbackHandler"
        ),
        "listener.name.sasl.oauthbearer.sasl.oauthbearer.jwks.endpoint.url": keys,
        "listener.name.sasl.oauthbearer.sasl.oauthbearer.expected.audience": "kafka",
        "listener.name.sasl.oauthbearer.sasl.oauthbearer.expected.issuer": ISSUER,
        "listener.name.clear.sasl.enabled.mechanisms": "SCRAM-SHA-256",
        "connection.failed.authentication.delay.ms": "0",
    }
    for listener, digest in (("sasl", "256"), ("sasl", "512"), ("clear", "256")):
        login = f"{MODULES}.scram.ScramLoginModule required;"
        settings[f"listener.name.{listener}.scram-sha-{digest}.sasl.jaas.config"] = login
    broker = start_broker(
        settings,
        jvm=(f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={keys}",),
        listeners={
            "TLS": "SSL",
            "MUTUAL": "SSL",
            "EXPIRED": "SSL",
            "ELSEWHERE": "SSL",
            "SASL": "SASL_SSL",
            "CLEAR": "SASL_PLAINTEXT",
        },
        users={"gateway": PASSWORD},
    )
    yield Secured(
        broker=broker,
        issuer=issuer,
        ca=ca,
        other_ca=file("other.pem", other.pem),
        client=identity("client", "gateway"),
        stranger=identity("stranger", "gateway", of=other),
        password=file("password", PASSWORD + "\n"),
        wrong=file("wrong", "battery staple"),
    )
    broker.stop()


@asynccontextmanager
async def opened(environ: Mapping[str, str]) -> AsyncIterator[Log]:
    log = await open_log(from_sources({}, environ), owner=False)
    try:
        yield log
    finally:
        await log.close()


class Owner:
    """A listener that counts how often partitions were assigned."""

    def __init__(self) -> None:
        self.assignments = 0

    def assigned(self, assignments: object, without_position: object = ()) -> None:  # noqa: ARG002 - the listener's signature
        assert assignments
        self.assignments += 1

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: object) -> Mapping[Partition, Commit]:
        assert partitions
        return {}


async def use(log: Log) -> None:
    """Do with a log whatever has a connection of its own: ask, append, scan, and read as a member of a group."""
    topic = f"t{uuid4().hex}"
    await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
    await log.append(topic, key=b"k", value=b"v", headers=[])
    assert [record.value async for batch in log.scan(Partition(topic, 0), 0, 1) for record in batch] == [b"v"]
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
    async with asyncio.timeout(PATIENCE):
        while not (batches := await consumer.fetch(timeout=0.5)):
            pass
    assert [record.value for batch in batches for record in batch.records] == [b"v"]
    await consumer.close()


# What lets us in


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_user_and_password_are_accepted(secured: Secured, mechanism: str) -> None:
    async with opened(secured.by_password(mechanism)) as log:
        await use(log)


async def test_a_password_is_proved_in_the_clear_without_being_sent(secured: Secured) -> None:
    given = {"sasl_mechanism": "SCRAM-SHA-256", "sasl_username": "gateway", "sasl_password_file": secured.password}
    environ, seen = secured.environ("CLEAR", "SASL_PLAINTEXT", **given), bytearray()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            seen.extend(data)
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, beyond = await asyncio.open_connection("127.0.0.1", secured.broker.port_of("CLEAR"))
        await asyncio.gather(copy(reader, beyond), copy(back, writer), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as between:
        # The first connection goes by it; the others to where the broker says that it is.
        port = between.sockets[0].getsockname()[1]
        async with opened({**environ, "GATEWAY_LOG": f"kafka://127.0.0.1:{port}"}) as log:
            await use(log)
    assert b"n=gateway,r=" in seen, "the login went by here"
    assert b",p=" in seen
    assert PASSWORD.encode() not in seen
    assert base64.b64encode(PASSWORD.encode()) not in seen


def test_no_setting_takes_a_password() -> None:
    """Arguments and variables are shown by `ps` and in manifests; a file has permissions of its own."""
    named = [name for name in SETTINGS if re.search("password|secret|token", name)]
    assert named == ["kafka_sasl_password_file", "kafka_oauth_token_url"]
    with pytest.raises(UsageError) as caught:
        from_sources({"log": f"kafka://gateway:{PASSWORD}@kafka:9092"}, {})
    assert "expected an address without credentials" in str(caught.value)
    assert PASSWORD not in str(caught.value)


async def test_an_authority_of_ones_own_is_trusted(secured: Secured) -> None:
    async with opened(secured.environ("TLS", "SSL")) as log:
        await use(log)


@pytest.mark.parametrize("is_one_file", [True, False])
async def test_a_certificate_is_shown_to_a_broker_that_asks_for_one(secured: Secured, *, is_one_file: bool) -> None:
    key = {} if is_one_file else {"ssl_key": secured.client}
    async with opened(secured.environ("MUTUAL", "SSL", ssl_certificate=secured.client, **key)) as log:
        await use(log)


async def test_a_token_is_fetched_and_accepted(secured: Secured) -> None:
    async with Sink(secured.issuer.answer()) as endpoint:
        async with opened(secured.by_token(endpoint.url)) as log:
            await use(log)
        (request,) = endpoint.requests
    assert request.body == b"grant_type=client_credentials&scope=hooks&audience=kafka"


async def test_connections_outlive_their_expired_tokens(secured: Secured) -> None:
    """A broker closes a connection whose token has ended: with a new one nothing fails, and no member is evicted."""
    owner, appended = Owner(), 0
    async with Sink(secured.issuer.answer(life=1.5)) as endpoint, opened(secured.by_token(endpoint.url)) as log:
        topic = f"t{uuid4().hex}"
        await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
        consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
        read = 0
        async with asyncio.timeout(PATIENCE):
            while len(endpoint.requests) < 3 or read < appended:
                if len(endpoint.requests) < 3:
                    await log.append(topic, key=b"k", value=b"%d" % appended, headers=[])
                    appended += 1
                read += sum([len(batch.records) for batch in await consumer.fetch(timeout=0.1)])
        assert read == appended > 4
        assert owner.assignments == 1
        await consumer.close()


async def test_a_gateway_takes_an_event_in_and_delivers_it_by_way_of_a_secured_broker(
    secured: Secured, tmp_path: Path
) -> None:
    async with Sink(secured.issuer.answer()) as endpoint, Sink(path="/first") as first, Sink(path="/second") as second:
        environ = secured.by_token(endpoint.url)
        rules, prefix = RULES.format(first=first.url, second=second.url), f"t{uuid4().hex[:12]}."
        async with GatewayProcess(
            tmp_path, rules=rules, log=environ["GATEWAY_LOG"], prefix=prefix, environ=environ
        ) as gateway:
            status, _ = await post(gateway.port, signed_post(b"{}", delivery="1"))
            assert status == 202
            await first.received(1, timeout=PATIENCE)
            assert 'gateway_certificate_expiry_timestamp_seconds{name="kafka/ca"}' in await gateway.scrape()
            assert await gateway.stop() == 0


# What doesn't


def refusals(secured: Secured) -> Mapping[str, tuple[dict[str, str], str]]:
    """Return settings that no broker accepts, each with its error."""
    plain = secured.environ("PLAINTEXT", "PLAINTEXT")
    return {
        "a wrong password": (
            secured.by_password("PLAIN", sasl_password_file=secured.wrong),
            "PLAIN authentication failed for user 'gateway'",
        ),
        "a wrong password, never sent": (
            secured.by_password("SCRAM-SHA-512", sasl_password_file=secured.wrong),
            "SCRAM-SHA-512 authentication failed for user 'gateway'",
        ),
        "a user that isn't there": (
            secured.by_password("SCRAM-SHA-256", sasl_username="nobody"),
            "SCRAM-SHA-256 authentication failed for user 'nobody'",
        ),
        "a mechanism that the broker doesn't offer": (
            secured.environ(
                "CLEAR",
                "SASL_PLAINTEXT",
                sasl_mechanism="SCRAM-SHA-512",
                sasl_username="gateway",
                sasl_password_file=secured.password,
            ),
            "expected a broker that supports SCRAM-SHA-512, got one that doesn't",
        ),
        "an authority that isn't trusted": (
            {**secured.environ("TLS", "SSL"), "GATEWAY_KAFKA_SSL_CA": str(secured.other_ca)},
            "expected a certificate that can be trusted, got: unable to get local issuer certificate",
        ),
        "a certificate that has expired": (
            secured.environ("EXPIRED", "SSL"),
            "expected a certificate that can be trusted, got: certificate has expired",
        ),
        "a certificate for another host": (
            secured.environ("ELSEWHERE", "SSL"),
            "got: ip address mismatch, certificate is not valid for '127.0.0.1'",
        ),
        "no certificate of ours": (
            secured.environ("MUTUAL", "SSL"),
            "expected our certificate to be accepted, or none to be asked for, got the TLS alert: ",
        ),
        "a certificate of ours that a stranger issued": (
            secured.environ("MUTUAL", "SSL", ssl_certificate=secured.stranger),
            "expected our certificate to be accepted, or none to be asked for, got the TLS alert: ",
        ),
        "no TLS where it is expected": (
            {**plain, "GATEWAY_LOG": secured.environ("TLS", "SSL")["GATEWAY_LOG"]},
            "expected a response, got the end of the connection (is PLAINTEXT what it speaks?)",
        ),
        "no SASL where it is expected": (
            {**plain, "GATEWAY_LOG": secured.environ("CLEAR", "PLAINTEXT")["GATEWAY_LOG"]},
            "expected a response, got the end of the connection (is PLAINTEXT what it speaks?)",
        ),
        "TLS where it isn't spoken": (
            {**secured.environ("TLS", "SSL"), "GATEWAY_LOG": plain["GATEWAY_LOG"]},
            "expected ",
        ),
        "SASL where nobody asks for it": (
            {**secured.by_password("PLAIN"), "GATEWAY_LOG": secured.environ("TLS", "SSL")["GATEWAY_LOG"]},
            "expected a broker that supports PLAIN, got one without SASL on this port",
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "a wrong password",
        "a wrong password, never sent",
        "a user that isn't there",
        "a mechanism that the broker doesn't offer",
        "an authority that isn't trusted",
        "a certificate that has expired",
        "a certificate for another host",
        "no certificate of ours",
        "a certificate of ours that a stranger issued",
        "no TLS where it is expected",
        "no SASL where it is expected",
        "TLS where it isn't spoken",
        "SASL where nobody asks for it",
    ],
)
def test_a_refused_login_is_explained_in_one_line(
    secured: Secured, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environ, told = refusals(secured)[name]
    for variable in [variable for variable in os.environ if variable.startswith("GATEWAY_")]:
        monkeypatch.delenv(variable)
    for variable, text in environ.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert main(["dead", "list"]) == 1
    took = time.monotonic() - started
    output, problem = capsys.readouterr()
    note, line = problem.splitlines()
    assert note.startswith("routes.yaml can't be read"), "and so nothing is hidden"
    assert told in line
    assert environ["GATEWAY_LOG"] in line
    assert (output, took < 6) == ("", True), took
    assert PASSWORD not in line
    assert "battery" not in line


async def test_a_refusing_broker_says_more_than_one_that_is_down(secured: Secured) -> None:
    environ = secured.by_password("PLAIN", sasl_password_file=secured.wrong)
    environ["GATEWAY_LOG"] = environ["GATEWAY_LOG"].replace("kafka://", "kafka://127.0.0.1:1,")
    with pytest.raises(LogUnavailableError, match="PLAIN authentication failed"):
        async with opened(environ):
            pass


async def test_a_token_endpoint_that_refuses_us_is_reported(secured: Secured) -> None:
    async with Sink(Answer(status=401, body=b'{"error": "invalid_client", "hint": "s3cret"}')) as endpoint:
        with pytest.raises(LogUnavailableError) as caught:
            async with opened(secured.by_token(endpoint.url)):
                pass
    told = "token endpoint: 127.0.0.1: expected a token, got 401 Unauthorized (invalid_client)"
    assert str(caught.value).endswith(f": expected a token, got none: {told}")


async def test_a_token_that_the_broker_does_not_believe_is_reported(secured: Secured) -> None:
    async with Sink(Issuer().answer()) as endpoint:
        with pytest.raises(LogUnavailableError, match="OAUTHBEARER authentication failed with the token"):
            async with opened(secured.by_token(endpoint.url)):
                pass


@pytest.mark.parametrize("life", [1.0, 86400.0])
async def test_a_refusal_at_run_time_fails_requests_and_heals_by_itself(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, life: float
) -> None:
    """As an operator would see who changes a password too early: nothing hangs, and nothing has to be started again.

    However long the token would hold that the broker refuses.
    """
    monkeypatch.setattr(kafka_credentials, "TOKEN_AGE", 1.0)  # so that the test needn't wait for a minute
    answers = secured.issuer.answer(life=1.5)

    def answer(request: Request) -> Answer:
        return answers(request)

    async with Sink(answer) as endpoint, opened(secured.by_token(endpoint.url)) as log:
        topic = f"t{uuid4().hex}"
        await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
        answers, asked = Issuer().answer(life=life), len(endpoint.requests)
        async with asyncio.timeout(PATIENCE):
            while await takes(log, topic) or len(endpoint.requests) == asked:
                pass
        assert not any([await answers_to(log) for _ in range(50)]), "expected it to be told by every question"
        answers = secured.issuer.answer()
        async with asyncio.timeout(PATIENCE):
            while not await takes(log, topic):
                pass


async def answers_to(log: Log) -> bool:
    try:
        await log.ping()
    except LogUnavailableError:
        return False
    return True


async def takes(log: Log, topic: str) -> bool:
    try:
        await log.append(topic, key=b"k", value=b"v", headers=[])
    except LogUnavailableError:
        return False
    return True


# What is given


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"SECURITY_PROTOCOL": "TLS"}, "expected PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL, got 'TLS'"),
        ({"SASL_USERNAME": "u"}, "expected it with the security protocol SASL_SSL or SASL_PLAINTEXT, got PLAINTEXT"),
        ({"SSL_CA": "/ca.pem"}, "expected it with the security protocol SSL or SASL_SSL, got PLAINTEXT"),
        ({"SECURITY_PROTOCOL": "SASL_SSL"}, "GATEWAY_KAFKA_SASL_MECHANISM: expected it with SASL_SSL, got none"),
        (
            {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "PLAIN", "SASL_USERNAME": "u"},
            "GATEWAY_KAFKA_SASL_PASSWORD_FILE: expected it with PLAIN, got none",
        ),
        (
            {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER"},
            "GATEWAY_KAFKA_OAUTH_TOKEN_URL: expected it with OAUTHBEARER, got none",
        ),
        ({"OAUTH_TOKEN_URL": "https://login.example/"}, "expected it with the mechanism OAUTHBEARER, got none"),
        ({"OAUTH_TOKEN_URL": "https://u:hunter2@login.example/"}, "expected an http or https URL without user"),
        (
            {"SECURITY_PROTOCOL": "SSL", "SSL_KEY": "/key.pem"},
            "GATEWAY_KAFKA_SSL_CERTIFICATE: expected it with GATEWAY_KAFKA_SSL_KEY, got none",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_reported(settings: dict[str, str], told: str) -> None:
    environ = {"GATEWAY_LOG": "kafka://a:9092"} | {f"GATEWAY_KAFKA_{name}": text for name, text in settings.items()}
    with pytest.raises(UsageError) as caught:
        from_sources({}, environ)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_each_setting_is_a_flag_and_a_variable() -> None:
    flags = {
        "log": "kafka://a:9092",
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": "OAUTHBEARER",
        "kafka_sasl_username": "gateway",
        "kafka_sasl_password_file": "/run/secrets/kafka",
        "kafka_oauth_token_url": "https://login.example/token?tenant=1",
        "kafka_oauth_scope": "one two",
        "kafka_oauth_audience": "kafka",
        "kafka_ssl_ca": "/ca.pem",
        "kafka_ssl_certificate": "/client.pem",
        "kafka_ssl_key": "/client.key",
    }
    expected = KafkaSecurity(
        protocol=SecurityProtocol.SASL_SSL,
        mechanism=SaslMechanism.OAUTHBEARER,
        username="gateway",
        password_file=Path("/run/secrets/kafka"),
        token_url="https://login.example/token?tenant=1",
        scope="one two",
        audience="kafka",
        ca=Path("/ca.pem"),
        certificate=Path("/client.pem"),
        key=Path("/client.key"),
    )
    assert from_sources(flags, {}).kafka == expected
    assert from_sources({}, {f"GATEWAY_{name.upper()}": text for name, text in flags.items()}).kafka == expected


def test_kafka_settings_do_not_affect_the_embedded_log() -> None:
    assert from_sources({}, {"GATEWAY_KAFKA_SASL_USERNAME": "u"}).kafka.username == "u"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "sasl_password_file",
            None,
            "--kafka-sasl-password-file: expected a file, got {file}: no such file or directory",
        ),
        ("sasl_password_file", "\n", "--kafka-sasl-password-file: expected a secret in "),
        ("ssl_ca", "not PEM", "--kafka-ssl-ca: expected a certificate in PEM"),
        ("ssl_certificate", "not PEM", "--kafka-ssl-certificate: expected a certificate in PEM"),
    ],
)
async def test_an_unusable_file_is_reported_without_its_content(
    tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    password, file = tmp_path / "password", tmp_path / "file"
    password.write_text(PASSWORD)
    if content is not None:
        file.write_text(content)
    settings: dict[str, Any] = {"sasl_mechanism": "PLAIN", "sasl_username": "u", "sasl_password_file": password}
    fields = {"security_protocol": "SASL_SSL", **settings, name: file}
    environ = {f"GATEWAY_KAFKA_{field.upper()}": str(value) for field, value in fields.items()}
    with pytest.raises(UsageError) as caught:
        async with opened({"GATEWAY_LOG": "kafka://127.0.0.1:1", **environ}):
            pass
    assert str(caught.value).startswith(told.format(file=file))
    assert "not PEM" not in str(caught.value)


def test_it_is_reported_when_certificates_expire(tmp_path: Path) -> None:
    authority, life = Authority(), timedelta(days=3)
    (tmp_path / "ca.pem").write_text(authority.pem)
    (tmp_path / "client.pem").write_text("".join(authority.issue("gateway", life=life)))
    settings = {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CA": "ca.pem", "KAFKA_SSL_CERTIFICATE": "client.pem"}
    environ = {f"GATEWAY_{name}": str(tmp_path / text) if "pem" in text else text for name, text in settings.items()}
    ends = kafka_certificate_expiries(from_sources({}, environ).kafka)
    assert ends == pytest.approx(
        {"ca": time.time() + timedelta(days=1).total_seconds(), "certificate": time.time() + life.total_seconds()},
        abs=60,
    )


def test_a_password_is_not_in_the_representation() -> None:
    assert "hunter2" not in repr(connection.Security(mechanism="PLAIN", username="u", password="hunter2"))
