"""Scaling: laws are recovered from noisy points; a prediction is registered before its run starts, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT
from scipy.optimize import least_squares

from gptjax.commands.scale import scale
from gptjax.config import zip_
from gptjax.errors import ConfigError, GptjaxError, RunError
from gptjax.lab import laws, scaling
from gptjax.lab.laws import Law, bootstrap, can_fit, fit, interval
from gptjax.lab.trials import Trial

COMPUTE = np.geomspace(1e11, 3e12, 7)[:, None]
FAR = np.array([[1e13]])  # 100 times the smallest
SIZES = np.array([[n, d] for n in np.geomspace(1e5, 3e6, 4) for d in np.geomspace(1e6, 1e8, 4)])
some_laws = st.builds(
    lambda a, b, c: Law((a,), (-b,), c, (1e12,)), st.floats(0.3, 3), st.floats(0.1, 0.5), st.floats(0.3, 2)
)


@given(some_laws)
@settings(max_examples=30, deadline=None)
def test_a_law_of_compute_is_recovered(law):
    found = fit(COMPUTE, law(COMPUTE))
    assert found(FAR) == pytest.approx(law(FAR), rel=1e-3)
    assert found.b[0] == pytest.approx(law.b[0], abs=0.02)


@given(some_laws, st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_noise_between_seeds_changes_the_prediction_little(law, seed):
    noise = np.exp(0.002 * np.random.default_rng(seed).standard_normal(7))
    assert fit(COMPUTE, law(COMPUTE) * noise)(FAR) == pytest.approx(law(FAR), rel=0.04)


@given(st.floats(0.2, 1), st.floats(0.2, 1), st.floats(0.2, 0.5), st.floats(0.2, 0.5), st.floats(0.5, 2))
@settings(max_examples=15, deadline=None)
def test_a_law_of_parameters_and_tokens_is_recovered(a, b, alpha, beta, floor):
    law = Law((a, b), (-alpha, -beta), floor, (5e5, 1e7))
    found = fit(SIZES, law(SIZES))
    far = np.array([[1e7, 1e9]])
    assert found(far) == pytest.approx(law(far), rel=1e-3)
    assert found.b == pytest.approx(law.b, abs=0.02)


def test_the_fit_agrees_with_scipys():
    """An independent reference: scipy's least squares with its own Huber loss and slopes by differences."""
    losses = Law((0.8,), (-0.25,), 1.1, (1e12,))(COMPUTE) * np.exp([0.003, -0.002, 0.001, 0.05, -0.004, 0.002, 0])
    unit = np.exp(np.log(COMPUTE).mean())

    def residuals(p):
        return np.log(np.exp(p[0]) * (COMPUTE[:, 0] / unit) ** p[1] + np.exp(p[2])) - np.log(losses)

    reference = least_squares(residuals, [0, -0.2, 0], loss="huber", f_scale=laws.HUBER, xtol=1e-12, ftol=1e-12)
    found = fit(COMPUTE, losses)
    assert [np.log(found.a[0]), found.b[0], np.log(found.c)] == pytest.approx(reference.x, abs=1e-3)


def test_one_outlier_changes_the_fit_little_however_large():
    law = Law((0.8,), (-0.25,), 1.1, (1e12,))
    slightly, badly = (fit(COMPUTE, law(COMPUTE) * np.where(np.arange(7) == 2, factor, 1))(FAR) for factor in (1.1, 2))
    assert badly == pytest.approx(slightly, rel=1e-4)
    assert badly == pytest.approx(law(FAR), rel=0.015)


def test_parameters_and_tokens_must_not_be_collinear():
    assert can_fit(SIZES)
    together = np.array([[n, 20 * n] for n in np.geomspace(1e5, 1e7, 8)])
    assert not can_fit(together), "both grow together"
    assert not can_fit(SIZES[:4]), "one of them is constant"
    assert not can_fit(SIZES[[0, 1, 4, 5, 9]]), "as many parameters as runs"


def test_the_interval_holds_most_new_runs():
    """By simulation: of 40 studies with two seeds and noise of 0.4%, nearly all intervals of 95% hold the new run."""
    rng, law, inside = np.random.default_rng(0), Law((1.2,), (-0.2,), 1.0, (4e11,)), []
    x = np.repeat(COMPUTE, 2, 0)
    for _ in range(40):
        losses, new = (law(at) * np.exp(0.004 * rng.standard_normal(len(at))) for at in (x, FAR))
        low, high = interval(bootstrap(fit(x, losses), x, losses, FAR[0], 100)[0])
        assert low < high
        inside.append(low <= new[0] <= high)
    assert np.mean(inside) >= 0.85


FAMILY = zip_(TINY.override(name="small"), {"train.steps": [10, 20, 40, 80, 160]})
BIG = TINY.override(name="big", train=dict(steps=1000))


