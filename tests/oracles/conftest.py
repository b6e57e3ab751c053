"""The vendors' libraries aren't among what `make test` installs: `make oracles` does, and sets GATEWAY_ORACLES."""

import os
import random

collect_ignore = [] if "GATEWAY_ORACLES" in os.environ else ["test_oracles.py", "test_structured_fields.py"]
SEED = int(os.environ.get("GATEWAY_TEST_SEED") or random.SystemRandom().randrange(10**9))


def pytest_report_header() -> str:
    return f"oracles: GATEWAY_TEST_SEED={SEED}"
