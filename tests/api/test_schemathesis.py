"""Schemathesis draws requests from the API's document, right and wrong ones: no answer is a bug, each is as told."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest

from dev.openapi import DOCUMENT
from tests.api.test_examples import RULES, sent
from tests.gateway_process import GatewayProcess
from tests.sink import Sink

EXAMPLES = 8
"""Requests of each kind that are drawn for each operation: some two thousand in all, in half a minute."""
WIDTH = 500
"""Characters of a line of its report: some have bodies of a megabyte."""
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)
SETTINGS = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415, 422, 503]
"""
"""A body that is too large is refused as such, before it is read."""
TOOL = "from schemathesis.cli import schemathesis; schemathesis()"
pytestmark = [
    pytest.mark.skipif(
        find_spec("schemathesis") is None and os.environ.get("CI") != "true", reason="needs schemathesis"
    ),
    pytest.mark.timeout(300),
    pytest.mark.rotated(share=1 / 5, group="api"),
]


@pytest.fixture(params=["embedded", "kafka"])
async def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    """A gateway whose destination fails, so that there are attempts and dead letters."""
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    if request.param == "kafka":
        log = f"kafka://{request.getfixturevalue('kafka')}"
    async with Sink(410) as sink:
        rules = RULES.format(url=sink.url)
        environ = {"GATEWAY_INDEX": str(tmp_path / "index.db")}
        prefix = f"t{uuid4().hex[:12]}."
        async with GatewayProcess(tmp_path, rules=rules, log=log, prefix=prefix, environ=environ) as running:
            yield running


async def test_each_answer_is_as_the_document_says(gateway: GatewayProcess, tmp_path: Path) -> None:
    await sent(gateway)
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    command = [
        *(sys.executable, "-c", TOOL, "run", str(DOCUMENT), f"--url=http://127.0.0.1:{gateway.admin_port}/api/v1"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES)),
        *("--exclude-operation-id", "tailEvents"),  # which has no end
        *("--suppress-health-check", "all", "--warnings", "off", "--no-color", "--request-timeout", "20"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await process.communicate()
    told = "\n".join([line[:WIDTH] for line in out.decode().splitlines()])
    assert process.returncode == 0, f"{told}\n{gateway.story()}"
    assert gateway.lines("api_failed") == []
