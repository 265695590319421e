"""nanoGPT's recipe for a CPU: a character model of Shakespeare, 0.8 M parameters.

Question   does gptjax reach nanoGPT's published loss with nanoGPT's settings?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/papers/nanogpt_shakespeare_cpu.py
Cost       about 3 minutes on 2 CPU cores
Expected   validation loss 1.88 +- 0.04 nats a character over the whole split
Source     github.com/karpathy/nanoGPT, README, "I only have a macbook": 1.88; the original re-run whole-split: 1.8857
"""

from gptjax.config import Data, Experiment, Model, Optim, Train

experiment = Experiment(
    name="nanogpt_shakespeare_cpu",
    model=Model(
        context_length=64,
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        ffn="gelu_exact",
        bias=False,
        layers="unrolled",
    ),
    data=Data(source="$GPTJAX_DATA/tinyshakespeare.txt", tokenizer="char", val_fraction=0.1),
    optim=Optim(
        learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100, beta1=0.9, beta2=0.99, weight_decay=0.1
    ),
    train=Train(steps=2000, batch_size=12, eval_every=250, checkpoint_every=1000, sample_prompt="ROMEO:"),
)
