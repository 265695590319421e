"""The named axes of weights: one table of what each axis is. Where an axis lies on a mesh: `sharding.RULES`."""

from dataclasses import dataclass

from gptjax.config import ModelConfig

Axes = tuple[str, ...]  # the names of one weight's axes, in order


@dataclass(frozen=True)
class Axis:
    """One named axis."""

    field: str  # of `ModelConfig`: its size
    scales_with_width: bool = False  # a matrix with two such axes is a hidden matrix of muP
    counts_heads: bool = False  # a "head_dim" axis follows, and both together are one side of a matrix


AXES = {
    "layers": Axis("num_layers"),
    "embed": Axis("embed_dim", scales_with_width=True),
    "vocab": Axis("vocab_size"),
    "heads": Axis("num_heads", scales_with_width=True, counts_heads=True),
    "kv_heads": Axis("num_kv_heads", scales_with_width=True, counts_heads=True),
    "head_dim": Axis("head_dim"),
    "ffn": Axis("ffn_dim", scales_with_width=True),
    "positions": Axis("context_length"),
    "features": Axis("embed_dim", scales_with_width=True),
    "rank": Axis("lora_rank"),
    "classes": Axis("num_classes"),
}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every axis. `config.vocab_size` must be set."""
    resolved = config.resolved()
    return {name: getattr(resolved, axis.field) for name, axis in AXES.items()}
