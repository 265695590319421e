"""The commands `gptjax report`, `diff` and `runs`."""

import json
import os
import re
import sys

import pytest
from made_runs import BASE, make_run, make_sweep

from gptjax.cli import main
from gptjax.errors import RunError
from gptjax.lab.report import plot_loss
from gptjax.training.metrics import read_metrics
from gptjax.training.run import open_run


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; exit code, stdout and stderr."""

    def one(*arguments):
        monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return code, out, err

    return one


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path / "lr", {"high": [3.0, 3.5, 4.0], "low": [2.9, 3.41, 3.9], "lowest": [3.3, 3.9]})


def test_names_are_neither_formulas_nor_terminal_commands(run, tmp_path):
    """A run folder of someone else may have any name in its experiment.json."""
    for number, name in enumerate((r"lr $\frac{$", "_under", "red \x1b[31m", "x" * 100_000, "half \ud83d")):
        e = BASE.override(name=name, optim=dict(learning_rate=1e-3 * (number + 1)))
        make_run(tmp_path / str(number), e, 3.0)
    code, out, err = run("report", *(tmp_path / str(number) for number in range(5)), "--out", tmp_path / "page")
    assert code == 0 and "\x1b" not in out + err and r"lr $\frac{$" in out and r"red \x1b[31m" in out
    assert len(out) < 5_000 and (tmp_path / "page" / "report.png").is_file()
    code, out, _ = run("runs", tmp_path)
    assert code == 0 and "\x1b" not in out
    code, out, _ = run("diff", tmp_path / "0", tmp_path / "2")
    assert code == 0 and "\x1b" not in out
    assert plot_loss(open_run(tmp_path / "0")) == tmp_path / "0" / "loss.png"


@pytest.mark.parametrize("what", ["metrics.jsonl", "result.json", "provenance.json", "samples.txt", "experiment.json"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_never_waited_for(run, tmp_path, what):
    for kind in ("pipe", "folder"):
        folder = make_run(tmp_path / kind, BASE, 3.0)
        (folder / what).unlink()
        os.mkfifo(folder / what) if kind == "pipe" else (folder / what).mkdir()
    code, out, _ = run("runs", tmp_path)
    assert code == 0 and "pipe" in out and "folder" in out
    for kind in ("pipe", "folder"):
        code, _, err = run("report", tmp_path / kind, "--out", tmp_path / "page")
        assert code in (0, 2) and err.count("\n") <= 2


def test_a_line_of_metrics_without_end_is_damage_and_not_read_whole(run, tmp_path):
    folder = make_run(tmp_path / "run", BASE, 3.0)
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate(40 << 30)  # a sparse file: 40 GB of zeros after the lines
    code, _, err = run("report", folder, "--out", tmp_path / "page")
    assert code == 2 and "metrics.jsonl: has" in err
    with pytest.raises(RunError, match=r"metrics.jsonl, line \d+: is damaged \(it has more than 1,048,576 bytes\)"):
        list(read_metrics(folder / "metrics.jsonl"))


def test_a_report_prints_a_table_and_leaves_a_page_and_a_picture(run, sweep, tmp_path):
    code, out, err = run("report", sweep)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.match(r"high +3 +3\.5000 .* baseline$", lines[1]) and re.match(r"low +3 .* better$", lines[2])
    assert "cannot tell" in lines[3] and "lowest-seed2: missing, has not started" in out
    assert (sweep / "report.html").exists() and (sweep / "report.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("report", sweep, "--json", "--out", tmp_path / "new" / "out", "--baseline", "low")
    content = json.loads(out)
    assert code == 0 and content["baseline"] == "low" and (tmp_path / "new" / "out" / "report.html").exists()
    assert [v["verdict"] for v in content["variants"]] == ["worse", "baseline", "cannot tell"]
    assert content["variants"][0]["difference"]["value"] == pytest.approx(0.29 / 3)


def test_a_report_over_other_text_says_so_and_judges_nothing(run, tmp_path):
    a, b = (make_run(tmp_path / n, BASE.override({"name": n, "data.source": n}), 3.0, data=n) for n in "ab")
    code, out, _ = run("report", a, b, "--out", tmp_path)
    assert code == 0 and "NOTE: val_loss of b is not comparable with the baseline's" in out
    assert "not comparable" in out.splitlines()[2] and "better" not in out and "worse" not in out


def test_a_report_of_one_trained_run(run, finished_run, tmp_path):
    code, out, _ = run("report", finished_run, "--out", tmp_path)
    assert code == 0 and "baseline" in out and "Training loss, smoothed" in (tmp_path / "report.html").read_text()


def test_runs_are_listed_filtered_and_sorted(run, sweep, tmp_path):
    make_run(tmp_path / "bad", BASE, 3.0)
    (tmp_path / "bad" / "experiment.json").write_text("?")
    code, out, _ = run("runs", tmp_path)
    assert code == 0 and len(out.splitlines()) == 1 + 9 + 1 and re.search(r"\nbad +damaged .*experiment\.json", out)

    def names(*options):
        code, out, err = run("runs", tmp_path, "--json", *options)
        assert code == 0, err
        return [r["name"].removeprefix("lr/") for r in json.loads(out)]

    assert names("--filter", "val_loss<3.3", "--sort", "val_loss") == ["low-seed0", "high-seed0"]
    assert names("--filter", "val_loss<3.3", "optim.learning_rate=0.01") == ["high-seed0"]
    assert names("--filter", "state!=finished") == ["bad", "lowest-seed2"]
    assert names("--filter", "optim.name = AdamW", "seed>=2", "--sort", "val_loss", "--reverse") == [
        "high-seed2", "low-seed2", "lowest-seed2"
    ]  # fmt: skip
    assert names("--sort", "val_loss")[-2:] == ["bad", "lowest-seed2"], "runs without the metric come last"
    assert names("--filter", "init=none", "state=missing") == ["lowest-seed2"]
    assert "2 of 10 runs" in run("runs", tmp_path, "--filter", "val_loss<3.3")[1]
    (tmp_path / "empty").mkdir()
    assert "no runs yet" in run("runs", tmp_path / "empty")[1]


def test_differences_of_two_runs(run, sweep, tmp_path):
    a, b = sweep / "high-seed0", sweep / "low-seed1"
    code, out, _ = run("diff", a, b)
    assert code == 0
    assert re.search(r"optim\.learning_rate +0\.01 +0\.001\n", out) and re.search(r"seed +0 +1\n", out)
    assert re.search(r"val_loss +3\.0000 +3\.4100 +\+0\.4100\n", out) and "environment: no difference" in out
    c = make_run(tmp_path / "c", BASE, 3.0, finished=False, provenance={"commit": "new", "versions": {"jax": "9"}})
    content = json.loads(run("diff", a, c, "--json")[1])
    assert content["environment"] == {"commit": ["abc", "new"], "versions.jax": ["0.10.2", "9"]}
    assert content["metrics"]["val_loss"] == [3.0, None, None]
    assert "is stopped: at step 3 of 6" in run("diff", a, c)[1]


def test_differences_of_files_and_runs(run, sweep, tmp_path):
    """Derived fields, which a run folder has and a file leaves out, are no difference."""
    e = BASE.override({"model.vocab_size": None, "model.ffn_dim": None, "model.head_dim": None})
    (tmp_path / "mine.py").write_text(
        f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({e.to_json()!r})"
    )
    content = json.loads(run("diff", tmp_path / "mine.py", sweep / "high-seed0", "--json")[1])
    assert content["config"] == {"name": ["tiny", "high-seed0"]} and content["metrics"] == {}
    code, out, _ = run("diff", tmp_path / "mine.py", sweep / "low-seed0.json")
    assert code == 0 and "environment" not in out
    assert "config: no difference" in run("diff", sweep / "low-seed0.json", sweep / "low-seed0.json")[1]


@pytest.mark.parametrize("arguments, message", [
    (["report"], "name the runs or sweeps"),
    (["report", "{0}/none"], "does not exist"),
    (["report", "{0}"], "is neither a run nor a sweep"),
    (["report", "{0}/lr", "--baseline", "hig"], "did you mean high?"),
    (["report", "{0}/lr", "--metric", "bits"], "no finished run has it"),
    (["report", "{0}/lr", "--out", "{0}/lr/sweep.json"], "cannot be written"),
    (["runs", "{0}/none"], "does not exist"),
    (["runs", "{0}", "--filter", "model.fnn=gelu"], "did you mean model.ffn?"),
    (["runs", "{0}", "--filter", "val_los<3"], "did you mean val_loss?"),
    (["runs", "{0}", "--filter", "nonsense"], "must be FIELD=VALUE"),
    (["runs", "{0}", "--filter", "val_loss<low"], "compare numbers"),
    (["runs", "{0}", "--sort", "qqq"], "no such field"),
    (["runs", "{0}", "--reverse"], "no effect without --sort"),
    (["diff", "{0}/lr", "{0}/lr/high-seed0"], "is not a run folder"),
    (["diff", "{0}/none.py", "{0}/lr/high-seed0"], "no such experiment file"),
])  # fmt: skip
def test_bad_input_gets_one_clear_message(run, sweep, arguments, message):
    code, out, err = run(*(a.format(sweep.parent) for a in arguments))
    assert code == 2 and message in err and out == "", (code, out, err)
