"""A dozen of the kills of `make chaos`, in a process of its own: it forks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_as_if_they_were_left_alone(request, tmp_path):
    script = request.config.rootpath / "tests" / "chaos.py"
    said = subprocess.run(
        [sys.executable, str(script), "--kills", "12", "--only", "at+kd,2 workers"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith(
        "12 kills in all; every run ended with the bits of the run left alone\n"
    )
    assert "at a change" in said.stdout
