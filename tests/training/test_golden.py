"""What stands on disk keeps loading: a run, a sweep, a token store and a registered prediction from before the names
changed (tests/golden/before-rename, made by the last commit that had the old names)."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import restored, use_one_device

from gptjax.config import DataConfig, Experiment
from gptjax.data.store import open_store
from gptjax.lab import scaling
from gptjax.lab.comparison import compare
from gptjax.lab.progress import state_of
from gptjax.lab.trials import Trial, existing_trials, read_sweep
from gptjax.lab.variants import variants_of
from gptjax.loading import load_experiment
from gptjax.training import checkpoint, train
from gptjax.training.run import open_run

GOLDEN = Path(__file__).parents[1] / "golden" / "before-rename"
NEW_FIELDS = {
    "mlm": {"model.sliding_window": 8, "objective.name": "mlm", "objective.mask_rate": 0.2},
    "fim": {"objective.name": "fim", "objective.fim_rate": 0.7},
    "prefix_lm": {"objective.name": "prefix_lm"},
    "sft": {"objective.name": "sft", "optim.freeze": ["embedding.*"]},
    "dpo": {"objective.name": "dpo", "objective.beta": 0.2},
    "rloo": {"objective.name": "rloo", "objective.reward": "bleu", "objective.num_generations": 4},
    "grpo": {"objective.name": "grpo", "objective.reward": "mod:fn", "objective.max_new_tokens": 16},
    "distill": {"objective.name": "distill", "objective.divergence": "reverse"},
    "rest": {
        "model.rope_theta": 5e5,
        "model.partial_rotary_factor": 0.25,
        "model.mup_base_width": 64,
        "train.spike_sigma": 6.0,
        "train.watchdog_seconds": 100.0,
        "train.trackers": ["wandb"],
    },
}


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Path:
    """A copy to work in, as the current folder, with the cache that lay beside it."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPTJAX_CACHE", str(folder / "cache"))
    use_one_device(monkeypatch)
    return folder


def test_a_run_loads_bit_for_bit_and_resumes_to_its_last_checkpoint(golden):
    expected = json.loads((golden / "expected.json").read_text())
    for step in ("4", "8"):
        state = restored(golden / "run", step)
        assert {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in state.items()} == expected[step]
    run = open_run(golden / "run")
    saved, before = restored(golden / "run", "8"), run.metrics()
    figures = train.train(run.experiment, golden / "run", rollback_to=4)
    again = restored(golden / "run", "8")
    assert figures["steps"] == 8 and figures["samples"] == 64
    # another processor rounds differently: the same bits are promised for the same machine
    for name, array in saved.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    losses = {x["step"]: x["loss"] for x in before if "loss" in x}
    resumed = {x["step"]: x["loss"] for x in open_run(golden / "run").metrics() if "loss" in x}
    np.testing.assert_allclose([resumed[s] for s in range(1, 9)], [losses[s] for s in range(1, 9)], rtol=1e-5)
    twice = {}
    for _ in range(2):  # and twice on this machine gives the same bits
        train.train(run.experiment, golden / "run", rollback_to=4)
        state = restored(golden / "run", "8")
        twice = twice or state
        assert all(np.array_equal(twice[name], x) for name, x in state.items())


def test_a_finished_run_has_nothing_to_do_and_every_checksum_holds(golden, capsys):
    run = open_run(golden / "run")
    assert [checkpoint.problem(c) for c in checkpoint.listing(run.checkpoints)] == [None, None]
    before = (golden / "run" / "metrics.jsonl").read_bytes()
    figures = train.train(load_experiment("run/experiment.json"), golden / "run")
    assert figures["val_loss"] == json.loads((GOLDEN / "run" / "result.json").read_text())["val_loss"]
    assert (golden / "run" / "metrics.jsonl").read_bytes() == before


def test_a_store_is_found_by_its_old_key(golden):
    (old,) = (golden / "cache" / "stores").iterdir()
    store = open_store(DataConfig(source="corpus.txt"))
    assert store.key == old.name and list((golden / "cache" / "stores").iterdir()) == [old]
    text = store.tokenizer.decode(np.concatenate([store.train[0].ids, store.validation[0].ids]))
    assert text == (golden / "corpus.txt").read_text()


def test_a_sweep_is_read_and_has_nothing_to_train(golden):
    trials = read_sweep(golden / "sweep")
    assert [t.name for t in trials] == [f"width{w}-seed0" for w in (8, 16, 24, 32)]
    assert all(state_of(t).done for t in trials)
    assert existing_trials(golden / "sweep", trials).keys() == {t.name for t in trials}
    assert trials[0].experiment.model.sliding_window == 12 and trials[0].experiment.train.watchdog_seconds == 500.0
    losses = {t.name: json.loads((t.folder / "result.json").read_text())["val_loss"] for t in trials}
    variants, left_out = variants_of([golden / "sweep"])
    assert not left_out
    compared = compare(variants)
    assert {row.variant.name: row.value.value for row in compared.rows} == pytest.approx(
        {name.removesuffix("-seed0"): loss for name, loss in losses.items()}
    )


def test_a_registered_prediction_keeps_its_seal_and_its_score(golden):
    trials = read_sweep(golden / "study")
    large = load_experiment(str(golden / "study" / "large.json"))
    study = scaling.Study(
        golden / "study", tuple(trials), Trial(large.name, large.seed, large, golden / "study" / "large")
    )
    kept = scaling.read_prediction(study)
    assert kept is not None and kept["loss"] == pytest.approx(4.3724837702286665)
    assert scaling.score(study) == json.loads((GOLDEN / "study" / "score.json").read_text())


@pytest.mark.parametrize("number", range(len(NEW_FIELDS)), ids=list(NEW_FIELDS))
def test_old_spellings_in_json_are_read(number):
    name, wanted = list(NEW_FIELDS.items())[number]
    old = json.loads((GOLDEN / "experiments.json").read_text())[number]
    experiment = Experiment.from_json(json.dumps(old))
    new = json.loads(experiment.to_json())
    for path, value in wanted.items():
        section, _, field = path.partition(".")
        assert new[section][field] == value, name
    assert Experiment.from_json(experiment.to_json()) == experiment
    for section in ("model", "data", "objective", "optim", "train", "mesh"):  # and no other value changed
        unlike = sorted(map(repr, old[section].values())), sorted(map(repr, new[section].values()))
        renamed = {repr(old["objective"]["name"]), repr(new["objective"]["name"])}
        assert [x for x in unlike[0] if x not in renamed] == [x for x in unlike[1] if x not in renamed], section


def test_a_pattern_that_froze_an_untied_head_still_does():
    old = json.loads((GOLDEN / "experiments.json").read_text())[3]
    assert Experiment.from_json(json.dumps(old)).optim.freeze == ("embedding.*",)  # tied: there is no head
    old["model"]["tie_embeddings"] = False
    assert Experiment.from_json(json.dumps(old)).optim.freeze == ("embedding.*", "head.*")
