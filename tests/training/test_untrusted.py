"""A run folder may be untrusted: nothing in it is executed, no link leads out of it, and memory is bounded."""

import ast
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import QUICK, ROOT

from gptjax.errors import GptjaxError, RunError
from gptjax.training import checkpoint
from gptjax.training.restore import load_params
from gptjax.training.run import open_run

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def vouch(folder: Path, **more) -> None:
    """Makes the manifest and the marker of a checkpoint match its files, as an attacker can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    paths = [p for p in (folder / "arrays").rglob("*") if p.is_file()]
    files = {
        str(p.relative_to(folder / "arrays")): [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()]
        for p in paths
    }
    text = json.dumps(manifest | {"files": files | more})
    (folder / "manifest.json").write_text(text)
    (folder / "committed").write_text(f"sha256 {hashlib.sha256(text.encode()).hexdigest()}\n")


@pytest.mark.parametrize(
    "name", ["experiment.json", "metrics.jsonl", "tokenizer", "checkpoints", "checkpoints/00000006/arrays"]
)
def test_links_that_lead_out_are_refused(run, tmp_path, name):
    (run / name).rename(tmp_path / "outside")
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="is a link out of the run folder"):
        open_run(run)


def test_a_link_to_the_run_folder_itself_is_fine(run, tmp_path):
    (tmp_path / "linked").symlink_to(run)
    assert load_params(open_run(tmp_path / "linked"), "last")[1] == 6


def test_names_in_a_manifest_that_lead_out_are_refused(run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    proof = [6, hashlib.sha256(b"secret").hexdigest()]
    for name in ("../../../../secret", str(tmp_path / "secret")):
        vouch(run / "checkpoints" / "00000006", **{name: proof})
        with pytest.raises(RunError, match=r"step 6 cannot be used: .*is not a plain file of the checkpoint"):
            checkpoint.choose(run / "checkpoints", "6")


def test_giants_and_devices_are_refused_without_reading_them(run):
    os.truncate(run / "experiment.json", 1 << 40)  # a terabyte of nothing
    with pytest.raises(RunError, match=r"at most .* are allowed"):
        open_run(run)
    (run / "experiment.json").unlink()
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")  # who opens it for reading waits for ever
    with pytest.raises(RunError):
        open_run(run)
    os.truncate(run / "checkpoints" / "00000006" / "manifest.json", 1 << 40)
    (last,) = [c for c in checkpoint.listing(run / "checkpoints") if c.step == 6]
    assert checkpoint.problem(last)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[1]", '{"format": 1, "model": 5}', '{"format": 1, "modle": {}}', "\0"]
)
def test_an_experiment_that_is_none_is_refused(run, text):
    (run / "experiment.json").write_text(text)
    with pytest.raises(GptjaxError):
        open_run(run)


def test_chunks_larger_than_their_array_are_refused(run):
    """Reading one chunk allocates all of it: a small file could take any amount of memory."""
    import tensorstore

    folder = run / "checkpoints" / "00000006"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'arrays'}/"}).result()
    name = b"params.blocks.ffn.up/.zarray"
    described = json.loads(store.read(name).result().value)
    store.write(name, json.dumps(described | {"chunks": [1 << 20, 1 << 20, 1 << 10]}).encode()).result()
    vouch(folder)
    with pytest.raises(RunError, match=r"params\.blocks\.ffn\.up of shape \(2, 16, 64\) is stored in chunks of"):
        load_params(open_run(run), "last")


SLOW_COMMANDS = (["eval"], ["sample", "line"])


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['GPTJAX_TEST_MARK']}",)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["verify"], *(pytest.param(v, marks=pytest.mark.slow) for v in SLOW_COMMANDS)])
def test_no_code_from_a_run_folder_runs(run, tmp_path, monkeypatch, command):
    mark = tmp_path / "it-ran"
    monkeypatch.setenv("GPTJAX_TEST_MARK", str(mark))
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("experiment.py", "sitecustomize.py", "__init__.py", "jax.py", "tokenizer/tokenizer.py"):
        (run / name).write_text(code)
    (run / "checkpoints" / "00000006" / "arrays" / "state.pkl").write_bytes(pickle.dumps(Payload()))
    vouch(run / "checkpoints" / "00000006")
    argv = [sys.executable, "-m", "gptjax", command[0], str(run), *command[1:]]
    ended = subprocess.run(argv, capture_output=True, text=True, env=os.environ | QUICK, cwd=ROOT)
    assert "Traceback" not in ended.stderr and ended.returncode in (0, 2), ended.stderr
    for name in ("manifest.json", "committed"):
        (run / "checkpoints" / "00000006" / name).write_bytes(pickle.dumps(Payload()))
    (run / "tokenizer" / "gptjax_tokenizer.json").write_bytes(pickle.dumps(Payload()))
    ended = subprocess.run(argv, capture_output=True, text=True, env=os.environ | QUICK, cwd=ROOT)
    # eval needs no tokenizer of the run, and falls back to an earlier checkpoint
    assert ended.returncode == (0 if command[0] == "eval" else 2) and "Traceback" not in ended.stderr, ended.stderr
    assert not mark.exists()


def test_the_source_has_no_way_to_unpickle_or_to_execute_but_for_experiment_files():
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in (ROOT / "gptjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__", "np.load", "numpy.load", "torch.load"}, (
                    path
                )
                assert "exec_module" not in called or path.name == "loading.py", path
