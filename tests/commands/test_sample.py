"""`gptjax sample` and `gptjax chat` as a user meets them: what is printed, what is refused, and exit codes."""

import io
import json
import re
import sys

import jax
import pytest
from conftest import tiny_model

from gptjax.cli import main
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import init_params


@pytest.fixture
def run(finished_run, monkeypatch, capfd):
    """Runs a verb on the finished run in this process; exit code, stdout and stderr."""

    def one(verb, *arguments, typed="", model=finished_run):
        monkeypatch.setattr(sys, "argv", ["gptjax", verb, *map(str, [model, *arguments])])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the verb sets, for a process of its own
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr("os._exit", sys.exit)
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return one


def test_one_text_is_streamed_and_several_are_numbered(run):
    code, one, _ = run("sample", "line", "--max-new-tokens", 6)
    assert code == 0 and one.startswith("line") and one.endswith("\n")
    code, two, _ = run("sample", "line", "--max-new-tokens", 6, "--num-return-sequences", 2)
    assert code == 0 and two.startswith(f"--- 1 ---\n{one}--- 2 ---\nline")


def test_prompts_from_a_file_as_json(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("li\nline 1\n")
    code, out, _ = run("sample", "--prompts", file, "--max-new-tokens", 4, "--json", "--temperature", 0)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [v["prompt"] for v in lines] == ["li", "line 1"]
    assert all(len(v["ids"]) == len(v["logprobs"]) <= 4 for v in lines)
    _, alone, _ = run("sample", "line 1", "--max-new-tokens", 4, "--temperature", 0)
    assert alone == "line 1" + lines[1]["text"] + "\n", "what is made beside it changes nothing"
    assert run("sample", "too", "--prompts", file)[0] == 2


def test_log_probabilities_are_shown_token_by_token(run):
    code, out, _ = run("sample", "line", "--max-new-tokens", 3, "--logprobs")
    shown = [line for line in out.splitlines() if re.match(r"\s+-?\d+\.\d{4}  b'", line)]
    assert code == 0 and len(shown) == 3


def test_beams_and_guesses(run, finished_run):
    code, beams, _ = run("sample", "line", "--max-new-tokens", 4, "--num-beams", 3, "--num-return-sequences", 2)
    assert code == 0 and beams.count("line") >= 2
    greedy = run("sample", "line", "--max-new-tokens", 8, "--temperature", 0)[1]
    for drafter in (["--draft", finished_run], ["--prompt-lookup", 2]):
        code, out, err = run("sample", "line", "--max-new-tokens", 8, "--temperature", 0, *drafter)
        assert code == 0 and out == greedy
        assert re.search(r"\d\.\d\d tokens a call of the model \(\d+% of the guesses accepted", err)


def test_a_grammar_is_kept_or_its_breach_reported(run, tmp_path):
    pytest.importorskip("llguidance")
    code, out, _ = run("sample", "x", "--regex", "[ab]{3}c", "--max-new-tokens", 8)
    assert code == 0 and re.fullmatch("x[ab]{3}c\n", out)
    code, out, err = run("sample", "x", "--regex", "[ab]{9}c", "--max-new-tokens", 5)
    assert code == 3 and "1 of 1 texts had to stop before they were whole" in err
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [1, "é"]}')
    code, out, _ = run("sample", "x", "--json-schema", schema, "--json", "--num-return-sequences", 3)
    assert code == 0 and {json.loads(json.loads(line)["text"]) for line in out.splitlines()} <= {1, "é"}


