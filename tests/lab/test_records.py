"""Listing folders of runs: intact, damaged and untrusted ones."""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import BASE, make_run, make_sweep

from gptjax.errors import RunError
from gptjax.lab.listing import as_json, as_text
from gptjax.lab.records import find_runs, finite_numbers, inspect_run
from gptjax.training import lock


def state_of(folder):
    record = inspect_run(folder)
    as_text([record])
    json.dumps(as_json([record]), allow_nan=False)
    return record.state, record.why


def test_the_state_of_a_run(finished_run, tmp_path):
    record = inspect_run(finished_run)
    assert (record.state, record.step, record.why) == ("finished", 6, "") and record.final_metrics["num_params"] > 0
    assert record.started and "--- sample" not in record.samples()
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    assert state_of(run) == ("stopped", "at step 6 of 6")
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < 6))
    assert state_of(run) == ("stopped", "at step 6 of 6"), "a checkpoint counts as well"
    with lock.hold(run):
        assert state_of(run) == ("running", "at step 6 of 6")
    assert state_of(run)[0] == "stopped" and state_of(tmp_path / "none") == ("missing", "has not started")
    with lock.hold(tmp_path / "new"):
        assert state_of(tmp_path / "new")[0] == "running"
    (run / "provenance.json").write_text(
        json.dumps(json.loads((run / "provenance.json").read_text()) | {"imported": "x"})
    )
    assert state_of(run)[0] == "imported"


def spoil(name, content):
    return lambda run: (run / name).write_text(content)


def replace_by(name, make):
    def do(run):
        (run / name).unlink()
        make(run / name)

    return do


DAMAGES = [
    (spoil("experiment.json", "{"), "experiment.json: is damaged"),
    (spoil("experiment.json", "[]"), "experiment.json: is damaged"),
    (spoil("experiment.json", '{"format": 9}'), "format is 9"),
    (spoil("experiment.json", '{"format": 1, "model": {"layers_": 3}}'), "model.layers_: no such field"),
    (spoil("experiment.json", "[" * 100_000), "is damaged"),
    (spoil("result.json", "nothing"), "result.json: is damaged"),
    (spoil("result.json", "[1]"), "a JSON object was expected"),
    (spoil("metrics.jsonl", '{"step": "x"}\n'), "metrics.jsonl, line 1: is damaged"),
    (spoil("provenance.json", "\x00"), "provenance.json: is damaged"),
    (lambda run: (run / "provenance.json").unlink(), "provenance.json: No such file"),
    (lambda run: (run / "experiment.json").unlink(), "has no experiment.json"),
    (replace_by("metrics.jsonl", lambda path: path.symlink_to("/etc/hostname")), "is a link out of the run folder"),
    (replace_by("metrics.jsonl", os.mkfifo), "neither a file nor a folder"),
    (replace_by("metrics.jsonl", lambda path: path.mkdir()), "is not a plain file"),
]


@pytest.mark.parametrize("damage, why", DAMAGES)
def test_a_damaged_run_is_a_line_that_says_why(tmp_path, damage, why):
    make_run(tmp_path / "whole", BASE, 3.0)
    damage(make_run(tmp_path / "bad", BASE, 3.0))
    found = {r.name: r for r in find_runs(tmp_path)}
    assert found["whole"].state == "finished" and found["bad"].state == "damaged" and why in found["bad"].why
    assert "\n" not in found["bad"].why and str(tmp_path) not in found["bad"].why
    assert len(as_text(list(found.values())).splitlines()) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["format", "model", "steps", "val_loss", "num_params", "started", "devices", "seed", "tokens"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["experiment.json", "provenance.json", "result.json"]), st.dictionaries(KEYS, json_values))
def test_any_untrusted_json_is_listed(tmp_path, name, values):
    run = tmp_path / "run"
    if not run.exists():
        make_run(run, BASE, 3.0)
    before = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(before | values))
    try:
        assert len(find_runs(tmp_path)) == 1 and state_of(run)[0] in ("finished", "damaged", "stopped")
    finally:
        (run / name).write_text(json.dumps(before))


def test_no_code_in_an_untrusted_folder_runs(tmp_path):
    run = make_run(tmp_path / "run", BASE, 3.0)
    for name in ("sweep.py", "experiment.py", "__init__.py", "conftest.py"):
        (run / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(find_runs(tmp_path)) == 1 and not (tmp_path / "ran").exists()
    evil = make_run(tmp_path / "evil", BASE, 3.0, provenance={"started": "\x1b[31mred"})
    assert "\x1b" not in as_text([inspect_run(evil)])


def test_sweeps_and_runs_are_found_however_deep(tmp_path):
    make_run(tmp_path / "a", BASE, 3.0)
    make_run(tmp_path / "deep" / "er" / "b", BASE, 3.0)
    make_sweep(tmp_path / "deep" / "s", {"x": [3.0], "y": [2.0, 2.5]})
    make_run(tmp_path / "a" / "checkpoints" / "no", BASE, 1.0)
    make_run(tmp_path / ".hidden", BASE, 1.0)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.json").write_text('{"format": 1, "trials": [{"name": 3}]}')
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "sweep.json").write_text(
        '{"format": 1, "trials": [{"name": "../a", "variant": "", "seed": 0}]}'
    )
    found = {r.name: r.state for r in find_runs(tmp_path)}
    assert found == {
        "a": "finished", "deep/er/b": "finished", "deep/s/x-seed0": "finished", "deep/s/y-seed0": "finished",
        "deep/s/x-seed1": "missing", "deep/s/y-seed1": "finished", "bad": "damaged", "worse": "damaged",
    }  # fmt: skip
    assert [r.name for r in find_runs(tmp_path / "a")] == ["a"]
    for path in (tmp_path / "none", tmp_path / "a" / "result.json"):
        with pytest.raises(RunError, match="name a folder of runs"):
            find_runs(path)


def test_only_finite_numbers_are_metrics():
    values = {
        "a": 1,
        "b": {"c": 2.5, "d": "3", "e": True},
        "f": float("nan"),
        "g": float("inf"),
        "h": 10**400,
        "i": [1],
    }
    assert dict(finite_numbers(values)) == {"a": 1, "b.c": 2.5}
