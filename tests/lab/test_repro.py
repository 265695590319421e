"""Claims: found by file or name, refused if incomplete, measured once, and shown when they fail."""

import json
import sys
from html.parser import HTMLParser

import pytest

from gptjax.cli import main
from gptjax.errors import GptjaxError, Interrupted
from gptjax.lab import repro
from gptjax.lab.claims_page import page

FILE = '''"""A claim."""
from pathlib import Path
from gptjax.errors import DataError
from gptjax.lab.repro import Claim, Measurement

def measure(folder):
    {body}

claim = Claim(title="A title", citation={citation!r}, published="1.88", tolerance="1.88 +- 0.04", minutes={minutes},
              measure=measure, device={device!r})
'''
PASSES = """(folder / "times").open("a").write("x")
    return Measurement("1.87", True, {"loss": 1.87, "each": [1.86, 1.88]}, "seen <b>")"""


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """Writes claims into a checkout of their own, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / repro.PAPERS).mkdir(parents=True)

    def write(name, body=PASSES, citation="Someone 2020, table 1", minutes=1, device="cpu"):
        path = repro.PAPERS / f"{name}.py"
        path.write_text(FILE.format(body=body, citation=citation, minutes=minutes, device=device))
        return path

    return write


@pytest.fixture
def run(monkeypatch, capfd):
    def one(*arguments):
        monkeypatch.setattr(sys, "argv", ["gptjax", "repro", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.setattr("gptjax.commands.repro.start_jax", lambda: None)
        monkeypatch.setattr("os._exit", sys.exit)
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()

    return one


def test_a_claim_is_one_file_and_is_measured_once(papers, run, tmp_path):
    papers("mine")
    code, out, err = run("mine", "--folder", tmp_path / "out")
    assert code == 0
    assert "mine" in out and "1.87" in out and "pass" in out
    assert "1 of 1 pass" in err
    run("mine", "--folder", tmp_path / "out")
    times = tmp_path / "out/mine/times"
    assert times.read_text() == "x", "measured twice"
    path = papers("mine")
    path.write_text('"""Another docstring."""\n# and a comment\n' + path.read_text().partition("\n")[2])
    run("mine", "--folder", tmp_path / "out")
    assert times.read_text() == "x", "a docstring or a comment does not require a new measurement"
    path.write_text(path.read_text().replace("1.87", "1.89"))
    assert "1.89" in run("mine", "--folder", tmp_path / "out")[1]
    assert times.read_text() == "xx", "changed code is measured again"


def test_one_that_fails_stays_failing_and_one_that_crashes_does_not_stop_the_others(papers, run, tmp_path):
    papers("a_crash", "raise ValueError('a bug of its own')")
    papers("b_fails", "return Measurement('2.50', False)")
    papers("c_lacks", "raise DataError('the environment variable GPTJAX_DATA is not set')")
    papers("d_gpu", device="gpu")
    papers("e_passes")
    code, out, err = run("--folder", tmp_path / "out", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    verdicts = {row["name"]: row["verdict"] for row in rows}
    expected = ["crashed", "fail", "not run", "pass", "not run"]
    assert list(verdicts.values()) == expected, "in the order of their cost, those for a GPU last"
    assert code == 3 and "a bug of its own" in err
    assert "GPTJAX_DATA" in rows[2]["note"] and "needs a GPU" in rows[4]["note"]
    table = json.loads((tmp_path / "out/claims.json").read_text())["claims"]
    assert [row["verdict"] for row in table] == expected
    listed = run("--list", "--folder", tmp_path / "out")[1].splitlines()
    assert len(listed) == 5 and "fail" in listed[1] and "to do" in listed[0], "a crashed claim is tried again"
    assert run("d_gpu", "e_passes", "--folder", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(citation=""), "mine.py: the claim has no citation; say where the number was published"),
        (dict(citation="  "), "has no citation"),
        (dict(minutes=0), "minutes above 0"),
        (dict(device="tpu"), "device 'cpu' or 'gpu'"),
    ],
)
def test_a_claim_that_lacks_something_is_refused_by_its_file(papers, run, changes, message):
    papers("mine", **changes)
    code, _, err = run("mine")
    assert code == 2 and message in err


def test_what_keeps_a_claim_from_being_measured_is_printed_on_its_own_line(papers, run, tmp_path):
    papers("lacks", "raise DataError('the environment variable GPTJAX_DATA is not set, and a long way to say so')")
    code, out, err = run("lacks", "--folder", tmp_path / "out")
    assert code == 3 and "\n  lacks: the environment variable GPTJAX_DATA is not set, and a long way to say so" in out
    assert "0 of 1 pass, 1 not run" in err


def test_a_claim_without_a_citation_is_refused_with_a_hint(papers, run):
    path = papers("mine")
    path.write_text(path.read_text().replace("citation='Someone 2020, table 1', ", ""))
    code, _, err = run("mine")
    assert code == 2 and "mine.py: the claim has no citation; say where" in err and "TypeError" not in err


def test_a_file_without_a_claim_is_refused(papers, run):
    papers("mine")
    (repro.PAPERS / "other.py").write_text("claim = 3")
    (repro.PAPERS / "none.py").write_text("x = 3")
    for name, message in [
        ("nothing", "no such claim; experiments/papers has mine, none, other"),
        ("none", "none.py: defines no `claim`"),
        ("other", "other.py: its claim is of type int"),
    ]:
        code, _, err = run(name)
        assert code == 2 and message in err


def test_an_interruption_ends_all_and_the_time_is_kept(papers, tmp_path):
    papers("mine", "from gptjax.errors import Interrupted; raise Interrupted('asked to')")
    with pytest.raises(Interrupted):
        list(repro.reproduce([repro.load_claim("mine")], tmp_path / "out"))
    before = json.loads((tmp_path / "out/mine/seconds.json").read_text())["seconds"]
    assert before > 0 and not (tmp_path / "out/mine/claim.json").exists()
    papers("mine")
    (outcome,) = repro.reproduce([repro.load_claim("mine")], tmp_path / "out")
    assert outcome.minutes > before / 60


def test_the_page_is_valid_self_contained_and_escapes_text(papers, tmp_path):
    papers("mine")
    list(repro.reproduce([repro.load_claim("mine")], tmp_path / "out"))
    text = (tmp_path / "out/claims.html").read_text()
    for word in ("Someone 2020", "1.88 +- 0.04", "pass", "1.87", "1.86, 1.88", "seen &lt;b&gt;"):
        assert word in text
    assert "http:" not in text and "https:" not in text and "<script" not in text and "src=" not in text
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            opened.extend([tag] * (tag != "meta"))

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Reader().feed(text)
    assert not opened
    assert "0 of 0" in page([])


TRAINS = """import conftest
    from gptjax.lab.repro import train_run
    loss = train_run(conftest.tiny_run(Path.cwd()), folder)["val_loss"]
    return Measurement(f"{loss}", True)"""


@pytest.mark.slow
def test_a_claim_trains_in_its_folder_and_what_is_trained_is_not_trained_again(papers, tmp_path, single_device):
    papers("mine", TRAINS)
    (first,) = repro.reproduce([repro.load_claim("mine")], tmp_path / "out")
    assert (first.verdict, first.name) == ("pass", "mine"), first.note
    saved = sorted((tmp_path / "out/mine/tiny/checkpoints").iterdir())
    times = [path.stat().st_mtime_ns for path in saved]
    (tmp_path / "out/mine/claim.json").unlink()  # cut off before the outcome was written
    (again,) = repro.reproduce([repro.load_claim("mine")], tmp_path / "out")
    assert again.ours == first.ours and again.minutes > first.minutes
    assert [path.stat().st_mtime_ns for path in saved] == times


def test_claims_name_their_file_only_once(papers):
    papers("mine")
    assert [claim_file.name for claim_file in repro.all_claims()] == ["mine"]
    with pytest.raises(GptjaxError, match="no such experiment file"):
        repro.load_claim("somewhere/else.py")


def test_a_claim_is_found_by_a_near_name_and_by_the_path_of_a_file_anywhere(papers, run, tmp_path):
    papers("pre_ln")
    assert repro.load_claim("pre-ln").name == repro.load_claim("Pre_LN").name == "pre_ln"
    code, _, err = run("pre-lm")
    assert code == 2 and "pre-lm: no such claim; did you mean pre_ln? experiments/papers has pre_ln" in err
    (tmp_path / "elsewhere").mkdir()
    file = papers("other").rename(tmp_path / "elsewhere" / "other.py")
    code, out, _ = run(file, "--folder", tmp_path / "out")
    assert code == 0 and "other" in out and "pass" in out


def test_results_written_before_the_renaming_are_read(papers, tmp_path):
    papers("mine")
    (outcome,) = repro.reproduce([repro.load_claim("mine")], tmp_path)
    for name in ("mine/claim.json", "claims.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace('"metrics"', '"figures"').replace('"note"', '"seen"'))
    assert repro.saved_result(repro.load_claim("mine"), tmp_path) == outcome
    assert repro.write_table([], tmp_path) == [outcome]
