"""What to train: one frozen, hashable `Experiment`, complete, so that it alone decides the run.

An experiment is usually a baseline and its difference: `baseline.override(model=dict(num_layers=8))`. `grid` makes
many, `diff` says how two differ. A field that is None is derived from the others; `resolved` writes them out.
What makes an experiment impossible stands in `checks.py`.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gptjax.errors import ConfigError
from gptjax.schema import leaves, replace_at, type_problems, unknown, value_at

FORMAT_VERSION = 1
ObjectiveName = Literal["causal", "prefix", "masked", "fill_in", "supervised", "dpo", "risk", "grpo", "distill"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network and the mechanisms in it."""

    vocab_size: int | None = None  # rows of the embedding; None: as many as the tokenizer has
    context_length: int = 256  # tokens in a training window, and rows of a learned position table
    num_layers: int = 6  # blocks of attention and FFN
    embed_dim: int = 384  # width of the residual stream
    num_heads: int = 6  # query heads
    num_kv_heads: int | None = None  # key and value heads: fewer is GQA, 1 is MQA; None: num_heads (MHA)
    head_dim: int | None = None  # width of one head; None: embed_dim / num_heads
    ffn_dim: int | None = None  # hidden width of the FFN; None: 4 embed_dim, or 8/3 embed_dim where it is gated
    ffn: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu", "none"] = "gelu"  # gelu: tanh; none: no FFN
    positions: Literal["learned", "rope", "alibi", "none"] = "learned"  # how the model knows token order
    rope_base: float = 10_000.0  # theta of RoPE
    rope_fraction: float = 1.0  # share of each head that RoPE turns (GPT-NeoX: 0.25)
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"  # how RoPE stretches to longer contexts
    rope_factor: float = 1.0  # how many times longer than rope_original_length the context may be
    rope_original_length: int | None = None  # context that RoPE was trained on; None: context_length / rope_factor
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm has a scale and never a bias
    norm_placement: Literal["pre", "post"] = "pre"  # pre: x + f(norm(x)); post: norm(x + f(x)), no final norm
    norm_epsilon: float = 1e-5  # added to the variance
    parallel_residual: bool = False  # x + attention(norm(x)) + ffn(norm(x)), each with its own norm (GPT-NeoX)
    embedding_norm: bool = False  # normalise what goes into the first block (BERT)
    bias: bool = True  # biases in the linear layers and in layernorm
    causal: bool = True  # False: every token sees the whole text (BERT)
    window: int | None = None  # a token sees this many tokens, itself included; None: all of them
    qk_norm: bool = False  # RMS-normalise queries and keys per head (Henry et al. 2020)
    attention_softcap: float | None = None  # c tanh(score / c) on attention scores (Gemma 2: 50)
    logit_softcap: float | None = None  # c tanh(logit / c) on the output (Gemma 2: 30)
    dropout: float = 0.0  # of embeddings, attention weights and both residual branches; to the nearest 1/256
    tie_embeddings: bool = True  # the head is the transposed token embedding
    head: Literal["linear", "mlm"] = "linear"  # mlm: dense, activation and norm before it, a bias after it (BERT)
    num_classes: int = 0  # told in the place of tokens, by a head of their own; 0: as many as `data.answers` asks for
    lora_rank: int = 0  # train two matrices of this rank beside every target, and nothing else (LoRA); 0: all weights
    lora_alpha: float = 16.0  # what they add is multiplied by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("query", "value")  # of tokens, query, key, value, out, up, gate and down
    init_std: float = 0.02  # standard deviation of every matrix at the start (GPT-2)
    mup_width: int | None = None  # muP: the width for which rates and init_std were found (Yang et al. 2022)
    init_depth_scaled: bool = True  # divide it by sqrt(branches) where a branch joins the residual (GPT-2)
    layers: Literal["scan", "unrolled"] = "scan"  # unrolled runs faster, scan compiles faster; same checkpoint
    remat: Literal["none", "dots", "full"] = "none"  # recompute in the backward pass: all but matmuls, or all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the weights are always float32
    attention_kernel: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cudnn on a GPU where it can, else xla

    @property
    def gated(self) -> bool:
        """Whether the FFN has a third matrix, whose product the activation is of."""
        return self.ffn in ("swiglu", "geglu")

    @property
    def num_residual_adds(self) -> int:
        """How often something is added to the residual stream: by attention and by the FFN of every layer."""
        return self.num_layers * (1 if self.ffn == "none" else 2)

    @property
    def width_multiplier(self) -> float:
        """How many times as wide as `mup_width` it is: what muP scales by; 1 without muP."""
        return self.embed_dim / self.mup_width if self.mup_width else 1.0

    @property
    def mup_init_std(self) -> float:
        """Standard deviation at the start of matrices whose two sides both grow with the width."""
        return self.init_std / self.width_multiplier**0.5

    def resolved(self) -> "ModelConfig":
        """The same model with every derived size written out (all but `vocab_size`, which the tokenizer knows)."""
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
    """The text, how it becomes tokens and how tokens become windows."""

    source: str | tuple[str, ...] = "pydoc"  # pydoc, file or folder (txt jsonl csv parquet), hub: task: function:
    weights: tuple[float, ...] = ()  # share of each source in a mixture; (): by their number of tokens
    column: str = "text"  # the column that holds the text, in jsonl, csv, parquet and hub data
    prompt: str | None = None  # what an example of a table begins with: text and {columns}; None: rows are plain text
    answer: str | None = None  # what is to be learnt after it; its columns must not be empty
    rejected: str | None = None  # dpo: the worse answer, in the place of the other
    answers: Literal["text", "classes"] = "text"  # written, or one of the labels, told by a head for them alone
    labels: tuple[str, ...] = ()  # the only answers there are; (): any, or those of the task
    hub_config: str | None = None  # configuration of a hub data set
    hub_split: str = "train"  # split of a hub data set to read
    streaming: bool = False  # read a hub data set over the network while tokenising, without storing it first
    max_documents: int | None = None  # read no more documents of each source than this
    val_source: str | tuple[str, ...] | None = None  # validation text of its own; None: split it off the source
    val_fraction: float = 0.1  # share of the text that is kept for validation
    split: Literal["fraction", "document"] = "fraction"  # the last characters, or whole documents by their hash
    tokenizer: str = "byte"  # byte, char, sentencepiece, tokenizer.json, vocab.json + merges.txt, RUN/tokenizer, init
    tokenizer_vocab_size: int = 4096  # pieces that sentencepiece may learn
    document_mask: bool = False  # attention and positions stay inside a document; else windows run across


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to do with a window."""

    name: ObjectiveName = "causal"  # see data/objectives.py, and from dpo on tuning/
    mask_rate: float = 0.15  # masked: share of the tokens that are asked for (BERT)
    whole_words: bool = False  # masked: all tokens of a word are asked for, or none
    next_sentence: bool = False  # masked: also asks whether the second half of a row follows the first
    fill_in_rate: float = 0.5  # fill_in: share of the texts whose middle comes last (Bavarian et al. 2022)
    z_loss: float = 0.0  # weight of (log Z)^2, which keeps logits small (PaLM: 1e-4)
    reference: str | None = None  # distill: the teacher; dpo, risk, grpo: the model to stay near; None: that of init
    beta: float = 0.1  # dpo, risk, grpo: how much it counts to stay near it
    divergence: Literal["forward", "reverse"] = "forward"  # distill: KL(teacher || model), or KL(model || teacher)
    score: str = "exact_match"  # risk, grpo: of the answers written: a metric of tuning/scores.py, or module:function
    samples: int = 8  # risk, grpo: answers to each prompt
    new_tokens: int = 32  # risk, grpo: tokens of an answer at most


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and its averages."""

    name: Literal["adamw", "lion", "adafactor", "sgd", "muon", "schedule_free"] = "adamw"  # update rule
    learning_rate: float = 1e-3  # the peak, reached at the end of the warm-up
    final_learning_rate: float = 0.0  # where the schedule ends
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: constant, then 1-sqrt cooldown
    warmup_steps: int = 100  # linear rise from 0
    cooldown_fraction: float = 0.2  # share of the steps that wsd spends falling
    beta1: float = 0.9  # average of the gradient; the momentum of sgd and muon
    beta2: float = 0.99  # average of its square
    epsilon: float = 1e-8  # added to the root of beta2's average
    weight_decay: float = 0.1  # decoupled, times the learning rate, on matrices and embeddings only
    clip_norm: float | None = 1.0  # global norm above which gradients are scaled down
    noise_multiplier: float | None = None  # DP-SGD: noise over clip_norm, to which each window's gradient is clipped
    frozen: tuple[str, ...] = ()  # weights that stay as they are, by patterns: "embedding.*", "blocks.ffn.*"
    layer_decay: float = 1.0  # the rate of each layer is that of the layer above it times this
    ema_decay: float | None = None  # evaluate and sample an average of the weights with this decay


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and what is kept."""

    steps: int = 1000  # updates of the weights
    batch_size: int = 32  # windows an update (answers, where they are written), over all devices and microbatches
    microbatches: int = 1  # parts of a batch that are computed one after the other
    eval_every: int = 250  # steps between full validation passes; 0: only at the end
    checkpoint_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # checkpoints with the lowest validation loss to keep besides
    log_every: int = 10  # steps between lines of metrics.jsonl
    skip_spikes: float | None = None  # skip updates whose loss lies this many sigma above the last 128 (usual: 6)
    max_skipped: int = 8  # updates skipped in a row, for that or for a non-finite loss, that stop the run
    stuck_seconds: float = 600.0  # without any progress, after which a process shows its stacks and ends
    prefetch: int = 2  # batches made ahead of the step that needs them
    sample_prompt: str = ""  # what the samples at the end begin with; "": a new document
    sample_tokens: int = 200  # length of each of the two samples at the end; 0: no samples
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # views of metrics.jsonl to write besides


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out: FSDP over `data`, tensor parallelism over `model`."""

    data: int | None = None  # devices that share a batch and the weights; None: all that `model` leaves
    model: int = 1  # devices that share every matrix


