# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a run
# A run folder needs nothing but itself. Point `RUN` at one, for instance `runs/quickstart`.

# %%
import os
from pathlib import Path

from gptjax.training.run import open_run

run = open_run(Path(os.environ.get("RUN", "runs/quickstart")))
run.experiment

# %% [markdown]
# The final metrics, and what it was trained with.

# %%
print(run.result())
print(run.provenance()["versions"])

# %% [markdown]
# `metrics.jsonl` is the source of truth: one line per logged step, and one per evaluation.

# %%
lines = run.metrics()
train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
print("first and last training loss:", train[0], train[-1])
print("validation:", validation)

# %% [markdown]
# The weights of a checkpoint are a nested dict of arrays; the logits of a text are one `apply` away.

# %%
import jax

from gptjax.model.gpt import GPT
from gptjax.training.restore import load_params

params, step = load_params(run, "best")
print("step", step, jax.tree.map(lambda x: x.shape, params["embedding"]))
tokenizer = run.tokenizer()
ids = tokenizer.encode("The ")
logits = GPT(run.experiment.model).apply({"params": params}, ids[None])
top = logits[0, -1].argsort()[::-1][:5]
print("after 'The ':", [tokenizer.decode([int(i)]) for i in top])

# %% [markdown]
# And a picture of the loss.

# %%
from gptjax.lab.report import plot_loss

print(plot_loss(run))