def finish(trial: Trial, loss: float, started: str = "2020-01-01T00:00:00+00:00", **changes) -> None:
    """What a run leaves, without the training."""
    trial.folder.mkdir(parents=True)
    e = trial.experiment.resolved(65).override(changes)
    (trial.folder / "experiment.json").write_text(e.to_json())
    (trial.folder / "provenance.json").write_text(json.dumps({"started": started, "data": "x"}))
    (trial.folder / "result.json").write_text(json.dumps({"steps": e.train.steps, "val_loss": loss, "seconds": 1.0}))


def loss_of(steps: int) -> float:
    """A power law, with a little noise for the small runs: without any, the interval has no width."""
    noise = {10: -1e-4, 20: 1e-4, 40: -1e-4, 80: 1e-4, 160: -1e-4}.get(steps, 0.0)
    return 1 + 4 * steps**-0.4 + noise


@pytest.fixture
def study(tmp_path) -> scaling.Study:
    """A study whose small runs are done."""
    made = scaling.study_of(FAMILY, BIG, 1, tmp_path)
    for trial in made.trials:
        finish(trial, loss_of(trial.experiment.train.steps))
    return made


LATER = "2999-01-01T00:00:00+00:00"


def test_a_prediction_is_registered_once_and_scored(study):
    first = scaling.register(study)
    low, high = first["interval"]
    assert first["loss"] == pytest.approx(loss_of(1000), rel=1e-3) and low < high
    assert [run["tokens"] for run in first["runs"]] == [steps * 8 * 16 for steps in (10, 20, 40, 80, 160)]
    assert first["chinchilla"] is None, "all have as many parameters"
    text = study.prediction.read_text()
    assert scaling.register(study) == first and study.prediction.read_text() == text, "it is not written again"
    finish(study.large, loss_of(1000), LATER)
    scored = scaling.score(study)
    assert abs(scored["relative_error"]) < 1e-3 and scored["prediction_sha256"] == first["sha256"]
    assert scored["times_smallest"] == pytest.approx(100) and scored["times_largest"] == pytest.approx(1000 / 160)
    assert json.loads((study.folder / "score.json").read_text()) == scored
    assert scaling.register(study) == first, "it stays when the large run is done"


def test_a_wrong_prediction_is_scored_as_wrong(study):
    scaling.register(study)
    finish(study.large, 1.5, LATER)
    scored = scaling.score(study)
    assert not scored["inside"] and scored["relative_error"] == pytest.approx(loss_of(1000) / 1.5 - 1, abs=2e-3)


def test_nothing_is_predicted_for_a_run_that_has_started(study):
    study.large.folder.mkdir()
    with pytest.raises(RunError, match="the large run is already stopped, and no prediction was registered before it"):
        scaling.register(study)
    assert not study.prediction.exists()
    with pytest.raises(RunError, match="can only be scored against a prediction registered before"):
        scaling.score(study)


def test_a_run_that_started_before_its_prediction_is_not_scored(study):
    scaling.register(study)
    finish(study.large, 1.3, "2020-01-01T00:00:00+00:00")
    with pytest.raises(RunError, match=r"started at 2020.*before the prediction was registered"):
        scaling.score(study)


def test_a_large_run_that_is_another_is_not_scored(study):
    scaling.register(study)
    finish(study.large, 1.3, LATER, **{"optim.learning_rate": 0.5})
    with pytest.raises(RunError, match=r"not the run of this study: it differs in optim.learning_rate"):
        scaling.score(study)


@pytest.mark.parametrize("field, value", [("loss", 1.2), ("registered", "2020-01-01T00:00:00+00:00"), ("format", 2)])
def test_a_change_of_a_registered_prediction_is_noticed(study, field, value):
    kept = scaling.register(study)
    study.prediction.write_text(json.dumps(kept | {field: value}))
    for action in (scaling.read_prediction, scaling.register, scaling.score):
        with pytest.raises(RunError, match="was changed after it was registered"):
            action(study)


def test_a_registered_prediction_is_not_changed_by_another_family(study, tmp_path):
    kept = scaling.register(study)
    shorter = scaling.study_of(FAMILY[:-1], BIG, 1, tmp_path)
    with pytest.raises(RunError, match=r"another study \(the family was .*never changed"):
        scaling.register(shorter)
    with pytest.raises(RunError, match=r"the large run's train.steps was 1000, and is now 900"):
        scaling.register(scaling.study_of(FAMILY, BIG.override(train=dict(steps=900)), 1, tmp_path))
    result = study.trials[0].folder / "result.json"
    result.write_text(result.read_text().replace('"val_loss"', '"val_loss": 9.0, "old"'))
    with pytest.raises(RunError, match="small-steps=10-seed0 is not the same run any more"):
        scaling.register(study)
    assert json.loads(study.prediction.read_text()) == kept


