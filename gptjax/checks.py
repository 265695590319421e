"""What makes an experiment impossible: every rule once, all that fail reported together, before anything compiles."""

from collections.abc import Callable, Mapping
from string import Formatter

from gptjax.config import (
    RENAMED_OBJECTIVES,
    DataConfig,
    Experiment,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)
from gptjax.errors import ConfigError
from gptjax.schema import replace_at, type_problems, value_at

POSITIVE = """model.context_length model.num_layers model.embed_dim model.num_heads model.rope_theta model.rope_factor
    model.norm_epsilon optim.learning_rate optim.epsilon train.steps train.batch_size train.microbatches
    train.keep_last train.log_every train.prefetch train.max_skipped train.watchdog_seconds train.spike_sigma
    mesh.model data.tokenizer_vocab_size optim.layer_decay model.lora_alpha
    model.mup_base_width model.vocab_size model.num_kv_heads
    model.head_dim model.ffn_dim model.sliding_window model.rope_original_length
    model.attention_softcap model.logit_softcap data.max_documents optim.clip_norm optim.noise_multiplier mesh.data
    objective.num_generations objective.max_new_tokens""".split()
NOT_NEGATIVE = """seed model.init_std model.lora_rank model.num_classes objective.z_loss objective.beta
    optim.final_learning_rate
    optim.warmup_steps optim.weight_decay train.eval_every train.checkpoint_every train.keep_best
    train.sample_tokens""".split()
SHARES = "model.dropout optim.beta1 optim.beta2 data.val_fraction optim.cooldown_fraction".split()
ON_POLICY = ("rloo", "grpo")  # objectives for which the model writes answers of its own
OWNERS = {  # fields of Objective that mean something to some objectives only
    "mask_rate": ("mlm",),
    "whole_words": ("mlm",),
    "next_sentence": ("mlm",),
    "fim_rate": ("fim",),
    "reference": ("dpo", "distill", *ON_POLICY),
    "beta": ("dpo", *ON_POLICY),
    "divergence": ("distill",),
    "reward": ON_POLICY,
    "num_generations": ON_POLICY,
    "max_new_tokens": ON_POLICY,
}
Need = Callable[[bool, str], None]


def check(experiment: Experiment, num_devices: int | None = None) -> Experiment:
    """Returns the experiment, or raises `ConfigError` with everything that is wrong with it.

    `num_devices` is the number that the mesh must fit; None leaves that out.
    """
    wrong_type = type_problems(experiment)
    if experiment.objective.name in RENAMED_OBJECTIVES:
        new_name = RENAMED_OBJECTIVES[experiment.objective.name]
        wrong_type["objective.name"] = f"objective.name = {experiment.objective.name!r}: is now called {new_name!r}"
    sound = _with_defaults(experiment, wrong_type)
    out_of_range = _range_problems(sound)
    sound = _with_defaults(sound, out_of_range)
    if found := [*wrong_type.values(), *out_of_range.values(), *_rule_problems(sound, num_devices)]:
        raise ConfigError(found)
    return experiment


def _with_defaults(e: Experiment, problems: Mapping[str, str]) -> Experiment:
    """Puts the default where a value is impossible, so that the rules about the other fields can still be judged."""
    for path in problems:
        e = replace_at(e, path, value_at(Experiment(), path))
    return e


