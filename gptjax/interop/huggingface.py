"""Reads models of Hugging Face exactly: every setting is understood or refused, and every tensor is used.

config.json                    the config; see families
model.safetensors              the weights, or several files with model.safetensors.index.json; see files
generation_config.json         the recommended sampling parameters, and the ids that end a text
chat_template.jinja            turns messages into a prompt; also in tokenizer_config.json
tokenizer.json and others      see data/tokenizer/huggingface_read.py
"""

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checks import check
from gptjax.config import Experiment, ModelConfig
from gptjax.data.tokenizer import EngineTokenizer, Tokenizer
from gptjax.data.tokenizer.huggingface_read import from_huggingface
from gptjax.errors import ConfigError, DataError, ExchangeError, PromptError, warn
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.interop import files
from gptjax.interop.families import FAMILIES, Family
from gptjax.interop.fields import Fields
from gptjax.interop.files import CONFIG, GENERATION, TEMPLATE, TOKENIZER, SafetensorsReader
from gptjax.interop.layout import nested, weight_shapes

SAMPLING_FIELDS = {  # fields of generation_config.json that `SamplingParams` has -> the value without effect
    "temperature": None,
    "top_k": 0,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": None,
    "no_repeat_ngram_size": 0,
}

# Fields without effect on gptjax's texts: token ids, lengths and counts (set elsewhere), and computation.
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
INERT: dict[str, tuple[Any, ...]] = {  # unsupported rules -> values that turn them off
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
MAX_PADDING = 1024  # embeddings are padded to a multiple of 64, 128 or, at most, this


def load_folder(folder: Path, name: str | None = None, tokenizer: Tokenizer | None = None) -> Pretrained:
    """Loads the model in a folder; weights keep the dtype of the file, and those of all layers are stacked.

    `tokenizer` None: that in the folder. Families: gpt2, llama, gpt_neox and, for import only, bert as a masked
    language model, whose token type 0 is folded into the positions (texts in two segments are not supported). Raises
    `ExchangeError` with all problems; warns about a tokenizer that may be wrong, and about unsupported sampling rules.
    """
    config, params = read_weights(folder)
    if tokenizer is None:
        tokenizer = _folder_tokenizer(folder)
    tokenizer = _without_unused_ids(folder, tokenizer, config.vocab_size or 0)
    _check_tokenizer(folder, tokenizer.vocab_size, config.vocab_size or 0)
    generation_config, ends, extra_generation_config = _generation(folder)
    # some ids are beyond the vocabulary
    stops = tuple(i for i in ends if i < (config.vocab_size or 0) and i != tokenizer.eos_id)
    if unknown := [i for i in stops if i >= tokenizer.vocab_size]:
        raise ExchangeError(
            folder,
            [f"eos_token_id = {unknown[0]}, but the tokenizer has only {tokenizer.vocab_size:,} ids: "
             "it is the wrong tokenizer; use the one that the model was trained with"],
        )  # fmt: skip
    template = files.read_text_file(folder, TEMPLATE)
    if template is None:
        template = _template(files.read_object(folder, TOKENIZER) or {})
    return Pretrained(
        name or folder.name, config, params, tokenizer, generation_config, stops, template, extra_generation_config
    )


def read_weights(folder: Path) -> tuple[ModelConfig, Any]:
    """The config and the weights, as in `load_folder`."""
    files.check_folder(folder)
    family, config = read_config(folder)
    with SafetensorsReader(folder) as weights:
        return config, _params(folder, family, config, weights)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and the config in config.json. Raises `ExchangeError` with every field that is not supported."""
    where = folder / CONFIG
    values = files.read_object(folder, CONFIG)
    if values is None:
        raise ExchangeError(folder, [f"has no {CONFIG}, so it is not a Hugging Face model"])
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ExchangeError(where, [f"model_type = {kind!r}: gptjax supports {', '.join(FAMILIES)}"])
    family = FAMILIES[kind]
    fields = Fields(values)
    config = family.from_hf_config(fields)
    if problems := fields.finish():
        raise ExchangeError(where, problems)
    try:  # a bidirectional model is not a valid experiment, but a valid model
        check(Experiment(model=dataclasses.replace(config, causal=True)))
    except ConfigError as e:
        raise ExchangeError(where, [f"gives {problem}" for problem in e.problems]) from None
    return family, config.resolved()


def _folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder. Raises `DataError`, with the option that names another one."""
    try:
        return from_huggingface(folder)
    except DataError as e:
        if "has no tokenizer" not in str(e):
            raise
        raise DataError(f"{e}, or name one for gptjax import with --tokenizer PATH|byte|NAME") from None


def _without_unused_ids(folder: Path, tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """Leaves out special tokens for which the model has no embedding, often one for padding: no text has them."""
    beyond = sorted(word for word, i in tokenizer.special_tokens.items() if i >= rows)
    roles = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    is_tail = bool(beyond) and len(beyond) == tokenizer.vocab_size - rows and all(i < rows for i in roles)
    if not is_tail or not isinstance(tokenizer, EngineTokenizer):
        return tokenizer
    warn(f"{folder}: {', '.join(beyond)} of the tokenizer is left out: the model has only {rows:,} embeddings")
    return tokenizer.without(beyond)


def _check_tokenizer(folder: Path, ids: int, rows: int) -> None:
    """Raises `ExchangeError` if a tokenizer has more ids than the model has embeddings; warns if it has far fewer.

    Embeddings are often padded to a round size: by fewer than `MAX_PADDING` rows, and by at most half of all rows. With
    more padding the tokenizer may be that of another model.
    """
    if ids > rows:
        raise ExchangeError(
            folder,
            [f"the tokenizer has {ids:,} ids and the model {rows:,}: it is the wrong tokenizer; "
             "use the one that the model was trained with"],
        )  # fmt: skip
    if rows - ids >= MAX_PADDING or rows > 2 * ids:
        warn(
            f"{folder}: the tokenizer has {ids:,} ids and the model {rows:,}. Padding usually adds fewer than "
            f"{MAX_PADDING:,} rows and at most half of all rows, so this may be the wrong tokenizer. If the texts make "
            "no sense, use the tokenizer that the model was trained with"
        )


def _params(folder: Path, family: Family, config: ModelConfig, weights: SafetensorsReader) -> Any:
    """The nested dict of weights. The tensors of the files must be exactly those of the model."""
    names = _names(folder, family, config, weights)
    tensors = family.tensors(config)
    shapes = weight_shapes(config)
    _check_shapes(folder, family, config, names, weights)
    found: dict[str, np.ndarray] = {}
    for t in tensors:
        shape = shapes[t.weights[0]]
        if not t.layered:
            found |= zip(t.weights, t.split(weights.read_tensor(names[t.name]), shape), strict=True)
            continue
        layers = [names[t.name.format(i=i)] for i in range(config.num_layers)]
        dtypes = {weights.tensors[name].dtype for name in layers}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.float32
        stacks = [np.empty((config.num_layers, *shape), dtype) for _ in t.weights]
        for i, name in enumerate(layers):
            for stack, part in zip(stacks, t.split(weights.read_tensor(name), shape), strict=True):
                stack[i] = part
        found |= zip(t.weights, stacks, strict=True)
    for extra, at in family.folded.items():
        (weight,) = next(t.weights for t in tensors if t.name == at)
        found[weight] = found[weight].astype(np.float32) + weights.read_tensor(names[extra])[0].astype(np.float32)
    for copy, original in family.copies.items():
        duplicated = copy in names and copy not in {t.name for t in tensors}
        if duplicated and not np.array_equal(weights.read_tensor(names[copy]), weights.read_tensor(names[original])):
            problem = f"{names[copy]} differs from {names[original]}, although the config says that they are tied"
            raise ExchangeError(folder, [f"{problem}; set tie_word_embeddings to false if the head is separate"])
    return nested(found)


def _names(folder: Path, family: Family, config: ModelConfig, weights: SafetensorsReader) -> dict[str, str]:
    """Name without prefix -> name in the files, for every tensor except buffers."""
    weights.check_dtypes(lambda name: re.fullmatch(family.buffers, family.canonical(name)) is not None)
    names: dict[str, str] = {}
    problems = []
    for name in weights.tensors:
        short = family.canonical(name)
        if re.fullmatch(family.buffers, short):
            continue
        if short in names:
            problems.append(f"{name} and {names[short]} are the same weight")
        names[short] = name
    if config.num_layers > len(names):
        problems.append(f"{CONFIG} has {config.num_layers:,} layers, but there are only {len(names):,} tensors")
        raise ExchangeError(folder, problems)
    expected = {
        t.name.format(i=i) for t in family.tensors(config) for i in range(config.num_layers if t.layered else 1)
    }
    expected |= family.folded.keys()
    if missing := sorted(family.full_name(n) for n in expected - names.keys()):
        hint = family.without_head if all(n.startswith(family.outside) for n in missing) else ""
        problems.append(f"{_some(missing)} missing from the weights{hint}")
    if unexpected := sorted(names[n] for n in names.keys() - expected - family.copies.keys()):
        problems.append(f"{_some(unexpected)} in the weights but not part of a {family.name} model with this config")
    if problems:
        raise ExchangeError(folder, problems)
    return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} others" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more} {'is' if len(names) == 1 else 'are'}"


def _check_shapes(
    folder: Path, family: Family, config: ModelConfig, names: dict[str, str], weights: SafetensorsReader
) -> None:
    """Raises `ExchangeError` for wrong shapes, before memory is allocated."""
    shapes = weight_shapes(config)
    tensors = family.tensors(config)
    problems = []
    for t in tensors:
        expected = t.shape(shapes[t.weights[0]])
        for i in range(config.num_layers if t.layered else 1):
            name = names[t.name.format(i=i)]
            shape = weights.tensors[name].shape
            if shape != expected:
                problems.append(f"{name} has shape {list(shape)}; by {CONFIG} it must be {list(expected)}")
    for extra, at in family.folded.items():
        shape, table = (weights.tensors[names[name]].shape for name in (extra, at))
        if len(shape) != 2 or shape[0] < 1 or shape[1] != table[1]:
            problems.append(f"{names[extra]} has shape {list(shape)}, which does not fit {list(table)} of {names[at]}")
    if problems:
        raise ExchangeError(folder, problems[:8] + [f"and {len(problems) - 8} others"] * (len(problems) > 8))


def _generation(folder: Path) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """generation_config.json: the fields of `SamplingParams`, the ids that end a text, and all other fields.

    Warns about rules that gptjax does not support.
    """
    given = files.read_object(folder, GENERATION) or {}
    sampling = {name: given[name] for name, off in SAMPLING_FIELDS.items() if given.get(name) not in (None, off)}
    others = {name: value for name, value in given.items() if name not in NO_EFFECT | SAMPLING_FIELDS.keys()}
    if rules := [name for name, value in others.items() if value not in (None, *INERT.get(name, ()))]:
        ignored = ", ".join(f"{name} = {reprlib.repr(others[name])}" for name in rules)
        warn(
            f"{folder / GENERATION}: gptjax does not support {ignored}, so its texts may differ from those of "
            "transformers; an export keeps these fields"
        )
    if given.get("do_sample") is False:
        sampling["temperature"] = 0.0
    try:
        SamplingParams(**sampling)
    except (PromptError, TypeError) as e:
        raise ExchangeError(folder / GENERATION, [f"has invalid values: {e}"]) from None
    ends = given.get("eos_token_id")
    source = GENERATION if ends is not None else CONFIG
    if ends is None:
        ends = (files.read_object(folder, CONFIG) or {}).get("eos_token_id")
    stops = ends if isinstance(ends, list) else [i for i in (ends,) if i is not None]
    if not all(type(i) is int and i >= 0 for i in stops):
        raise ExchangeError(folder / source, [f"eos_token_id = {ends!r}: must be a token id or a list of them"])
    extra_generation_config = {
        name: value for name, value in given.items() if name not in sampling or sampling[name] != value
    }
    return sampling, stops, extra_generation_config


def _template(tokenizer: dict[str, Any]) -> str | None:
    """The chat template in tokenizer_config.json; if there are several, the one named default."""
    given = tokenizer.get("chat_template")
    if isinstance(given, list):
        named = [t for t in given if isinstance(t, dict)]
        given = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return given if isinstance(given, str) else None
