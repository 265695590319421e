"""Models of Hugging Face, read and written exactly: every setting is understood or refused, every tensor accounted for.

config.json                    the settings: see families
model.safetensors              the weights, or several files with model.safetensors.index.json: see files
generation_config.json         how its makers recommend to sample, and the ids that end a text
chat_template.jinja            turns messages into a prompt; also in tokenizer_config.json
tokenizer.json and others      see data/tokenizer/huggingface_read.py
"""

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import ModelConfig
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.data.tokenizer.huggingface_read import from_huggingface
from gptjax.errors import ConfigError, ExchangeError, PromptError, warn
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.interop import files
from gptjax.interop.families import FAMILIES, Family
from gptjax.interop.fields import Fields
from gptjax.interop.files import CONFIG, GENERATION, TEMPLATE, TOKENIZER, Weights
from gptjax.interop.layout import nested, weight_shapes

RECOMMENDED = {  # fields of generation_config.json that `SamplingParams` has, and where they have no effect
    "temperature": None,
    "top_k": 0,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": None,
    "no_repeat_ngram_size": 0,
}

# Fields that change no text of gptjax's: ids, lengths and numbers of texts that are asked for elsewhere, computing.
NO_EFFECT = frozenset(
    """transformers_version _from_model_config _commit_hash trust_remote_code do_sample
    bos_token_id eos_token_id pad_token_id decoder_start_token_id
    max_length max_new_tokens max_time num_return_sequences length_penalty early_stopping
    use_cache cache_implementation cache_config max_cache_len low_memory compile_config disable_compile
    prefill_chunk_size continuous_batching_config renormalize_logits remove_invalid_values
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size
    speculation_type use_mtp""".split()
)
INERT: dict[str, tuple[Any, ...]] = {  # rules that gptjax does not take from the file -> values that switch them off
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "stop_strings": ([],),
    "token_healing": (False,),
}
MOST_PADDING = 1024  # tables are rounded up to a multiple of 64, 128 or, at most, this


def load_folder(folder: Path, name: str | None = None) -> Pretrained:
    """The model in a folder; its weights in the dtype of the file, those of each layer stacked.

    Families: gpt2, llama, gpt_neox and, to read only, bert as masked language model, whose token type 0 is worked into
    the table of positions (texts in two parts are not supported). Raises `ExchangeError` with all that is in the way;
    warns of a tokenizer that may be the wrong one, and of what the makers recommend and gptjax does not follow.
    """
    model, params = read_weights(folder)
    tokenizer = from_huggingface(folder)
    _check_tokenizer(folder, tokenizer.vocab_size, model.vocab_size or 0)
    recommended, ends, extra_generation_config = _generation(folder)
    stops = tuple(i for i in ends if i < (model.vocab_size or 0) and i != tokenizer.eos_id)  # some lie beyond
    if lost := [i for i in stops if i >= tokenizer.vocab_size]:
        raise ExchangeError(
            folder,
            [f"eos_token_id = {lost[0]}, and the tokenizer has only {tokenizer.vocab_size:,} ids: "
             "it is the wrong tokenizer; bring the one that the model was trained with"],
        )  # fmt: skip
    template = files.read_words(folder, TEMPLATE)
    if template is None:
        template = _template(files.read_object(folder, TOKENIZER) or {})
    return Pretrained(name or folder.name, model, params, tokenizer, recommended, stops, template, extra_generation_config)


def read_weights(folder: Path) -> tuple[ModelConfig, Any]:
    """The settings and the weights alone, as `load_folder` reads them."""
    files.check_folder(folder)
    family, model = read_config(folder)
    with Weights(folder) as weights:
        return model, _params(folder, family, model, weights)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and the settings in config.json. Raises `ExchangeError` with every field that is not understood."""
    where = folder / CONFIG
    values = files.read_object(folder, CONFIG)
    if values is None:
        raise ExchangeError(folder, [f"holds no {CONFIG}, so it is no model of Hugging Face"])
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ExchangeError(where, [f"model_type = {kind!r}: gptjax reads {', '.join(FAMILIES)}"])
    family, fields = FAMILIES[kind], Fields(values)
    model = family.read(fields)
    if problems := fields.finish():
        raise ExchangeError(where, problems)
    try:  # a text that is seen whole is no experiment, but it may be a model
        check(Experiment(model=dataclasses.replace(model, causal=True)))
    except ConfigError as e:
        raise ExchangeError(where, [f"makes {problem}" for problem in e.problems]) from None
    return family, model.resolved()


def _check_tokenizer(folder: Path, ids: int, rows: int) -> None:
    """Raises `ExchangeError` where a tokenizer has more ids than the model has rows for; warns where it has far fewer.

    Rows without an id are usual, as tables are padded to a round size: fewer than `MOST_PADDING`, and at most half of
    the table. Beyond that it may be the tokenizer of another model, but nobody can be certain.
    """
    if ids > rows:
        raise ExchangeError(
            folder,
            [f"the tokenizer has {ids:,} ids and the model {rows:,}: it is the wrong tokenizer; "
             "bring the one that the model was trained with"],
        )  # fmt: skip
    if rows - ids >= MOST_PADDING or rows > 2 * ids:
        warn(
            f"{folder}: the tokenizer has {ids:,} ids and the model {rows:,}. Padding leaves fewer than "
            f"{MOST_PADDING:,} rows without an id, and at most half of them, so it may be the wrong tokenizer: if its "
            "texts make no sense, bring the one that the model was trained with"
        )


def _params(folder: Path, family: Family, config: ModelConfig, weights: Weights) -> Any:
    """The nested dict of weights: every tensor of the files must be one of the model's, and every one there."""
    names = _names(folder, family, model, weights)
    tensors, shapes = family.tensors(model), weight_shapes(model)
    _check_shapes(folder, family, model, names, weights)
    found: dict[str, np.ndarray] = {}
    for t in tensors:
        shape = shapes[t.weights[0]]
        if not t.layered:
            found |= zip(t.weights, t.split(weights.read(names[t.name]), shape), strict=True)
            continue
        layers = [names[t.name.format(i=i)] for i in range(model.num_layers)]
        kinds = {weights.tensors[name].dtype for name in layers}
        dtype = kinds.pop() if len(kinds) == 1 else np.float32
        stacks = [np.empty((model.num_layers, *shape), dtype) for _ in t.weights]
        for i, name in enumerate(layers):
            for stack, part in zip(stacks, t.split(weights.read(name), shape), strict=True):
                stack[i] = part
        found |= zip(t.weights, stacks, strict=True)
    for extra, at in family.folded.items():
        (weight,) = next(t.weights for t in tensors if t.name == at)
        found[weight] = found[weight].astype(np.float32) + weights.read(names[extra])[0].astype(np.float32)
    for copy, original in family.copies.items():
        twice = copy in names and copy not in {t.name for t in tensors}
        if twice and not np.array_equal(weights.read(names[copy]), weights.read(names[original])):
            problem = f"{names[copy]} is not the same as {names[original]}, though the settings say that it is"
            raise ExchangeError(folder, [f"{problem}; set tie_word_embeddings to false if the head is its own"])
    return nested(found)


