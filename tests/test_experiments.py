"""Every experiment file resolves, fits its rules, and says what it is for."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.checks import check
from gptjax.config import diff
from gptjax.errors import ConfigError
from gptjax.lab.progress import flops
from gptjax.lab.repro import load_claim
from gptjax.lab.scaling import study_of
from gptjax.lab.trials import trials_of
from gptjax.loading import load_experiment, load_sweep
from gptjax.model.size import num_params

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "experiments").rglob("*.py") if p.name != "__init__.py")
CLAIMS = [p for p in FILES if p.parent.name == "papers"]
TRAINED = [p for p in FILES if "\nexperiment = " in p.read_text()]  # all but claims for which nothing is trained
# published sizes: Radford et al. 2019 as released; Brown et al. 2020, table 2.1; Touvron et al. 2023, table 2
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
}
ROUNDED = {"gpt3_1b3": (1.3e9, 0.05), "gpt3_175b": (175e9, 0.005), "llama_7b": (6.7e9, 0.006)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_is_documented(path):
    relative, docstring = path.relative_to(ROOT), path.read_text().split('"""')[1]
    for word in ("Question", "Command", "Cost", "Expected"):
        assert f"\n{word}" in docstring, f"{relative}: its docstring does not give the {word.lower()}"
    assert path in TRAINED or path in CLAIMS


@pytest.mark.parametrize("path", TRAINED, ids=lambda p: str(p.relative_to(ROOT)))
def test_experiment_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    relative = path.relative_to(ROOT)
    experiment = load_experiment(str(relative))
    assert load_experiment(".".join(relative.with_suffix("").parts)) == experiment
    check(experiment)
    assert experiment.name == path.stem
    assert str(relative) in path.read_text().split('"""')[1]


ABLATIONS = [path for path in FILES if path.parent.name == "ablations" and path.stem not in ("small", "objective")]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_the_variants_of_an_ablation_differ_and_have_the_shapes_that_they_say(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment, variants = load_experiment(str(path)), load_sweep(str(path))
    assert len(trials_of(variants, 3, tmp_path)) == 3 * len(variants) and len(variants) > 1
    changed = {field for e in variants for field in diff(variants[0], e)} - {"name"}
    assert changed, "the first is what the others are compared with"
    whole = [e.override(name=experiment.name).resolved(1024) for e in variants]
    assert experiment.resolved(1024) in whole, "what gptjax train trains is one of them"
    params = [num_params(e.resolved(1024).model)["total"] for e in variants]
    if not any(field.startswith("model.num") for field in changed):
        assert max(params) - min(params) <= 128 * 128, "positions alone may add a table"
    if path.stem == "ffn":
        assert len(set(params)) == 1
    if path.stem == "depth_width":
        in_blocks = [num_params(e.resolved(1024).model)["total"] - 1024 * e.model.embed_dim for e in variants]
        norms = [(2 * e.model.num_layers + 1) * e.model.embed_dim for e in variants]
        assert len({total - norm for total, norm in zip(in_blocks, norms, strict=True)}) == 1
    if path.stem == "batch_size":
        assert len({e.train.steps * e.train.batch_size for e in variants}) == 1


@pytest.mark.slow
def test_the_large_run_of_the_scaling_study_takes_a_hundred_times_the_compute_of_the_smallest(tmp_path):
    path = str(ROOT / "experiments/papers/predictable_scaling.py")
    study = study_of(load_sweep(path), load_experiment(path), 1, tmp_path)
    smallest, *_, largest = sorted(flops(trial.experiment) for trial in study.trials)
    assert flops(study.large.experiment) >= 100 * smallest
    assert flops(study.large.experiment) >= 3 * largest, "it lies well beyond all of them"


@pytest.mark.parametrize("path", CLAIMS, ids=lambda p: p.stem)
def test_claim_is_whole_and_says_how_to_make_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_claim(path.stem).claim == load_claim(str(path)).claim
    docstring = path.read_text().split('"""')[1]
    assert f"gptjax repro {path.stem}\n" in docstring
    assert "\nSource" in docstring


@pytest.mark.parametrize("name", PUBLISHED)
def test_gpt2_has_exactly_the_published_number_of_weights(name):
    experiment = load_experiment(str(ROOT / f"experiments/baselines/{name}.py")).resolved(50257)
    assert num_params(experiment.model)["total"] == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_larger_baselines_have_the_published_size(name):
    experiment = load_experiment(str(ROOT / f"experiments/baselines/{name}.py")).resolved(50257)
    size, tolerance = ROUNDED[name]
    assert num_params(experiment.model)["total"] == pytest.approx(size, rel=tolerance)


def test_nanogpt_recipe_has_the_published_number_of_weights():
    experiment = load_experiment(str(ROOT / "experiments/papers/nanogpt_shakespeare_cpu.py")).resolved(65)
    assert num_params(experiment.model)["total"] - 64 * 128 == 795_904


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "defines no `experiment`"),
        ("experiment = 3", "defines no `experiment`"),
        ("def", "line 1"),
        ("x = 1\nraise RuntimeError('boom')", "line 2: RuntimeError: boom"),
        ("from gptjax.config import *\n\nexperiment = Experiment(model=Model(num_layer=3))",
         "line 3: model.num_layer: no such field; did you mean model.num_layers"),
        ("from gptjax.config import *\nexperiment = Experiment(sed=3)",
         "line 2: sed: no such field; did you mean seed?"),
        ("from gptjax.config import *\nexperiment = Experiment().override(train=dict(step=3))",
         "train.step: no such field; did you mean train.steps"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_the_line(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path))
    assert message in str(caught.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_experiment("nowhere/nothing.py")


def test_a_file_outside_any_package_works(tmp_path):
    (tmp_path / "mine.py").write_text("from gptjax.config import Experiment\nexperiment = Experiment(name='mine')\n")
    assert load_experiment(str(tmp_path / "mine.py")).name == "mine"
    assert jax.device_count() == 8


@pytest.mark.slow
def test_the_objective_study_can_be_made_and_is_not_made_twice(tmp_path, monkeypatch, single_device, capsys):
    """The whole study with runs of 3 steps, on the samples of the tasks: no figure means anything here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GPTJAX_DATA", str(ROOT / "gptjax/data/tasks/samples"))
    study = importlib.import_module("experiments.ablations.objective")
    short = {"train.steps": 3, "optim.warmup_steps": 1, "train.batch_size": 2}
    monkeypatch.setattr(study, "experiment", study.experiment.override(short))
    monkeypatch.setattr(study, "RECALL", study.RECALL | short)
    monkeypatch.setattr(study, "SENTIMENT", study.SENTIMENT | short)
    for name, value in {"DOCUMENTS": 5, "QUESTIONS": 4, "GAPS": 3, "CANDIDATES": 2}.items():
        monkeypatch.setattr(study, name, value)
    study.study(tmp_path, seeds=2)
    first = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "recall.png").exists()
    assert len(list(tmp_path.glob("*-*-*.json"))) == 12
    assert {"recall at 256", "fill-in from both sides", "sentiment"} <= result["table"].keys()
    for name, columns in result["table"].items():
        pairs = result["figures"][name]
        difference = np.mean(pairs["masked"]) - np.mean(pairs["causal"])
        assert columns["difference"][0] == pytest.approx(difference)
    monkeypatch.setattr(study, "train", None)  # nothing is left to train
    study.study(tmp_path, seeds=2)
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:]