def test_losses_of_other_data_are_neither_fitted_nor_scored(study):
    path = study.trials[2].folder / "provenance.json"
    kept = path.read_text()
    path.write_text(kept.replace('"x"', '"y"'))
    with pytest.raises(RunError, match=r"^small-steps=40-seed0: trained on other data than small-steps=10-seed0"):
        scaling.register(study)
    path.write_text(kept)
    scaling.register(study)
    finish(study.large, 1.3, LATER)
    path = study.large.folder / "provenance.json"
    path.write_text(path.read_text().replace('"x"', '"y"'))
    with pytest.raises(RunError, match=r"^large: trained on other data"):
        scaling.score(study)


def test_of_two_commands_that_predict_at_once_the_first_one_counts(study, monkeypatch):
    first = scaling.register(study)
    answers = iter([None, first])  # the second command read before the first one wrote
    monkeypatch.setattr(scaling, "read_prediction", lambda study: next(answers))
    monkeypatch.setattr(scaling, "predict", lambda *_: {"loss": 0.0})
    text = study.prediction.read_text()
    assert scaling.register(study) == first and study.prediction.read_text() == text
    assert [path.name for path in study.folder.iterdir() if path.name.startswith(".")] == []


def test_a_family_must_be_comparable_with_its_large_run(tmp_path):
    other = TINY.override(name="other", data=dict(source="elsewhere.txt"), train=dict(steps=7))
    with pytest.raises(ConfigError) as caught:
        scaling.study_of([FAMILY[0], FAMILY[1], other], BIG.override(train=dict(steps=9)), 1, tmp_path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["other", "sweep", "experiment"]
    assert "data.source" in caught.value.problems[0] and "3 different training computes" in caught.value.problems[1]
    unfinished = scaling.study_of(FAMILY, BIG, 1, tmp_path)
    with pytest.raises(RunError):
        scaling.register(unfinished)


LEARNER = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from gptjax.config import Experiment

NOISE = {10: -1e-4, 20: 1e-4, 40: -1e-4, 80: 1e-4, 160: -1e-4}
e, folder = Experiment.from_json(Path(sys.argv[1]).read_text()).resolved(65), Path(sys.argv[2])
if e.name == "bad":
    sys.exit("what went wrong")
folder.mkdir()
(folder / "experiment.json").write_text(e.to_json())
(folder / "provenance.json").write_text(json.dumps({"started": datetime.now(UTC).isoformat(timespec="seconds")}))
loss = 1 + 4 * e.train.steps**-0.4 + NOISE.get(e.train.steps, 0.0)
result = {"steps": e.train.steps, "val_loss": loss, "seconds": 1.0}
(folder / "result").write_text(json.dumps(result))
(folder / "result").rename(folder / "result.json")
"""


@pytest.mark.slow
def test_the_command_predicts_trains_waits_and_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = lambda trial: [sys.executable, "learner.py", str(trial.file), str(trial.folder)]  # noqa: E731
    monkeypatch.setattr(Trial, "command", property(command))
    Path("learner.py").write_text(LEARNER.replace('"bad"', '"big"'))
    Path("mine.py").write_text(
        f"from gptjax.config import Experiment, zip_\nexperiment = Experiment.from_json({BIG.to_json()!r})\n"
        "sweep = zip_(experiment.override(name='small'), {'train.steps': [10, 20, 40, 80, 160]})\n"
    )
    scale(["mine.py", "--status"])
    assert "6 runs (6 new)\nno prediction yet" in capsys.readouterr().out and not Path("runs").exists()
    with pytest.raises(SystemExit) as stopped:
        scale(["mine.py", "--workers", "2"])
    output = capsys.readouterr()
    assert stopped.value.code == 3 and "predicted for big" in output.out and "big failed" not in output.out
    kept = Path("runs/mine/prediction.json").read_text()
    Path("learner.py").write_text(LEARNER)
    large = Path("runs/mine/large")
    somebody = subprocess.Popen([sys.executable, "learner.py", f"{large}.json", large], env=os.environ)
    scale(["mine.py", "--external"])
    assert somebody.wait() == 0
    out = capsys.readouterr().out
    assert "big: loss 1.2524 nats/token, predicted 1.25" in out and "inside the interval" in out and "100 times" in out
    assert Path("runs/mine/prediction.json").read_text() == kept
    assert Path("runs/mine/scaling.png").stat().st_size > 10_000
    Path("learner.py").write_text("import sys; sys.exit(2)")
    scale(["mine.py"])
    assert "big: loss 1.2524" in capsys.readouterr().out, "nothing is trained twice"
    with pytest.raises(RunError, match="another study"):
        scale(["mine.py", "--seeds", "2"])
    with pytest.raises(GptjaxError, match="must be at least 1"):
        scale(["mine.py", "--workers", "0"])
