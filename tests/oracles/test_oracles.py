"""Our verification and the vendors' libraries agree, on requests that are drawn anew in each run."""

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest

from gateway.model import Headers
from gateway.verify.schemes import build_verifier
from tests.oracles.conftest import SEED
from tests.oracles.oracle import Signed
from tests.verify.signed_requests import reason
from tests.verify.test_vectors import changes
from tests.verify.vectors import Vector

ROUNDS = 50
NAMES = sorted(path.stem for path in (Path(__file__).parent / "vendors").glob("[!_]*.py"))


@pytest.fixture(params=NAMES, scope="module")
def vendor(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"tests.oracles.vendors.{request.param}")


def draws(vendor: ModuleType) -> list[random.Random]:
    return [random.Random(f"{SEED}/{vendor.__name__}/{n}") for n in range(ROUNDS)]


def test_what_the_library_signs_is_accepted_and_no_change_of_it(vendor: ModuleType) -> None:
    if not hasattr(vendor, "sign"):
        pytest.skip("it only verifies")
    for draw in draws(vendor):
        vector = _vector(vendor, vendor.sign(draw))
        verifier = vector.verifier()
        verifier.verify(vector.request, now=vector.now, keys=vector.keys)
        for changed in draw.sample(several := list(changes(vector)), min(20, len(several))):
            assert reason(verifier, changed, now=vector.now, keys=vector.keys) != "accepted"


def test_the_library_accepts_what_we_sign_and_no_change_of_it(vendor: ModuleType) -> None:
    if not hasattr(vendor, "unsigned"):
        pytest.skip("it only signs, or only its key does")
    for draw in draws(vendor):
        unsigned: Signed = vendor.unsigned(draw)
        vector = _vector(vendor, unsigned)
        pairs = vector.verifier().sign(
            unsigned.body, now=unsigned.now, id=f"msg_{draw.random()}", type="t", headers=dict(unsigned.headers),
            path=unsigned.path, query=unsigned.query,
        )  # fmt: skip
        request = unsigned.request._replace(headers=tuple((n.encode(), v.encode()) for n, v in pairs))
        assert vendor.accepts(request, unsigned)
        several = list(changes(_vector(vendor, unsigned, request.headers)))
        for changed in draw.sample(several, min(20, len(several))):
            ours = reason(vector.verifier(), changed, now=unsigned.now) == "accepted"
            assert ours == vendor.accepts(changed, unsigned)


def test_we_agree_on_every_change_of_what_the_vendors_key_has_signed(vendor: ModuleType) -> None:
    if not hasattr(vendor, "sign") or not hasattr(vendor, "accepts"):
        pytest.skip("it only signs, or only verifies")
    for draw in draws(vendor):
        signed = vendor.sign(draw)
        vector = _vector(vendor, signed)
        assert vendor.accepts(vector.request, signed)
        several = list(changes(vector))
        for changed in draw.sample(several, min(20, len(several))):
            ours = reason(vector.verifier(), changed, now=signed.now, keys=vector.keys) == "accepted"
            assert ours == vendor.accepts(changed, signed)


def _vector(vendor: ModuleType, signed: Signed, headers: Headers | None = None) -> Vector:
    scheme = vendor.__name__.rpartition(".")[2].replace("_", "-")
    request = signed.request if headers is None else signed.request._replace(headers=headers)
    build_verifier({"scheme": scheme, **signed.config}, public_url=signed.public_url)
    return Vector(
        scheme=scheme, made_by=vendor.PACKAGE, now=signed.now, config=signed.config, request=request,
        public_url=signed.public_url, covers=signed.covers, documents=signed.documents,
    )  # fmt: skip
