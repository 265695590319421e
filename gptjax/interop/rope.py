"""RoPE's settings in a config.json: the old form (`rope_theta` and `rope_scaling`) and the one of transformers 5."""

import math
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.fields import Fields

KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}  # theirs -> ours
# What gptjax has fixed; a field that is absent has the same value in transformers.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {"beta_fast": (32, 32.0, None), "beta_slow": (1, 1.0, None), "truncate": (True,)},
    "llama3": {"low_freq_factor": (1, 1.0), "high_freq_factor": (4, 4.0)},
}


def read_rope(fields: Fields, context: int, theta_name: str = "rope_theta") -> tuple[dict[str, Any], float | None]:
    """The fields of `ModelConfig` about RoPE, and the share of each head that it turns where that is said in the same object.

    `theta_name` is what the family calls the base in the old form.
    """
    theta = fields.take(theta_name, float, 10_000.0)
    scaling, parameters = fields.values.get("rope_scaling"), fields.values.get("rope_parameters")
    if scaling and parameters:
        fields.problem("rope_scaling", "rope_parameters is there as well; one of the two must go")
    rope = fields.part("rope_scaling" if scaling else "rope_parameters")
    fields.ignore("rope_scaling", "rope_parameters")
    if rope.values.get("type") is not None and rope.values.get("rope_type", rope.values["type"]) != rope.values["type"]:
        rope.problem("type", "rope_type says something else")
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
    if found.get("rope_factor") == 1:  # stretched to the same length: not at all
        found = {"rope_theta": found["rope_theta"], "rope_scaling": "none"}
    return found, share


def _check_attention_factor(rope: Fields, factor: float) -> None:
    """YaRN's factor on queries and keys can be given in three ways; gptjax has the paper's, 0.1 ln(factor) + 1."""
    usual = 0.1 * math.log(max(factor, 1)) + 1
    given = rope.take("attention_factor", float, None)
    scales = [rope.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim")]
    name = "attention_factor"
    if given is None and all(scales):
        one, all_dims = (0.1 * scale * math.log(max(factor, 1)) + 1 for scale in scales)
        given, name = one / all_dims, "mscale"
    if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        rope.problem(name, f"makes YaRN's attention factor {given}; gptjax has it as 0.1 ln(factor) + 1 = {usual} only")


def write_rope(config: ModelConfig, theta_name: str = "rope_theta") -> dict[str, Any]:
    """The old form, which every release of transformers reads; of a resolved model whose scaling is not ntk."""
    theirs = next((theirs for theirs, ours in KINDS.items() if ours == config.rope_scaling), "default")
    if theirs == "default":
        return {theta_name: config.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": theirs, "factor": config.rope_factor}
    if theirs in FIXED:
        scaling["original_max_position_embeddings"] = config.rope_original_length
    if theirs == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {theta_name: config.rope_theta, "rope_scaling": scaling}
