"""Named entities as token classification: a tag at every word of a message.

Question   does a model find more entities by tagging words than by writing the entities out?
Command    gptjax train experiments/finetune/entities_tags.py
           gptjax eval runs/entities_tags --tasks entities
Cost       3 minutes on 2 CPU cores, after experiments/finetune/pretraining.py; --init RUN|HF_FOLDER takes another model
Expected   see experiments/README.md
"""

from experiments.finetune.entities import experiment as in_text

experiment = in_text.override(
    name="entities_tags",
    data=dict(answers="classes"),
    model=dict(context_length=544),  # holds every word of the longest message: none is cut
    train=dict(batch_size=4),
)
