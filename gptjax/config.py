"""What to train: one frozen, hashable `Experiment` that determines the run completely.

An experiment is usually a baseline and its difference: `baseline.override(model=dict(num_layers=8))`. `grid` makes
many, `diff` lists how two differ. A field that is None is derived from the others; `resolved` fills it in.
`checks.py` has the rules that an experiment must satisfy.
"""

import dataclasses
import fnmatch
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptjax.errors import ConfigError
from gptjax.schema import leaves, replace_at, type_problems, unknown, value_at

FORMAT_VERSION = 2
RENAMED = {  # names of format 1 -> today's; files in the old names are read, code and options get the new name
    "model.mup_width": "model.mup_base_width",
    "model.rope_base": "model.rope_theta",
    "model.rope_fraction": "model.partial_rotary_factor",
    "model.window": "model.sliding_window",
    "objective.fill_in_rate": "objective.fim_rate",
    "objective.new_tokens": "objective.max_new_tokens",
    "objective.samples": "objective.num_generations",
    "objective.score": "objective.reward",
    "optim.frozen": "optim.freeze",
    "train.skip_spikes": "train.spike_sigma",
    "train.stuck_seconds": "train.watchdog_seconds",
    "train.track": "train.trackers",
}
RENAMED_OBJECTIVES = {  # values of objective.name in format 1 -> today's
    "fill_in": "fim",
    "masked": "mlm",
    "prefix": "prefix_lm",
    "risk": "rloo",
    "supervised": "sft",
}


