"""Comparison of variants over seeds: pairs, verdicts, and variants that are not comparable."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import BASE, make_run, make_sweep

from gptjax.config import grid
from gptjax.errors import GptjaxError
from gptjax.lab.comparison import compare, judge
from gptjax.lab.labels import short_labels
from gptjax.lab.page import page
from gptjax.lab.progress import write_note
from gptjax.lab.text_report import as_json, as_text
from gptjax.lab.trials import read_sweep, trials_of, write_sweep
from gptjax.lab.variants import variants_of
from gptjax.tuning.intervals import over_runs


def compared(*folders, **options):
    return compare(variants_of(folders)[0], **options)


def outcomes(c):
    return {row.variant.name: row.verdict.outcome for row in c.rows}


def test_differences_are_paired_by_seed_and_show_what_means_hide(tmp_path):
    """Seeds differ far more than variants, so only pairs show the difference."""
    base = [3.0, 3.5, 4.0]
    moved = [0.1 - 0.001 * i for i in range(3)]
    lower, higher = ([x + sign * m for x, m in zip(base, moved, strict=True)] for sign in (-1, 1))
    losses = {"a": base, "b": lower, "c": higher, "d": [3.1, 3.3, 4.1]}
    c = compared(make_sweep(tmp_path / "s", losses))
    assert outcomes(c) == {"a": "baseline", "b": "better", "c": "worse", "d": "cannot tell"}
    b = c.rows[1]
    assert b.difference.value == pytest.approx(-0.099) and b.pairs == 3
    assert b.value.low < 3.0 and b.value.high > 4.0, "the means alone would show nothing"
    assert b.bits.value == pytest.approx(b.value.value / 2)
    assert outcomes(compared(tmp_path / "s", baseline="b")) == {
        "a": "worse", "b": "baseline", "c": "worse", "d": "cannot tell"
    }  # fmt: skip
    assert set(c.fields) == {"optim.learning_rate"} and c.fields["optim.learning_rate"] == (1e-2, 1e-3, 1e-4, 1e-5)
    assert c.warnings == () and c.unfinished == []


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=1, max_size=8), st.booleans())
def test_the_verdict_flips_exactly_where_the_interval_leaves_out_0(pairs, higher):
    d = over_runs("m", pairs)
    outcome = judge(d, pairs, higher).outcome
    if math.isnan(d.low) or d.low <= 0 <= d.high:
        assert outcome == "cannot tell"
    else:
        assert outcome == ("better" if (d.low > 0) == higher else "worse")


def test_it_flips_at_the_edge():
    pairs = np.array([-0.1, 0.0, 0.1])
    reach = over_runs("m", pairs).high
    assert judge(over_runs("m", pairs + reach * 0.999), list(pairs + reach * 0.999), False).outcome == "cannot tell"
    assert judge(over_runs("m", pairs + reach * 1.001), list(pairs + reach * 1.001), False).outcome == "worse"
    assert judge(over_runs("m", pairs - reach * 1.001), list(pairs - reach * 1.001), False).outcome == "better"


def test_the_number_of_seeds_that_would_decide_it(tmp_path):
    c = compared(make_sweep(tmp_path / "s", {"a": [3.0, 3.0, 3.0], "b": [2.9, 3.05, 2.95], "same": [3.0, 3.0, 3.0]}))
    assert "more seeds would decide it" in c.rows[1].verdict.seeds_hint and c.rows[1].verdict.more_seeds > 1
    assert c.rows[2].verdict.why == "no seed shows a difference" and not c.rows[2].verdict.seeds_hint
    one = compared(make_sweep(tmp_path / "one", {"a": [3.0], "b": [2.0]})).rows[1]
    assert (
        one.verdict.outcome == "cannot tell"
        and "a second seed would show" in one.verdict.why
        and not one.verdict.seeds_hint
    )
    assert one.difference.value == -1.0 and math.isnan(one.difference.low)


def test_unfinished_trials_are_shown(tmp_path):
    folder = make_sweep(tmp_path / "s", {"a": [3.0, 3.1], "b": [2.9, 3.0], "c": []})
    trials = {t.name: t for t in read_sweep(folder)}
    (trials["a-seed1"].folder / "result.json").unlink()
    (trials["b-seed1"].folder / "experiment.json").write_text("{")
    trials["b-seed0"].log.write_text("words of a finished run\n")
    shutil.rmtree(trials["c-seed0"].folder, ignore_errors=True)
    trials["c-seed0"].log.write_text("Traceback\n\nValueError: no good\n")
    write_note(trials["c-seed1"], "ended", code=3, why="step 4: diverged")
    trials["c-seed1"].log.write_text("")
    c = compared(folder)
    states = {r.name: (r.state, r.why) for r in c.unfinished}
    assert states["a-seed1"] == ("stopped", "at step 6 of 6")
    assert states["b-seed1"][0] == "damaged" and "experiment.json" in states["b-seed1"][1]
    assert states["c-seed0"] == ("stopped", "before its first step; last line of its log: ValueError: no good")
    assert states["c-seed1"] == ("failed", "before its first step: step 4: diverged")
    assert c.rows[1].pairs == 1 and c.rows[2].verdict.why == "no finished run"
    text = as_text(c)
    content = as_json(c)
    assert all(name in text for name in states)
    assert sum(r["state"] != "finished" for v in content["variants"] for r in v["runs"]) == 4
    json.dumps(content, allow_nan=False)


def test_a_run_that_diverged_is_no_reason_to_call_the_others_better(tmp_path):
    c = compared(make_sweep(tmp_path / "s", {"a": [3.0, 3.1, 3.2], "b": [2.5, 2.6, None]}))
    assert c.rows[1].verdict.outcome == "cannot tell" and c.rows[1].verdict.why == "the metric is not finite for seed 2"
    assert "b-seed2: its final val_loss is not finite, so the run is not in any mean" in c.warnings


def test_nor_by_any_other_metric_of_that_evaluation(tmp_path):
    folders = []
    for rate, name in enumerate("ab", 1):
        for seed in range(3):
            e, lost = (
                BASE.override({"name": name, "optim.learning_rate": 0.1 * rate, "seed": seed}),
                name == "b" and seed == 2,
            )
            figures = (None, {"val_accuracy": None}) if lost else (3.0, {"val_accuracy": 0.2 * rate + 0.1 * seed})
            folders.append(make_run(tmp_path / f"{name}{seed}", e, figures[0], **figures[1]))
    c = compared(*folders, metric="val_accuracy")
    assert c.rows[1].verdict.outcome == "cannot tell" and c.rows[1].verdict.why == "the metric is not finite for seed 2"


def test_two_sweeps_of_one_file_are_not_one_when_they_differ(tmp_path):
    """The same names of variants, but other steps: neither pooled nor left out."""
    folders = []
    for name, changes in (("short", {}), ("long", {"train.steps": 9}), ("more", {"seed": 2})):
        variants = [BASE.override({"name": v, "optim.learning_rate": r} | changes) for v, r in (("a", 0.1), ("b", 0.2))]
        write_sweep(tmp_path / name, trials := trials_of(variants, 2, tmp_path / name))
        for t in trials:
            make_run(t.folder, t.experiment, 3.0 + 0.1 * t.seed)
        folders.append(tmp_path / name)
    (tmp_path / "more" / "a-seed2").rename(
        tmp_path / "gone"
    )  # one that has not begun, so that its tokens are not known
    variants, left_out = variants_of(folders)
    assert left_out == []
    steps = [[(r.experiment.train.steps, r.experiment.seed) for r in v.records] for v in variants]
    here = BASE.train.steps
    four, two = [(here, 0), (here, 1), (here, 2), (here, 3)], [(9, 0), (9, 1)]
    assert steps == [four, four, two, two]
    assert [v.name for v in variants] == [f"{v} ({s}/{v}-seed0)" for s in ("short", "long") for v in "ab"]


DATA = {"data": "other"}
OTHER = [
    ({"model.context_length": 8}, {}, "model.context_length", True),
    ({"objective.name": "prefix_lm"}, {}, "objective.name", False),
    ({"data.tokenizer": "char"}, DATA, "data (text, tokenizer or split)", True),
    ({"data.source": "other.txt"}, DATA, "data (text, tokenizer or split)", False),
    ({"data.source": "other.txt", "data.tokenizer": "char"}, DATA, "data (text, tokenizer or split)", False),
    ({}, {"provenance": {"reference": "x"}}, "reference", False),
    ({"data.tokenizer": "char"}, DATA | {"val_bytes": 500}, "data (text, tokenizer or split)", False),
]


@pytest.mark.parametrize("changes, made, reason, bits", OTHER)
def test_figures_of_different_text_or_tasks_are_not_compared(tmp_path, changes, made, reason, bits):
    """Bits per byte are compared if only the tokenizer or the context length differ."""
    folders = [make_run(tmp_path / f"a{i}", BASE.override(name="a", seed=i), 3 + 0.1 * i) for i in range(3)]
    e = BASE.override({"name": "b", "optim.learning_rate": 0.5} | changes)
    folders += [make_run(tmp_path / f"b{i}", e.override(seed=i), 2 + 0.1 * i + 0.001 * i, **made) for i in range(3)]
    c = compared(*folders)
    assert outcomes(c) == {"a": "baseline", "b": "not comparable"} and c.rows[1].difference is None
    assert any("not comparable" in w and reason in w for w in c.warnings) and "not comparable" in as_text(c)
    of_bits = compared(*folders, metric="val_bits_per_byte")
    assert outcomes(of_bits)["b"] == ("better" if bits else "not comparable")
    assert outcomes(compared(*folders, metric="seconds"))["b"] == "cannot tell", "speed does not depend on the text"


def test_a_loss_does_not_depend_on_what_only_the_optimiser_sees(tmp_path):
    for i in range(2):
        make_run(tmp_path / f"a{i}", BASE.override(seed=i), 3.0 + i)
        make_run(
            tmp_path / f"b{i}", BASE.override({"seed": i, "name": "z", "objective.z_loss": 0.1}), 2.0 + i + 0.001 * i
        )
    c = compared(*(tmp_path / f"{x}{i}" for x in "ab" for i in range(2)))
    assert outcomes(c) == {"tiny": "baseline", "z": "better"} and not c.warnings


def test_runs_are_one_variant_where_they_differ_in_name_and_seed_alone(tmp_path):
    for i in range(3):
        make_run(tmp_path / f"a{i}", BASE.override(name=f"gelu-seed{i}", seed=i), 3.0 + i)
        make_run(tmp_path / f"b{i}", BASE.override({"name": f"gelu-seed{i}", "seed": i, "model.ffn": "relu"}), 4.0 + i)
    folders = sorted(tmp_path.iterdir())
    variants, left_out = variants_of([*folders, folders[0]])
    assert [(v.name, len(v.records)) for v in variants] == [("gelu (a0)", 3), ("gelu (b0)", 3)] and not left_out
    make_run(tmp_path / "again", BASE.override(name="x", seed=1), 1.0)
    _, left_out = variants_of([*folders, tmp_path / "again"])
    assert left_out == ["again: there are two runs with seed 1; the first one counts"]
    sweep = make_sweep(tmp_path / "s", {"a": [3.0, 3.1]})
    more = make_run(tmp_path / "more", BASE.override({"name": "q", "seed": 7, "optim.learning_rate": 0.01}), 3.3)
    (variant,), _ = variants_of([sweep, more])
    assert variant.by_seed("val_loss") == {0: 3.0, 1: 3.1, 7: 3.3}


def test_changes_in_mid_run_and_other_machines_are_reported(tmp_path):
    changes = [{"when": "", "step": 2, "fields": {"optim.learning_rate": [1, 2]}}]
    make_run(tmp_path / "a", BASE, 3.0, provenance={"changes": changes})
    make_run(tmp_path / "b", BASE.override(name="b", train=dict(steps=7)), 3.0, provenance={"commit": "def+"})
    warnings = compared(tmp_path / "a", tmp_path / "b").warnings
    assert "a: was changed during training (optim.learning_rate)" in warnings
    assert "the runs used different commits: abc, def+" in warnings


@pytest.mark.parametrize("options, message", [
    (dict(baseline="bb"), "--baseline bb: is not a variant; did you mean b? the variants are a, b"),
    (dict(metric="val_los"), "--metric val_los: no finished run has it; did you mean val_loss?"),
    (dict(metric="steps"), "it is not known whether higher or lower is better"),
])  # fmt: skip
def test_an_unknown_baseline_or_metric_is_named(tmp_path, options, message):
    with pytest.raises(GptjaxError) as refused:
        compared(make_sweep(tmp_path / "s", {"a": [3.0], "b": [2.0]}), **options)
    assert message in str(refused.value)


def test_higher_is_better_for_accuracies_also_of_tasks(tmp_path):
    for i in range(2):
        for name, value in (("a", 0.5), ("b", 0.7 + 0.001 * i)):
            tasks = {"tasks": {"sentiment": {"accuracy": value}}}
            rate = {"a": 0.1, "b": 0.2}[name]
            make_run(
                tmp_path / f"{name}{i}",
                BASE.override({"name": name, "seed": i, "optim.learning_rate": rate}),
                3.0,
                **tasks,
            )
    c = compared(*sorted(tmp_path.iterdir()), metric="tasks.sentiment.accuracy")
    assert outcomes(c)["b"] == "better" and c.higher_is_better


def test_a_folder_that_is_neither_and_a_seed_that_is_wrong_are_refused(tmp_path):
    for folder, message in ((tmp_path, "is neither a run nor a sweep"), (tmp_path / "x", "does not exist")):
        with pytest.raises(GptjaxError, match=message):
            variants_of([folder])
    folder = make_sweep(tmp_path / "s", {"a": [3.0, 3.1]})
    e = dataclasses.replace(BASE.override({"name": "a-seed0", "optim.learning_rate": 0.01}), seed=5)
    (folder / "a-seed0" / "experiment.json").write_text(e.to_json())
    with pytest.raises(GptjaxError, match=r"holds a run with seed 5, but sweep\.json says 0"):
        variants_of([folder])


@pytest.mark.parametrize("names, labels", [
    (["sw-ffn=gelu-learning_rate=0.001", "sw-ffn=swiglu-learning_rate=1e-05"], ["gelu, lr 0.001", "swiglu, lr 1e-05"]),
    (["sw-ffn=gelu-num_layers=2", "sw-ffn=swiglu-num_layers=2"], ["gelu", "swiglu"]),
    (["sw-bias=True", "sw-bias=False"], ["bias True", "bias False"]),
    (["sw-a=rope-b=rope", "sw-a=rope-b=alibi", "sw-a=none-b=rope"],
     ["a rope, b rope", "a rope, b alibi", "a none, b rope"]),
    (["sw", "sw-ffn=relu"], ["sw", "relu"]),
    (["sw-ffn=relu", "other-ffn=relu"], ["sw-ffn=relu", "other-ffn=relu"]),
    (["baseline", "wide"], ["baseline", "wide"]),
    (["sw-ffn=relu"], ["sw-ffn=relu"]),
    (["sw-x=1-x=2", "sw-x=2"], ["sw-x=1-x=2", "sw-x=2"]),
])  # fmt: skip
def test_labels_say_only_what_differs_and_stay_unambiguous(names, labels):
    assert short_labels(names) == labels


def test_a_report_has_labels_and_takes_names_and_labels_as_baseline(tmp_path):
    axes = {"model.ffn": ["gelu", "relu"], "optim.learning_rate": [1e-3, 1e-2]}
    write_sweep(tmp_path / "s", trials := trials_of(grid(BASE.override(name="sw"), axes), 2, tmp_path / "s"))
    for i, t in enumerate(trials):
        make_run(t.folder, t.experiment, 3.0 + 0.1 * i)
    c = compared(tmp_path / "s", baseline="relu, lr 0.01")
    assert c.baseline == "relu, lr 0.01" == compared(tmp_path / "s", baseline="sw-ffn=relu-learning_rate=0.01").baseline
    assert as_text(c).splitlines()[0].split()[:4] == ["variant", "seeds", "validation", "loss"]
    assert "nats/token" in as_text(c) and "\ngelu, lr 0.001" in as_text(c) and "sw-ffn" not in as_text(c)
    assert [v["name"] for v in as_json(c)["variants"]] == [t.variant for t in trials[:4]]
    assert "gelu, lr 0.001" in page(c, "t") and "nats/token" in page(c, "t")
