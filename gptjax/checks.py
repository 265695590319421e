"""The rules for an experiment; all broken ones are reported together. An objective has its own in `objectives/`."""

from collections.abc import Callable, Mapping
from string import Formatter

from gptjax.config import DataConfig, Experiment, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from gptjax.errors import ConfigError, printable
from gptjax.objectives import make_objective, name_problems, objective_problems
from gptjax.schema import replace_at, type_problems, value_at

POSITIVE = """model.vocab_size model.context_length model.num_layers model.embed_dim model.num_heads model.num_kv_heads
    model.head_dim model.ffn_dim model.rope_theta model.rope_factor model.rope_original_length model.norm_epsilon
    model.sliding_window model.attention_softcap model.logit_softcap model.lora_alpha model.mup_base_width
    data.max_documents data.tokenizer_vocab_size objective.num_generations objective.max_new_tokens
    optim.learning_rate optim.epsilon optim.clip_norm optim.noise_multiplier optim.layer_decay
    train.steps train.batch_size train.microbatches train.keep_last train.log_every train.spike_sigma
    train.max_skipped train.watchdog_seconds train.prefetch mesh.data mesh.model""".split()
NOT_NEGATIVE = """seed model.num_classes model.lora_rank model.init_std objective.z_loss objective.beta
    optim.final_learning_rate optim.warmup_steps optim.weight_decay
    train.eval_every train.checkpoint_every train.keep_best train.sample_tokens""".split()
FRACTIONS = "model.dropout optim.beta1 optim.beta2 data.val_fraction optim.cooldown_fraction".split()
MAX_NAME = 230  # bytes of a run's name: file systems allow 255
# far above what any machine can hold; a larger value would fill the memory before it is noticed
LIMITS = {
    "model.vocab_size": 10**8, "model.context_length": 10**8, "model.num_layers": 10**5, "model.embed_dim": 10**6,
    "model.num_heads": 10**5, "model.num_kv_heads": 10**5, "model.head_dim": 10**5, "model.ffn_dim": 10**7,
    "model.num_classes": 10**7, "model.lora_rank": 10**5, "model.sliding_window": 10**9, "model.mup_base_width": 10**6,
    "data.max_documents": 10**12, "data.tokenizer_vocab_size": 10**7, "objective.num_generations": 10**6,
    "objective.max_new_tokens": 10**8, "train.steps": 10**12, "train.batch_size": 10**7, "train.microbatches": 10**7,
    "train.sample_tokens": 10**8, "train.prefetch": 10**4, "mesh.data": 10**6, "mesh.model": 10**6,
}  # fmt: skip
Need = Callable[[bool, str], None]


def check(experiment: Experiment, num_devices: int | None = None) -> Experiment:
    """Returns the experiment, or raises `ConfigError` with everything that is wrong with it.

    `num_devices` is the number that the mesh must fit; None leaves that out.
    """
    wrong_type = name_problems(experiment.objective.name) | type_problems(experiment)
    sound = _with_defaults(experiment, wrong_type)
    out_of_range = _range_problems(sound)
    sound = _with_defaults(sound, out_of_range)
    if found := [*wrong_type.values(), *out_of_range.values(), *_rule_problems(sound, num_devices)]:
        raise ConfigError(found)
    return experiment


def _with_defaults(e: Experiment, problems: Mapping[str, str]) -> Experiment:
    """Replaces impossible values by their defaults, so that the rules about other fields can still be checked."""
    for path in problems:
        e = replace_at(e, path, value_at(Experiment(), path))
    return e


