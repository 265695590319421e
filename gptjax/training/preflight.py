"""Checks before a run starts: everything that could stop it later, or its samples at the end."""

import jax

from gptjax.config import Experiment
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, DataError, RunError
from gptjax.inference.pretrained import check_is_generative
from gptjax.training.initial import backbone_params, init_mismatches
from gptjax.training.privacy import check_libraries
from gptjax.training.train_setup import TrainSetup


def check_start(setup: TrainSetup, fresh: bool = True, finished: bool = False) -> None:
    """Raises, before anything is written, if the run could not start or could not generate its samples at the end.

    A run that is not `fresh` has checkpoints and does not need the weights of `experiment.init`; one that is `finished`
    does not need the reference model either.
    """
    if setup.privacy is not None:
        check_libraries()
    e, tokenizer = setup.experiment, setup.store.tokenizer
    if e.train.sample_tokens:
        _check_sample_prompt(e, tokenizer)
    if not finished:
        _check_reference(setup)
    if setup.initial is None or not fresh:
        return
    first = setup.initial.open()
    if first.tokenizer.id_to_bytes != tokenizer.id_to_bytes:
        raise RunError(
            f"init = {e.init!r}: was trained with another tokenizer, so its ids mean other text than here; "
            "set data.tokenizer = 'init'"
        )
    if found := init_mismatches(backbone_params(first, e), setup.abstract.params, e.model):
        raise RunError(f"init = {e.init!r}: has other weights than this model:\n  - " + "\n  - ".join(found))


def _check_sample_prompt(e: Experiment, tokenizer: Tokenizer) -> None:
    try:
        length = len(tokenizer.encode(e.train.sample_prompt))
    except DataError as error:
        raise ConfigError([f"train.sample_prompt: {error}; give another, or train.sample_tokens = 0"]) from None
    context = e.model.context_length
    if length >= context:
        raise ConfigError([f"train.sample_prompt: its {length} tokens do not fit model.context_length = {context}"])


def _check_reference(setup: TrainSetup) -> None:
    e, reference = setup.experiment, setup.objective.reference
    if setup.objective.rollout and jax.process_count() > 1:
        raise ConfigError(
            [f"objective.name = {e.objective.name!r}: answers are sampled in one process only; start one"]
        )
    if reference is None:
        return
    check_is_generative(reference.pretrained)
    if reference.pretrained.tokenizer.id_to_bytes != setup.store.tokenizer.id_to_bytes:
        raise RunError(
            f"{reference.name}: has another tokenizer than the text, so its probabilities are of other tokens; "
            "set data.tokenizer = 'init', or to that of the reference model"
        )
    theirs, length = reference.pretrained.model, e.model.context_length
    if theirs.causal != e.model.causal:
        raise RunError(
            f"{reference.name}: has model.causal = {theirs.causal}, so it attends to other tokens; choose another model"
        )
    if theirs.positions == "learned" and theirs.context_length < length:
        raise RunError(
            f"{reference.name}: has {theirs.context_length} learned positions, but model.context_length = {length}; "
            f"set model.context_length = {theirs.context_length} or less"
        )
