"""Pictures of runs: drawn whatever the run is like."""

import numpy as np
import pytest
from conftest import TINY

from gptjax.lab.curves import smooth
from gptjax.lab.report import plot_by_distance, plot_loss
from gptjax.training.run import Run


@pytest.mark.parametrize("count", [0, 1, 2, 3, 25])
def test_a_run_of_any_length_can_be_drawn(tmp_path, count):
    lines = [f'{{"step": {i}, "loss": {5 - i / 10}}}\n' for i in range(count)]
    lines += [f'{{"step": {i}, "val_loss": {5 - i / 10}}}\n' for i in range(0, count, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "cut o')
    path = plot_loss(Run(tmp_path, TINY))
    assert (path is None) == (count == 0)
    assert path is None or path.read_bytes().startswith(b"\x89PNG")


def test_smoothing_keeps_lines_and_length():
    line = np.arange(40.0)
    np.testing.assert_allclose(smooth(line)[4:-4], line[4:-4])
    for count in (1, 2, 11):
        np.testing.assert_allclose(smooth(np.full(count, 3.0)), np.full(count, 3.0))


def test_shares_by_distance_are_drawn_with_and_without_intervals(tmp_path):
    known = np.array([[0.9, 0.5, 0.2], [0.8, 0.3, -0.1], [1.1, 0.7, 0.5]])
    unknown = np.array([[0.9, 0.5, 0.2], [np.nan] * 3, [np.nan] * 3])  # of a single run
    plot_by_distance([2, 64, 256], {"one": known, "other": unknown}, 64, 0.1, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
