"""A Llama-style model, 6.7 B parameters: RoPE, RMSNorm, SwiGLU, no biases, a head of its own.

Question   what do Llama's choices change against GPT-2's at the same data?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/llama_7b.py
Cost       about 4e22 FLOPs for a trillion tokens
Expected   not run here
Source     Touvron et al. 2023, table 2 and section 2
"""

from experiments.baselines import gpt2_124m

experiment = gpt2_124m.experiment.override(
    name="llama_7b",
    model=dict(
        vocab_size=32000,
        context_length=2048,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        ffn_dim=11008,
        ffn="swiglu",
        positions="rope",
        norm="rmsnorm",
        norm_epsilon=1e-6,
        bias=False,
        tie_embeddings=False,
        remat="full",
    ),
    data=dict(tokenizer="sentencepiece", tokenizer_vocab_size=32000),
    optim=dict(learning_rate=3e-4, final_learning_rate=3e-5),
    train=dict(steps=250_000, batch_size=2048, microbatches=64),
)
