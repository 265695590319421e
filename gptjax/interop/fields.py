"""Reads a config.json completely: every field that is not understood is a problem, reported with its value."""

from typing import Any

from gptjax.schema import conforms, describe

# No effect on the logits: the origin of the model, training, and defaults of text generation.
NO_EFFECT = frozenset(
    """model_type architectures torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash use_cache
    attn_implementation _attn_implementation_autoset tokenizer_class is_llama_config max_sequence_length n_ctx
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id mask_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing
    chunk_size_feed_forward transformers.js_config
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix""".split()
)
# In every family, no effect at these values only.
INERT: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}


MAX_SIZE = 1 << 26  # above any dimension of a model


class Fields:
    """The values of a config.json, and the problems with them. Each field is read once."""

    def __init__(self, values: dict[str, Any], prefix: str = ""):
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = []
        self._unread = {name for name in values if prefix or name not in NO_EFFECT}

    def take(self, name: str, kind: Any, default: Any) -> Any:
        """A value of a type; the default if it is absent or null. Another type is a problem."""
        self._unread.discard(name)
        value = self.values.get(name)
        if value is None:
            return default
        if not conforms(value, kind):
            self.problem(name, f"must be {describe(kind)}")
            return default
        if kind is int and not 1 <= value <= MAX_SIZE:
            self.problem(name, f"must be at least 1 and at most {MAX_SIZE:,}")
            return default
        return value

    def need(self, name: str, kind: Any, placeholder: Any) -> Any:
        """Like `take`, for a required field."""
        if self.values.get(name) is None:
            self.problems.append(f"{self.prefix}{name} is missing")
        return self.take(name, kind, placeholder)

    def choose(self, name: str, choices: dict[str, Any], default: str) -> Any:
        """The translation of a string."""
        value = self.take(name, str, default)
        if value not in choices:
            self.problem(name, f"gptjax supports {', '.join(choices)}")
            value = default
        return choices[value]

    def inert(self, **allowed: tuple[Any, ...]) -> None:
        """Fields without effect at these values; any other value is a problem."""
        for name, values in allowed.items():
            self._unread.discard(name)
            if name in self.values and not any(
                type(v) is type(self.values[name]) and v == self.values[name] for v in values
            ):
                self.problem(name, f"gptjax supports only {' or '.join(map(repr, values))}")

    def ignore(self, *names: str) -> None:
        """Fields without effect on the logits of this family."""
        self._unread -= set(names)

    def problem(self, name: str, message: str) -> None:
        self.problems.append(f"{self.prefix}{name} = {self.values.get(name)!r}: {message}")

    def nested(self, name: str) -> "Fields":
        """The fields of a nested object; its problems are added to these."""
        inner = Fields(self.take(name, dict, {}), f"{self.prefix}{name}.")
        inner.problems = self.problems
        return inner

    def finish(self) -> list[str]:
        """All problems, including fields that were not read."""
        if not self.prefix:
            self.inert(**INERT)
        for name in sorted(self._unread):
            self.problem(name, "gptjax does not know this field; if it does not change the logits, remove it")
        self._unread = set()
        return self.problems
