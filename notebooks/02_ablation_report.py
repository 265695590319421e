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
# # An ablation's report, number by number
# What `gptjax report` prints, computed by hand. Point `SWEEP` at a sweep's folder, for instance `runs/ffn` after
# `gptjax sweep experiments/ablations/ffn.py --seeds 3 --workers 2`.

# %%
import os
from pathlib import Path

import numpy as np

from gptjax.lab.comparison import compare
from gptjax.lab.text_report import as_text
from gptjax.lab.variants import variants_of

folder = Path(os.environ.get("SWEEP", "runs/ffn"))
variants, left_out = variants_of([folder])
c = compare(variants)
print(as_text(c))
print("left out:", left_out)

# %% [markdown]
# A variant is an experiment with several seeds. What differs between two of them is all that may explain a difference.

# %%
for path, values in c.fields.items():
    print(path, dict(zip([v.name for v in variants], values, strict=True)))

# %% [markdown]
# Runs of one seed have the same batches in the same order. So the losses of two variants go up and down together from
# seed to seed, and the differences by seed vary less than the losses do: that is why the report pairs them.

# %%
base, *others = [v.by_seed("val_loss") for v in variants]
for variant, losses in zip(variants[1:], others, strict=True):
    seeds = sorted(base.keys() & losses.keys())
    pairs = np.array([losses[s] - base[s] for s in seeds])
    unpaired = np.hypot(*(np.std([x[s] for s in seeds], ddof=1) for x in (base, losses)))
    print(
        f"{variant.name}: differences {pairs.round(4)}; they vary by {pairs.std(ddof=1):.4f}, "
        f"unpaired by {unpaired:.4f}"
    )

# %% [markdown]
# The mean of few differences is uncertain by more than a bell curve says: Student's t with one degree of freedom fewer
# than there are seeds. The interval of the report is `mean +- t * spread / sqrt(seeds)`.

# %%
from scipy import stats

for row in c.rows[1:]:
    losses = row.variant.by_seed("val_loss")
    pairs = np.array([losses[s] - base[s] for s in sorted(base.keys() & losses.keys())])
    reach = stats.t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / len(pairs) ** 0.5
    print(f"by hand {pairs.mean():+.4f} ({pairs.mean() - reach:+.4f} to {pairs.mean() + reach:+.4f})")
    print(f"report  {row.difference.value:+.4f} ({row.difference.low:+.4f} to {row.difference.high:+.4f})")
    print(row.variant.name, "is", row.verdict.outcome, row.verdict.seeds_hint)

# %% [markdown]
# The page that the command writes, with curves and samples.

# %%
from gptjax.lab.page import page

(folder / "report.html").write_text(page(c, folder.name))
print(folder / "report.html")
