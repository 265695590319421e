"""Sweeps: which trials there are, where each is, and that what is missing is trained once, whoever is killed.

Most trials here are trained by `LEARNER`, a small process that keeps the promises of `gptjax train`: it holds the lock,
logs its steps, saves on SIGTERM, goes on, and leaves a result. The last test trains for real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import TINY, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE, QUICK, ROOT

from gptjax.commands.sweep import sweep
from gptjax.config import Experiment, Search, Uniform, grid, zip_
from gptjax.errors import ConfigError, GptjaxError, Interrupted, RunError
from gptjax.lab import local
from gptjax.lab.comparison import compare
from gptjax.lab.live_table import LiveTable
from gptjax.lab.local import Local, divide_machine
from gptjax.lab.progress import memory_needed, read_note, seconds_needed, state_of, write_note
from gptjax.lab.search import SearchPlan
from gptjax.lab.sweep import FixedPlan, train_missing
from gptjax.lab.trials import Trial, read_sweep, trials_of, write_sweep
from gptjax.lab.variants import variants_of
from gptjax.loading import load_experiment, load_sweep
from gptjax.model.size import num_params
from gptjax.training.lock import holder

LEARNER = """
import json, signal, sys, time
from pathlib import Path
from gptjax.training.lock import hold

experiment, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with hold(folder):
    if "bad" in experiment["name"]:
        print("what went wrong")
        sys.exit(2)
    log = folder / "metrics.jsonl"
    first = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(first + 1, experiment["train"]["steps"] + 1):
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\\n")
        time.sleep(0.02)
        if stop:
            sys.exit(75)
    result = {"steps": step, "val_loss": 0.5, "seconds": 1.0, "memory_bytes": 1000}
    (folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def learner(tmp_path, monkeypatch):
    """Trials are trained by `LEARNER`, which is a file for processes of other Pythons as well."""
    script = tmp_path / "learner.py"
    script.write_text(LEARNER)
    command = lambda trial: [sys.executable, str(script), str(trial.file), str(trial.folder)]  # noqa: E731
    monkeypatch.setattr(Trial, "command", property(command))
    return script


def made(folder: Path, names=("a", "b"), seeds: int = 2, steps: int = 5) -> list[Trial]:
    variants = [TINY.override(name=name, train=dict(steps=steps), model=dict(num_layers=i + 1)) for i, name in
                enumerate(names)]  # fmt: skip
    trials = trials_of(variants, seeds, folder)
    write_sweep(folder, trials)
    return trials


def silent(trials, states, changed):
    pass


def test_a_trial_is_a_variant_with_a_seed_and_is_kept(tmp_path):
    trials = made(tmp_path / "s", seeds=2)
    assert [t.name for t in trials] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert [(t.variant, t.experiment.seed) for t in trials] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert read_sweep(tmp_path / "s") == trials
    assert load_experiment(str(trials[2].file)) == trials[2].experiment, "gptjax train can take it"
    more = made(tmp_path / "s", ("a", "b", "c"), seeds=1)
    assert read_sweep(tmp_path / "s") == [*trials, more[2]], "existing trials stay"
    with pytest.raises(RunError, match=r"another sweep \(a-seed0: train.steps: 5 there, 9 now\)"):
        made(tmp_path / "s", steps=9)
    assert read_sweep(tmp_path / "s") == [*trials, more[2]]
    (tmp_path / "s" / "sweep.json").write_text('{"format": 1, "trials": [{"name": "../x", "variant": "", "seed": 0}]}')
    with pytest.raises(RunError, match=r"'../x' is not the name"):
        read_sweep(tmp_path / "s")


def test_all_problems_of_a_sweep_are_reported_at_once(tmp_path):
    bad = TINY.override(name="c", model=dict(num_heads=3))
    with pytest.raises(ConfigError) as caught:
        trials_of([TINY, TINY.override(name="twin"), bad, TINY.override(name="c", seed=4)], 1, tmp_path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["tiny and twin", "c", "c"]
    assert "are the same experiment" in caught.value.problems[0] and "does not divide" in caught.value.problems[1]
    close = [TINY.override(name="x", seed=1), TINY.override(name="y", seed=2)]
    with pytest.raises(ConfigError, match=r"^y-seed2 and x-seed2: are the same experiment.*take fewer seeds"):
        trials_of(close, 2, tmp_path)
    with pytest.raises(ConfigError, match="300 bytes are too many for a folder name"):
        trials_of([TINY.override(name="n" * 300)], 1, tmp_path)
    with pytest.raises(ConfigError, match=r"model.num_layer.*num_layers"):
        grid(TINY, {"model.num_layer": [1, 2]})
    with pytest.raises(ConfigError, match=r"seed 2, model.num_layers 1"):
        zip_(TINY, {"seed": [1, 2], "model.num_layers": [1]})
    pairs = zip_(TINY, {"model.num_layers": [1, 2], "model.embed_dim": [16, 32]})
    assert [(e.name, e.model.num_layers, e.model.embed_dim) for e in pairs] == [
        ("tiny-num_layers=1-embed_dim=16", 1, 16), ("tiny-num_layers=2-embed_dim=32", 2, 32)
    ]  # fmt: skip


def test_a_file_may_hold_a_sweep_an_experiment_or_neither(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from gptjax.config import Experiment, grid\nsweep = grid(Experiment(), {'seed': [1, 2]})\n")
    assert [e.seed for e in load_sweep(str(path))] == [1, 2]
    with pytest.raises(ConfigError, match="it has a sweep: gptjax sweep"):
        load_experiment(str(path))
    other = tmp_path / "other.py"
    other.write_text("sweep = 3")
    with pytest.raises(ConfigError, match="defines no `sweep`"):
        load_sweep(str(other))
    (tmp_path / "x.json").write_text('{"format": 1, "nmae": "x"}')
    with pytest.raises(ConfigError, match=r"x.json: nmae: no such field"):
        load_experiment(str(tmp_path / "x.json"))


@given(st.integers(1, 9), st.integers(1, 16), st.integers(0, 8))
def test_the_machine_is_divided_evenly(workers, cores, cards):
    made = divide_machine(workers, list(range(cores)), [str(i) for i in range(cards)])
    used = [core for slot in made for core in slot.cores]
    assert all(slot.cores for slot in made) and set(used) <= set(range(cores))
    if workers <= cores:
        assert sorted(used) == list(range(cores)), "every core has one worker"
    taken = [gpu for slot in made for gpu in slot.gpus]
    if cards >= workers:
        assert sorted(taken, key=int) == [str(i) for i in range(cards)]
    elif cards:
        assert all(len(slot.gpus) == 1 for slot in made), "several workers to a GPU"
        for gpu in set(taken):
            assert sum(float(p.environment()["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for p in made if p.gpus == (gpu,)) <= 1
    else:
        assert not taken and all(slot.environment() == {} for slot in made)


def test_a_failing_trial_does_not_stop_the_others_and_is_tried_again(tmp_path, learner, capsys):
    trials = made(tmp_path / "s", ("good", "bad"))
    with LiveTable() as show:
        states = train_missing(FixedPlan(trials), Local(2), show)
    assert {name: s.status for name, s in states.items()} == {
        "good-seed0": "done", "bad-seed0": "failed", "good-seed1": "done", "bad-seed1": "failed"
    }  # fmt: skip
    err = capsys.readouterr().err
    assert "bad-seed0 failed (exit code 2). The last lines of its log:\n    what went wrong" in err
    notes = {t.name: read_note(t) for t in trials}
    learner.write_text(LEARNER.replace('"bad"', '"worse"'))  # mended
    states = train_missing(FixedPlan(trials), Local(1), silent)
    assert all(s.done for s in states.values())
    assert {t.name for t in trials if read_note(t) != notes[t.name]} == {"bad-seed0", "bad-seed1"}, (
        "only what was missing"
    )


def test_a_trial_that_is_killed_has_failed_unless_we_killed_it(tmp_path, learner):
    learner.write_text(
        LEARNER.replace("sys.exit(2)", "os.kill(os.getpid(), signal.SIGKILL)").replace("json,", "json, os,")
    )
    trials = made(tmp_path / "s", ("bad", "good"), seeds=1)
    states = train_missing(FixedPlan(trials), Local(1), silent)
    assert states["bad-seed0"].status == "failed" and "out of memory" in states["bad-seed0"].why
    assert states["good-seed0"].done
    trial = made(tmp_path / "t", ("slow",), seeds=1, steps=4000)[0]
    job = Local(1).start([trial], {})[trial.name]
    wait(lambda: state_of(trial).step > 1)
    job.kill()
    wait(lambda: job.poll() is not None)
    assert job.poll() == 75 and state_of(trial).status == "stopped"


def test_no_more_than_fit_run_at_once(tmp_path, learner, monkeypatch):
    trials = made(tmp_path / "s", steps=8)
    needed = memory_needed(trials[1].experiment)
    learner.write_text(LEARNER.replace('"memory_bytes": 1000', f'"memory_bytes": {int(needed)}'))
    monkeypatch.setattr(local, "memory_available", lambda: 2.5 * needed)
    seen = []
    train_missing(
        FixedPlan(trials),
        Local(4),
        lambda _, states, __: seen.append(sum(s.status == "running" for s in states.values())),
    )
    assert max(seen) == 2
    trials = made(tmp_path / "t", seeds=1)
    monkeypatch.setattr(local, "memory_available", lambda: 0.0)
    states = train_missing(FixedPlan(trials), Local(2), silent)
    assert all(s.done for s in states.values()), "one at a time is always tried"


def test_the_memory_that_is_expected_grows_with_what_takes_it():
    small, wide = TINY, TINY.override(model=dict(embed_dim=512, num_heads=8, context_length=256))
    assert memory_needed(small) < memory_needed(wide)
    state = 16 * num_params(wide.resolved(257).model)["total"]
    assert memory_needed(wide) > state
    half = wide.override(train=dict(microbatches=2))
    assert state < memory_needed(half) < memory_needed(wide)


def test_ctrl_c_saves_every_trial_and_the_same_command_resumes(tmp_path, learner):
    trials = made(tmp_path / "s", seeds=1, steps=400)
    process = conductor(tmp_path, learner)
    wait(lambda: all(state_of(t).step > 3 for t in trials))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "every trial of this command is saved" in err
    assert [state_of(t).status for t in trials] == ["stopped", "stopped"]
    assert not any(holder(t.folder) for t in trials)
    learner.write_text(LEARNER.replace("time.sleep(0.02)", "pass"))
    assert all(s.done for s in train_missing(FixedPlan(trials), Local(2), silent).values())
    for trial in trials:
        steps = [json.loads(line)["step"] for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 401)), "no step is computed twice"


def test_a_stop_signal_is_forwarded_whenever_it_comes(tmp_path, learner):
    trials = made(tmp_path / "s", seeds=1, steps=4000)
    signalled = []

    def show(trials, states, changed) -> None:
        if not signalled and all(s.step > 3 for s in states.values()):
            signalled.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # while the table is drawn, not in the pause between two polls

    with pytest.raises(Interrupted, match="every trial of this command is saved"):
        train_missing(FixedPlan(trials), Local(2), show)
    assert all(3 < state_of(t).step < 4000 for t in trials)
    assert not any(holder(t.folder) for t in trials)


@pytest.mark.slow
def test_after_kill_9_the_same_command_waits_for_what_still_runs_and_runs_nothing_twice(tmp_path, learner):
    trials = made(tmp_path / "s", seeds=2, steps=400)
    process = conductor(tmp_path, learner)
    wait(lambda: all(state_of(t).step > 3 for t in trials[:2]))
    process.kill()
    process.wait()
    assert [state_of(t).status for t in trials] == ["running", "running", "new", "new"]
    assert "process" in state_of(trials[0]).why
    states = train_missing(FixedPlan(trials), Local(2), silent)
    assert all(s.done for s in states.values())
    for trial in trials:
        steps = [json.loads(line)["step"] for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 401)), trial.name


def conductor(tmp_path: Path, learner: Path) -> subprocess.Popen:
    """A process of its own that trains the sweep in `s`."""
    script = tmp_path / "conductor.py"
    script.write_text(
        f"""
import sys
from pathlib import Path
from gptjax.errors import GptjaxError
from gptjax.lab.local import Local
from gptjax.lab.sweep import FixedPlan, train_missing
from gptjax.lab.trials import Trial, read_sweep

Trial.command = property(lambda t: [sys.executable, {str(learner)!r}, str(t.file), str(t.folder)])
try:
    train_missing(FixedPlan(read_sweep(Path({str(tmp_path / "s")!r}))), Local(2), lambda *_: None)
except GptjaxError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""
    )
    return subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait(what, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_the_state_of_a_trial(tmp_path):
    trial = made(tmp_path / "s")[0]
    assert state_of(trial).status == "new"
    write_note(trial, "submitted", job="7")
    assert state_of(trial, ours=True).status == "waiting" and state_of(trial).status == "new"
    write_note(trial, "ended", code=3)
    assert (state_of(trial).status, state_of(trial).why) == ("failed", "exit code 3")
    write_note(trial, "ended", code=-9)
    assert (state_of(trial).status, "signal 9" in state_of(trial).why) == ("failed", True)
    for code in (0, 75, -15):  # the last: asked to stop before it could save
        write_note(trial, "ended", code=code)
        assert state_of(trial).status == "new"
    write_note(trial, "cancelled", why="by hand")
    assert (state_of(trial).status, state_of(trial).why) == ("cancelled", "by hand")
    write_note(trial, "ended", code=75)
    trial.folder.mkdir()
    (trial.folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "val_loss": 2.5}\n{"step": 3, "lo'
    )
    s = state_of(trial)
    assert (s.status, s.step, s.loss, s.val_loss) == ("stopped", 2, 3.0, 2.5), (
        "a line that is being written is left out"
    )


def test_the_remaining_time_is_estimated_from_finished_and_running_trials(tmp_path):
    trials = made(tmp_path / "s", ("small", "deep"), seeds=2, steps=10)
    states = {t.name: state_of(t) for t in trials}
    assert seconds_needed(trials, states, None) == {}
    left = seconds_needed(trials, states, 1e9)
    assert left["deep-seed0"] > left["small-seed0"] > 0
    size = trials[1].experiment.train.batch_size * trials[1].experiment.model.context_length
    trials[1].folder.mkdir()
    metrics = {"step": 4, "loss": 2.0, "tokens_per_second": 3 * size}
    (trials[1].folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    states = {t.name: state_of(t) for t in trials}
    left = seconds_needed(trials, states, 1e9)
    assert left["deep-seed0"] == pytest.approx(2), "6 steps at its own speed of 3 steps/s"
    assert left["deep-seed1"] == pytest.approx(10 / 3) and left["small-seed0"] < left["deep-seed1"]
    trials[0].folder.mkdir()
    result = {"steps": 10, "val_loss": 1.0, "seconds": 40.0, "memory_bytes": 5}
    (trials[0].folder / "result.json").write_text(json.dumps(result))
    states = {t.name: state_of(t) for t in trials}
    left = seconds_needed(trials, states, None)
    assert left["small-seed0"] == 0 and left["small-seed1"] == pytest.approx(40) and left["deep-seed1"] > 40
    assert left["deep-seed0"] == pytest.approx(2)


def test_the_command_shows_the_status_overrides_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        f"from gptjax.config import Experiment, grid\nbase = Experiment.from_json({TINY.to_json()!r})\n"
        "sweep = grid(base, {'model.ffn': ['gelu', 'relu']})\n"
    )
    sweep(["mine.py", "--status", "--seeds", "2", "--set", "train.steps=70", "model.norm=rmsnorm"])
    out = capsys.readouterr().out
    assert out.count("0/70") == 4 and "runs/mine: 4 trials (4 new)" in out
    assert not Path("runs").exists(), "--status writes nothing"
    for arguments, message in (
        (["mine.py", "--set", "train.stpes=1"], "stpes.*steps"),
        (["mine.py", "--set", "steps"], "must be section.field=VALUE"),
        (["mine.py", "--seeds", "0"], "must be at least 1"),
        (["mine.py", "--workers", "0"], "must be at least 1"),
        (["mine.py", "--executor", "slurm", "--slurm.minutes", "2"], "saves 2 minutes before its end"),
        (["mine.py", "--executor", "slurm", "--slurm.parallel", "0"], "--slurm.parallel: must be at least 1"),
        (["mine.py", "--slurm.partition", "gpu"], "--partition.*no effect without --executor slurm"),
        (["mine.py", "--executor", "slurm", "--workers", "2"], "--workers.*no effect with --executor slurm"),
        (["mine.py", "--set", "model.num_heads=7"], "does not divide"),
    ):
        with pytest.raises(GptjaxError, match=message):
            sweep(arguments)
    write_sweep(
        Path("runs/mine"),
        trials_of([TINY.override(name="tiny-ffn=gelu", model=dict(ffn="gelu"))], 1, Path("runs/mine")),
    )
    with pytest.raises(GptjaxError, match=r"holds another sweep .*train.steps: \d+ there, 70 now"):
        sweep(["mine.py", "--status", "--set", "train.steps=70"])
    Path("search.py").write_text(
        Path("mine.py")
        .read_text()
        .replace(
            "sweep = grid(base, {'model.ffn': ['gelu', 'relu']})",
            "from gptjax.config import Search\nsearch = Search(base, {'model.ffn': ['gelu', 'relu']})",
        )
    )
    with pytest.raises(GptjaxError, match=r"defines a `search` and no `sweep`.*--search"):
        sweep(["search.py", "--status"])


SEARCHER = LEARNER.replace(
    '{"step": step, "loss": 1 / step}', '{"step": step, "val_loss": (experiment["optim"]["learning_rate"] - 0.3) ** 2}'
).replace('"val_loss": 0.5', '"val_loss": (experiment["optim"]["learning_rate"] - 0.3) ** 2')  # best at 0.3


def searched(folder: Path, method: str, count: int, workers: int = 2) -> SearchPlan:
    e = TINY.override(name="s", train=dict(steps=30, eval_every=5, checkpoint_every=5))
    return SearchPlan(Search(e, {"optim.learning_rate": Uniform(0.01, 1.0)}), method, count, workers, folder)


@pytest.mark.slow
def test_a_search_finds_the_best_values_and_is_resumed(tmp_path, learner):
    pytest.importorskip("optuna")
    learner.write_text(SEARCHER.replace("time.sleep(0.02)", "pass"))
    states = train_missing(searched(tmp_path / "s", "tpe", 6), Local(2), silent)
    assert len(states) == 6 and all(s.done for s in states.values())
    first = {t.name: read_note(t) for t in read_sweep(tmp_path / "s")}
    plan = searched(tmp_path / "s", "tpe", 14)
    assert len(train_missing(plan, Local(2), silent)) == 14
    assert {t.name: read_note(t) for t in read_sweep(tmp_path / "s")[:6]} == first, "finished trials stay"
    rates = [t.experiment.optim.learning_rate for t in read_sweep(tmp_path / "s")]
    _, value, values = plan.best()
    nearest = min(rates, key=lambda rate: abs(rate - 0.3))
    assert values == {"optim.learning_rate": nearest} and value == pytest.approx((nearest - 0.3) ** 2)
    assert len(set(rates)) == 14 and abs(nearest - 0.3) < 0.1


@pytest.mark.slow
def test_successive_halving_prunes_the_worse_trials(tmp_path, learner, monkeypatch):
    pytest.importorskip("optuna")
    learner.write_text(SEARCHER.replace("time.sleep(0.02)", "time.sleep(0.05)"))
    monkeypatch.setattr("gptjax.lab.sweep.POLL_SECONDS", 0.1)
    states = train_missing(searched(tmp_path / "s", "halving", 8), Local(2), silent)
    trials = {t.name: t for t in read_sweep(tmp_path / "s")}
    distance = {name: abs(t.experiment.optim.learning_rate - 0.3) for name, t in trials.items()}
    ended = {kind: [n for n, s in states.items() if s.status == kind] for kind in ("done", "cancelled")}
    assert ended["done"] and ended["cancelled"] and len(ended["done"]) + len(ended["cancelled"]) == 8
    assert min(distance, key=distance.get) in ended["done"], "the best is not pruned"
    assert all("pruned at step" in states[name].why for name in ended["cancelled"])
    again = {t.name: read_note(t) for t in trials.values()}
    train_missing(searched(tmp_path / "s", "halving", 8), Local(2), silent)
    assert {t.name: read_note(t) for t in trials.values()} == again, "nor is it tried again"


@pytest.mark.slow
def test_a_search_continues_after_trials_that_are_killed_or_diverge(tmp_path, learner):
    pytest.importorskip("optuna")
    rate = 'experiment["optim"]["learning_rate"]'
    learner.write_text(
        SEARCHER.replace("time.sleep(0.02)", f"{rate} < 0.5 or os.kill(os.getpid(), signal.SIGKILL)")
        .replace("json,", "json, os,")
        .replace(f'"steps": step, "val_loss": ({rate} - 0.3) ** 2', '"steps": step, "val_loss": None')
    )
    plan = searched(tmp_path / "s", "random", 6, workers=1)
    states = train_missing(plan, Local(1), silent)
    rates = {t.name: t.experiment.optim.learning_rate for t in read_sweep(tmp_path / "s")}
    assert {name: s.status for name, s in states.items()} == {
        n: "done" if r < 0.5 else "failed" for n, r in rates.items()
    }
    assert {s.status for s in states.values()} == {"done", "failed"} and len(states) == 6
    assert plan.best() is None, "none of them has a loss"


def test_a_search_is_resumed_in_its_own_folder_only(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("gptjax.lab.search.write_sweep", mock.Mock(side_effect=KeyboardInterrupt))
        searched(tmp_path / "s", "random", 2).trials({})
    searched(tmp_path / "s", "random", 2)
    (trial,) = read_sweep(tmp_path / "s")
    assert trial.file.exists(), "a trial created before the kill is written after it"
    e = TINY.override(name="s", train=dict(steps=31, eval_every=5, checkpoint_every=5))
    space = {"optim.learning_rate": Uniform(0.01, 1.0)}
    with pytest.raises(RunError, match="holds another sweep"):
        SearchPlan(Search(e, space), "random", 2, 1, tmp_path / "s")
    with pytest.raises(RunError, match="holds a search for the least val_loss, not for the most val_accuracy"):
        SearchPlan(Search(e, space, "val_accuracy", lower_is_better=False), "random", 2, 1, tmp_path / "s")


def test_two_commands_may_make_the_same_search(tmp_path, learner):
    pytest.importorskip("optuna")
    learner.write_text(SEARCHER.replace("time.sleep(0.02)", "pass"))
    one, other = searched(tmp_path / "s", "random", 2), None
    one.trials({})
    other = searched(tmp_path / "s", "random", 2)
    states = train_missing(one, Local(2), silent)
    assert {t.name for t in other.trials(states)} == set(states) and other.best() == one.best()


def test_what_another_command_has_pruned_is_not_started_again(tmp_path):
    pytest.importorskip("optuna")
    one = searched(tmp_path / "s", "halving", 2)
    trials = one.trials({})
    other = searched(tmp_path / "s", "halving", 2)
    for trial, loss in zip(trials, (0.1, 0.9), strict=True):
        trial.folder.mkdir()
        (trial.folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "val_loss": loss}) + "\n")
        write_note(trial, "started")
        one.trials({t.name: state_of(t, ours=True) for t in trials})
    (worse,) = one.pruned({})
    other.trials({t.name: state_of(t) for t in trials})
    assert worse == trials[1].name and list(other.pruned({})) == [worse]


def test_a_search_says_what_is_wrong_with_it(tmp_path):
    pytest.importorskip("optuna")
    for space, message in (
        ({"optim.learning_rat": [1, 2]}, "learning_rat.*learning_rate"),
        ({"seed": []}, "seed: has no values"),
        ({}, "names no field"),
    ):
        with pytest.raises(ConfigError, match=message):
            Search(TINY, space)
    with pytest.raises(ConfigError, match="low must be less"):
        Uniform(2, 1)
    with pytest.raises(ConfigError, match="halving compares"):
        SearchPlan(Search(TINY.override(train=dict(eval_every=0)), {"seed": [1, 2]}), "halving", 2, 1, tmp_path)
    with pytest.raises(ConfigError, match="does not divide"):
        SearchPlan(Search(TINY, {"model.num_heads": [3, 4]}), "random", 2, 1, tmp_path)


@pytest.mark.slow
def test_a_real_sweep_shares_its_data_and_is_resumed_after_kill_9_of_everything(tmp_path):
    corpus = write_corpus(tmp_path)
    base = TINY.override({"data.source": str(corpus), "data.tokenizer": "char", "train.steps": 300})
    base = base.override({"train.eval_every": 30, "train.checkpoint_every": 30, "train.sample_tokens": 0})
    (tmp_path / "mine.py").write_text(
        f"from gptjax.config import Experiment, grid\nbase = Experiment.from_json({base.to_json()!r})\n"
        "sweep = grid(base, {'model.ffn': ['gelu', 'relu']})\n"
    )
    sweep = [sys.executable, "-m", "gptjax", "sweep", str(tmp_path / "mine.py"), "--workers", "2", "--seeds", "2"]
    command = [*sweep, "--run-dir", str(tmp_path / "s")]
    environment = os.environ | QUICK | {"GPTJAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    wait(lambda: any(path.read_text().count("\n") > 5 for path in tmp_path.glob("s/*/metrics.jsonl")), 120)
    children = subprocess.run(["pgrep", "-f", str(tmp_path / "s")], capture_output=True, text=True).stdout.split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "4 trials (4 done)" in done.stderr, done.stderr
    assert len(list((tmp_path / "cache/stores").glob("*/store.json"))) == 1, "tokenised once"
    for trial in read_sweep(tmp_path / "s"):
        assert state_of(trial).step == 300
        lines = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted(set(steps)), "no step is there twice"
    relu = Experiment.from_json((tmp_path / "s/tiny-ffn=relu-seed0/experiment.json").read_text())
    assert relu.model.ffn == "relu"
    undisturbed = [*sweep, "--run-dir", str(tmp_path / "t")]
    subprocess.run(undisturbed, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    rows, others = (compare(variants_of([tmp_path / name])[0]).rows for name in ("s", "t"))
    reports = [[(r.variant.name, r.value, r.bits, r.difference, r.verdict) for r in them] for them in (rows, others)]
    assert reports[0] == reports[1] and all(row.pairs == 2 for row in rows), "as in an undisturbed sweep"
