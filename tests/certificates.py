"""Certificates for tests: an authority that issues them, as PEM."""

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


class Authority:
    """Signs certificates. `pem` is its own, self-signed; `key`, in PEM, is another certificate's."""

    def __init__(
        self,
        name: str = "Test CA",
        *,
        life: timedelta = timedelta(days=1),
        issuer: "Authority | None" = None,
        key: str | None = None,
    ) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        if key is not None:
            given = serialization.load_pem_private_key(key.encode(), None)
            assert isinstance(given, ec.EllipticCurvePrivateKey)
            self._key = given
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = (issuer or self)._sign(self._name, self._key.public_key(), is_authority=True, life=life)

    def issue(
        self,
        *names: str,
        passphrase: bytes | None = None,
        life: timedelta = timedelta(days=1),
        subject: str | None = None,
        purpose: x509.ObjectIdentifier | None = None,
        alternatives: bytes | None = None,
        is_rsa: bool = False,
    ) -> tuple[str, str]:
        """Return a certificate for names and addresses, and its private key. Its life may have ended.

        `subject` is as in RFC 4514; without it, it is the first name. `purpose` is an extended key usage.
        `alternatives` are the alternative names as they are, in DER.
        """
        key = rsa.generate_private_key(65537, 2048) if is_rsa else ec.generate_private_key(ec.SECP256R1())
        common = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] if names else "nobody")])
        whom = common if subject is None else x509.Name.from_rfc4514_string(subject)
        locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked).decode()
        return self._sign(whom, key.public_key(), names, life=life, purpose=purpose, alternatives=alternatives), private

    def server(
        self, folder: Path, *names: str, clients: "Authority | None" = None, least: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        """Make the context of a server; with `clients` it takes only those with a certificate of that authority."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.file(folder, *names))
        if least is not None:
            context.minimum_version = context.maximum_version = least
        if clients is not None:
            context.load_verify_locations(cadata=clients.pem)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def file(self, folder: Path, *names: str) -> Path:
        """Write a certificate and its key into one file, for `load_cert_chain`."""
        path = folder / f"{names[0]}.pem"
        path.write_text("".join(self.issue(*names)))
        return path

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        names: tuple[str, ...] = (),
        *,
        is_authority: bool = False,
        life: timedelta = timedelta(days=1),
        purpose: x509.ObjectIdentifier | None = None,
        alternatives: bytes | None = None,
    ) -> str:
        now = datetime.now(UTC)
        ours = self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + life)
            # What VERIFY_X509_STRICT asks for, the default since Python 3.13.
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ours), critical=False)
        )
        if is_authority:
            builder = builder.add_extension(_SIGNING, critical=True)
        elif alternatives is not None:
            raw = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, alternatives)
            builder = builder.add_extension(raw, critical=False)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, names))), critical=False)
        if purpose is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(PEM).decode()


def _alternative(name: str) -> x509.GeneralName:
    if ":/" in name:
        return x509.UniformResourceIdentifier(name)
    if "@" in name:
        return x509.RFC822Name(name)
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


_SIGNING = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)
