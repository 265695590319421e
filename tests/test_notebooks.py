"""The notebooks, kept as Python files, run from top to bottom on a fresh run and on a sweep."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_run
from made_runs import make_sweep

from gptjax.training import train

ROOT = Path(__file__).parent.parent


def execute(name: str, **environment: str) -> str:
    """What a notebook prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / name], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_notebook_is_run_here_and_is_one_for_jupytext():
    names = sorted(path.name for path in (ROOT / "notebooks").glob("*.py"))
    assert names == ["01_reading_a_run.py", "02_ablation_report.py"]
    for name in names:
        text = (ROOT / "notebooks" / name).read_text()
        assert "format_name: percent" in text and text.count("# %% [markdown]") >= 4


@pytest.mark.slow
def test_reading_a_run(tmp_path):
    train.train(tiny_run(tmp_path), tmp_path / "run")
    assert "first and last training loss" in execute("01_reading_a_run.py", RUN=str(tmp_path / "run"))
    assert (tmp_path / "run" / "loss.png").exists()


def test_the_intervals_of_a_report_by_hand(tmp_path):
    folder = make_sweep(tmp_path / "sweep", {"gelu": [3.0, 3.2, 2.9], "swiglu": [2.9, 3.05, 2.83]})
    told = execute("02_ablation_report.py", SWEEP=str(folder))
    by_hand, report = (re.search(rf"{who} +(.*)", told)[1] for who in ("by hand", "report"))
    assert by_hand == report == "-0.1067 (-0.2071 to -0.0063)"  # t = 4.303 for 3 pairs
    assert "swiglu is better" in told and "optim.learning_rate" in told and (folder / "report.html").exists()
