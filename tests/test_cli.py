"""The command as a user meets it: real processes, their output, and their exit codes."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, tiny_run
from processes import QUICK, write_experiment

from gptjax.cli import main
from gptjax.training import checkpoint

ROOT = Path(__file__).parent.parent


def gptjax(*arguments, cwd=ROOT, **environment):
    """Runs the command; returns exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=dict(os.environ) | QUICK | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def in_process(monkeypatch, capfd):
    """Like `gptjax`, but without starting a process, which takes seconds."""
    monkeypatch.setattr("jax.device_count", lambda: 1)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the command sets for its process

    def run(*arguments, cwd=ROOT):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment file, the folder of its finished run, and what the command printed."""
    folder = tmp_path_factory.mktemp("cli")
    e = tiny_run(folder, **{"model.context_length": 32})
    path = folder / "mine.py"
    path.write_text(f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({e.to_json()!r})\n")
    code, out, err = gptjax("train", path, "--run-dir", folder / "run", "--train.steps", 8, "--seed", "1")
    assert code == 0, err
    return path, folder / "run", out, err


def test_training_leaves_a_run_and_shows_what_it_does(finished):
    _, run, out, err = finished
    assert json.loads((run / "experiment.json").read_text())["train"]["steps"] == 8
    assert json.loads((run / "experiment.json").read_text())["seed"] == 1
    for part in ("parameters", "mesh data 1 x model 1", "xla attention (on cpu", "FLOPs", "tokens/s", "MFU", "left",
                 "val ", "bits/byte", "first step after", "ms/step", "peak memory", "loss curve"):  # fmt: skip
        assert part in err, f"{part!r} is not in the output of training:\n{err}"
    assert out.count("--- sample") == 2 and (run / "samples.txt").read_text() == out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "\r" not in err and "\x1b" not in err, "a log that is no terminal stays plain"
    steps = [line.split(" | ")[0] for line in err.splitlines() if line.startswith("step ")]
    assert len(steps) == len(set(steps)), "a step is printed once, with its own validation loss"


@pytest.mark.slow
def test_the_default_folder_is_relative_and_works(finished, tmp_path):
    path, _, _, _ = finished
    short = ("--train.steps", 3, "--train.sample-tokens", 4)
    assert gptjax("train", path, *short, cwd=tmp_path)[0] == 0
    assert gptjax("sample", "runs/tiny", "line", "--max-new-tokens", 2, cwd=tmp_path)[0] == 0


def test_the_same_command_again_has_nothing_to_do(finished, in_process):
    path, run, _, _ = finished
    code, _, err = gptjax("train", path, "--run-dir", run, "--train.steps", 8, "--seed", 1)
    assert code == 0 and "is already finished; nothing to do" in err
    code, _, err = in_process("train", path, "--run-dir", run, "--train.steps", 9, "--seed", 1)
    assert code == 2 and "train.steps: 8 in the run, 9 now" in err


def test_results_of_a_finished_run_survive_a_damaged_checkpoint(finished, tmp_path):
    path, intact, _, _ = finished
    run = shutil.copytree(intact, tmp_path / "run")
    arrays = [p for p in (run / "checkpoints/00000008").rglob("*") if p.is_file()]
    largest = max(arrays, key=lambda p: p.stat().st_size)
    largest.write_bytes(b"\0" + largest.read_bytes()[1:])
    before = (run / "samples.txt").read_text()
    code, out, err = gptjax("train", path, "--run-dir", run, "--train.steps", 8, "--seed", 1)
    assert code == 0 and out == before == (run / "samples.txt").read_text() and "nothing to do" in err


def test_a_module_in_the_current_folder_is_found_as_by_python_m(tmp_path):
    """By both ways to start gptjax, for training and for evaluation."""
    (tmp_path / "mine_here.py").write_text("def text(seed, index):\n    raise ValueError('found me')\n")
    (tmp_path / "neighbour_here.py").write_text("STEPS = 7\n")
    write_experiment(tmp_path, TINY.override({"data.source": "function:mine_here:text", "data.max_documents": 2}))
    with (tmp_path / "tiny.py").open("a") as file:
        file.write("import neighbour_here\nexperiment = experiment.override({'train.steps': neighbour_here.STEPS})\n")
    for command in ([sys.executable, "-m", "gptjax"], [str(Path(sys.executable).parent / "gptjax")]):
        done = subprocess.run([*command, "train", "tiny.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "the function fails (ValueError: found me)" in done.stderr, done.stderr


def test_sampling_prints_texts_only(finished, in_process):
    _, run, _, _ = finished
    code, out, err = gptjax("sample", run, "line 1", "--max-length", 20, "--num-return-sequences", 2)
    assert (code, err) == (0, "")
    assert out.count("line 1") >= 2 and "--- 2 ---" in out
    again = [in_process("sample", run, "line 1", "--max-new-tokens", 8, "--seed", 3)[1] for _ in range(2)]
    assert again[0] == again[1] and again[0].startswith("line 1")


def test_evaluation_prints_one_json_object_and_nothing_else(finished, in_process):
    _, run, _, _ = finished
    code, out, _ = gptjax("eval", run, "--json")
    metrics, result = json.loads(out), json.loads((run / "result.json").read_text())
    assert code == 0
    for name in ("val_loss", "val_bits_per_byte"):
        assert metrics[name] == pytest.approx(result[name], rel=1e-5)
    assert (
        metrics["steps"] == 8
        and metrics["num_params"] == result["num_params"]
        and metrics["tokens"] == result["tokens"]
    )
    code, out, _ = in_process("eval", run, "--checkpoint", "best")
    assert code == 0 and "val_loss" in out


def test_help_and_version_say_what_there_is(in_process):
    code, out, err = gptjax("--help")
    assert (code, err) == (0, "")
    for part in ("gptjax train", "gptjax sample", "gptjax eval", "exit codes"):
        assert part in out
    assert gptjax("--version")[1].strip() == __import__("gptjax").__version__
    for command in ("train", "sample", "eval"):
        code, out, _ = in_process(command, "--help")
        assert code == 0 and f"gptjax {command}" in out
    assert "--model.num-layers" in in_process("train", "experiments/quickstart.py", "--help")[1]


def test_help_loads_nothing_slow():
    code = "import sys; sys.argv = ['gptjax', '--help']; from gptjax.cli import main; main(); " \
           "print(sorted({'jax', 'numpy', 'tyro', 'flax'} & sys.modules.keys()))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Files to go wrong with."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.txt").write_text("")
    (folder / "file").write_text("")
    mine = TINY.override({"data.source": str(folder / "nothing.txt")})
    (folder / "mine.py").write_text(
        f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({mine.to_json()!r})\n"
    )
    return folder


@pytest.mark.parametrize("arguments, message", [
    (["fly"], "no such command: 'fly'; the commands are new, train, sweep, scale, sample, chat, eval, "
     "import, export, verify, replay, profile, runs, report, diff"),
    (["trian"], "no such command: 'trian'; did you mean train?"),
    (["train", "{0}/mine.py", "--data.source", "pydoc", "--data.tokenizer", "char", "--train.sample-prompt", "字",
      "--run-dir", "{0}/run"], "train.sample_prompt: '字' at character 0 is none of the"),
    (["train"], "no experiment file was given"),
    (["train", "{0}/mine.py", "--from-step", "3"], "--from-step: is now called --rollback-to"),
    (["sweep", "{0}/mine.py", "--on=slurm"], "--on: is now called --executor"),
    (["scale", "{0}/mine.py", "--wait"], "--wait: is now called --external"),
    (["train", "nothing.py"], "nothing.py: no such experiment file"),
    (["train", "{0}/mine.py"], "nothing.txt': no such file or folder"),
    (["train", "{0}/mine.py", "--data.source", "{0}/empty.txt"], "empty.txt: is empty"),
    (["train", "{0}/mine.py", "--run-dir", "{0}/file"], "is a file"),
    (["train", "{0}/mine.py", "--resume"], "does not exist"),
    (["train", "{0}/mine.py", "--model.num-layer", "3"], "--model.num-layers"),
    (["train", "{0}/mine.py", "--model.num-layers", "three"], "num-layers"),
    (["train", "{0}/mine.py", "--model.num-heads", "3", "--optim.learning-rate", "-1"], "gptjax train: 2 problems:"),
    (["train", "{0}/mine.py", "--init", "{0}", "--data.source", "pydoc", "--run-dir", "{0}/run"], "holds neither"),
    (["sample", "{0}/nowhere", "hi"], "nowhere: does not exist"),
    (["sample", "{0}", "hi"], "holds neither experiment.json"),
    (["eval", "{0}/nowhere", "--json"], "nowhere: does not exist"),
])  # fmt: skip
def test_bad_input_gets_one_clear_message(broken, in_process, arguments, message):
    code, out, err = in_process(*(a.format(broken) for a in arguments), cwd=broken)
    assert code == 2 and message in err, (code, err)
    assert out == "" and "Traceback" not in err


@pytest.mark.parametrize("arguments, message", [
    (["fly"], "no such command: 'fly'"),
    (["train", "{0}/mine.py", "--model.num-heads", "3", "--optim.learning-rate", "-1"], "gptjax train: 2 problems:"),
    (["sample", "{0}/nowhere", "hi"], "nowhere: does not exist"),
])  # fmt: skip
def test_bad_input_ends_the_process_with_code_2(broken, arguments, message):
    code, out, err = gptjax(*(a.format(broken) for a in arguments), cwd=broken)
    assert code == 2 and message in err and out == "" and "Traceback" not in err, (code, err)


def test_examples_that_cannot_be_used_are_named_with_their_line_before_training(broken, monkeypatch, capfd):
    """In a table whose rows do not stand one a line."""
    table = 'text,label\n\n"two\nlines",good\n\nfine,{}\nbad,bad\n'
    for number, label in enumerate(["godo", '" "', "a very long answer"]):
        (broken / f"{number}.csv").write_text(table.format(label))
    (broken / "rows.jsonl").write_text('{"text": "a", "label": "good"}\n\n{"text": "b"}\n')
    templates, labels = {"--data.prompt": "{text}:", "--data.answer": "{label}"}, ["--data.labels", "good", "bad"]
    for source, changes, message in [
        ("0.csv", {}, "0.csv, line 6: the answer 'godo' is none of the labels; did you mean 'good'?"),
        ("1.csv", {}, "1.csv, line 6: column 'label' is empty, so there is no answer to train on"),
        (
            "2.csv",
            {"--objective.name": "sft"},
            "2.csv, line 6: its answers are 19 tokens long, and model",
        ),
        ("rows.jsonl", {}, "rows.jsonl, line 3: has no column 'label'"),
        ("0.csv", {"--data.prompt": "{words}"}, "0.csv, line 3: has no column 'words'"),
        ("0.csv", {"--data.answer": "label"}, "data.answer = 'label': names no column"),
    ]:
        options = {"--data.source": str(broken / source), "--run-dir": str(broken / "run")} | templates | changes
        arguments = [*itertools.chain(*options.items()), *(labels if source != "2.csv" else [])]
        monkeypatch.setattr(sys, "argv", ["gptjax", "train", str(broken / "mine.py"), *arguments])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the command replaces
        monkeypatch.setattr("jax.device_count", lambda: 1)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2 and message in err and "Traceback" not in err and out == "", err
        assert not (broken / "run").exists(), "nothing is left of a run that could not start"


def test_prompts_that_cannot_be_continued_are_refused(finished, in_process):
    _, run, _, _ = finished
    for arguments, message in [
        (["x" * 40], "more than the model's context"),
        (["line", "--max-length", "4"], "the prompt alone has 4 tokens"),
        (["line", "--top-p", "2"], "top_p = 2.0"),
        (["line", "--checkpoint", "77"], "has no checkpoint '77'"),
        (["\udcff"], "half of a surrogate pair"),
    ]:
        code, out, err = in_process("sample", run, *arguments)
        assert code == 2 and message in err and "Traceback" not in err and out == "", (arguments, err)
    code, out, _ = in_process("sample", run, "<|endoftext|>", "--max-new-tokens", "2")
    assert code == 0 and out.startswith("<|endoftext|>"), "special-token text is text"
    assert in_process("sample", run, "", "--max-new-tokens", "2")[0] == 0


def test_the_shakespeare_recipe_says_where_its_text_is(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTJAX_DATA", raising=False)
    recipe = "experiments/papers/nanogpt_shakespeare_cpu.py"
    code, _, err = gptjax("train", recipe, "--run-dir", tmp_path / "run")
    assert code == 2 and "Traceback" not in err
    assert "GPTJAX_DATA is not set" in err and "https://" in err
    assert not (tmp_path / "run").exists(), "nothing is left of a run that could not start"


def test_verify_prints_a_line_for_each_checkpoint_and_fails_where_one_is_damaged(finished, tmp_path, in_process):
    _, run, _, _ = finished
    copy = shutil.copytree(run, tmp_path / "run")
    code, out, err = gptjax("verify", copy)
    steps = [c.step for c in checkpoint.listing(copy / "checkpoints")]
    assert code == 0 and len(out.splitlines()) == len(steps) and err == ""
    for line, step in zip(out.splitlines(), steps, strict=True):
        assert line.startswith(f"step {step:>8}  ok") and "bytes" in line
    path = max((copy / "checkpoints").rglob("arrays/*"), key=lambda p: p.stat().st_size * p.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    (copy / "checkpoints" / "00000099").mkdir()
    code, out, err = in_process("verify", copy)
    assert code == 2 and f"DAMAGED  {path}" in out and f"1 of {len(steps)} checkpoints cannot be used" in err
    assert "not a checkpoint" in out and "00000099" in out
    assert path.exists() and (copy / "checkpoints" / "00000099").exists(), "it only reads"
    metrics = copy / "metrics.jsonl"
    metrics.write_text("{]\n" + metrics.read_text())
    code, _, err = in_process("verify", copy)
    assert code == 2 and "metrics.jsonl, line 1: is damaged" in err


@pytest.mark.slow
def test_replay_recomputes_a_step(finished):
    _, run, _, _ = finished
    code, out, _ = gptjax("replay", run, "--step", "2")
    assert code == 0 and "step 2, recomputed from" in out
    assert "the output and the gradient of every module are finite" in out
    assert "the same" in out and "NOT" not in out
    code, _, err = gptjax("replay", run, "--step", "1000")
    assert code == 2 and "the run has steps 1 to" in err


@pytest.mark.slow
def test_profile_shows_modules_and_operations_of_a_run_and_leaves_it_alone(finished, tmp_path):
    run = finished[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, out, err = gptjax("profile", run, "--steps", "2", "--out", tmp_path / "trace")
    assert code == 0, err
    assert "attention backward" in out and "optimiser update" in out and "ms/step" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("section, field", [("data", "source"), ("objective", "reward")])
def test_profile_runs_no_code_that_a_run_folder_names(finished, tmp_path, section, field):
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\ndef do(*given): return 'text'\n")
    file = tmp_path / "run" / "experiment.json"
    e = json.loads(file.read_text())
    e[section][field] = "function:evil:do" if field == "source" else "evil:do"
    if field == "reward":
        e["objective"]["name"] = "grpo"
    file.write_text(json.dumps(e))
    code, _, err = gptjax("profile", tmp_path / "run", "--steps", "2", "--out", tmp_path / "trace", PYTHONPATH=tmp_path)
    assert not (tmp_path / "it_ran").exists() and "Traceback" not in err
    assert code == 2 or field == "source"  # whose tokens exist: the function is not called
