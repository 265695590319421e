"""Sentiment by a head of its own: what does a classifier gain over answering in text?

Question   is a new linear layer on the last token better than writing "positive" or "negative"?
Command    gptjax train experiments/finetune/sentiment_head.py
           gptjax eval runs/sentiment_head --tasks sentiment
Cost       1 minute on 2 CPU cores, after experiments/finetune/pretraining.py; --init RUN|HF_FOLDER takes another model
Expected   see experiments/README.md
"""

from experiments.finetune.sentiment import experiment as in_text

experiment = in_text.override(name="sentiment_head", data=dict(answers="classes"))
