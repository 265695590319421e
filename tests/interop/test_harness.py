"""The harness gives the same numbers as lm-eval's own `hf` backend on the same weights, request for request."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which lm-eval's hf backend needs

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gptjax.data.tokenizer import CharTokenizer  # noqa: E402
from gptjax.errors import DataError, PromptError  # noqa: E402
from gptjax.inference.pretrained import Pretrained  # noqa: E402
from gptjax.interop.harness import GptjaxLM, parse_generation_kwargs, run_tasks, table  # noqa: E402
from gptjax.interop.huggingface import load_folder  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of lm_eval and torch, which have many
]
CONTEXT = 64
TASKS = ["choices", "letters", "writing", "reading"]
END = "<|endoftext|>"


def write_tasks(folder: Path, hf: HFLM) -> None:
    """Four small tasks as YAML with local data; the answers to write are what `hf` writes, for every other document."""
    rng = np.random.default_rng(0)
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)[:9]).split()
    draw = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
    questions = [draw(n) for n in (1, 2, 5, 9, 14, 30, 60, 90)] + ["ends in spaces   ", "", "two\nlines\n", "naïve €?"]
    choices = [{"question": q, "choices": [draw(n) for n in (1, 3, 6)], "gold": i % 3} for i, q in enumerate(questions)]
    letters = [{"question": q or "which?", "gold": "ABCD"[i % 4]} for i, q in enumerate(questions)]
    prompts = [q for q in questions if q]
    made = hf.generate_until([Instance("generate_until", {}, (q, GENERATION), 0) for q in prompts])
    writing = [
        {"question": q, "answer": a if i % 2 else "else"} for i, (q, a) in enumerate(zip(prompts, made, strict=True))
    ]
    reading = [{"text": draw(n)} for n in (1, 7, 40, 80, 300)] + [{"text": "a  b\n\n c"}, {"text": f"{END}begun"}]
    for name, rows in [("choices", choices), ("letters", letters), ("writing", writing), ("reading", reading)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / name}.jsonl}}\n"
            "test_split: train\nmetadata: {version: 1}\n" + SETTINGS[name]
        )


GENERATION = {"until": ["\n", "e "], "do_sample": False, "max_gen_toks": 20}
SETTINGS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "letters": """output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: gold
fewshot_split: train
num_fewshot: 1
metric_list: [{metric: acc}]
""",
    "writing": f"""output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {json.dumps(GENERATION)}
metric_list: [{{metric: exact_match}}]
""",
    "reading": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def make_tokenizer(folder: Path, begin: str | None = None):
    """Byte-level BPE, as transformers saves it; with `begin` it writes that before every text."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    engine = ByteLevelBPETokenizer()
    engine.train_from_iterator(
        [topics[name] for name in sorted(topics)[:40]],
        vocab_size=500,
        special_tokens=[END, begin or "<|unused|>"],
        show_progress=False,
    )
    if begin:
        engine._tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, engine.token_to_id(begin))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine._tokenizer, bos_token=begin or END, eos_token=END
    )
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in (begin or END, END)]
    return dict(zip(("bos_token_id", "eos_token_id"), ids, strict=True), vocab_size=len(tokenizer))


