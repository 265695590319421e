"""Sentiment by LoRA: 1.7% of the weights, beside the embedding, the attention's queries and values and what leaves it.

Question   do so few weights learn sentiment as well as all of them do?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/sentiment_lora.py
           GPTJAX_DATA=FOLDER gptjax eval runs/sentiment_lora --tasks sentiment --compare-with runs/sentiment
Cost       90 seconds on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from experiments.finetune.sentiment import experiment as all_weights

experiment = all_weights.override(
    name="sentiment_lora",
    model=dict(lora_rank=3, lora_targets=("tokens", "query", "value", "out"), lora_alpha=6.0, dropout=0.2),
    optim=dict(learning_rate=5e-3, weight_decay=0.0),
)
