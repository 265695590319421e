"""The RoPE fields of a config.json: the old form (`rope_theta`, `rope_scaling`) and that of transformers 5."""

import math
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.fields import Fields

KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}  # transformers -> gptjax
# The values that gptjax supports; an absent field has the same value in transformers.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {"beta_fast": (32, 32.0, None), "beta_slow": (1, 1.0, None), "truncate": (True,)},
    "llama3": {"low_freq_factor": (1, 1.0), "high_freq_factor": (4, 4.0)},
}


def read_rope(fields: Fields, context: int, theta_name: str = "rope_theta") -> tuple[dict[str, Any], float | None]:
    """The RoPE fields of `ModelConfig`, and the partial rotary factor if it is in the same object.

    `theta_name`: the family's name of the base in the old form.
    """
    theta = fields.take(theta_name, float, 10_000.0)
    scaling = fields.values.get("rope_scaling")
    parameters = fields.values.get("rope_parameters")
    if scaling and parameters:
        fields.problem("rope_scaling", "rope_parameters is given as well; remove one of the two")
    rope = fields.nested("rope_scaling" if scaling else "rope_parameters")
    fields.ignore("rope_scaling", "rope_parameters")
    if rope.values.get("type") is not None and rope.values.get("rope_type", rope.values["type"]) != rope.values["type"]:
        rope.problem("type", "rope_type has another value")
    kind = rope.choose("rope_type" if "rope_type" in rope.values else "type", KINDS, "default")
    rope.ignore("type")
    found: dict[str, Any] = {"rope_theta": float(rope.take("rope_theta", float, theta)), "rope_scaling": kind}
    if kind != "none":
        found["rope_factor"] = float(rope.need("factor", float, 2.0))
    if kind in FIXED:
        found["rope_original_length"] = rope.take("original_max_position_embeddings", int, context)
        rope.inert(**FIXED[kind])
    else:
        rope.ignore("original_max_position_embeddings")
    if kind == "llama3":
        for name in FIXED[kind].keys() - rope.values.keys():
            rope.need(name, float, 1.0)
    if kind == "yarn":
        _check_attention_factor(rope, found["rope_factor"])
    share = rope.take("partial_rotary_factor", float, None)
    rope.finish()
    if found.get("rope_factor") == 1:  # a factor of 1 is no scaling
        found = {"rope_theta": found["rope_theta"], "rope_scaling": "none"}
    return found, share


def _check_attention_factor(rope: Fields, factor: float) -> None:
    """YaRN's attention factor can be given in three ways; gptjax supports the paper's, 0.1 ln(factor) + 1."""
    expected = 0.1 * math.log(max(factor, 1)) + 1
    given = rope.take("attention_factor", float, None)
    scales = [rope.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim")]
    name = "attention_factor"
    if given is None and all(scales):
        one, all_dims = (0.1 * scale * math.log(max(factor, 1)) + 1 for scale in scales)
        given, name = one / all_dims, "mscale"
    if given is not None and not math.isclose(given, expected, rel_tol=1e-6):
        rope.problem(
            name, f"makes YaRN's attention factor {given}; gptjax supports only 0.1 ln(factor) + 1 = {expected}"
        )


def write_rope(config: ModelConfig, theta_name: str = "rope_theta") -> dict[str, Any]:
    """The old form, which every release of transformers reads; for a resolved config without ntk scaling."""
    theirs = next((theirs for theirs, ours in KINDS.items() if ours == config.rope_scaling), "default")
    if theirs == "default":
        return {theta_name: config.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": theirs, "factor": config.rope_factor}
    if theirs in FIXED:
        scaling["original_max_position_embeddings"] = config.rope_original_length
    if theirs == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {theta_name: config.rope_theta, "rope_scaling": scaling}