@dataclass(frozen=True)
class ModelConfig:
    """The network: its sizes and its mechanisms."""

    vocab_size: int | None = None  # rows of the embedding; None: the size of the tokenizer's vocabulary
    context_length: int = 256  # tokens in a training window, and rows of a learned position table
    num_layers: int = 6  # transformer blocks
    embed_dim: int = 384  # width of the residual stream
    num_heads: int = 6  # query heads
    num_kv_heads: int | None = None  # key and value heads: fewer is GQA, 1 is MQA; None: num_heads (MHA)
    head_dim: int | None = None  # width of one head; None: embed_dim / num_heads
    ffn_dim: int | None = None  # hidden width of the FFN; None: 4 embed_dim, or 8/3 embed_dim if it is gated
    ffn: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu", "none"] = "gelu"  # gelu: tanh; none: no FFN
    positions: Literal["learned", "rope", "alibi", "none"] = "learned"  # how the model knows the order of the tokens
    rope_theta: float = 10_000.0  # base of RoPE's wavelengths (Su et al. 2021)
    partial_rotary_factor: float = 1.0  # fraction of each head that RoPE rotates (GPT-NeoX: 0.25)
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"  # how RoPE is extended to longer contexts
    rope_factor: float = 1.0  # how many times rope_original_length the context may be
    rope_original_length: int | None = None  # context that RoPE was trained on; None: context_length / rope_factor
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm has a scale and never a bias
    norm_placement: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)); post: norm(x + f(x)), no final norm
    norm_epsilon: float = 1e-5  # added to the variance
    parallel_residual: bool = False  # x + attention(norm(x)) + ffn(norm(x)), with two norms (GPT-NeoX)
    embedding_norm: bool = False  # normalize the input of the first block (BERT)
    bias: bool = True  # biases in the linear layers and in layernorm
    causal: bool = True  # False: every token attends to the tokens after it as well (BERT)
    sliding_window: int | None = None  # each token attends to this many tokens, itself included; None: to all
    qk_norm: bool = False  # RMS-normalize queries and keys per head (Henry et al. 2020)
    attention_softcap: float | None = None  # c tanh(score / c) on attention scores (Gemma 2: 50)
    logit_softcap: float | None = None  # c tanh(logit / c) on the output (Gemma 2: 30)
    dropout: float = 0.0  # rate for embeddings, attention weights and both residual branches; multiples of 1/256
    tie_embeddings: bool = True  # the output head is the transposed token embedding
    head: Literal["linear", "mlm"] = "linear"  # mlm: dense layer, activation and norm before it, and a bias (BERT)
    num_classes: int = 0  # outputs of a classification head; 0: the number of labels if data.answers = "classes"
    lora_rank: int = 0  # train low-rank matrices of this rank on lora_targets, all else frozen (Hu et al. 2021); 0: off
    lora_alpha: float = 16.0  # the low-rank update is multiplied by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("query", "value")  # any of tokens, query, key, value, out, up, gate, down
    init_std: float = 0.02  # standard deviation of every matrix at initialization (GPT-2)
    mup_base_width: int | None = None  # muP: width at which the rates and init_std were tuned (Yang et al. 2022)
    init_depth_scaled: bool = True  # divide init_std by sqrt(branches) where a branch joins the residual (GPT-2)
    layers: Literal["scan", "unrolled"] = "scan"  # unrolled runs faster, scan compiles faster; same checkpoint
    remat: Literal["none", "dots", "full"] = "none"  # recompute in the backward pass: all but matmuls, or everything
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the weights are always float32
    attention_kernel: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cudnn on a GPU where possible, else xla

    @property
    def gated(self) -> bool:
        """Whether the FFN has a third matrix, the gate."""
        return self.ffn in ("swiglu", "geglu")

    @property
    def num_residual_adds(self) -> int:
        """Number of branches added to the residual stream: attention and FFN of every layer."""
        return self.num_layers * (1 if self.ffn == "none" else 2)

    @property
    def width_multiplier(self) -> float:
        """embed_dim / mup_base_width, the factor of muP's scaling; 1 without muP."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def mup_init_std(self) -> float:
        """Initial standard deviation of matrices whose two sides both grow with the width."""
        return self.init_std / self.width_multiplier**0.5

    def resolved(self) -> "ModelConfig":
        """The same model with every derived size filled in (all but `vocab_size`, which depends on the tokenizer)."""
        ffn_dim = round(self.embed_dim * 8 / 3 / 8) * 8 if self.gated else 4 * self.embed_dim
        derived: dict[str, Any] = dict(
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            ffn_dim=ffn_dim,
            rope_original_length=round(self.context_length / self.rope_factor),
        )
        missing = {name: value for name, value in derived.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


@dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer, and how tokens are cut into windows."""

    source: str | tuple[str, ...] = "pydoc"  # pydoc, file or folder (txt jsonl csv parquet), hub: task: function:
    weights: tuple[float, ...] = ()  # fraction of each source in a mixture; (): by their numbers of tokens
    column: str = "text"  # column with the text in jsonl, csv, parquet and hub data
    prompt: str | None = None  # template of a prompt, with {columns}; None: rows are plain text
    answer: str | None = None  # template of the answer to predict; its columns must not be empty
    rejected: str | None = None  # dpo: template of the rejected answer
    answers: Literal["text", "classes"] = "text"  # text: generated; classes: predicted by a classification head
    labels: tuple[str, ...] = ()  # the only valid answers; (): any text, or the labels of the task
    hub_config: str | None = None  # configuration of a hub data set
    hub_split: str = "train"  # split of a hub data set to read
    streaming: bool = False  # read a hub data set over the network without storing it first
    max_documents: int | None = None  # most documents to read from each source; None: all
    val_source: str | tuple[str, ...] | None = None  # separate validation text; None: split it off the source
    val_fraction: float = 0.1  # fraction of the text kept for validation
    split: Literal["fraction", "document"] = "fraction"  # the last characters, or whole documents by their hash
    tokenizer: str = "byte"  # byte, char, sentencepiece, tokenizer.json, vocab.json + merges.txt, RUN/tokenizer, init
    tokenizer_vocab_size: int = 4096  # size of a sentencepiece vocabulary
    document_mask: bool = False  # attention and positions stay within a document; False: windows run across documents


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted in each window, and the loss."""

    name: str = "causal"  # causal, prefix_lm, mlm, fim, sft, dpo, rloo, grpo, distill, or your own module:Class
    mask_rate: float = 0.15  # mlm: fraction of tokens to predict (BERT)
    whole_words: bool = False  # mlm: mask all tokens of a word or none
    next_sentence: bool = False  # mlm: also predict whether the second half of a row follows the first (BERT)
    fim_rate: float = 0.5  # fim: fraction of texts whose middle is moved to the end (Bavarian et al. 2022)
    z_loss: float = 0.0  # weight of (log Z)^2, which keeps logits small (PaLM: 1e-4)
    reference: str | None = None  # distill: the teacher; dpo, rloo, grpo: the reference model; None: init
    beta: float = 0.1  # dpo, rloo, grpo: weight of the KL divergence from the reference model
    divergence: Literal["forward", "reverse"] = "forward"  # distill: KL(teacher || student), or KL(student || teacher)
    reward: str = "exact_match"  # rloo, grpo: reward of an answer: a metric of tuning/scores.py, or module:function
    num_generations: int = 8  # rloo, grpo: answers sampled for each prompt
    max_new_tokens: int = 32  # rloo, grpo: most tokens of an answer


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and its averages."""

    name: Literal["adamw", "lion", "adafactor", "sgd", "muon", "schedule_free"] = "adamw"  # update rule
    learning_rate: float = 1e-3  # the peak, reached at the end of the warmup
    final_learning_rate: float = 0.0  # at the end of the schedule
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: constant, then 1-sqrt cooldown
    warmup_steps: int = 100  # steps of linear warmup from 0
    cooldown_fraction: float = 0.2  # wsd: fraction of the steps spent in the cooldown
    beta1: float = 0.9  # decay of the gradient's average; the momentum of sgd and muon
    beta2: float = 0.99  # decay of the average of its square
    epsilon: float = 1e-8  # added to the root of the second average
    weight_decay: float = 0.1  # decoupled, times the learning rate, on matrices and embeddings only
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    noise_multiplier: float | None = None  # DP-SGD: std of the noise / clip_norm (Abadi et al. 2016); None: off
    freeze: tuple[str, ...] = ()  # patterns of weights not to train: "embedding.*", "blocks.ffn.*", "head.*" (output)
    layer_decay: float = 1.0  # learning rate of a layer relative to the layer above it
    ema_decay: float | None = None  # decay of an average of the weights for evaluation and sampling; None: off


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch size, evaluation, checkpoints and logs."""

    steps: int = 1000  # updates of the weights
    batch_size: int = 32  # windows per update (rloo, grpo: answers), over all devices and microbatches
    microbatches: int = 1  # parts of a batch that are computed one after the other (gradient accumulation)
    eval_every: int = 250  # steps between full validation passes; 0: only at the end
    checkpoint_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # checkpoints with the lowest validation loss to keep as well
    log_every: int = 10  # steps between lines of metrics.jsonl
    spike_sigma: float | None = None  # skip updates whose loss is this many sigma above the last 128 losses (usual: 6)
    max_skipped: int = 8  # consecutive skipped updates (loss spike or non-finite) that stop the run
    watchdog_seconds: float = 600.0  # seconds without progress after which a process prints its stacks and exits
    prefetch: int = 2  # batches prepared in advance
    sample_prompt: str = ""  # prompt of the samples at the end; "": a new document
    sample_tokens: int = 200  # tokens of each of the two samples at the end; 0: no samples
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # also log metrics.jsonl to these


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh: FSDP over `data`, tensor parallelism over `model`."""

    data: int | None = None  # devices along which batch and weights are sharded (FSDP); None: all that `model` leaves
    model: int = 1  # devices along which every matrix is sharded (tensor parallelism)


