"""Text from converted models, token for token that of `transformers.generate`: greedy, beams and penalties."""

import numpy as np
import pytest

from gptjax.data.tokenizer import ByteTokenizer
from gptjax.data.tokenizer.huggingface_write import to_huggingface
from gptjax.inference.beams import BeamConfig, beam_search
from gptjax.inference.engine import make_engine
from gptjax.inference.generate import Request, generate
from gptjax.inference.sampling import SamplingParams
from gptjax.interop.huggingface import load_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
PROMPTS = [[72, 101, 108, 108, 111], [7] * 13, [1, 2]]
NEW = 12


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


def neox():
    config = transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=64, rotary_pct=0.5)
    return transformers.GPTNeoXForCausalLM(config)


FAMILIES = [gpt2, llama, neox]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def pair(request, tmp_path_factory):
    """The same random weights in transformers and here, large enough that the next token depends on the text."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    model.save_pretrained(folder)
    to_huggingface(ByteTokenizer(), folder)
    return model, make_engine(load_folder(folder))


def theirs(model, prompts, **how):
    """`generate` with the prompts padded on the left, as transformers wants them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    how = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "max_new_tokens": NEW} | how
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, **how)[:, width:].tolist()


def ours(engine, prompts, sampling):
    requests = [Request(np.array(p, np.int32), NEW, sampling) for p in prompts]
    steps = list(generate(engine, requests))
    return [[int(s.tokens[i]) for s in steps] for i in range(len(prompts))]


@pytest.mark.parametrize(
    "rules",
    [{}, dict(no_repeat_ngram_size=2), dict(repetition_penalty=1.4, no_repeat_ngram_size=1)],
    ids=["plain", "no-repeat", "both"],
)
def test_greedy_texts_are_those_of_transformers(pair, rules):
    model, engine = pair
    alone = [theirs(model, [p], **rules)[0] for p in PROMPTS]
    assert ours(engine, PROMPTS, SamplingParams(temperature=0, **rules)) == alone
    if not rules:
        assert theirs(model, PROMPTS) == alone, "ragged batches there as here"


LONG = BeamConfig(5, 2.0)
OTHERS = [BeamConfig(2), BeamConfig(4, -0.5), BeamConfig(3, 1.0, True), BeamConfig(4, 0.7, "never")]
SEARCHES = [(family, LONG) for family in FAMILIES] + [(gpt2, beams) for beams in OTHERS]  # which know no family


@pytest.mark.parametrize(("pair", "beams"), SEARCHES, indirect=["pair"], ids=lambda x: getattr(x, "__name__", str(x)))
def test_beams_are_those_of_transformers(pair, beams):
    """With a stop token that the texts often reach, and all that were found, in their order."""
    model, engine = pair
    for prompt, penalty in [(PROMPTS[0], 1.0), (PROMPTS[2], 1.3)]:
        free = ours(engine, [prompt], SamplingParams(temperature=0))[0]
        stop = free[4]
        found = beam_search(
            engine,
            Request(np.array(prompt, np.int32), NEW, SamplingParams(0, repetition_penalty=penalty)),
            beams,
            (stop,),
        )
        expected = theirs(
            model, [prompt], num_beams=beams.count, num_return_sequences=beams.count, eos_token_id=stop,
            length_penalty=beams.length_penalty, early_stopping=beams.early_stopping, repetition_penalty=penalty,
        )  # fmt: skip
        cut = [text[: text.index(stop) + 1] if stop in text else text for text in expected]
        assert [f.ids.tolist() for f in found] == cut
        assert [f.finished for f in found] == [stop in text for text in expected]
