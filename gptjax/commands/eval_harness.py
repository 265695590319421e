"""`gptjax eval MODEL --tasks lm_eval:NAME`: a model on tasks of EleutherAI's lm-evaluation-harness."""

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from gptjax.errors import GptjaxError

if TYPE_CHECKING:
    from gptjax.commands.eval_options import Evaluation
    from gptjax.inference.pretrained import Pretrained


def check_installed() -> None:
    """Raises `GptjaxError` if lm_eval is not installed."""
    try:
        with redirect_stdout(sys.stderr):
            from gptjax.interop import harness  # noqa: F401
    except ModuleNotFoundError as e:
        raise GptjaxError(
            f"--tasks lm_eval: needs the lm-evaluation-harness, which is not installed ({e}); "
            "pip install 'gptjax[harness]'"
        ) from None


def evaluate_harness(options: "Evaluation", pretrained: "Pretrained") -> tuple[dict[str, Any], str]:
    """lm_eval's own results, and its tables."""
    with redirect_stdout(sys.stderr):  # keeps what a task prints out of the results
        from gptjax.interop import harness

        lm = harness.GptjaxLM(pretrained, options.batch_size, options.dtype)
        own = options.lm_eval
        results = harness.run_tasks(lm, options.harness_tasks, own.include_path, options.limit, own.num_fewshot)
    return results, harness.table(results)
