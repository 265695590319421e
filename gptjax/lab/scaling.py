"""Scaling studies: predict the loss of a large run from small runs, and register the prediction before it starts.

A study is a file with a `sweep` (the family of small runs) and an `experiment` (the large run). Besides the sweep, its
folder holds

prediction.json   the prediction, its runs, its fit and its date; sealed with a hash and never changed
large/            the run folder of the large run
score.json        the result, compared with the prediction
scaling.png       a plot of both
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.atomic_io import read_json, write_atomic
from gptjax.config import Experiment, diff
from gptjax.errors import ConfigError, RunError
from gptjax.lab import laws
from gptjax.lab.progress import flops, sized, state_of, tokens
from gptjax.lab.sweep import Job
from gptjax.lab.trials import Trial, trials_of
from gptjax.model.size import num_params
from gptjax.training.run import open_run

FORMAT_VERSION = 1
PREDICTION, SCORE, PICTURE, LARGE = "prediction.json", "score.json", "scaling.png", "large"
CONFIDENCE, DRAWS = 0.95, 1000
MIN_COMPUTES = 4  # of a family: a law has three parameters
BAND_POINTS = 60
MUST_MATCH = ("data.", "objective.", "model.context_length")  # the fields that a validation loss depends on


@dataclass(frozen=True)
class Study:
    """A family of runs over compute, and the large run to predict."""

    folder: Path
    trials: tuple[Trial, ...]  # every run of the family, with every seed
    large: Trial

    @property
    def prediction(self) -> Path:
        return self.folder / PREDICTION


@dataclass(frozen=True)
class Point:
    """The size and loss of a run, for the fit of a law."""

    name: str
    flops: float  # C: the training compute, by `flops_per_token`
    parameters: int  # N: parameters in matrix products
    tokens: int  # D: tokens read in training
    loss: float  # final validation loss; nats/token
    data: str  # fingerprint of the text, the tokenizer and the split


def study_of(family: Sequence[Experiment], large: Experiment, seeds: int, folder: Path) -> Study:
    """Creates a study. Raises `ConfigError` with all reasons why the family cannot predict the large run."""
    trials = trials_of(family, seeds, folder)
    trials_of([large], 1, folder)  # raises if the large run is invalid
    problems = []
    for e in family:
        if other := [field for field in diff(e, large) if field.startswith(MUST_MATCH)]:
            problems.append(f"{e.name}: differs from the large run {large.name} in {', '.join(other)}, so their losses "
                            "cannot be compared; use the same values")  # fmt: skip
    computes = {flops(e) for e in family}
    if len(computes) < MIN_COMPUTES:
        problems.append(
            f"sweep: has {len(computes)} different training computes; the fit needs at least {MIN_COMPUTES}"
        )
    if max(computes) >= flops(large):
        problems.append(f"experiment: {large.name} takes {flops(large):.2g} FLOPs, and the largest run of the sweep "
                        f"{max(computes):.2g}; the large run must take more than all runs of the sweep")  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return Study(folder, tuple(trials), Trial(large.name, large.seed, large, folder / LARGE))


def point(trial: Trial) -> Point:
    """The point of a finished run. Raises `RunError` if it is not finished, or trained another experiment."""
    state = state_of(trial)
    run = open_run(trial.folder)
    if not state.done or state.val_loss is None or not np.isfinite(state.val_loss):
        raise RunError(f"{trial.folder}: has no final loss (it is {state.status}); the fit needs finished runs")
    expected = trial.experiment.resolved(run.experiment.model.vocab_size or 0, run.experiment.data.labels)
    if changes := diff(expected, run.experiment):
        raise RunError(f"{trial.folder}: is not the run of this study: it differs in {', '.join(changes)}")
    return Point(trial.name, *_size(run.experiment), state.val_loss, run.provenance().get("data", ""))


def _size(e: Experiment) -> tuple[float, int, int]:
    return flops(e), num_params(sized(e).model)["multiplied"], tokens(e)


def read_prediction(study: Study) -> dict[str, Any] | None:
    """The registered prediction; None if there is none.

    Raises `RunError` if it was changed after it was registered, or belongs to other runs than those of the study.
    """
    path = study.prediction
    if not path.exists():
        return None
    prediction = read_json(path)
    if prediction.get("sha256") != _seal(prediction):
        raise RunError(f"{path}: was changed after it was registered (its SHA-256 does not match); restore the file "
                       "from a copy, or start another study with another --run-dir")  # fmt: skip
    if prediction["format"] != FORMAT_VERSION:
        raise RunError(f"{path}: format is {prediction['format']}; this gptjax reads {FORMAT_VERSION}")
    problems = []
    before = {run["name"] for run in prediction["runs"]}
    now = {trial.name for trial in study.trials}
    if before != now:
        problems.append(f"the family was {', '.join(sorted(before))}, and is now {', '.join(sorted(now))}")
    if changes := diff(Experiment.from_json(json.dumps(prediction["large"]["experiment"])), study.large.experiment):
        problems += [
            f"the large run's {field} was {old!r}, and is now {new!r}" for field, (old, new) in changes.items()
        ]
    if not problems:
        points = {run["name"]: run for run in prediction["runs"]}
        problems += [f"{t.name} is not the same run any more" for t in study.trials
                     if state_of(t).done and not points[t.name].items() <= asdict(point(t)).items()]  # fmt: skip
    if problems:
        raise RunError(f"{path}: is the prediction of another study ({'; '.join(problems)}). A registered prediction "
                       "is never changed: restore the study, or choose another --run-dir")  # fmt: skip
    return prediction


def register(study: Study) -> dict[str, Any]:
    """The registered prediction, or a new one from the runs of the family, which must all be finished.

    Raises `RunError` if the large run has already started, because that would not be a prediction.
    """
    if existing := read_prediction(study):
        return existing
    if (status := state_of(study.large).status) != "new":
        raise RunError(f"{study.large.folder}: the large run is already {status}, and no prediction was "
                       "registered before it; choose another --run-dir")  # fmt: skip
    points = [point(trial) for trial in study.trials]
    _check_data(points)
    vocab_size = open_run(study.trials[0].folder).experiment.model.vocab_size or 0
    e = study.large.experiment.resolved(vocab_size, open_run(study.trials[0].folder).experiment.data.labels)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "format": FORMAT_VERSION,
        "registered": now,
        **predict(points, *_size(e)),
        "large": {"name": e.name, **dict(zip(("flops", "parameters", "tokens"), _size(e), strict=True)),
                  "experiment": json.loads(study.large.experiment.to_json())},
        "runs": [asdict(p) for p in points],
        "versions": {"python": platform.python_version()} | {x: metadata.version(x) for x in ("gptjax", "numpy")},
    }  # fmt: skip
    try:
        write_atomic(study.prediction, _json(content | {"sha256": _seal(content)}), new=True)
    except FileExistsError:  # another command was faster; its prediction counts
        return read_prediction(study) or {}
    return read_json(study.prediction)


def _check_data(points: Sequence[Point]) -> None:
    """Raises `RunError` if runs used different data: their losses cannot be compared."""
    if other := [p.name for p in points if p.data != points[0].data]:
        raise RunError(f"{', '.join(other)}: trained on other data than {points[0].name} (the text, the tokenizer "
                       "or the split has changed), so the losses cannot be compared; start another study")  # fmt: skip


def predict(points: Sequence[Point], flops: float, parameters: int, tokens: int) -> dict[str, Any]:
    """The loss of a run of this size with an interval, by L(C); also by L(N, D) if N and D are not collinear."""
    losses = np.array([p.loss for p in points])
    compute = np.array([[p.flops] for p in points])
    at = np.array([float(flops)])
    law = laws.fit(compute, losses)
    samples, drawn_laws = laws.bootstrap(law, compute, losses, at, DRAWS)
    grid = np.geomspace(compute.min(), 1.5 * at[0], BAND_POINTS)[:, None]
    low, high = laws.interval(np.array([drawn(grid) for drawn in drawn_laws]), CONFIDENCE)
    prediction = {
        "loss": float(law(at[None])[0]),
        "interval": laws.interval(samples, CONFIDENCE),
        "confidence": CONFIDENCE,
        "interval_by": f"bootstrap of residuals, {DRAWS} draws, the seed of the large run included",
        "law": asdict(law) | {"form": "L(C) = a (C / unit)^b + c"},
        "spread": float(np.std(laws.residuals(law, compute, losses))),
        "band": {"flops": grid[:, 0].tolist(), "low": low, "high": high},
    }
    sizes = np.array([[p.parameters, p.tokens] for p in points], float)
    if not laws.can_fit(sizes):
        return prediction | {"chinchilla": None}
    law = laws.fit(sizes, losses)
    at = np.array([parameters, tokens], float)
    samples, _ = laws.bootstrap(law, sizes, losses, at, DRAWS)
    by_size = {
        "loss": float(law(at[None])[0]),
        "interval": laws.interval(samples, CONFIDENCE),
        "law": asdict(law) | {"form": "L(N, D) = sum a (N or D / unit)^b + c"},
    }
    return prediction | {"chinchilla": by_size}


def score(study: Study) -> dict[str, Any]:
    """Compares the registered prediction with the finished large run, and writes score.json.

    Raises `RunError` if the large run started before the prediction was registered.
    """
    prediction = read_prediction(study)
    if prediction is None:
        raise RunError(
            f"{study.prediction}: does not exist; a run can only be scored against a prediction registered before it"
        )
    large = point(study.large)
    _check_data([*(Point(**({"data": large.data} | run)) for run in prediction["runs"]), large])
    started = open_run(study.large.folder).provenance()["started"]
    if datetime.fromisoformat(started) < datetime.fromisoformat(prediction["registered"]):
        raise RunError(f"{study.large.folder}: started at {started}, before the prediction was registered "
                       f"({prediction['registered']}); start another study")  # fmt: skip
    low, high = prediction["interval"]
    result = {
        "format": FORMAT_VERSION,
        "prediction_sha256": prediction["sha256"],
        "registered": prediction["registered"],
        "began": started,
        "predicted": prediction["loss"],
        "interval": [low, high],
        "loss": large.loss,
        "relative_error": prediction["loss"] / large.loss - 1,
        "inside": low <= large.loss <= high,
        "flops": large.flops,
        "times_smallest": large.flops / min(run["flops"] for run in prediction["runs"]),
        "times_largest": large.flops / max(run["flops"] for run in prediction["runs"]),
    }
    write_atomic(study.folder / SCORE, _json(result))
    return result


class ExternalRunner:
    """Starts nothing: the large run is trained elsewhere, in this study's folder on a shared file system."""

    def adopt(self, trials: Sequence[Trial]) -> dict[str, Job]:
        return {}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, Job]:
        return {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _seal(prediction: Mapping[str, Any]) -> str:
    """SHA-256 of a prediction without its hash, in a canonical form."""
    content = {key: value for key, value in prediction.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
