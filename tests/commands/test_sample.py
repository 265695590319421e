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
    """Runs a command on the finished run in this process; exit code, stdout and stderr."""

    def one(command, *arguments, typed="", model=finished_run):
        monkeypatch.setattr(sys, "argv", ["gptjax", command, *map(str, [model, *arguments])])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the command sets for its process
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
    assert alone == "line 1" + lines[1]["text"] + "\n", "the rest of the batch changes nothing"
    assert run("sample", "too", "--prompts", file)[0] == 2


def test_log_probabilities_are_shown_token_by_token(run):
    code, out, _ = run("sample", "line", "--max-new-tokens", 3, "--logprobs")
    shown = [line for line in out.splitlines() if re.match(r"\s+-?\d+\.\d{4}  b'", line)]
    assert code == 0 and len(shown) == 3


@pytest.mark.slow
def test_beams_and_speculative_decoding(run, finished_run):
    code, beams, _ = run("sample", "line", "--max-new-tokens", 4, "--num-beams", 3, "--num-return-sequences", 2)
    assert code == 0 and beams.count("line") >= 2
    greedy = run("sample", "line", "--max-new-tokens", 8, "--temperature", 0)[1]
    for drafter in (["--draft", finished_run], ["--prompt-lookup", 2]):
        code, out, err = run("sample", "line", "--max-new-tokens", 8, "--temperature", 0, *drafter)
        assert code == 0 and out == greedy
        assert re.search(r"\d\.\d\d tokens per call of the model \(\d+% of the draft tokens accepted", err)


def test_a_text_fits_the_grammar_or_is_reported_as_incomplete(run, tmp_path):
    pytest.importorskip("llguidance")
    code, out, _ = run("sample", "x", "--regex", "[ab]{3}c", "--max-new-tokens", 8)
    assert code == 0 and re.fullmatch("x[ab]{3}c\n", out)
    code, out, err = run("sample", "x", "--regex", "[ab]{9}c", "--max-new-tokens", 5)
    assert code == 3 and "1 of 1 texts reached the length limit before they were complete" in err
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [1, "é"]}')
    code, out, _ = run("sample", "x", "--json-schema", schema, "--json", "--num-return-sequences", 3)
    assert code == 0 and {json.loads(json.loads(line)["text"]) for line in out.splitlines()} <= {1, "é"}


@pytest.mark.parametrize("arguments, message", [
    (["x", "--min-p", "2"], "min_p = 2.0"),
    (["x", "--repetition-penalty", "0"], "repetition_penalty = 0.0"),
    (["x", "--logit-bias", "five"], "'five' is not ID:NUMBER"),
    (["x", "--logit-bias", "999:1"], "logit_bias: 999 is not a token id"),
    (["x", "--stop", ""], "an empty string would end every text"),
    (["x", "--num-beams", "2", "--stop", "y", "--seed", "1", "--regex", "a", "--top-k", "3", "--temperature", "1"],
     "--temperature, --top-k, --seed: no effect with --num-beams, which does not sample; "
     "--stop, --regex: not supported with --num-beams; remove these options"),
    (["x", "--length-penalty", "2", "--draft-tokens", "3", "--temperature", "0", "--min-p", "0.1", "--top-p", "0.5"],
     "--top-p, --min-p: no effect with --temperature 0, which is greedy decoding; "
     "--length-penalty: no effect without --num-beams above 1; "
     "--draft-tokens: no effect without --draft or --prompt-lookup; remove these options"),
    (["x", "--num-beams", "2", "--num-return-sequences", "3"], "2 beams find at most 2 texts"),
    (["x", "--num-return-sequences", "0"], "num_return_sequences = 0"),
    (["x", "--num-beams", "0"], "num_beams = 0: must be at least 1"),
    (["x", "--stop-tokens", "999"], "stop_tokens: 999 is not a token id"),
    (["x", "--logit-bias", "5:nan"], "logit_bias"),
    (["x", "--logit-bias", "5:inf"], "must be numbers below infinity"),
    (["x", "--no-repeat-ngram-size", "1" + "0" * 24], "at most 1,000,000,000"),
    (["x", "--num-return-sequences", "1000000"], "num_return_sequences = 1000000: must be at least 1 and at most"),
    (["x", "--prompt-lookup", "3", "--draft-tokens", "1000000"], "draft_tokens = 1000000: must be at least 1"),
    (["x", "--prompt-lookup", "2", "--draft", "elsewhere"], "give only one of them"),
    (["x", "--prompt-lookup", "2", "--frequency-penalty", "1"], "cannot be combined with speculative decoding"),
    (["x", "--grammar", "nowhere.lark"], "nowhere.lark': cannot be read"),
    (["x", "--max-new-tokens", "-1"], "max_new_tokens = -1"),
    (["x", "--prompts", "nowhere.txt"], "nowhere.txt': cannot be read"),
])  # fmt: skip
def test_invalid_options_get_one_message(run, arguments, message):
    code, out, err = run("sample", *arguments)
    assert code == 2 and message in err and out == "", err


def test_a_dialogue_on_the_terminal(run, monkeypatch):
    model = tiny_model(vocab_size=257, context_length=64)
    pretrained = Pretrained("talker", model, init_params(model, jax.random.key(0)), ByteTokenizer())
    monkeypatch.setattr("gptjax.interop.open.open_model", lambda name, checkpoint: pretrained)
    code, out, err = run("chat", "--max-new-tokens", 3, typed="a\n\n/reset\nb\n/exit\nnever read\n")
    assert code == 0 and err == "" and out.count("\n") >= 2
    code, again, _ = run("chat", "--max-new-tokens", 3, typed="a\n/reset\nb\n")
    assert (code, again) == (0, out), "the same seed and questions give the same answers"
    code, _, err = run("chat", "--max-new-tokens", 3, typed="a question that is far too long, " * 2 + "\n")
    assert code == 2 and "shorten one of them" in err and "no message got an answer" in err


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_checkpoint_is_an_option_for_runs_only(run, command, tmp_path):
    code, out, err = run(command, "--checkpoint", 4, "--max-new-tokens", 3, typed="/exit\n")
    assert code == 0 and "no effect" not in err, "it is an option for a run"
    code, out, err = run(command, "--checkpoint", 4, "--seed", 2, "--temperature", 0, model=tmp_path)
    assert (code, out) == (2, "")
    for message in (
        f"--checkpoint: no effect, because {tmp_path} is not a run folder",
        "--seed: no effect with --temperature 0",
    ):
        assert message in err


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_a_model_with_temperature_0_needs_a_temperature_before_other_sampling_options(run, monkeypatch, command):
    model = tiny_model(vocab_size=257, context_length=64)
    pretrained = Pretrained("cold", model, init_params(model, jax.random.key(0)), ByteTokenizer(), {"temperature": 0.0})
    monkeypatch.setattr("gptjax.interop.open.open_model", lambda name, checkpoint: pretrained)
    code, _, err = run(command, "--seed", 1, "--top-k", 5, "--max-new-tokens", 2, typed="hi\n")
    assert (
        code == 2 and "--top-k, --seed: no effect, because the model's own generation config has temperature 0" in err
    )
    assert run(command, "--seed", 1, "--top-k", 5, "--temperature", 1, "--max-new-tokens", 2, typed="hi\n")[0] == 0
