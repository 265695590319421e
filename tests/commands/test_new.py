"""`gptjax new`: every template is a documented file that can be trained, swept or reproduced outside of a checkout."""

import re
from pathlib import Path

import pytest

from gptjax.checks import check
from gptjax.commands.new import new, template
from gptjax.errors import ConfigError, GptjaxError
from gptjax.lab import repro
from gptjax.lab.trials import trials_of
from gptjax.loading import load_experiment, load_sweep
from gptjax.training.train import train

KINDS = ("quickstart", "sweep", "finetune", "claim")
SMALL = {
    "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.context_length": 16,
    "data.tokenizer": "byte", "train.steps": 2, "optim.warmup_steps": 1, "train.batch_size": 4, "train.eval_every": 0,
    "train.checkpoint_every": 2, "train.sample_tokens": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_a_documented_experiment_that_imports_nothing_of_a_checkout(kind, capsys):
    new(["mine", "--from", kind])
    assert capsys.readouterr().out.startswith("mine.py: edit it, then gptjax ")
    text = Path("mine.py").read_text()
    for word in ("Question", "Command", "Cost", "Expected"):
        assert f"\n{word}" in text.split('"""')[1]
    assert "NAME" not in text and not re.search("^(from|import) (?!gptjax|pathlib)", text, re.MULTILINE)
    experiment = load_experiment("mine.py")
    check(experiment)
    assert experiment.name == "mine" and f"runs/{experiment.name}" in text + "runs/mine"


def test_the_default_is_quickstart_and_nothing_is_overwritten():
    new(["mine.py"])
    before = Path("mine.py").read_text()
    assert before == template("quickstart").replace("NAME", "mine")
    with pytest.raises(GptjaxError, match=r"mine\.py already exists, and is not overwritten"):
        new(["mine", "--from", "claim"])
    assert Path("mine.py").read_text() == before
    for name in ("../mine", "a/b", "1st", ""):
        with pytest.raises(GptjaxError, match="cannot be the name of a file"):
            new([name])


def test_a_missing_experiment_file_names_the_command():
    with pytest.raises(ConfigError, match=r"mine\.py: no such experiment file; `gptjax new mine` writes a new one"):
        load_experiment("mine.py")


@pytest.mark.slow
def test_the_quickstart_is_trained_and_fine_tuned(single_device):
    new(["quickstart"])
    train(load_experiment("quickstart.py").override(SMALL), Path("runs/quickstart"))
    new(["mine", "--from", "finetune"])
    e = load_experiment("mine.py")
    assert e.init == "runs/quickstart"
    short = {path: value for path, value in SMALL.items() if path.startswith(("train.", "optim."))}
    from gptjax.interop.open import open_model

    metrics = train(e.override(short | {"model.context_length": 512}), Path("runs/mine"), open_init=open_model)
    assert metrics["steps"] == 2 and metrics["val_loss"] > 0


def test_the_sweep_has_a_grid_of_trials():
    new(["mine", "--from", "sweep"])
    variants = load_sweep("mine.py")
    assert len(trials_of(variants, 3, Path("runs/mine"))) == 12
    assert variants[0].name == "mine-ffn=gelu-learning_rate=0.003"


@pytest.mark.slow
def test_the_claim_is_measured(single_device):
    new(["mine", "--from", "claim"])
    text = Path("mine.py").read_text()
    changes = "".join(f"    {path!r}: {value!r},\n" for path, value in SMALL.items())
    text = text.replace("SEEDS = (0, 1)", f"experiment = experiment.override({{\n{changes}}})\nSEEDS = (0,)")
    Path("mine.py").write_text(text)
    (result,) = repro.reproduce([repro.load_claim("mine.py")], Path("runs/repro"))
    assert result.verdict in ("pass", "fail"), result.note
    assert "nats/token" in result.ours