@pytest.mark.parametrize("arguments, message", [
    (["x", "--min-p", "2"], "min_p = 2.0"),
    (["x", "--repetition-penalty", "0"], "repetition_penalty = 0.0"),
    (["x", "--logit-bias", "five"], "'five' is not ID:NUMBER"),
    (["x", "--logit-bias", "999:1"], "logit_bias: 999 is no token"),
    (["x", "--stop", ""], "an empty string ends every text"),
    (["x", "--num-beams", "2", "--stop", "y", "--seed", "1", "--regex", "a", "--top-k", "3", "--temperature", "1"],
     "--temperature, --top-k, --seed: no effect with --num-beams, which draws nothing; "
     "--stop, --regex: not possible with --num-beams; leave out what has no place"),
    (["x", "--length-penalty", "2", "--draft-tokens", "3", "--temperature", "0", "--min-p", "0.1", "--top-p", "0.5"],
     "--top-p, --min-p: no effect at --temperature 0, which draws nothing; "
     "--length-penalty: no effect without --num-beams above 1; "
     "--draft-tokens: no effect without --draft or --prompt-lookup; leave out what has no place"),
    (["x", "--num-beams", "2", "--num-return-sequences", "3"], "2 beams find no more texts"),
    (["x", "--num-return-sequences", "0"], "num_return_sequences = 0"),
    (["x", "--num-beams", "0"], "num_beams must be at least 1"),
    (["x", "--stop-tokens", "999"], "stop_tokens: 999 is no token"),
    (["x", "--logit-bias", "5:nan"], "logit_bias"),
    (["x", "--prompt-lookup", "2", "--draft", "elsewhere"], "one of them can guess"),
    (["x", "--prompt-lookup", "2", "--frequency-penalty", "1"], "look back at every token"),
    (["x", "--grammar", "nowhere.lark"], "nowhere.lark': cannot be read"),
    (["x", "--max-new-tokens", "-1"], "max_new_tokens = -1"),
    (["x", "--prompts", "nowhere.txt"], "nowhere.txt': cannot be read"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_message(run, arguments, message):
    code, out, err = run("sample", *arguments)
    assert code == 2 and message in err and out == "", err


def test_a_dialogue_on_the_terminal(run, monkeypatch):
    model = tiny_model(vocab_size=257, context_length=64)
    made = Pretrained("talker", model, init_params(model, jax.random.key(0)), ByteTokenizer())
    monkeypatch.setattr("gptjax.interop.open.open_model", lambda name, checkpoint: made)
    code, out, err = run("chat", "--max-new-tokens", 3, typed="a\n\n/reset\nb\n/exit\nnever read\n")
    assert code == 0 and err == "" and out.count("\n") >= 2
    code, again, _ = run("chat", "--max-new-tokens", 3, typed="a\n/reset\nb\n")
    assert (code, again) == (0, out), "the same seed and questions give the same answers"
    code, _, err = run("chat", "--max-new-tokens", 3, typed="a question that is far too long, " * 2 + "\n")
    assert code == 0 and "shorten one of them" in err


@pytest.mark.parametrize("verb", ["sample", "chat"])
def test_checkpoints_are_asked_for_of_runs_only(run, verb, tmp_path):
    code, out, err = run(verb, "--checkpoint", 4, "--max-new-tokens", 3, typed="hi\n")
    assert code == 0 and "no effect" not in err, "of a run it is an option"
    code, out, err = run(verb, "--checkpoint", 4, "--seed", 2, "--temperature", 0, model=tmp_path)
    assert (code, out) == (2, "")
    for told in (f"--checkpoint: no effect, as {tmp_path} is no run folder", "--seed: no effect at --temperature 0"):
        assert told in err


@pytest.mark.parametrize("verb", ["sample", "chat"])
def test_where_the_makers_recommend_to_draw_nothing_the_temperature_comes_first(run, monkeypatch, verb):
    model = tiny_model(vocab_size=257, context_length=64)
    made = Pretrained("cold", model, init_params(model, jax.random.key(0)), ByteTokenizer(), {"temperature": 0.0})
    monkeypatch.setattr("gptjax.interop.open.open_model", lambda name, checkpoint: made)
    code, _, err = run(verb, "--seed", 1, "--top-k", 5, "--max-new-tokens", 2, typed="hi\n")
    assert code == 2 and "--top-k, --seed: no effect at temperature 0, as the model's makers recommend" in err
    assert run(verb, "--seed", 1, "--top-k", 5, "--temperature", 1, "--max-new-tokens", 2, typed="hi\n")[0] == 0