def _range_problems(e: Experiment) -> dict[str, str]:
    bounds: list[tuple[list[str], Callable[[float], bool], str]] = [
        (POSITIVE, lambda x: x > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
        (FRACTIONS, lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
        (["optim.ema_decay", "objective.mask_rate"], lambda x: 0 < x < 1, "must lie between 0 and 1"),
        (["objective.fim_rate"], lambda x: 0 <= x <= 1, "must be at least 0 and at most 1"),
    ]
    found = {}
    for paths, holds, message in bounds:
        for path in paths:
            value = value_at(e, path)
            if value is not None and not holds(value):
                found[path] = f"{path} = {value}: {message}"
    for path, limit in LIMITS.items():
        value = value_at(e, path)
        if value is not None and value > limit:
            found[path] = f"{path} = {_short(value)}: must be at most {limit:,}"
    return found


def _short(value: int) -> str:
    """A number for a message, which an untrusted file may give thousands of digits."""
    return f"{value:,}" if value < 10**30 else f"about 10**{value.bit_length() * 3 // 10}"


def _rule_problems(e: Experiment, num_devices: int | None) -> list[str]:
    """The rules between fields: a condition, and the message if it does not hold."""
    found: list[str] = []

    def need(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    need(e.seed < 2**63, f"seed = {e.seed}: must be below 2**63")
    need(bool(e.name.strip(".")) and "/" not in e.name, f"name = {e.name[:80]!r}: must name a folder under runs/")
    is_plain = printable(e.name) == e.name and not set("\n\t") & set(e.name)
    need(is_plain, f"name = {e.name[:80]!r}: has characters that cannot be printed; leave them out")
    size = len(e.name.encode(errors="surrogatepass"))
    need(size <= MAX_NAME, f"name = {e.name[:20] + '...'!r}: has {size:,} bytes; at most {MAX_NAME} are allowed")
    need(
        e.init is not None or e.objective.reference is not None or e.data.tokenizer != "init",
        "data.tokenizer = 'init': there is no init; set init to a run or a model",
    )
    need(
        e.init is not None or e.model.lora_rank == 0,
        f"model.lora_rank = {e.model.lora_rank}: LoRA adapts an existing model; set init to it, or set 0",
    )
    need(
        e.model.causal or e.train.sample_tokens == 0,
        f"train.sample_tokens = {e.train.sample_tokens}: a model with model.causal = False cannot generate text; set 0",
    )
    found += objective_problems(e)
    _class_rules(e, need)
    _model_rules(e.model, need, e.knows_shape)
    _kernel_rules(e, need)
    _data_rules(e.data, need)
    _training_rules(e.optim, e.train, need)
    _privacy_rules(e, need)
    need(
        e.model.mup_base_width is None or e.optim.name in ("adamw", "lion"),
        f"optim.name = {e.optim.name!r}: muP (model.mup_base_width) needs the rates of adamw or lion; choose one",
    )
    if num_devices is not None:
        _mesh_rules(e.train, e.mesh, num_devices, need)
    return found


def _class_rules(e: Experiment, need: Need) -> None:
    m, d = e.model, e.data
    need(
        m.num_classes == 0 or d.answers == "classes",
        f"model.num_classes = {m.num_classes}: has no effect; set data.answers = 'classes', or leave it out",
    )
    need(
        not d.labels or d.answer is not None or d.answers == "classes",
        f"data.labels = {d.labels}: the data has no answers; set data.answer",
    )
    need(len(set(d.labels)) == len(d.labels), f"data.labels = {d.labels}: has a label twice; list each once")


def _model_rules(m: ModelConfig, need: Need, knows_shape: bool) -> None:
    if m.head_dim is None:
        largest = min(m.embed_dim, 10_000)  # an untrusted value may be vast
        fits = [n for n in range(1, largest + 1) if m.embed_dim % n == 0]
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
        "fraction between",
    )
    head_dim = m.head_dim or m.embed_dim // m.num_heads
    need(
        m.positions != "rope" or head_dim % 2 == 0,
        f"model.head_dim = {head_dim}: RoPE rotates pairs of dimensions; make it even",
    )
    need(
        m.positions != "rope"
        or head_dim % 2 != 0
        or (0 < m.partial_rotary_factor <= 1 and round(head_dim * m.partial_rotary_factor) % 2 == 0),
        f"model.partial_rotary_factor = {m.partial_rotary_factor}: must be above 0, at most 1, and "
        f"rotate an even part of the {head_dim} dimensions of a head",
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
        "model.parallel_residual = True: no FFN to run in parallel; leave it out, or choose another model.ffn",
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
    if not e.knows_shape:
        return
    head_dim = m.head_dim or m.embed_dim // m.num_heads
    need(
        head_dim % 8 == 0 and head_dim <= 256,
        f"model.attention_kernel = 'cudnn': needs head_dim to be a multiple of 8 and at most 256, and it is {head_dim}"
        "; use 'auto'",
    )
    masked = make_objective(e).masks_tokens() or m.sliding_window is not None or m.positions == "alibi"
    need(
        m.context_length % 2 == 0 or not masked,
        f"model.attention_kernel = 'cudnn': needs an even context_length to train under a mask or with ALiBi, and it "
        f"is {m.context_length}; use 'auto'",
    )


def _data_rules(d: DataConfig, need: Need) -> None:
    _template_rules(d, need)
    sources = (d.source,) if isinstance(d.source, str) else d.source
    need(bool(sources) and all(sources), f"data.source = {d.source!r}: names no text; pydoc is always available")
    apart = (d.val_source,) if isinstance(d.val_source, str) else d.val_source or ()
    need(
        not any(source.startswith("function:") for source in (*sources, *apart)) or d.max_documents is not None,
        f"data.source = {d.source!r}: a function has no end; set data.max_documents",
    )
    need(
        not d.weights or (len(d.weights) == len(sources) and min(d.weights) > 0),
        f"data.weights = {d.weights}: needs one positive number for each of the {len(sources)} sources",
    )
    need(
        d.val_source is not None or d.val_fraction > 0,
        "data.val_fraction = 0: leaves no validation text; set a fraction such as 0.1, or data.val_source",
    )
    need(
        not d.streaming or d.split == "document" or d.val_source is not None,
        "data.streaming = True: the length of the text is not known in advance; set data.split = 'document'",
    )


def _template_rules(d: DataConfig, need: Need) -> None:
    need(
        (d.prompt is None) == (d.answer is None),
        "data.prompt, data.answer: an example needs both; set the other one too, or neither for plain text",
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
            need(False, f"data.{name} = {template!r}: {e}; a column is written in braces, and {{{{ is a literal brace")
            continue
        need(
            bool(found) and all(found),
            f"data.{name} = {template!r}: names no column, or an empty one; write one in braces, as in {{text}}",
        )


def _training_rules(o: OptimConfig, t: TrainConfig, need: Need) -> None:
    need(
        o.warmup_steps < t.steps,
        f"optim.warmup_steps = {o.warmup_steps}: the run has only {t.steps} steps (train.steps); "
        f"use fewer, for example {t.steps // 10}",
    )
    need(
        o.final_learning_rate <= o.learning_rate,
        f"optim.final_learning_rate = {o.final_learning_rate}: above optim.learning_rate = {o.learning_rate}; lower it",
    )
    need(
        o.name != "schedule_free" or o.schedule == "constant",
        f"optim.schedule = {o.schedule!r}: optim.name = 'schedule_free' has none; set optim.schedule = 'constant'",
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
    """DP-SGD protects single windows, each drawn with the same probability (see training/privacy.py)."""
    if e.optim.noise_multiplier is None:
        return
    private, objective = f"optim.noise_multiplier = {e.optim.noise_multiplier}", make_objective(e)
    need(
        e.optim.clip_norm is not None,
        f"{private}: is relative to optim.clip_norm, to which gradients are clipped; set it, for example to 1",
    )
    need(
        objective.group().rows <= 1 and not objective.needs_negatives(),
        f"{private}: needs a gradient for each window, and objective.name = {e.objective.name!r} reads several windows "
        "together; choose another objective, or leave out optim.noise_multiplier",
    )
    need(
        e.train.batch_size >= 24,
        f"train.batch_size = {e.train.batch_size}: {private} draws fewer windows on average than fit a batch; "
        "choose 24 or more",
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
        f"train.spike_sigma = {e.train.spike_sigma}: would reveal a window that was drawn, which {private} "
        "must hide; leave it out",
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
