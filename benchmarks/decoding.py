"""Greedy writing with GPT-2's shape and random weights, by gptjax and by `transformers.generate`.

A call writes 64 new tokens after random prompts of 16.
"""

import statistics
import time
from collections.abc import Callable

SHAPE = dict(layers=12, heads=12, width=768, context=1024, vocab=50257)
TINY = dict(layers=2, heads=2, width=32, context=128, vocab=199)
PROMPT, NEW = 16, 64


def gptjax_maker(shape: dict[str, int], dtype: str, batch: int) -> tuple[Callable[[], None], dict[str, float]]:
    """One call writes all tokens."""
    import jax
    import numpy as np

    from gptjax import cpu
    from gptjax.config import ModelConfig
    from gptjax.data.tokenizer import CharTokenizer
    from gptjax.inference.cache import cache_bytes, cache_length_for
    from gptjax.inference.engine import make_engine
    from gptjax.inference.generate import Request, generate
    from gptjax.inference.pretrained import Pretrained
    from gptjax.inference.sampling import SamplingParams
    from gptjax.model.gpt import init_params
    from gptjax.training.train_setup import enable_compilation_cache

    cpu.use_cores()
    enable_compilation_cache()
    model = ModelConfig(
        vocab_size=shape["vocab"], num_layers=shape["layers"], num_heads=shape["heads"], embed_dim=shape["width"],
        context_length=shape["context"],
    ).resolved()  # fmt: skip
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    tokens = CharTokenizer("".join(chr(0x10000 + i) for i in range(shape["vocab"])), False)
    engine = make_engine(Pretrained("random", model, params, tokens), dtype)
    del params
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, shape["vocab"], (batch, PROMPT)).astype(np.int32)
    requests = [Request(p, NEW, SamplingParams(temperature=0)) for p in prompts]

    def first() -> float:
        began = time.perf_counter()
        next(iter(generate(engine, requests)))
        return time.perf_counter() - began

    cold = first()
    figures = {
        "first token, not compiled in this process": cold,
        "first token, warm": statistics.median(first() for _ in range(5)),
        "weight bytes": engine.weight_bytes,
        "cache bytes": cache_bytes(engine.config, batch, cache_length_for(engine.config, PROMPT + NEW)),
    }

    def one() -> None:
        assert sum(1 for _ in generate(engine, requests)) == NEW

    return one, figures


def torch_maker(
    shape: dict[str, int], dtype: str, batch: int, device: str = "cpu"
) -> tuple[Callable[[], None], dict[str, float]]:
    """The same by `transformers.generate` with its key/value cache and SDPA."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape["vocab"], n_positions=shape["context"], n_embd=shape["width"], n_layer=shape["layers"],
        n_head=shape["heads"], attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    prompts = torch.randint(0, shape["vocab"], (batch, PROMPT), device=device)
    mask = torch.ones_like(prompts)

    def make(tokens: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + tokens
        if device == "cuda":
            torch.cuda.synchronize()

    def first() -> float:
        began = time.perf_counter()
        make(1)
        return time.perf_counter() - began

    first()
    return lambda: make(NEW), {"first token, warm": statistics.median(first() for _ in range(5))}


def make(kind: str, dtype: str, batch: int, tiny: bool, device: str = "cpu") -> tuple[Callable[[], None], dict]:
    """What writes with gptjax or transformers, made once, and its figures."""
    shape = TINY if tiny else SHAPE
    made, figures = gptjax_maker(shape, dtype, batch) if kind == "gptjax" else torch_maker(shape, dtype, batch, device)
    made()
    return made, figures
