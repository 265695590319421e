"""Every experiment file resolves, fits its rules, and says what it is for."""

from pathlib import Path

import jax
import pytest

from gptjax.checks import check
from gptjax.errors import ConfigError
from gptjax.loading import load_experiment
from gptjax.training.metrics import num_params

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "experiments").rglob("*.py") if p.name != "__init__.py")
# published sizes: Radford et al. 2019 as released; Brown et al. 2020, table 2.1; Touvron et al. 2023, table 2
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
}
ROUNDED = {"gpt3_1b3": (1.3e9, 0.05), "gpt3_175b": (175e9, 0.005), "llama_7b": (6.7e9, 0.006)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_experiment_resolves_and_is_documented(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    relative = path.relative_to(ROOT)
    experiment = load_experiment(str(relative))
    assert load_experiment(".".join(relative.with_suffix("").parts)) == experiment
    check(experiment)
    assert experiment.name == path.stem
    docstring = path.read_text().split('"""')[1]
    for word in ("Question", "Command", "Cost", "Expected"):
        assert f"\n{word}" in docstring, f"{relative}: its docstring does not give the {word.lower()}"
    assert str(relative) in docstring


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
