"""Optimizers: each at a rate that suits it.

Question   which optimizer has the lowest loss after as many steps?
Command    gptjax sweep experiments/ablations/optimizers.py --seeds 3 --workers 2
           gptjax report runs/optimizers
Cost       27 minutes on 2 CPU cores (6 variants, 3 seeds)
Expected   see experiments/README.md

The rates are guesses from each method's paper scaled to this model, not searched for: a sweep over rates for each
of them decides more than this table does.
"""

from experiments.ablations.small import experiment as small

experiment = small.override(name="optimizers")
RATES = {"adamw": 3e-3, "muon": 4e-3, "lion": 6e-4, "adafactor": 1e-2, "sgd": 3e-1, "schedule_free": 6e-3}
sweep = [
    experiment.override(
        name=f"optimizers-{name}",
        optim=dict(name=name, learning_rate=rate, final_learning_rate=round(rate / 10, 9))
        | (dict(schedule="constant") if name == "schedule_free" else {}),
    )
    for name, rate in RATES.items()
]