def make_gpt2(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **make_tokenizer(folder), n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def make_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **make_tokenizer(folder, "<|begin|>"), max_position_embeddings=CONTEXT, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The two backends, and the folder with the tasks."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2(folder)
    hf = HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks", hf)
    return hf, GptjaxLM(load_folder(folder), batch_size=5), folder / "tasks"


@pytest.fixture(scope="module")
def results(both):
    hf, ours, tasks = both
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return [
        lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0, log_samples=True)
        for lm in (hf, ours)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_and_every_metric_is_that_of_the_hf_backend(results, task):
    hf, ours = (r["samples"][task] for r in results)
    assert len(hf) == len(ours) > 5
    for a, b in zip(hf, ours, strict=True):
        assert a["doc"] == b["doc"]
        if task == "writing":
            assert a["resps"] == b["resps"], a["doc"]
        elif task == "reading":
            assert b["resps"][0][0] == pytest.approx(a["resps"][0][0], rel=1e-5)
        else:
            for x, y in zip(a["resps"], b["resps"], strict=True):
                assert y[0][0] == pytest.approx(x[0][0], rel=1e-5, abs=1e-4) and y[0][1] == x[0][1]
    hf, ours = (r["results"][task] for r in results)
    for name, value in hf.items():
        if isinstance(value, float):
            assert ours[name] == (value if task != "reading" else pytest.approx(value, rel=1e-4)), name
    if task == "writing":
        assert 0 < ours["exact_match,none"] < 1, "some texts stop early, some do not"


@pytest.mark.parametrize("context, continuation", [
    ("", " a word"), ("", f"{END} and more"), ("ends in a space ", "word"), (f"{END}begins with it", " and goes on"),
    ("one", "two"), ("x " * 100, "long before"), ("a", " b" * 29),
])  # fmt: skip
def test_requests_at_the_edge(both, context, continuation):
    hf, ours, _ = both
    request = [Instance("loglikelihood", {}, (context, continuation), 0)]
    (a,), (b,) = hf.loglikelihood(request), ours.loglikelihood(request)
    assert b == (pytest.approx(a[0], rel=1e-5, abs=1e-4), a[1])


def test_a_tokenizer_that_adds_bos(tmp_path):
    make_llama(tmp_path)
    hf, ours = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32"), GptjaxLM(load_folder(tmp_path))
    for text in ("a word", "<|begin|>a word", f"a{END}b", "long " * 99):
        assert ours.tok_encode(text) == hf.tok_encode(text)
        short = text[:40]  # what is longer than the context cannot be a continuation
        for context, continuation in [("", short), (text, " and more"), ("first", short)]:
            request = [Instance("loglikelihood", {}, (context, continuation), 0)]
            (a,), (b,) = hf.loglikelihood(request), ours.loglikelihood(request)
            assert b == (pytest.approx(a[0], rel=1e-5, abs=1e-4), a[1])
        request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
        assert ours.loglikelihood_rolling(request) == pytest.approx(hf.loglikelihood_rolling(request), rel=1e-5)
        request = [Instance("generate_until", {}, (text, {"until": ["e "], "max_gen_toks": 12}), 0)]
        assert ours.generate_until(request) == hf.generate_until(request)


def test_inputs_that_break_the_hf_backend(both):
    _, ours, _ = both
    score = lambda *texts: ours.loglikelihood([Instance("loglikelihood", {}, texts, 0)])  # noqa: E731
    assert score(" ", "word") == score("", " word"), "a context of spaces only is an empty one"
    with pytest.raises(PromptError, match="a continuation of 0 tokens"):
        score("", END)


def test_a_shorter_context_can_be_requested(both):
    hf, ours, _ = both
    hf, ours = HFLM(hf.model, tokenizer=hf.tokenizer, max_length=20), GptjaxLM(ours.pretrained, max_length=20)
    rolling = [Instance("loglikelihood_rolling", {}, ("The while statement is used for it. " * 9,), 0)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling), rel=1e-5)
    assert ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0]


def test_the_command_runs_tasks_and_its_results_are_plain_json(both):
    _, ours, tasks = both
    results = run_tasks(ours, ["choices", "read*"], tasks, limit=3)
    assert json.loads(json.dumps(results)) == results
    assert set(results["results"]) == {"choices", "reading"} and results["n-samples"]["choices"]["effective"] == 3
    assert "acc_norm" in table(results) and "bits_per_byte" in table(results)
    assert results["config"]["model_num_parameters"] == sum(x.numel() for x in both[0].model.parameters())


def test_unknown_tasks_and_impossible_requests_are_named(both, tmp_path):
    _, ours, tasks = both
    with pytest.raises(DataError, match=r"no task 'choicess'; did you mean choices"):
        run_tasks(ours, ["choicess"], tasks)
    with pytest.raises(DataError, match="is not a folder"):
        run_tasks(ours, ["choices"], tmp_path / "nowhere")
    bad = (tasks / "choices.yaml").read_text().replace("choices.jsonl", "gone.jsonl").replace("task: ", "task: no_")
    (tmp_path / "bad.yaml").write_text(bad)
    with pytest.raises(DataError, match="no_choices: their data cannot be read"):
        run_tasks(ours, ["no_choices"], tmp_path)
    with pytest.raises(PromptError, match="lower max_gen_toks"):
        ours.generate_until([Instance("generate_until", {}, ("a", {"until": ["x"]}), 0)])
    with pytest.raises(PromptError, match="1 to 64 tokens are possible"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("a", " b" * 99), 0)])
    with pytest.raises(PromptError, match="neither a BOS nor an EOS token"):
        GptjaxLM(Pretrained("x", ours.pretrained.model, {}, CharTokenizer("ab", has_eos=False)))


def test_generation_settings():
    assert parse_generation_kwargs({})[1:] == (
        256,
        parse_generation_kwargs({"do_sample": False, "temperature": 0.7})[2],
    )
    stop, tokens, sampling = parse_generation_kwargs(
        {"until": "x", "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9}
    )
    assert (stop, tokens, sampling.temperature, sampling.top_p) == (["x"], 5, 0.5, 0.9)
    with pytest.raises(DataError, match="gptjax does not support num_beams"):
        parse_generation_kwargs({"num_beams": 4})
