"""Scaling studies: the loss of a large run, predicted from small ones and registered before the large one exists.

A file with a `sweep`, the family of small runs, and an `experiment`, the large one, is a study. Its folder is that of
the sweep, and holds besides

prediction.json   what was predicted, from which runs, by which fit, when; sealed with a hash and never changed
large/            the run folder of the large run
score.json        what came out
scaling.png       both
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
from gptjax.training.metrics import num_params
from gptjax.training.run import open_run

FORMAT_VERSION = 1
PREDICTION, SCORE, PICTURE, LARGE = "prediction.json", "score.json", "scaling.png", "large"
CONFIDENCE, DRAWS = 0.95, 1000
FEWEST = 4  # computes of a family: a law has three parameters
BAND_POINTS = 60
SAME = ("data.", "objective.", "model.context_length")  # what a validation loss depends on


@dataclass(frozen=True)
class Study:
    """A family of runs over compute, and the run that is predicted from it."""

    folder: Path
    trials: tuple[Trial, ...]  # every run of the family, once for each seed
    large: Trial

    @property
    def prediction(self) -> Path:
        return self.folder / PREDICTION


@dataclass(frozen=True)
class Point:
    """A run as a law sees it."""

    name: str
    flops: float  # C: of training, by `flops_per_token`
    parameters: int  # N: weights in matrix products
    tokens: int  # D: read in training
    loss: float  # of the whole validation text at the end; nats a token
    data: str  # fingerprint of text, tokenizer and split


def study_of(family: Sequence[Experiment], large: Experiment, seeds: int, folder: Path) -> Study:
    """A study. Raises `ConfigError` with all that keeps the large run from being predicted by its family."""
    trials = trials_of(family, seeds, folder)
    trials_of([large], 1, folder)  # for what is wrong with it
    problems = []
    for e in family:
        if other := [field for field in diff(e, large) if field.startswith(SAME)]:
            problems.append(f"{e.name}: differs from {large.name}, the large run, in {', '.join(other)}, so that their "
                            "losses cannot be compared; give them the same")  # fmt: skip
    computes = {flops(e) for e in family}
    if len(computes) < FEWEST:
        problems.append(f"sweep: has {len(computes)} different computes; a law of three parameters needs {FEWEST}")
    if max(computes) >= flops(large):
        problems.append(f"experiment: {large.name} takes {flops(large):.2g} FLOPs, the largest of the sweep "
                        f"{max(computes):.2g}; predicted is a run that takes more than all of them")  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return Study(folder, tuple(trials), Trial(large.name, large.seed, large, folder / LARGE))


def point(trial: Trial) -> Point:
    """A run that is done. Raises `RunError` where it is not, or where it trained something else."""
    state, run = state_of(trial), open_run(trial.folder)
    if not state.done or state.val_loss is None or not np.isfinite(state.val_loss):
        raise RunError(f"{trial.folder}: has no final loss ({state.status}); a law is fitted to runs that are done")
    expected = trial.experiment.resolved(run.experiment.model.vocab_size or 0, run.experiment.data.labels)
    if changes := diff(expected, run.experiment):
        raise RunError(f"{trial.folder}: is not the run of the study: it differs in {', '.join(changes)}")
    return Point(trial.name, *_size(run.experiment), state.val_loss, run.provenance().get("data", ""))


def _size(e: Experiment) -> tuple[float, int, int]:
    return flops(e), num_params(sized(e).model)["multiplied"], tokens(e)


def registered(study: Study) -> dict[str, Any] | None:
    """The prediction that stands; None where there is none.

    Raises `RunError` where it was changed after it was registered, or is of other runs than those of the study.
    """
    path = study.prediction
    if not path.exists():
        return None
    kept = read_json(path)
    if kept.get("sha256") != _seal(kept):
        raise RunError(f"{path}: was changed after it was registered: its content has another hash than it says; bring "
                       "the file back from a copy, or begin another study with another --run-dir")  # fmt: skip
    if kept["format"] != FORMAT_VERSION:
        raise RunError(f"{path}: format is {kept['format']}; this gptjax reads {FORMAT_VERSION}")
    problems = []
    before, now = {run["name"] for run in kept["runs"]}, {trial.name for trial in study.trials}
    if before != now:
        problems.append("the family was " + ", ".join(sorted(before)) + "; it is " + ", ".join(sorted(now)))
    if changes := diff(Experiment.from_json(json.dumps(kept["large"]["experiment"])), study.large.experiment):
        problems += [f"the large run's {field} was {old!r}; it is {new!r}" for field, (old, new) in changes.items()]
    if not problems:
        points = {run["name"]: run for run in kept["runs"]}
        problems += [f"{t.name} is no longer the run that it was" for t in study.trials
                     if state_of(t).done and not points[t.name].items() <= asdict(point(t)).items()]  # fmt: skip
    if problems:
        raise RunError(f"{path}: is the prediction of another study ({'; '.join(problems)}); what is registered is "
                       "never changed: go back to what it was, or choose another --run-dir")  # fmt: skip
    return kept


def register(study: Study) -> dict[str, Any]:
    """The prediction that stands, or a new one from the runs of the family, all of which must be done.

    Raises `RunError` where the large run has begun, as that would be no prediction.
    """
    if there := registered(study):
        return there
    if (status := state_of(study.large).status) != "new":
        raise RunError(f"{study.large.folder}: the large run is {status} already, and nothing was predicted before it; "
                       "choose another --run-dir")  # fmt: skip
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
    except FileExistsError:  # another command was quicker: what it has shown stands
        return registered(study) or {}
    return read_json(study.prediction)


def _check_data(points: Sequence[Point]) -> None:
    """Raises `RunError` where runs saw different data: their losses are of different texts."""
    if other := [p.name for p in points if p.data != points[0].data]:
        raise RunError(f"{', '.join(other)}: trained on other data than {points[0].name} (text, tokenizer or split has "
                       "changed since), so that their losses cannot be compared; begin another study")  # fmt: skip


def predict(points: Sequence[Point], flops: float, parameters: int, tokens: int) -> dict[str, Any]:
    """The loss of a run of that size, with an interval, by L(C), and by L(N, D) where the runs tell N and D apart."""
    losses = np.array([p.loss for p in points])
    compute = np.array([[p.flops] for p in points])
    at = np.array([float(flops)])
    law = laws.fit(compute, losses)
    drawn, others = laws.bootstrap(law, compute, losses, at, DRAWS)
    grid = np.geomspace(compute.min(), 1.5 * at[0], BAND_POINTS)[:, None]
    low, high = laws.interval(np.array([other(grid) for other in others]), CONFIDENCE)
    made = {
        "loss": float(law(at[None])[0]),
        "interval": laws.interval(drawn, CONFIDENCE),
        "confidence": CONFIDENCE,
        "interval_by": f"bootstrap of residuals, {DRAWS} draws, the seed of the large run included",
        "law": asdict(law) | {"form": "L(C) = a (C / unit)^b + c"},
        "spread": float(np.std(laws.residuals_of(law, compute, losses))),
        "band": {"flops": grid[:, 0].tolist(), "low": low, "high": high},
    }
    sizes = np.array([[p.parameters, p.tokens] for p in points], float)
    if not laws.can_fit(sizes):
        return made | {"chinchilla": None}
    law, at = laws.fit(sizes, losses), np.array([parameters, tokens], float)
    drawn, _ = laws.bootstrap(law, sizes, losses, at, DRAWS)
    return made | {"chinchilla": {"loss": float(law(at[None])[0]), "interval": laws.interval(drawn, CONFIDENCE),
                                  "law": asdict(law) | {"form": "L(N, D) = sum a (N or D / unit)^b + c"}}}  # fmt: skip


def score(study: Study) -> dict[str, Any]:
    """How good the registered prediction was, written to score.json; the large run must be done.

    Raises `RunError` where it began before the prediction was registered.
    """
    prediction = registered(study)
    if prediction is None:
        raise RunError(f"{study.prediction}: does not exist; a run is scored by what was registered before it")
    large = point(study.large)
    _check_data([*(Point(**({"data": large.data} | run)) for run in prediction["runs"]), large])
    began = open_run(study.large.folder).provenance()["started"]
    if datetime.fromisoformat(began) < datetime.fromisoformat(prediction["registered"]):
        raise RunError(f"{study.large.folder}: began at {began}, before its loss was predicted "
                       f"({prediction['registered']}); that is no prediction: begin another study")  # fmt: skip
    low, high = prediction["interval"]
    result = {
        "format": FORMAT_VERSION,
        "prediction_sha256": prediction["sha256"],
        "registered": prediction["registered"],
        "began": began,
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
    """Starts nothing: the large run is trained by somebody else, in this study's folder on a disk that is shared."""

    def adopt(self, trials: Sequence[Trial]) -> dict[str, Job]:
        return {}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, Job]:
        return {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _seal(prediction: Mapping[str, Any]) -> str:
    """SHA-256 of all of a prediction but its hash, in one way of writing it."""
    content = {key: value for key, value in prediction.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