def _names(folder: Path, family: Family, config: ModelConfig, weights: Weights) -> dict[str, str]:
    """Name without prefix -> name in the files, of every tensor but for buffers."""
    names: dict[str, str] = {}
    problems = []
    for name in weights.tensors:
        short = family.canonical(name)
        if re.fullmatch(family.buffers, short):
            continue
        if short in names:
            problems.append(f"{name} and {names[short]} are the same weight")
        names[short] = name
    if model.num_layers > len(names):
        problems.append(f"{CONFIG} tells of {model.num_layers:,} layers, and there are {len(names):,} tensors")
        raise ExchangeError(folder, problems)
    wanted = {t.name.format(i=i) for t in family.tensors(model) for i in range(model.num_layers if t.layered else 1)}
    wanted |= family.folded.keys()
    if missing := sorted(family.full_name(n) for n in wanted - names.keys()):
        hint = family.without_head if all(n.startswith(family.outside) for n in missing) else ""
        problems.append(f"{_some(missing)} missing from the weights{hint}")
    if strange := sorted(names[n] for n in names.keys() - wanted - family.copies.keys()):
        problems.append(f"{_some(strange)} in the weights and no part of a {family.name} with these settings")
    if problems:
        raise ExchangeError(folder, problems)
    return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} others" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more} {'is' if len(names) == 1 else 'are'}"


def _check_shapes(
    folder: Path, family: Family, config: ModelConfig, names: dict[str, str], weights: Weights
) -> None:
    """Before any memory is taken for them."""
    shapes, tensors = weight_shapes(model), family.tensors(model)
    problems = []
    for t in tensors:
        wanted = t.shape(shapes[t.weights[0]])
        for i in range(model.num_layers if t.layered else 1):
            there = weights.tensors[names[t.name.format(i=i)]].shape
            if there != wanted:
                problems.append(
                    f"{names[t.name.format(i=i)]} has shape {list(there)}; {CONFIG} asks for {list(wanted)}"
                )
    for extra, at in family.folded.items():
        there, table = (weights.tensors[names[name]].shape for name in (extra, at))
        if len(there) != 2 or there[0] < 1 or there[1] != table[1]:
            problems.append(
                f"{names[extra]} has shape {list(there)}, which does not go with {list(table)} of {names[at]}"
            )
    if problems:
        raise ExchangeError(folder, problems[:8] + [f"and {len(problems) - 8} others"] * (len(problems) > 8))


def _generation(folder: Path) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """What its makers recommend, as fields of `SamplingParams`; the ids that end a text; all else, to be passed on.

    Warns of rules that gptjax does not take from the file.
    """
    given = files.read_object(folder, GENERATION) or {}
    found = {name: given[name] for name, off in RECOMMENDED.items() if given.get(name) not in (None, off)}
    others = {name: value for name, value in given.items() if name not in NO_EFFECT | RECOMMENDED.keys()}
    if rules := [name for name, value in others.items() if value not in (None, *INERT.get(name, ()))]:
        told = ", ".join(f"{name} = {reprlib.repr(others[name])}" for name in rules)
        warn(
            f"{folder / GENERATION}: gptjax does not follow {told}, so its texts may differ from those of "
            "transformers; an export keeps what stands there"
        )
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except (PromptError, TypeError) as e:
        raise ExchangeError(folder / GENERATION, [f"recommends what cannot be done: {e}"]) from None
    ends = given.get("eos_token_id")
    source = GENERATION if ends is not None else CONFIG
    if ends is None:
        ends = (files.read_object(folder, CONFIG) or {}).get("eos_token_id")
    stops = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(i) is int and i >= 0 for i in stops):
        raise ExchangeError(folder / source, [f"eos_token_id = {ends!r}: ids of tokens were expected"])
    extra_generation_config = {name: value for name, value in given.items() if name not in found or found[name] != value}
    return found, stops, extra_generation_config


def _template(tokenizer: dict[str, Any]) -> str | None:
    """The chat template in tokenizer_config.json; of several with names, the one called default."""
    given = tokenizer.get("chat_template")
    if isinstance(given, list):
        named = [t for t in given if isinstance(t, dict)]
        given = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return given if isinstance(given, str) else None
