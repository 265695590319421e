"""The notebooks, kept as Python files, run from top to bottom on a fresh run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(notebook, tmp_path):
    from gptjax.training import train

    e = tiny_run(tmp_path)
    train.train(e, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, notebook], env=os.environ | {"RUN": str(tmp_path / "run")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "first and last training loss" in done.stdout and (tmp_path / "run" / "loss.png").exists()