@dataclass(frozen=True)
class Experiment:
    """One training run, whole: the same value, data and machine give the same bits."""

    name: str = "experiment"  # of the run folder, runs/NAME
    seed: int = 0  # of weights, data order and dropout; every use folds in its own name and step
    init: str | None = None  # a run, Hugging Face folder or hub name to start from; None: random
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def with_answers(self) -> bool:
        """Whether the text is examples, whose answers are asked for."""
        return self.data.prompt is not None or "task:" in str(self.data.source)

    @property
    def masks_tokens(self) -> bool:
        """Whether batches say who sees whom, besides the rules of the model: documents are kept apart, or a prefix."""
        return self.data.document_mask or self.with_answers or self.objective.name in ("masked", "prefix")

    def override(self, changes: Mapping[str, Any] | None = None, /, **sections: Any) -> "Experiment":
        """A copy with other values: `override({"model.num_layers": 8})` or `override(model=dict(num_layers=8))`.

        Raises `ConfigError` naming every field that does not exist, with the nearest one that does.
        """
        flat = dict(changes or {})
        for name, value in sections.items():
            flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        fields = leaves(Experiment)
        sections_known = {f.name for f in dataclasses.fields(self)}
        if problems := [unknown(path, list(fields)) for path in flat if path not in fields.keys() | sections_known]:
            raise ConfigError(problems)
        result = self
        for path, value in flat.items():
            result = replace_at(result, path, tuple(value) if isinstance(value, list) else value)
        return result

    def resolved(self, vocab_size: int, classes: tuple[str, ...] = ()) -> "Experiment":
        """The experiment with every derived field written out, as a run folder keeps it."""
        model = self.model if self.model.vocab_size else dataclasses.replace(self.model, vocab_size=vocab_size)
        model = dataclasses.replace(model, num_classes=model.num_classes or len(classes))
        if self.optim.noise_multiplier is not None:  # cuDNN takes no batch of windows with a gradient each
            model = dataclasses.replace(model, attention_kernel="xla")
        data = dataclasses.replace(self.data, labels=classes or self.data.labels)
        return dataclasses.replace(self, model=model.resolved(), data=data)

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal value."""
        return json.dumps({"format": FORMAT_VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Experiment":
        """Raises `ConfigError` for a field, a type or a format that this version does not know."""
        values = json.loads(text)
        if (version := values.pop("format", None)) != FORMAT_VERSION:
            raise ConfigError(
                [f"format is {version}; this gptjax reads {FORMAT_VERSION}: use the release that wrote it"]
            )
        if strange := values.keys() - {f.name for f in dataclasses.fields(cls)}:
            raise ConfigError([unknown(name, list(leaves(cls))) for name in sorted(strange)])
        experiment = cls().override(**values)
        if problems := type_problems(experiment):
            raise ConfigError(list(problems.values()))
        return experiment


def diff(a: Experiment, b: Experiment) -> dict[str, tuple[Any, Any]]:
    """The fields in which two experiments differ: dotted name -> (value in a, value in b)."""
    pairs = {path: (value_at(a, path), value_at(b, path)) for path in leaves(Experiment)}
    return {path: (x, y) for path, (x, y) in pairs.items() if x != y}


def grid(base: Experiment, axes: Mapping[str, Iterable[Any]]) -> list[Experiment]:
    """Every combination of the values given for dotted names, each named after what it sets."""
    return [_varied(base, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def zip_(base: Experiment, axes: Mapping[str, Iterable[Any]]) -> list[Experiment]:
    """The first of the values given for every dotted name, the second of each, and so on, named after what they set."""
    columns = {path: list(values) for path, values in axes.items()}
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{path} {len(values)}" for path, values in columns.items())
        raise ConfigError([f"zip_: needs as many values for each field ({counts}); grid makes every combination"])
    return [_varied(base, dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Uniform:
    """The values from `low` to `high`, whole where both are; `log`: each order of magnitude is as likely as another."""

    low: float  # the least
    high: float  # the most
    log: bool = False  # as for rates; above 0 then

    def __post_init__(self) -> None:
        if not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ConfigError([f"{self}: low must be less than high, and above 0 with log"])


@dataclass(frozen=True)
class Search:
    """Values to be searched for: `Search(base, {"optim.learning_rate": Uniform(1e-4, 1e-1, log=True)})`."""

    experiment: Experiment  # what every trial varies
    space: Mapping[str, Uniform | Sequence[Any]]  # dotted name -> what it may be: a range, or some values
    metric: str = "val_loss"  # of result.json
    lower_is_better: bool = True  # of the metric

    def __post_init__(self) -> None:
        fields = leaves(Experiment)
        problems = [unknown(path, list(fields)) for path in self.space if path not in fields]
        problems += [f"{path}: has no values to choose from" for path, v in self.space.items() if v in ([], ())]
        if problems or not self.space:
            raise ConfigError(problems or ["Search: names no field to search over"])


def _varied(base: Experiment, changes: dict[str, Any]) -> Experiment:
    label = "-".join(f"{path.rpartition('.')[2]}={value}" for path, value in changes.items())
    label = re.sub(r"[^\w.=+-]+", "_", label)  # it names a folder
    return base.override({"name": f"{base.name}-{label}"} | changes)
