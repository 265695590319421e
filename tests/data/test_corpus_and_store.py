"""Sources of every kind, their errors, and a store that is either complete or absent."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import corpus, store
from gptjax.data.batches import DataLoader
from gptjax.data.store import open_store
from gptjax.errors import DataError
from gptjax.objectives import make_objective

DOCUMENTS = [f"document {i}: " + "words and more " * (i % 5 + 1) for i in range(40)]


def texts(source, **settings):
    return list(corpus.iter_documents(str(source), DataConfig(**settings)))


def write_tables(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": d, "other": i} for i, d in enumerate(DOCUMENTS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (folder / "a.csv").write_text("text,other\n" + "".join(f'"{r["text"]}",{r["other"]}\n' for r in rows))
    return [folder / name for name in ("a.jsonl", "a.parquet", "a.csv")]


def test_every_format_gives_the_same_documents(tmp_path):
    for path in write_tables(tmp_path):
        assert texts(path) == DOCUMENTS, path
        assert texts(path, max_documents=3) == DOCUMENTS[:3]


cells = st.text('ab",\n é#', max_size=6)


@given(st.lists(st.tuples(cells, cells), min_size=1), st.data())
def test_rows_of_a_table_are_exact_and_have_their_line_numbers(rows, data):
    """Cells of any text, over several lines, and blank lines between the rows."""
    written, lines = io.StringIO("a,b\n"), []
    written.seek(0, io.SEEK_END)
    for row in rows:
        written.write("\n" * data.draw(st.integers(0, 2)))
        lines.append(written.getvalue().count("\n") + 1)
        csv.writer(written, lineterminator="\n").writerow(row)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_text(written.getvalue(), encoding="utf-8")
        found = list(corpus.iter_rows(str(path), DataConfig()))
        assert [(x["a"], x["b"]) for x, _ in found] == rows
        assert [where for _, where in found] == [f"{path}, line {n}" for n in lines]
        path = path.with_suffix(".jsonl")
        path.write_text("\n".join(json.dumps({"a": a}) + "\n" * (len(b) % 2) for a, b in rows))
        found, at = list(corpus.iter_rows(str(path), DataConfig())), 1
        for (a, b), (x, where) in zip(rows, found, strict=True):
            assert x == {"a": a} and where == f"{path}, line {at}"
            at += 1 + len(b) % 2


def test_malformed_tables_are_refused_with_the_line(tmp_path):
    for name, content, message in [
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: has 3 cells, but the first line has 2 columns"),
        ("b.csv", b'a,b\n"x\ny",2\n"open,2\n\n', "line 4: cannot be read as csv"),
        ("c.csv", b"a,a\n1,2\n", "line 1: has the column 'a' twice"),
        ("d.csv", b"a,b\n1,2\n1,caf\xe9\n", "line 3: is not UTF-8"),
        ("a.jsonl", b'{"a": "x"}\n\n{"a": \n', "line 3: cannot be read as json"),
        ("b.jsonl", b'{"a": "x"}\n[1]\n', "line 2: holds '[1]'; a JSON object with the columns is needed"),
        ("c.jsonl", b'{"a": "\xe9"}\n', "line 1: cannot be read as json"),
        ("d.jsonl", b"[" * 100_000, "line 1: cannot be read as json"),
        ("bom.csv", b"\xef\xbb\xbf", "has no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(corpus.iter_documents(str(tmp_path / name), DataConfig(column="a")))
        assert name in str(caught.value) and message in str(caught.value), name


def test_words_that_look_like_missing_values_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,other\nNA,1\n,2\nnull,3\n")
    assert texts(tmp_path / "a.csv") == ["NA", "null"]


def test_json_is_exact_in_an_array_and_in_lines(tmp_path):
    """Dates stay texts, and texts beside numbers stay themselves: other readers convert both."""
    rows = [{"q": "one", "a": 1}, {"q": "two", "a": "two"}, {"q": "day", "a": "2020-01-02"}, {"q": "no", "a": None}]
    (tmp_path / "array.json").write_text(" " + json.dumps(rows, indent=1))
    for name in ("lines.json", "lines.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, unit in {"array.json": "row", "lines.json": "line", "lines.jsonl": "line"}.items():
        path = tmp_path / name
        assert list(corpus.iter_rows(str(path), DataConfig())) == [
            (row, f"{path}, {unit} {n}") for n, row in enumerate(rows, 1)
        ]
        with pytest.raises(DataError, match=f"{unit} 1, column 'a': holds 1; text is needed"):
            texts(path, column="a")


@pytest.mark.parametrize("name", ["a.json", "lines.json", "a.jsonl"])
def test_half_a_surrogate_pair_is_refused_where_it_is(tmp_path, name):
    good, bad = r'{"text": "a smile \ud83d\ude00"}', r'{"text": "a smile \ud83d and more"}'
    rows = f"[{good}, {bad}]" if name == "a.json" else f"{good}\n{bad}\n"
    (tmp_path / name).write_text(rows)
    with pytest.raises(DataError, match=rf"{name}, (row|line) 2, column 'text': holds \\ud83d, which is half a char"):
        texts(tmp_path / name)


def test_a_line_of_text_is_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('"' + "é" * 60 + '"\n')
    with pytest.raises(DataError, match=r"line 1: holds '\"éé.*a JSON object with the columns is needed"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("compression", [".gz", ".zst", ".GZ"])
def test_compressed_files_have_the_documents_of_the_plain_ones(tmp_path, name, compression):
    import pyarrow as pa

    kind = "zstd" if compression == ".zst" else "gzip"
    content = {"a.txt": "words", "a.csv": "text\nwords\n"}.get(name, '{"text": "words"}\n').encode()
    for path, damaged in (
        (tmp_path / (name.upper() + compression), False),
        (tmp_path / ("cut" + name + compression), True),
    ):
        with pa.output_stream(str(path), compression=kind) as file:
            file.write(content)
        if damaged:
            path.write_bytes(path.read_bytes()[:-5])
            with pytest.raises(DataError, match=f"{path.name}: cannot be read|{path.name}: is empty"):
                texts(path)
        else:
            assert texts(path) == ["words"]
    assert len({corpus.fingerprint(str(path), DataConfig()) for path in tmp_path.iterdir()}) == 2


def test_what_a_folder_leaves_out_is_said_once(tmp_path, capfd):
    for name in ("a.jsonl", "C.JSONL", ".ipynb_checkpoints/a-checkpoint.jsonl", "sub/e.Jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    for name in ("x.pdf", "y.pdf", "LICENSE"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    for _ in range(2):
        assert texts(tmp_path) == ["C.JSONL", "a.jsonl", "sub/e.Jsonl"]
    warning = capfd.readouterr().err
    assert warning.count("warning") == 1 and "3 files are read and 4 are left out" in warning
    assert "2 ending in '.pdf', 1 hidden, 1 without an ending" in warning
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        texts(tmp_path / "pipe.txt")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.txt", "a.md", "ignored.bin", "c/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["a.md", "b.txt", "c/d.txt"]


def test_a_hub_data_set_is_read_downloaded_or_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_tables(folder)[0].rename(folder / "train.jsonl")
    (folder / "a.csv").unlink()
    (folder / "a.parquet").unlink()
    for streaming in (False, True):  # the hub's reader accepts a local folder as a name
        assert texts(f"hub:{folder}", streaming=streaming) == DOCUMENTS
    prints = [
        corpus.fingerprint(f"hub:{folder}", DataConfig(hub_split=part)) for part in ("train", "train", "train[:1%]")
    ]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(DataError, match="hub_split = 'nowhere': cannot be read"):
        texts(f"hub:{folder}", hub_split="nowhere")


def test_an_unknown_hub_name_is_refused():
    with pytest.raises(DataError, match="not found on the hub, or the hub cannot be reached"):
        texts("hub:nobody/nothing")


def test_the_embedded_corpus_is_available():
    assert sum(map(len, texts("pydoc"))) > 300_000


def test_errors_of_a_source_are_reported(tmp_path, monkeypatch):
    def refused(source, message, **settings):
        with pytest.raises(DataError) as caught:
            texts(source, **settings)
        assert message in str(caught.value)

    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    refused("$NO_SUCH_FOLDER/tinyshakespeare.txt", "environment variable NO_SUCH_FOLDER is not set")
    refused("$NO_SUCH_FOLDER/tinyshakespeare.txt", "get it from https://")
    refused(tmp_path / "nothing.txt", "no such file or folder")
    refused(tmp_path, "no file in this folder can be read; known endings are .txt")
    (tmp_path / "a.bin").write_text("x")
    refused(tmp_path / "a.bin", "ends in '.bin'")
    (tmp_path / "empty.txt").write_text("")
    refused(tmp_path / "empty.txt", "is empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    refused(tmp_path / "latin.txt", "byte 3 is not UTF-8")
    rows = [json.dumps({"text": "good"})] * 4
    (tmp_path / "cut.jsonl").write_text("\n".join([*rows, '{"text": "cut of']))
    refused(tmp_path / "cut.jsonl", "line 5")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    refused(tmp_path / "rows.jsonl", "has no column 'body' (data.column); it has text", column="body")
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    refused(tmp_path / "number.jsonl", "line 1, column 'text': holds 3")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut off")
    refused(tmp_path / "cut.parquet", "cut.parquet: cannot be read as parquet")


def test_a_store_is_built_once_and_found_again(tmp_path):
    data = DataConfig(source=str(write_corpus(tmp_path)))
    first = store.open_store(data)
    before = (first.folder / "store.json").stat().st_mtime_ns
    assert store.open_store(data).key == first.key
    assert (first.folder / "store.json").stat().st_mtime_ns == before
    elsewhere = tmp_path / "copy.txt"
    elsewhere.write_bytes((tmp_path / "corpus.txt").read_bytes())
    assert store.open_store(DataConfig(source=str(elsewhere))).key == first.key, "the path has no effect"
    elsewhere.write_bytes(elsewhere.read_bytes()[:-1] + b"!")
    assert store.open_store(DataConfig(source=str(elsewhere))).key != first.key, "one changed byte gives another key"


@pytest.mark.parametrize("changes", [dict(tokenizer="char"), dict(val_fraction=0.2), dict(split="document"),
                                     dict(max_documents=1)])  # fmt: skip
def test_the_key_depends_on_everything_that_decides_the_tokens(tmp_path, changes):
    source = str(write_corpus(tmp_path))
    assert store._key(DataConfig(source=source)) != store._key(DataConfig(source=source, **changes))


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece"])
def test_the_store_holds_exactly_the_text(tmp_path, kind):
    path = write_corpus(tmp_path)
    text = path.read_text()
    opened = store.open_store(DataConfig(source=str(path), tokenizer=kind, tokenizer_vocab_size=300, val_fraction=0.25))
    train, val = opened.train[0].ids, opened.validation[0].ids
    cut = int(len(text) * 0.75)
    assert opened.tokenizer.decode(train) == text[:cut]
    assert opened.tokenizer.decode(val) == text[cut:]
    assert opened.tokenizer.eos_id not in train, "the divided document does not end in the training part"


def documents_of(opened, stream):
    """The documents of a stream as text; each must end with `eos_id`."""
    ends = [*stream.document_starts[1:], len(stream.ids)]
    assert all(stream.ids[end - 1] == opened.tokenizer.eos_id for end in ends)
    return [opened.tokenizer.decode(stream.ids[a:b]) for a, b in zip(stream.document_starts, ends, strict=True)]


def test_a_split_by_document_divides_no_document(tmp_path):
    write_tables(tmp_path)
    opened = store.open_store(DataConfig(source=str(tmp_path / "a.jsonl"), split="document", val_fraction=0.3))
    train, validation = (documents_of(opened, s) for s in (opened.train[0], opened.validation[0]))
    assert sorted(train + validation) == sorted(DOCUMENTS) and len(validation) > 3
    # another document moves none of the first ones to the other split
    more = tmp_path / "more.jsonl"
    more.write_text((tmp_path / "a.jsonl").read_text() + json.dumps({"text": "new", "other": 0}) + "\n")
    grown = store.open_store(DataConfig(source=str(more), split="document", val_fraction=0.3))
    assert [d for d in documents_of(grown, grown.validation[0]) if d != "new"] == validation


def test_a_separate_validation_source(tmp_path):
    (tmp_path / "train.txt").write_text("training text " * 20)
    (tmp_path / "val.txt").write_text("validation text " * 5)
    opened = store.open_store(DataConfig(source=str(tmp_path / "train.txt"), val_source=str(tmp_path / "val.txt")))
    assert opened.tokenizer.decode(opened.train[0].ids) == "training text " * 20
    assert opened.tokenizer.decode(opened.validation[0].ids) == "validation text " * 5


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(DataError, match="no training text is left"):
        store.open_store(DataConfig(source=str(tmp_path / "short.txt"), val_fraction=0.9))


def test_a_build_that_is_killed_leaves_no_store(tmp_path):
    path = write_corpus(tmp_path)
    script = (
        "import os, signal\n"
        "from gptjax.config import DataConfig\n"
        "from gptjax.data import store\n"
        "write = store.write_atomic\n"
        "def die(target, content):\n"
        "    if target.name == 'store.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(target, content)\n"
        "store.write_atomic = die\n"
        f"store.open_store(DataConfig(source={str(path)!r}))\n"
    )
    environment = os.environ | {"GPTJAX_CACHE": str(tmp_path / "cache")}
    died = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert died.returncode == -9
    stores = tmp_path / "cache" / "stores"
    assert [p.name for p in stores.iterdir() if not p.name.startswith("building-")] == []
    again = "\n".join(script.splitlines()[1:3] + script.splitlines()[-1:])
    subprocess.run([sys.executable, "-c", again], env=environment, check=True)
    assert len([p for p in stores.iterdir() if (p / "store.json").exists()]) == 1


def test_a_store_that_lost_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))  # this test damages its store
    data = DataConfig(source=str(write_corpus(tmp_path, 3000)))
    opened = store.open_store(data)
    path = opened.folder / "0.train.tokens"
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=r"delete .* to rebuild it"):
        store.open_store(data)


def test_an_id_outside_the_vocabulary_is_refused_at_the_start_or_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    e = TINY.override({"data.source": str(write_corpus(tmp_path))})
    opened = open_store(e.data)
    path = opened.folder / "0.train.tokens"
    content = bytearray(path.read_bytes())
    content[2001] ^= 0x80  # a flipped bit makes a token 32768 more
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"holds the id 32\d\d\d, and the vocabulary has only 257"):
        open_store(e.data)
    monkeypatch.setattr(store, "CHECKED_AT_OPEN", 10)  # as in a corpus too large to be checked at once
    batches = DataLoader(open_store(e.data), e.resolved(257), make_objective(e))
    with pytest.raises(DataError, match=r"holds the id 32\d\d\d"):
        for step in range(50):
            batches.host_batch(step)
    shutil.rmtree(opened.folder)
    open_store(e.data)


def test_chunks_of_a_text_without_line_breaks():
    assert list(store.text_chunks("x" * 100, 10)) == ["x" * 100]
    assert "".join(store.text_chunks("a\nb" * 50, 7)) == "a\nb" * 50
    assert np.all([len(c) < 20 for c in store.text_chunks("ab\n" * 50, 7)])


@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_the_tokenizer_of_a_run_can_be_named_by_its_folder(tmp_path, kind):
    path = write_corpus(tmp_path)
    first = open_store(DataConfig(str(path), tokenizer=kind, tokenizer_vocab_size=280))
    folder = tmp_path / "run/tokenizer"
    folder.mkdir(parents=True)
    first.tokenizer.save(folder)
    again = open_store(DataConfig(str(path), tokenizer=str(folder)))
    assert again.tokenizer.kind == kind and again.tokenizer.id_to_bytes == first.tokenizer.id_to_bytes
    assert (again.train[0].ids == first.train[0].ids).all()