@dataclass(frozen=True)
class Experiment:
    """One training run. The same value, data and machine give the same bits."""

    name: str = "experiment"  # of the run folder, runs/NAME
    seed: int = 0  # of weights, data order and dropout; every use folds in its own name and step
    init: str | None = None  # run, Hugging Face folder or hub name to initialize the weights from; None: random
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def with_answers(self) -> bool:
        """Whether the data consists of examples, with a prompt and an answer."""
        return self.data.prompt is not None or "task:" in str(self.data.source)

    @property
    def knows_shape(self) -> bool:
        """Whether the model's sizes are known. With `init` they are those of that model, once it was opened."""
        return self.init is None or self.model.ffn_dim is not None

    def override(self, changes: Mapping[str, Any] | None = None, /, **sections: Any) -> "Experiment":
        """A copy with other values: `override({"model.num_layers": 8})` or `override(model=dict(num_layers=8))`.

        Raises `ConfigError` naming every field that does not exist, with the nearest one that does.
        """
        flat = dict(changes or {})
        for name, value in sections.items():
            flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        fields = leaves(Experiment)
        sections_known = {f.name for f in dataclasses.fields(self)}
        if problems := [unknown_field(path) for path in flat if path not in fields.keys() | sections_known]:
            raise ConfigError(problems)
        result = self
        for path, value in flat.items():
            result = replace_at(result, path, tuple(value) if isinstance(value, list) else value)
        return result

    def resolved(self, vocab_size: int, classes: tuple[str, ...] = ()) -> "Experiment":
        """The experiment with every derived field filled in, as a run folder keeps it."""
        model = self.model if self.model.vocab_size else dataclasses.replace(self.model, vocab_size=vocab_size)
        model = dataclasses.replace(model, num_classes=model.num_classes or len(classes))
        if self.optim.noise_multiplier is not None:  # cuDNN has no per-example gradients
            model = dataclasses.replace(model, attention_kernel="xla")
        data = dataclasses.replace(self.data, labels=classes or self.data.labels)
        return dataclasses.replace(self, model=model.resolved(), data=data)

    def to_json(self) -> str:
        """JSON from which `from_json` makes an equal value."""
        return json.dumps({"format": FORMAT_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Experiment":
        """Raises `ConfigError` for an unknown field, a wrong type or an unknown format."""
        values = json.loads(text)
        version = values.pop("format", None)
        if version not in (1, FORMAT_VERSION):
            raise ConfigError(
                [f"format is {version}; this gptjax reads 1 and {FORMAT_VERSION}: use the release that wrote it"]
            )
        if version == 1:
            _rename(values)
        if strange := values.keys() - {f.name for f in dataclasses.fields(cls)}:
            raise ConfigError([unknown_field(name) for name in sorted(strange)])
        experiment = cls().override(**values)
        if problems := type_problems(experiment):
            raise ConfigError(list(problems.values()))
        return experiment


Model, Data, Objective = ModelConfig, DataConfig, ObjectiveConfig  # shorter names, for experiment files
Optim, Train, Mesh = OptimConfig, TrainConfig, MeshConfig


def unknown_field(path: str) -> str:
    """The message for a field that does not exist: its new name, or the field that may have been meant."""
    if path in RENAMED:
        return f"{path}: is now called {RENAMED[path]}"
    return unknown(path, list(leaves(Experiment)))


def names_of_format_1(section: str, config: ModelConfig | ObjectiveConfig) -> dict[str, Any]:
    """The fields of a section under the names of format 1, in their order: for hashes that must never change."""
    old_names = {new: old for old, new in RENAMED.items()}
    old_objectives = {new: old for old, new in RENAMED_OBJECTIVES.items()}
    fields = {}
    for name, value in dataclasses.asdict(config).items():
        path = f"{section}.{name}"
        if path == "objective.name":
            value = old_objectives.get(value, value)
        fields[old_names.get(path, path).rpartition(".")[2]] = value
    return fields


def _rename(values: dict[str, Any]) -> None:
    """Replaces the names of format 1 by today's, in the nested dictionaries of an experiment's JSON."""
    for old, new in RENAMED.items():
        section, _, field_name = old.partition(".")
        fields = values.get(section, {})
        if field_name in fields:
            fields[new.rpartition(".")[2]] = fields.pop(field_name)
    objective = values.get("objective", {})
    if "name" in objective:
        objective["name"] = RENAMED_OBJECTIVES.get(objective["name"], objective["name"])
    model, optim = values.get("model", {}), values.get("optim", {})
    has_head = not model.get("tie_embeddings", True) or model.get("head") == "mlm"
    if has_head and any(fnmatch.fnmatch("embedding.head", pattern) for pattern in optim.get("freeze", ())):
        optim["freeze"] = [*optim["freeze"], "head.*"]  # these patterns froze the head as well


def diff(a: Experiment, b: Experiment) -> dict[str, tuple[Any, Any]]:
    """The fields in which two experiments differ: dotted name -> (value in a, value in b)."""
    pairs = {path: (value_at(a, path), value_at(b, path)) for path in leaves(Experiment)}
    return {path: (x, y) for path, (x, y) in pairs.items() if x != y}


def grid(base: Experiment, axes: Mapping[str, Iterable[Any]]) -> list[Experiment]:
    """Every combination of the values given for dotted names; each experiment is named after its values."""
    return [_varied(base, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def zip_(base: Experiment, axes: Mapping[str, Iterable[Any]]) -> list[Experiment]:
    """The first values of all dotted names, then the second values, and so on; each is named after its values."""
    columns = {path: list(values) for path, values in axes.items()}
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{path} {len(values)}" for path, values in columns.items())
        problem = f"zip_: needs the same number of values for each field ({counts})"
        raise ConfigError([f"{problem}; grid makes every combination"])
    return [_varied(base, dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Uniform:
    """Values from `low` to `high`, integers if both are; `log`: uniform in the logarithm."""

    low: float  # smallest value
    high: float  # largest value
    log: bool = False  # uniform in the logarithm, as for learning rates; needs low > 0

    def __post_init__(self) -> None:
        if not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ConfigError([f"{self}: low must be less than high, and above 0 with log"])


@dataclass(frozen=True)
class Search:
    """A search for good values: `Search(base, {"optim.learning_rate": Uniform(1e-4, 1e-1, log=True)})`."""

    experiment: Experiment  # the experiment that trials vary
    space: Mapping[str, Uniform | Sequence[Any]]  # dotted name -> a range, or a list of values
    metric: str = "val_loss"  # a key of result.json
    lower_is_better: bool = True  # whether the metric is minimized

    def __post_init__(self) -> None:
        fields = leaves(Experiment)
        problems = [unknown_field(path) for path in self.space if path not in fields]
        problems += [f"{path}: has no values to choose from" for path, v in self.space.items() if v in ([], ())]
        if problems or not self.space:
            raise ConfigError(problems or ["Search: names no field to search over"])


def _varied(base: Experiment, changes: dict[str, Any]) -> Experiment:
    label = "-".join(f"{path.rpartition('.')[2]}={value}" for path, value in changes.items())
    label = re.sub(r"[^\w.=+-]+", "_", label)  # it names a folder
    return base.override({"name": f"{base.name}-{label}"} | changes)
