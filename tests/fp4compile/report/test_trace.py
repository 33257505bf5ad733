"""Our graphs reach the two places where users of torch.compile look, and cost nothing where neither is switched on."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4compile.report.trace import Trace, trace_graph
from tests.captured_graphs import Mlp, capture_graphs
from tests.fp4compile.report.transformed_graphs import transform


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=200, check=True, env={**os.environ, **environment},
    )  # fmt: skip


EMIT = """
import torch
from fp4compile.report.trace import trace_graph
trace_graph("transformed", lambda: "def graph(): pass")
"""


def test_tlparse_gets_an_artifact(tmp_path: Path) -> None:
    run_python(EMIT, TORCH_TRACE=str(tmp_path))
    [log] = tmp_path.iterdir()
    text = log.read_text()
    assert '"artifact": {"name": "fp4compile_transformed", "encoding": "string"}' in text
    assert "def graph(): pass" in text


def test_torch_logs_shows_debug_lines() -> None:
    shown = run_python(EMIT, TORCH_LOGS="+fp4compile").stderr
    assert "transformed" in shown
    assert "def graph(): pass" in shown


def test_text_is_not_made_when_nobody_reads_it() -> None:
    def text() -> str:
        raise AssertionError("made for nobody")

    trace_log = logging.getLogger("torch.__trace")
    handlers, trace_log.handlers = trace_log.handlers, []
    try:
        assert not logging.getLogger("fp4compile").isEnabledFor(logging.DEBUG)
        trace_graph("captured", text)
    finally:
        trace_log.handlers = handlers


def test_a_run_is_told_from_start_to_finish(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="fp4compile")
    captured = capture_graphs(Mlp().bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16))[0]
    caplog.clear()
    transform(captured, instruments=(Trace(),))
    told = [r.getMessage() for r in caplog.records if r.name == "fp4compile.report.trace"]
    assert told[0].startswith("captured\n# graph 0/0, captured\n")
    assert any(re.match(r"\d+ insert-quantize: 4 changed in \d", line) for line in told)
    [transformed] = [line for line in told if line.startswith("transformed\n")]
    assert "torch.ops.fp4.scaled_mm.default(" in transformed
    assert told[-1].startswith("report\ngraph 0/0: inference on cpu, policy nvfp4\n")
