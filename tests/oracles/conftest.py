"""The vendors' libraries aren't among what `make test` installs: `make oracles` does, and sets GATEWAY_ORACLES."""

import os
import random
from collections.abc import Generator

import pytest

_NEED_LIBRARIES = ["test_request_presets.py", "test_oracles.py", "test_structured_fields.py", "test_fixtures.py"]
collect_ignore = [] if "GATEWAY_ORACLES" in os.environ else _NEED_LIBRARIES
SEED = int(os.environ.get("GATEWAY_TEST_SEED") or random.SystemRandom().randrange(10**9))


def pytest_report_header() -> str:
    return f"oracles: GATEWAY_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"oracles: GATEWAY_TEST_SEED={SEED}")
        raise
