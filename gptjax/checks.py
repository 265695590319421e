"""What makes an experiment impossible: every rule once, all that fail reported together, before anything compiles."""

from collections.abc import Callable, Mapping

from gptjax.config import Data, Experiment, Mesh, Model, Optim, Train
from gptjax.errors import ConfigError
from gptjax.schema import replace_at, type_problems, value_at

POSITIVE = """model.context_length model.num_layers model.embed_dim model.num_heads model.rope_base model.rope_factor
    model.norm_epsilon optim.learning_rate optim.epsilon train.steps train.batch_size train.microbatches
    train.keep_last train.log_every train.prefetch train.max_skipped train.stuck_seconds train.skip_spikes
    mesh.model data.tokenizer_vocab_size
    model.vocab_size model.num_kv_heads model.head_dim model.ffn_dim model.window model.rope_original_length
    model.attention_softcap model.logit_softcap data.max_documents optim.clip_norm mesh.data""".split()
NOT_NEGATIVE = """seed model.init_std objective.z_loss optim.final_learning_rate optim.warmup_steps
    optim.weight_decay train.eval_every train.checkpoint_every train.keep_best train.sample_tokens""".split()
SHARES = "model.dropout optim.beta1 optim.beta2 data.val_fraction optim.cooldown_fraction".split()
Need = Callable[[bool, str], None]


def check(experiment: Experiment, num_devices: int | None = None) -> Experiment:
    """Returns the experiment, or raises `ConfigError` with everything that is wrong with it.

    `num_devices` is the number that the mesh must fit; None leaves that out.
    """
    wrong_type = type_problems(experiment)
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
        (["optim.ema_decay"], lambda x: 0 < x < 1, "must lie between 0 and 1"),
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
        e.model.causal or e.objective.name != "causal",
        "model.causal = False: with objective.name = 'causal' every answer would be visible; set model.causal = True",
    )
    _model_rules(e.model, need)
    _data_rules(e.data, need)
    _training_rules(e.optim, e.train, need)
    if num_devices is not None:
        _mesh_rules(e.train, e.mesh, num_devices, need)
    return found


def _model_rules(m: Model, need: Need) -> None:
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
    head_dim = m.head_dim or m.embed_dim // m.num_heads
    need(
        m.positions != "rope" or head_dim % 2 == 0,
        f"model.head_dim = {head_dim}: RoPE turns pairs of numbers; make it even",
    )
    need(
        m.positions != "rope"
        or head_dim % 2 != 0
        or (0 < m.rope_fraction <= 1 and round(head_dim * m.rope_fraction) % 2 == 0),
        f"model.rope_fraction = {m.rope_fraction}: must be above 0, at most 1, and turn an even part of the "
        f"{head_dim} numbers of a head",
    )
    need(
        m.rope_fraction == 1 or m.positions == "rope",
        f"model.rope_fraction = {m.rope_fraction}: there is no RoPE; set model.positions = 'rope'",
    )
    need(
        not m.parallel_residual or m.norm_placement == "pre",
        "model.parallel_residual = True: needs model.norm_placement = 'pre'",
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
    need(
        m.attention_kernel != "cudnn" or (m.attention_softcap is None and m.dropout == 0 and m.dtype == "bfloat16"),
        "model.attention_kernel = 'cudnn': needs dtype = 'bfloat16', no attention_softcap and no dropout; use 'auto'",
    )


def _data_rules(d: Data, need: Need) -> None:
    sources = (d.source,) if isinstance(d.source, str) else d.source
    need(bool(sources) and all(sources), f"data.source = {d.source!r}: names no text; pydoc is always there")
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


def _training_rules(o: Optim, t: Train, need: Need) -> None:
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


def _mesh_rules(t: Train, mesh: Mesh, num_devices: int, need: Need) -> None:
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
