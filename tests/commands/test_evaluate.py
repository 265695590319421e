"""`gptjax eval` on other texts than the run's validation text, and on tasks."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.commands.evaluate import evaluate
from gptjax.data.store import find_store
from gptjax.errors import GptjaxError
from gptjax.training.run import open_run
from gptjax.training.train import train


@pytest.fixture
def run_eval(monkeypatch, capsys):
    """Runs the command in this process and returns what it printed on stdout."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the command sets for its process

    def run(*arguments) -> str:
        evaluate([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def texts(tmp_path):
    """A folder with three documents in two files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("line 3 is 9\nline 4 is 16\n" * 5)
    (folder / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("line", "ünë 5 is 25")))
    return folder


def test_metrics_of_another_text(finished_run, run_eval, texts):
    f = json.loads(run_eval(finished_run, "--data", texts / "a.txt", "--json"))
    assert (f["documents"], f["bytes"], f["tokens"], f["context"], f["stride"]) == (1, 125, 125, 16, 16)
    assert f["loss"] == pytest.approx(np.log(f["perplexity"])) and f["seconds"] > 0
    assert f["bits_per_byte"] == pytest.approx(f["loss"] / np.log(2)), "a token is a byte here"
    slid = json.loads(run_eval(finished_run, "--data", texts / "a.txt", "--json", "--stride", 4, "--context", 12))
    assert (slid["tokens"], slid["context"], slid["stride"]) == (125, 12, 4) and slid["loss"] != f["loss"]
    both = ["--data", texts / "a.txt", texts / "b.jsonl", "--column", "body", "--json"]
    f = json.loads(run_eval(finished_run, *both))
    assert (f["documents"], f["bytes"]) == (3, 125 + 4 + 13)
    assert json.loads(run_eval(finished_run, *both, "--max-documents", 1))["documents"] == 2
    narrow = json.loads(run_eval(finished_run, *both, "--dtype", "bfloat16", "--batch-size", 3))
    assert narrow["loss"] == pytest.approx(f["loss"], rel=0.05)


def test_the_validation_text_read_from_a_file_has_the_same_loss(finished_run, run_eval, tmp_path):
    run = open_run(finished_run)
    ids = find_store(run.provenance()["data"], run.experiment.data).validation[0].ids
    (tmp_path / "val.txt").write_bytes(run.tokenizer().decode_bytes(ids))
    own = json.loads(run_eval(finished_run, "--json"))
    other = json.loads(run_eval(finished_run, "--data", tmp_path / "val.txt", "--json"))
    assert other["bytes"] == own["val_bytes"] + 1, "here the first byte is scored as well"
    assert other["loss"] == pytest.approx(own["val_loss"], rel=0.02), "the windows begin one token earlier"


def test_loss_by_position_as_table_json_and_picture(finished_run, run_eval, texts, tmp_path):
    pytest.importorskip("matplotlib")
    plain = ["--data", texts / "a.txt", "--by-position"]
    out = run_eval(finished_run, *plain, "--plot", tmp_path / "picture.png")
    rows = out.split("context size")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3-4", "5-8", "9-16"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    bins = json.loads(run_eval(finished_run, *plain, "--json"))["by_position"]
    assert [row.split()[1] for row in rows] == [f"{b['loss']:.4f}" for b in bins]
    assert sum(b["tokens"] for b in bins) == 125


@pytest.mark.parametrize("arguments, message", [
    (["gpt2"], "is not a run folder, so it has no validation text of its own"),
    (["{0}/nowhere"], "nowhere: does not exist"),
    (["{0}"], "is not a run folder"),
    (["{1}", "--data", "{0}/nothing.txt"], "nothing.txt': no such file or folder"),
    (["{1}", "--data", "{0}/a.txt", "--tasks", "x"], "--data and --tasks: give only one of them"),
    (["{1}", "--task", "sentiment"], "--task: is now called --tasks"),
    (["{1}", "--tasks", "sentiment", "--against", "x"], "--against: is now called --compare-with"),
    (["{1}", "--tasks", "arc_easy"], "For a task of the lm-evaluation-harness write lm_eval:arc_easy"),
    (["{1}", "--tasks", "sentimant"], "--tasks sentimant: no such task; did you mean sentiment?"),
    (["{1}", "--data", "{0}/a.txt", "--limit", "4"], "--limit: no effect without --tasks"),
    (["{1}", "--tasks", "lm_eval:x", "--split", "validation", "--out", "y"],
     "--split, --out: no effect without one of gptjax's own --tasks"),
    (["{1}", "--tasks", "x", "--num-fewshot", "2"], "--num-fewshot: no effect without --tasks lm_eval:NAME"),
    (["{1}", "--dtype", "bfloat16", "--by-position", "--num-fewshot", "2", "--context", "8", "--batch-size", "2"],
     "--num-fewshot: no effect without --tasks lm_eval:NAME; --context, --by-position: no effect without --data; "
     "--batch-size, --dtype: no effect without --data or --tasks; remove these options"),
    (["{1}", "--tasks", "x", "--by-position", "--plot", "x.png", "--stride", "4", "--max-documents", "2"],
     "--max-documents, --stride, --by-position, --plot: no effect without --data"),
    (["{1}", "--data", "{0}/a.txt", "pydoc", "--column", "body", "--hub-split", "train", "--hub-config", "en"],
     "--hub-config, --hub-split: no effect without --data hub:NAME; --column: no effect on plain text"),
    (["{0}", "--data", "{0}/a.txt", "--checkpoint", "best"],
     "--checkpoint: no effect, because {0} is not a run folder"),
    (["{1}", "--data", "{0}/a.txt", "--stride", "17"], "stride = 17: must be at least 1 and at most the 16"),
    (["{1}", "--data", "{0}/a.txt", "--context", "17"], "context = 17: must be at least 1 and at most 16"),
    (["{1}", "--data", "{0}/a.txt", "--plot", "x.jpeg"], "must end in .png"),
    (["{1}", "--data", "{0}/b.jsonl"], "has no column 'text'"),
])  # fmt: skip
def test_invalid_options_get_one_clear_message(finished_run, run_eval, texts, arguments, message):
    with pytest.raises(GptjaxError, match=re.escape(message.format(texts, finished_run))) as refused:
        run_eval(*(a.format(texts, finished_run) for a in arguments))
    assert refused.value.exit_code == 2


def test_an_imported_run_needs_a_text_to_be_evaluated_on(finished_run, run_eval, texts, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "imported")
    about = json.loads((run / "provenance.json").read_text()) | {"imported": "us/tiny"}
    (run / "provenance.json").write_text(json.dumps(about))
    with pytest.raises(GptjaxError, match=r"contains imported weights, so it has .*--data FILE or --tasks TASK") as e:
        run_eval(run)
    assert "train" not in str(e.value).replace(str(run), "")
    assert json.loads(run_eval(run, "--data", texts / "a.txt", "--json"))["tokens"] == 125


def test_tasks_without_the_harness_name_the_extra(finished_run, run_eval, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gptjax.interop.harness", raising=False)
    monkeypatch.delattr("gptjax.interop.harness", raising=False)
    with pytest.raises(GptjaxError, match=r"pip install 'gptjax\[harness\]'"):
        run_eval(finished_run, "--tasks", "lm_eval:hellaswag")


@pytest.mark.filterwarnings("ignore")  # of lm_eval, which has many
def test_a_task_of_ones_own(finished_run, run_eval, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"line {i} is", "gold": i % 2} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rows.jsonl}}\ntest_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: [" 1", " 22"]\n'
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\nmetadata: {version: 1}\n"
    )
    own = ["--tasks", "lm_eval:mine", "--include-path", tmp_path, "--limit", 4]
    results = json.loads(run_eval(finished_run, *own, "--json"))
    assert results["n-samples"]["mine"] == {"original": 5, "effective": 4}
    assert 0 <= results["results"]["mine"]["acc,none"] <= 1
    assert "|mine |" in run_eval(finished_run, *own)


@pytest.fixture
def own_task(monkeypatch):
    """A task of six rows, called `parity`."""
    from gptjax.data import tasks

    rows = [({"x": f"line {i}", "y": ("even", "odd")[i % 2]}, f"rows.txt:{i}") for i in range(6)]
    task = tasks.Task(
        name="parity", summary="", load_rows=lambda split, folder: iter(rows), prompt="{x}: ", answer="{y}",
        labels=("even", "odd"), metrics=("accuracy", "edit_distance"), baseline="majority", source="", licence="",
    )  # fmt: skip
    monkeypatch.setitem(tasks.TASKS, "parity", task)


def test_task_scores_are_added_to_the_run_and_nothing_is_lost(finished_run, run_eval, own_task, tmp_path):
    pytest.importorskip("sacrebleu")
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = json.loads((run / "result.json").read_text()) | {"tasks": {"another": {"f1": 0.5}}}
    (run / "result.json").write_text(json.dumps(before))
    label = "parity-checkpoint-4"
    f = json.loads(run_eval(run, "--tasks", "parity", "--checkpoint", 4, "--json"))
    assert (f["task"], f["side"], f["checkpoint"], f["examples"]) == ("parity", "test", "4", 6)
    assert f["accuracy_baseline"] == 0.5
    low, high = f["accuracy_interval"]
    assert 0 <= low <= f["accuracy"] <= high <= 1 and f["accuracy_difference"] == f["accuracy"] - 0.5
    predictions = [json.loads(line) for line in (run / f"predictions-{label}.jsonl").read_text().splitlines()]
    assert f["predictions"] == str(run / f"predictions-{label}.jsonl")
    assert [p["where"] for p in predictions] == [f"rows.txt:{i}" for i in range(6)]
    assert np.mean([p["prediction"] in p["references"] for p in predictions]) == f["accuracy"]
    after = json.loads((run / "result.json").read_text())
    kept = after["tasks"].pop(label)
    assert after == before and kept == {k: v for k, v in f.items() if k != "predictions"}

    shown = run_eval(run, "--tasks", "parity", "--split", "validation", "--limit", 0.5)
    assert re.search(r"accuracy +0\.\d{4} +0\.\d{4} to [01]\.\d{4} +0\.\d{4}", shown) and "lower is better" in shown
    assert re.search(r"examples +3\n", shown) and "predictions-parity-validation-limit-0.5.jsonl" in shown
    tasks = open_run(run).result()["tasks"]
    assert tasks["parity-validation-limit-0.5"]["side"] == "validation" and tasks["another"] == {"f1": 0.5}
    assert tasks[label] == kept, "earlier scores are kept"


def test_a_run_that_has_scores_is_still_finished(run_eval, own_task, finished_run, tmp_path, single_device):
    pytest.importorskip("sacrebleu")
    run = shutil.copytree(finished_run, tmp_path / "run")
    run_eval(run, "--tasks", "parity")
    figures = train(open_run(run).experiment, run)
    assert figures == open_run(run).result() and figures["steps"] == 6 and "parity" in figures["tasks"]


def test_an_unfinished_run_stays_unfinished(finished_run, run_eval, own_task, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    evaluate([str(run), "--tasks", "parity"])
    assert "is not finished" in capsys.readouterr().err
    assert open_run(run).result() is None and (run / "predictions-parity.jsonl").exists()
    with pytest.raises(GptjaxError, match="is a run folder; remove --out"):
        run_eval(run, "--tasks", "parity", "--out", run)


def test_results_go_into_another_folder_and_never_overwrite(finished_run, run_eval, own_task, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "new" / "folder"
    f = json.loads(run_eval(finished_run, "--tasks", "parity", "--out", out, "--json"))
    result = json.loads((out / "result.json").read_text())
    assert result["tasks"]["parity"]["accuracy"] == f["accuracy"] and "loss" in result["tasks"]["parity"]
    assert not (finished_run / "predictions-parity.jsonl").exists()
    with pytest.raises(GptjaxError, match=r"predictions-parity.jsonl: exists already; choose another --out"):
        run_eval(finished_run, "--tasks", "parity", "--out", out)
    (tmp_path / "file").write_text("")
    with pytest.raises(GptjaxError, match="cannot be created"):
        run_eval(finished_run, "--tasks", "parity", "--out", tmp_path / "file")


def test_a_task_without_its_libraries_names_the_extra(finished_run, run_eval, own_task, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    for module in ("gptjax.tuning.scores", "gptjax.tuning.tasks"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(GptjaxError, match=r"pip install 'gptjax\[tasks\]'"):
        run_eval(finished_run, "--tasks", "parity")


@pytest.mark.filterwarnings("ignore")  # of lm_eval, which has many
def test_own_tasks_and_tasks_of_lm_eval_go_together(finished_run, run_eval, own_task, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("lm_eval")
    from gptjax.interop import harness

    monkeypatch.setattr(harness, "run_tasks", lambda lm, names, *options: {"names": names})
    monkeypatch.setattr(harness, "table", lambda results: "|the table|")
    arguments = [finished_run, "--tasks", "parity", "lm_eval:arc_easy,piqa", "lm_eval:hellaswag"]
    results = json.loads(run_eval(*arguments, "--out", tmp_path / "a", "--json"))
    assert results.keys() == {"parity", "lm_eval"} and results["parity"]["examples"] == 6
    assert results["lm_eval"]["names"] == ["arc_easy", "piqa", "hellaswag"]
    shown = run_eval(*arguments, "--out", tmp_path / "b")
    assert re.search(r"parity\n\nmetric .*\nlm_eval\n\n\|the table\|", shown, re.DOTALL)


def test_printed_metrics_have_units(finished_run, run_eval, texts):
    own = run_eval(finished_run)
    assert re.search(r"val_loss +\d\.\d{4} nats/token\n", own) and re.search(
        r"val_bits_per_byte +\d\.\d{4} bits/byte\n", own
    )
    other = run_eval(finished_run, "--data", texts / "a.txt")
    assert re.search(r"\nloss +\d\.\d{4} nats/token\n|^loss +\d\.\d{4} nats/token\n", other)
    assert re.search(r"\n[\d,]+ tokens/s$", other.rstrip())


@pytest.mark.parametrize("command", ["eval", "sample", "chat", "profile"])
def test_help_shows_what_a_value_is_and_keeps_groups(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptjax", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert "STR" not in out and "PATH" not in out.replace("--include-path", "") and f"gptjax {command}" in out
    groups = {"eval": ["text options", "task options", "lm-eval options"], "chat": ["sampling options"], "profile": []}
    for group in groups.get(command, ["sampling options", "beam-search options", "constraint options"]):
        assert group in out
