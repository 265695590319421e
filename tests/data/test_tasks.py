"""Every task reads its real data and its sample, its splits are disjoint, and its baseline answers."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gptjax.config import DataConfig
from gptjax.data.examples import SAMPLES, _warn_of_sample, load_examples
from gptjax.data.tasks import TASKS, baseline, find_task
from gptjax.data.tasks.entities import tags_of
from gptjax.errors import DataError

ROOT = Path(__file__).parents[2]


def test_an_unknown_task_gets_a_suggestion():
    with pytest.raises(DataError, match=r"task:sentimant: no such task; did you mean sentiment\?"):
        find_task("sentimant")


def test_missing_data_is_reported_with_its_address(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTJAX_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no such file; task:translation reads it from \$GPTJAX_DATA; get it from"):
        list(load_examples("task:translation", DataConfig(), "train"))
    monkeypatch.delenv("GPTJAX_DATA")
    monkeypatch.setattr("gptjax.data.examples.SAMPLES", tmp_path)
    with pytest.raises(DataError, match=r"task:sentiment: has no sample in gptjax; set GPTJAX_DATA to the folder"):
        list(load_examples("task:sentiment", DataConfig(), "train"))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.source])
@pytest.mark.parametrize("value", [None, ""])
def test_without_data_a_task_reads_its_sample_and_warns_once(name, value, monkeypatch, capsys):
    set_or_not = monkeypatch.delenv if value is None else monkeypatch.setenv
    set_or_not("GPTJAX_DATA", *([False] if value is None else [value]))
    _warn_of_sample.cache_clear()
    splits = check_splits(name, least=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"task:{name}: GPTJAX_DATA is not set, so a tiny sample" in err
    assert find_task(name).source in err
    if labels := find_task(name).labels:
        assert all({e.answer for e in found} == set(labels) for found in splits.values())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("real_data")
def test_a_task_reads_its_data(name):
    check_splits(name, least=20)


def check_splits(name: str, least: int) -> dict:
    """Reads all splits of a task twice: equal examples, with prompts, answers, known labels and a baseline answer."""
    task = find_task(name)
    names = ("train", "validation", "test")
    splits = {split: list(load_examples(f"task:{name}", DataConfig(), split)) for split in names}
    assert all(len(found) >= least for found in splits.values()) and len(splits["train"]) > len(splits["test"])
    assert splits["train"] == list(load_examples(f"task:{name}", DataConfig(), "train"))
    for found in splits.values():
        assert all(any(p.is_target for p in e.parts) and e.prompt.strip() and e.answer.strip() for e in found)
        assert all(not task.labels or e.answer.strip() in task.labels for e in found)
    answer_of = baseline(task, splits["train"])
    assert all(isinstance(answer_of(e), str) for e in splits["test"])
    return splits


def test_the_samples_come_with_an_installed_gptjax(tmp_path):
    """A wheel has every file of the samples, byte for byte."""
    pytest.importorskip("setuptools")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "gptjax", tmp_path / "gptjax", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    [path] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        for file in filter(Path.is_file, SAMPLES.rglob("*")):
            assert wheel.read(str(file.relative_to(ROOT))) == file.read_bytes()


@pytest.mark.usefixtures("real_data")
def test_equal_sentences_are_in_one_split():
    texts = [{" ".join(e.prompt.casefold().split()) for e in load_examples("task:sentiment", DataConfig(), split)}
             for split in ("train", "validation", "test")]  # fmt: skip
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


@pytest.mark.usefixtures("real_data")
def test_entities_survive_a_round_trip_through_text():
    found = list(load_examples("task:entities", DataConfig(), "train"))
    same = [tags_of(e.answer, e.values["tokens"].split()) == e.values["tags"].split() for e in found]
    assert sum(same) / len(same) >= 0.99


def test_the_task_in_the_documentation_works(tmp_path):
    """In a copy of the package, as a user who works in a clone has it."""
    shutil.copytree(ROOT / "gptjax", tmp_path / "gptjax", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TASK = Task(" in b)
    (tmp_path / "gptjax/data/tasks/headlines.py").write_text(block)
    rows = [f'"The river rose, by {i} feet. It fell again.",River rises {i} feet' for i in range(60)]
    (tmp_path / "headlines.csv").write_text("text,headline\n" + "\n".join(rows))
    script = """
from gptjax.config import DataConfig
from gptjax.data.examples import load_examples
from gptjax.data.tasks import baseline, find_task
for split in ("train", "validation", "test"):
    for e in load_examples("task:headlines", DataConfig(), split):
        print(split, repr(e.prompt), repr(e.answer), repr(baseline(find_task("headlines"), ())(e)), e.where, sep=" | ")
"""
    environment = {"PATH": os.environ["PATH"], "GPTJAX_DATA": str(tmp_path)}
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    lines = [line.split(" | ") for line in shown.splitlines()]
    assert len(lines) == 60 and {line[0] for line in lines} == {"train", "validation", "test"}
    _, prompt, answer, lead, where = lines[0]
    assert prompt == r"'The river rose, by 0 feet. It fell again.\nHeadline:\n'" and answer == "'River rises 0 feet'"
    assert lead == "'The river rose, by 0 feet.'" and where == f"{tmp_path}/headlines.csv, row 1"
