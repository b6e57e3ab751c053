"""Reads the access file, and the secrets that it names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gateway.access.access_file import MAX_BYTES, AccessFileError, AccessList, read_access
from gateway.access.sign_in_lines import Oidc, SignInAddress, checked_key, checked_secret, filled_in, path_in
from gateway.rules.references import content_of
from gateway.rules.yaml_document import reason_of


def read_file(file: Path, environ: Mapping[str, str]) -> AccessList:
    """Read a file. Blocks; raises AccessFileError with all problems, without a word of a secret."""
    found = read_access(_text(file), str(file))
    secrets = _Secrets(file, environ)
    sign_in, oidc = secrets.of_address(found.sign_in), secrets.of_provider(found.oidc)
    if secrets.problems:
        raise AccessFileError("\n".join(secrets.problems))
    return replace(found, sign_in=sign_in, oidc=oidc)


def files_of(file: Path) -> tuple[Path, ...]:
    """Return a file and those whose content it names: a change of any of them is a change of it. Blocks."""
    try:
        found = read_access(_text(file), str(file))
    except AccessFileError:
        return (file,)
    references = [found.sign_in.key if found.sign_in else "", found.oidc.secret if found.oidc else ""]
    return (file, *[file.parent / path for each in references if (path := path_in(each))])


class _Secrets:
    """The values of references; those of files from the folder of the file that names them."""

    def __init__(self, file: Path, environ: Mapping[str, str]) -> None:
        self._file = file
        self._environ = environ
        self.problems: list[str] = []

    def of_address(self, address: SignInAddress | None) -> SignInAddress | None:
        if address is None or not address.key:
            return address
        try:
            return replace(address, key=checked_key(self._value(address.key)))
        except ValueError as error:
            self.problems.append(f"{self._file}:{address.line}: key: {error}")
            return address

    def of_provider(self, provider: Oidc | None) -> Oidc | None:
        if provider is None:
            return None
        try:
            return replace(provider, secret=checked_secret(self._value(provider.secret)))
        except ValueError as error:
            self.problems.append(f"{self._file}:{provider.line}: secret: {error}")
            return provider

    def _value(self, reference: str) -> str:
        return filled_in(reference, self._content, self._environ)

    def _content(self, path: str) -> str:
        return content_of(self._file.parent / path)


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise AccessFileError(f"{file}: expected at most {MAX_BYTES >> 20} MiB")
        return content.decode()
    except OSError as error:
        raise AccessFileError(f"{file}: expected an access file, got: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise AccessFileError(f"{file}: expected UTF-8, got other bytes") from None
