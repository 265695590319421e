"""NAME: write your question here.

Question   which FFN and which learning rate are best?
Command    gptjax sweep NAME.py --seeds 3 --workers 2
           gptjax report runs/NAME
Cost       8 minutes on 2 CPU cores (4 variants, 3 seeds), no download
Expected   not known yet

The same command resumes the sweep. The first variant is the baseline of the report.
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig, grid

experiment = Experiment(  # what all variants have in common
    name="NAME",
    model=ModelConfig(
        context_length=128,
        num_layers=3,
        embed_dim=96,
        num_heads=3,
        positions="rope",
        norm="rmsnorm",
        bias=False,
        layers="unrolled",
    ),
    data=DataConfig(source="pydoc", tokenizer="sentencepiece", tokenizer_vocab_size=1024),
    optim=OptimConfig(warmup_steps=30, beta2=0.95),
    train=TrainConfig(steps=400, batch_size=8, eval_every=100, checkpoint_every=200, sample_tokens=0),
)

# every combination of these values; `zip_` in place of `grid` takes the first of each, the second of each, ...
sweep = grid(
    experiment,
    {
        "model.ffn": ["gelu", "swiglu"],
        "optim.learning_rate": [3e-3, 1e-3],
    },
)

# Let Optuna search instead (gptjax sweep NAME.py --search tpe --trials 20); needs pip install 'gptjax[search]':
# from gptjax.config import Search, Uniform
# search = Search(experiment, {"optim.learning_rate": Uniform(1e-4, 1e-2, log=True), "model.ffn": ["gelu", "swiglu"]})