def _range_problems(e: Experiment) -> dict[str, str]:
    bounds: list[tuple[list[str], Callable[[float], bool], str]] = [
        (POSITIVE, lambda x: x > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
        (SHARES, lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
        (["optim.ema_decay", "objective.mask_rate"], lambda x: 0 < x < 1, "must lie between 0 and 1"),
        (["objective.fim_rate"], lambda x: 0 <= x <= 1, "must be at least 0 and at most 1"),
    ]
    found = {}
    for paths, holds, message in bounds:
        for path in paths:
            value = value_at(e, path)
            if value is not None and not holds(value):
                found[path] = f"{path} = {value}: {message}"
    return found


def _rule_problems(e: Experiment, num_devices: int | None) -> list[str]:
    """The rules between fields, each once: what must hold, and what to say where it does not."""
    found: list[str] = []

    def need(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    need(e.seed < 2**63, f"seed = {e.seed}: must be below 2**63")
    need(bool(e.name.strip(".")) and "/" not in e.name, f"name = {e.name!r}: must name a folder under runs/")
    need(
        e.init is not None or e.objective.reference is not None or e.data.tokenizer != "init",
        "data.tokenizer = 'init': there is no init; name the run or the model to start from by init",
    )
    need(
        e.init is not None or e.model.lora_rank == 0,
        f"model.lora_rank = {e.model.lora_rank}: adapts a model that is there; name it by init, or set 0",
    )
    _objective_rules(e, need)
    _class_rules(e, need)
    _model_rules(e.model, need, _knows_shape(e))
    _kernel_rules(e, need)
    _data_rules(e.data, need)
    _training_rules(e.optim, e.train, need)
    _privacy_rules(e, need)
    need(
        e.model.mup_base_width is None or e.optim.name in ("adamw", "lion"),
        f"optim.name = {e.optim.name!r}: the rates of muP (model.mup_base_width) are those of adamw and lion; choose one",
    )
    if num_devices is not None:
        _mesh_rules(e.train, e.mesh, num_devices, need)
    return found


def _objective_rules(e: Experiment, need: Need) -> None:
    o, m, d, with_answers = e.objective, e.model, e.data, e.with_answers
    need(
        m.causal or o.name == "mlm" or d.answers == "classes",
        f"model.causal = False: with objective.name = {o.name!r} every answer would be visible; "
        "set model.causal = True, or objective.name = 'mlm'",
    )
    need(
        not m.causal or o.name != "mlm",
        "model.causal = True: with objective.name = 'mlm' a token is told by those after it too; "
        "set model.causal = False",
    )
    need(
        m.causal or e.train.sample_tokens == 0,
        f"train.sample_tokens = {e.train.sample_tokens}: a model with model.causal = False cannot write; set 0",
    )
    need(
        o.name not in ("sft", "dpo", "rloo", "grpo") or with_answers,
        f"objective.name = {o.name!r}: needs examples with answers; set data.prompt and data.answer, or task:NAME",
    )
    for name, owners in OWNERS.items():
        value = getattr(o, name)
        need(
            o.name in owners or value == getattr(ObjectiveConfig(), name),
            f"objective.{name} = {value}: has no effect; set objective.name = {' or '.join(map(repr, owners))}",
        )
    _tuning_rules(e, need)
    need(
        m.context_length >= 8 or not (o.next_sentence or o.name == "fim"),
        f"model.context_length = {m.context_length}: leaves no room for text between the tokens that objective.name = "
        f"{o.name!r} puts in; 8 is the least",
    )
    need(
        not o.next_sentence or not (d.document_mask or with_answers),
        "objective.next_sentence = True: reads two pieces of text as one, so that documents and examples are not kept "
        "apart; set data.document_mask = False and give plain text",
    )


def _tuning_rules(e: Experiment, need: Need) -> None:
    """Of the objectives that look at more than the next token: another model, two answers, answers of its own."""
    o, d, t = e.objective, e.data, e.train
    stays_near = o.name == "dpo" or (o.name in ON_POLICY and o.beta > 0)
    need(
        not stays_near or e.init is not None or o.reference is not None,
        f"objective.name = {o.name!r}: there is no model to stay near; name one by init, or by objective.reference",
    )
    need(
        o.name != "distill" or o.reference is not None,
        "objective.name = 'distill': there is no teacher; name one by objective.reference",
    )
    need(
        o.name != "dpo" or o.beta > 0,
        "objective.beta = 0: nothing is learnt with objective.name = 'dpo'; 0.1 is usual",
    )
    need(
        o.name not in ON_POLICY or o.beta > 0 or o.reference is None,
        f"objective.reference = {o.reference!r}: has no effect with objective.beta = 0; leave it out, or set beta",
    )
    need(
        o.name not in ON_POLICY or e.model.dropout == 0,
        f"model.dropout = {e.model.dropout}: with objective.name = {o.name!r} the model that learns would not be the "
        "one that wrote; set 0",
    )
    need(
        o.z_loss == 0 or o.name not in ("dpo", "distill"),
        f"objective.z_loss = {o.z_loss}: has no effect with objective.name = {o.name!r}; leave it out",
    )
    need(
        d.rejected is None or o.name == "dpo",
        "data.rejected: is learnt from with objective.name = 'dpo' only; leave it out",
    )
    need(
        o.name != "dpo" or d.rejected is not None,
        "objective.name = 'dpo': compares two answers; set data.rejected",
    )
    rows = 2 if o.name == "dpo" else o.num_generations if o.name in ON_POLICY else 1
    need(
        t.batch_size % (rows * t.microbatches if o.name == "dpo" else rows) == 0,
        f"train.batch_size = {t.batch_size}: objective.name = {o.name!r} reads {rows} rows together, "
        + (
            "in every microbatch; choose a multiple"
            if o.name == "dpo"
            else "objective.num_generations; choose a multiple"
        ),
    )
    need(
        rows == 1 or isinstance(d.source, str) or len(d.source) == 1,
        f"data.source = {d.source!r}: objective.name = {o.name!r} reads rows that belong together; give one source",
    )
    need(
        o.name not in ON_POLICY or o.num_generations > 1,
        f"objective.num_generations = {o.num_generations}: answers are compared with others to the same prompt; 2 is the least",
    )
    need(
        o.name not in ON_POLICY or not _knows_shape(e) or o.max_new_tokens < e.model.context_length,
        f"objective.max_new_tokens = {o.max_new_tokens}: leaves nothing of model.context_length = {e.model.context_length} "
        "for the prompt; ask for fewer",
    )


def _class_rules(e: Experiment, need: Need) -> None:
    m, d = e.model, e.data
    need(
        m.num_classes == 0 or d.answers == "classes",
        f"model.num_classes = {m.num_classes}: has no effect; set data.answers = 'classes', or leave it out",
    )
    need(
        not d.labels or d.answer is not None or d.answers == "classes",
        f"data.labels = {d.labels}: there are no answers; set data.answer",
    )
    need(len(set(d.labels)) == len(d.labels), f"data.labels = {d.labels}: names a label twice; name each once")
    if d.answers == "text":
        return
    need(
        e.objective.name == "sft",
        f"objective.name = {e.objective.name!r}: with data.answers = 'classes' the labels alone are asked for; set "
        "objective.name = 'sft'",
    )
    need(
        e.objective.z_loss == 0,
        f"objective.z_loss = {e.objective.z_loss}: has no effect with data.answers = 'classes'; leave it out",
    )
    need(
        d.prompt is None or len(d.labels) > 1,
        f"data.labels = {d.labels}: with data.answers = 'classes' one of them is told; name all, two at least",
    )
    need(
        e.train.sample_tokens == 0,
        f"train.sample_tokens = {e.train.sample_tokens}: a model that tells classes cannot write; set 0",
    )


def _knows_shape(e: Experiment) -> bool:
    """Whether the fields of the model are its own: with `init` they are those of that model, once it was opened."""
    return e.init is None or e.model.ffn_dim is not None


def _model_rules(m: ModelConfig, need: Need, knows_shape: bool) -> None:
    if m.head_dim is None:
        fits = [n for n in range(1, min(m.embed_dim, 10_000) + 1) if m.embed_dim % n == 0]  # a stranger's may be vast
        nearest = min(fits, key=lambda n: abs(n - m.num_heads))
        need(
            m.embed_dim % m.num_heads == 0,
            f"model.num_heads = {m.num_heads}: does not divide model.embed_dim = {m.embed_dim}; "
            f"{nearest} does, or set model.head_dim",
        )
    need(
        m.num_heads % (m.num_kv_heads or m.num_heads) == 0,
        f"model.num_kv_heads = {m.num_kv_heads}: must divide model.num_heads = {m.num_heads}",
    )
    of_ffn = [] if m.ffn == "none" else ["up", "down", *["gate"] * (m.gated or not knows_shape)]
    strange = set(m.lora_targets) - {"tokens", "query", "key", "value", "out", *of_ffn}
    need(
        not m.lora_rank or (bool(m.lora_targets) and not strange),
        f"model.lora_targets = {m.lora_targets}: must be of tokens, query, key, value, out, up, down"
        " (and gate, if gated; without an FFN none of these three)",
    )
    need(
        m.dropout == 0 or 1 / 512 < m.dropout < 511 / 512,
        f"model.dropout = {m.dropout}: is rounded to a multiple of 1/256, and this one to none or all; choose 0, or a "
        "share between",
    )
    head_dim = m.head_dim or m.embed_dim // m.num_heads
    need(
        m.positions != "rope" or head_dim % 2 == 0,
        f"model.head_dim = {head_dim}: RoPE turns pairs of numbers; make it even",
    )
    need(
        m.positions != "rope"
        or head_dim % 2 != 0
        or (0 < m.partial_rotary_factor <= 1 and round(head_dim * m.partial_rotary_factor) % 2 == 0),
        f"model.partial_rotary_factor = {m.partial_rotary_factor}: must be above 0, at most 1, and turn an even part of the "
        f"{head_dim} numbers of a head",
    )
    need(
        m.partial_rotary_factor == 1 or m.positions == "rope",
        f"model.partial_rotary_factor = {m.partial_rotary_factor}: there is no RoPE; set model.positions = 'rope'",
    )
    need(
        not m.parallel_residual or m.norm_placement == "pre",
        "model.parallel_residual = True: needs model.norm_placement = 'pre'",
    )
    need(
        m.ffn != "none" or not m.parallel_residual,
        "model.parallel_residual = True: there is no FFN beside attention; leave it out, or choose another model.ffn",
    )
    need(
        m.ffn != "none" or m.head == "linear",
        "model.head = 'mlm': takes its activation from model.ffn, which is 'none'; choose another",
    )
    need(
        m.head == "linear" or m.tie_embeddings,
        "model.head = 'mlm': reads its answers off the token embedding; set model.tie_embeddings = True",
    )
    need(
        m.rope_scaling == "none" or m.positions == "rope",
        f"model.rope_scaling = {m.rope_scaling!r}: there is no RoPE to scale; set model.positions = 'rope'",
    )
    need(
        m.rope_scaling == "none" or m.rope_factor > 1,
        f"model.rope_factor = {m.rope_factor}: model.rope_scaling = {m.rope_scaling!r} needs a factor above 1",
    )
    need(
        m.rope_scaling != "none" or m.rope_factor == 1,
        f"model.rope_factor = {m.rope_factor}: has no effect; set model.rope_scaling to linear, ntk, yarn or llama3",
    )


def _kernel_rules(e: Experiment, need: Need) -> None:
    """What cuDNN can do on any GPU; `choose_kernel` knows what it can do on the one that is there."""
    m = e.model
    if m.attention_kernel != "cudnn":
        return
    need(
        m.attention_softcap is None and m.dropout == 0 and m.dtype == "bfloat16",
        "model.attention_kernel = 'cudnn': needs dtype = 'bfloat16', no attention_softcap and no dropout; use 'auto'",
    )
    if not _knows_shape(e):
        return
    head_dim = m.head_dim or m.embed_dim // m.num_heads
    need(
        head_dim % 8 == 0 and head_dim <= 256,
        f"model.attention_kernel = 'cudnn': needs head_dim to be a multiple of 8 and at most 256, and it is {head_dim}"
        "; use 'auto'",
    )
    need(
        m.context_length % 2 == 0 or not (e.masks_tokens or m.sliding_window is not None or m.positions == "alibi"),
        f"model.attention_kernel = 'cudnn': needs an even context_length to learn under a mask or with ALiBi, and it "
        f"is {m.context_length}; use 'auto'",
    )


def _data_rules(d: DataConfig, need: Need) -> None:
    _template_rules(d, need)
    sources = (d.source,) if isinstance(d.source, str) else d.source
    need(bool(sources) and all(sources), f"data.source = {d.source!r}: names no text; pydoc is always there")
    apart = (d.val_source,) if isinstance(d.val_source, str) else d.val_source or ()
    need(
        not any(source.startswith("function:") for source in (*sources, *apart)) or d.max_documents is not None,
        f"data.source = {d.source!r}: a function never ends; say by data.max_documents how many documents to make",
    )
    need(
        not d.weights or (len(d.weights) == len(sources) and min(d.weights) > 0),
        f"data.weights = {d.weights}: one number above 0 is needed for each of the {len(sources)} sources",
    )
    need(
        d.val_source is not None or d.val_fraction > 0,
        "data.val_fraction = 0: there would be no validation text; give a share such as 0.1, or data.val_source",
    )
    need(
        not d.streaming or d.split == "document" or d.val_source is not None,
        "data.streaming = True: the length is not known in advance; set data.split = 'document'",
    )


def _template_rules(d: DataConfig, need: Need) -> None:
    need(
        (d.prompt is None) == (d.answer is None),
        "data.prompt, data.answer: an example needs both; give the other one too, or none for plain text",
    )
    named = [(s,) if isinstance(s, str) else s for s in (d.source, d.val_source) if s is not None]
    tasks = [source.startswith("task:") for sources in named for source in sources]
    need(
        not any(tasks) or all(tasks) or d.prompt is not None,
        f"data.source = {d.source!r}: mixes tasks with other text; set data.prompt and data.answer for its tables",
    )
    for name, template in (("prompt", d.prompt), ("answer", d.answer), ("rejected", d.rejected)):
        if template is None:
            continue
        try:
            found = [column for _, column, *_ in Formatter().parse(template) if column is not None]
        except ValueError as e:
            need(False, f"data.{name} = {template!r}: {e}; a column stands in braces, and {{{{ is a brace itself")
            continue
        need(
            bool(found) and all(found),
            f"data.{name} = {template!r}: names no column, or an empty one; put at least one in braces, as in {{text}}",
        )


def _training_rules(o: OptimConfig, t: TrainConfig, need: Need) -> None:
    need(
        o.warmup_steps < t.steps,
        f"optim.warmup_steps = {o.warmup_steps}: the run has only {t.steps} steps (train.steps); "
        f"warm up for fewer, {t.steps // 10} for instance",
    )
    need(
        o.final_learning_rate <= o.learning_rate,
        f"optim.final_learning_rate = {o.final_learning_rate}: above optim.learning_rate = {o.learning_rate}; lower it",
    )
    need(
        o.name != "schedule_free" or o.schedule == "constant",
        f"optim.schedule = {o.schedule!r}: optim.name = 'schedule_free' needs none; set optim.schedule = 'constant'",
    )
    need(
        o.name != "schedule_free" or o.beta1 > 0,
        "optim.beta1 = 0: optim.name = 'schedule_free' divides by it; 0.9 is usual",
    )
    need(
        t.batch_size % t.microbatches == 0,
        f"train.batch_size = {t.batch_size}: not a multiple of train.microbatches = {t.microbatches}",
    )


def _privacy_rules(e: Experiment, need: Need) -> None:
    """DP-SGD promises something of single windows, each of which is drawn with the same probability."""
    if e.optim.noise_multiplier is None:
        return
    private, o = f"optim.noise_multiplier = {e.optim.noise_multiplier}", e.objective
    need(
        e.optim.clip_norm is not None,
        f"{private}: is over optim.clip_norm, the norm of a window's gradient at most; set that, to 1 for instance",
    )
    need(
        o.name not in ("dpo", *ON_POLICY) and not o.next_sentence,
        f"{private}: needs windows that are learnt from one by one, and objective.name = {o.name!r} reads several "
        "together; choose another objective, or leave the noise out",
    )
    need(
        e.train.batch_size >= 24,
        f"train.batch_size = {e.train.batch_size}: {private} draws fewer windows than fit, on average too few "
        "below 8; choose 24 or more",
    )
    need(
        e.model.attention_kernel != "cudnn",
        f"model.attention_kernel = 'cudnn': {private} needs a gradient for each window; set 'xla'",
    )
    need(
        not e.data.weights,
        f"data.weights = {e.data.weights}: {private} draws every window with the same probability; leave them out",
    )
    need(
        e.train.spike_sigma is None,
        f"train.spike_sigma = {e.train.spike_sigma}: would tell of a window that was drawn, which {private} is to "
        "hide; leave it out",
    )


def _mesh_rules(t: TrainConfig, mesh: MeshConfig, num_devices: int, need: Need) -> None:
    data = mesh.data or max(1, num_devices // mesh.model)
    need(
        data * mesh.model == num_devices,
        f"mesh = {data} x {mesh.model} (data x model): does not use all {num_devices} devices that were found; "
        f"leave mesh.data out and choose a mesh.model that divides {num_devices}",
    )
    need(
        t.batch_size % (t.microbatches * data) == 0,
        f"train.batch_size = {t.batch_size}: not a multiple of train.microbatches x data devices = "
        f"{t.microbatches} x {data}; {-(-t.batch_size // (t.microbatches * data)) * t.microbatches * data} would be",
    )
