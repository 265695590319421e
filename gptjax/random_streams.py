"""The numbers that keep NumPy's random streams apart: a stream is `default_rng((seed, NUMBER, ...))`.

A number must never change, as it decides the data of every run. A new use takes a new number. JAX's random keys have
names instead (`training.state.named_key`).

Three numbers have two uses each, which can meet in one stream (NumPy pads a short key with zeros, so that `(seed, 6)`
is also the stream of step 0). This is harmless: the two uses draw from different distributions for different purposes,
and no result compares one with the other.
"""

TRAIN_ORDER = 1  # + source: the order and the phase of training windows
MIXTURE = 2  # the order in which the sources of a mixture take turns
VALIDATION_ORDER = 3  # + source
TRAIN_EXAMPLE = 4  # + example: masks, spans and other choices of the objective
VALIDATION_EXAMPLE = 5  # + source, example: the same for validation
ON_POLICY_TRAIN = 6  # + step: the seeds of sampled answers; shared with CLOZE
CLOZE = 6  # which gaps of a text are cloze items
ON_POLICY_VALIDATION = 7  # + batch: the seeds of sampled answers; shared with RECALL_DOCUMENT
RECALL_DOCUMENT = 7  # + document: the keys and values of a synthetic text
POISSON = 8  # + step: the windows that DP-SGD draws; shared with RECALL_QUESTION
RECALL_QUESTION = 8  # + question, distance (never 0, so the streams differ)
PRIVACY_NOISE = 9  # the key of the noise of DP-SGD
