"""Where the seeds of a test run begin: drawn from the commit, so that no range is learnt by heart, and told."""

import os
import subprocess
from functools import cache
from pathlib import Path

VARIABLE = "GATEWAY_TEST_SEED"
SPACING = 1000  # Seeds that a run may use; two commits rarely share one.


@cache
def drawn() -> int:
    """Return the first seed: that of GATEWAY_TEST_SEED, or one that the commit decides; 0 without a repository."""
    if given := os.environ.get(VARIABLE):
        return int(given)
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            check=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(asked.stdout[:8], 16) * SPACING
