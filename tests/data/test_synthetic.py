"""Text from a function of (seed, index): deterministic, and never imported because of an untrusted run folder."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import TINY

from gptjax.config import DataConfig
from gptjax.data import corpus
from gptjax.data.store import cache_folder, open_store
from gptjax.errors import DataError, RunError
from gptjax.training import train
from gptjax.training.diagnosis import replay
from gptjax.training.evaluation import evaluate_run
from gptjax.training.run import PROVENANCE, open_run

MODULE = """
def text(seed, index):
    return f"{seed}:{index * index} "

def row(seed, index):
    return {"question": f"{seed}+{index}", "sum": seed + index}

def number(seed, index):
    return index

def fails(seed, index):
    return str(1 // (2 - index))

constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "made_up.py"
    sys.modules.pop("made_up", None)


def data(name, count=20, **more):
    return DataConfig(source=f"function:made_up:{name}", max_documents=count, **more)


def test_documents_are_those_of_the_function_in_their_order(module):
    assert list(corpus.iter_documents("function:made_up:text", data("text", 3))) == ["0:0 ", "0:1 ", "0:4 "]
    assert list(corpus.iter_documents("function:made_up:text:7", data("text", 2))) == ["7:0 ", "7:1 "]
    rows = list(corpus.iter_rows("function:made_up:row:2", data("row", 2)))
    assert [row["sum"] for row, _ in rows] == [2, 3]
    assert rows[1][1] == "made_up:row:2, index 1"


def test_the_fingerprint_depends_on_the_text_only(module):
    first = corpus.fingerprint("function:made_up:text", data("text"))
    assert first == corpus.fingerprint("function:made_up:text:0", data("text"))
    assert first != corpus.fingerprint("function:made_up:text:1", data("text"))
    assert first != corpus.fingerprint("function:made_up:text", data("text", 21))
    module.write_text(MODULE.replace("index * index", "index ** 3"))
    sys.modules.pop("made_up")
    assert first != corpus.fingerprint("function:made_up:text", data("text"))


def test_a_store_of_documents_and_one_of_examples(module):
    plain = open_store(data("text", 200, split="document", val_fraction=0.2))
    found = plain.tokenizer.decode(np.concatenate([plain.train[0].ids, plain.validation[0].ids]))
    assert all(f"0:{i * i} " in found for i in range(200)), "every document is in one of the two splits"
    assert len(plain.validation[0].document_starts) + len(plain.train[0].document_starts) == 200
    examples = open_store(data("row", 200, prompt="{question}=", answer="{sum}"))
    stream = examples.train[0]
    answers = examples.tokenizer.decode(stream.ids[np.asarray(stream.loss_mask)])
    assert "17" in answers and "+" not in answers


@pytest.mark.parametrize(
    "source, message",
    [
        ("function:made_up", "is not of the form function:PACKAGE.MODULE:NAME"),
        ("function:made_up:text:x", "is not of the form function:PACKAGE.MODULE:NAME"),
        ("function:made_up:text:1:2", "is not of the form function:PACKAGE.MODULE:NAME"),
        ("function:no_such:text", "cannot be imported .ModuleNotFoundError"),
        ("function:made_up:nothing", "cannot be imported .AttributeError"),
        ("function:made_up:constant", "is not a function of .seed, index., but 3"),
        ("function:made_up:number", "index 0: returns 0; a text or a dict"),
        ("function:made_up:fails", "index 2: the function fails .ZeroDivisionError"),
        ("function:made_up:row", "has no column 'text'"),
    ],
)
def test_a_source_that_gives_no_text_is_refused(module, source, message):
    with pytest.raises(DataError, match=message):
        list(corpus.iter_documents(source, DataConfig(source=source, max_documents=4)))


def test_text_has_no_columns_and_no_end(module):
    with pytest.raises(DataError, match="need a dict of columns"):
        list(corpus.iter_rows("function:made_up:text", data("text")))
    with pytest.raises(DataError, match=r"data\.max_documents"):
        next(corpus.iter_documents("function:made_up:text", DataConfig()))


@pytest.mark.slow
def test_a_run_folder_never_makes_a_function_run(module, tmp_path, single_device):
    """With its text in the cache a run is evaluated like any other; without it, the function is not imported."""
    e = TINY.override({"data.source": "function:made_up:text", "data.max_documents": 2000, "train.sample_tokens": 0})
    train.train(e, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert evaluate_run(run)["val_loss"] > 0
    sys.modules.pop("made_up")
    module.write_text("raise SystemError('imported')")
    assert evaluate_run(run)["val_loss"] > 0
    shutil.rmtree(cache_folder() / "stores" / json.loads((run.folder / PROVENANCE).read_text())["data"])
    for read_data in (lambda: evaluate_run(run), lambda: replay(run, 1)):
        with pytest.raises(RunError, match=r"data\.source = 'function:made_up:text' names code"):
            read_data()
    assert "made_up" not in sys.modules
