"""EleutherAI's lm-evaluation-harness on a gptjax model, with the same results as its own `hf` backend.

Texts are processed as in `HFLM`: context and continuation are tokenised together and split, special tokens in the text
become their ids, an empty context becomes the BOS token (else EOS), and long inputs are truncated on the left. The only
file that needs lm_eval: `pip install 'gptjax[harness]'`. With this module imported, `gptjax` is a model of
lm_eval: `simple_evaluate("gptjax", "pretrained=runs/quickstart", tasks=[...])`.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table

from gptjax.errors import DataError, GptjaxError, PromptError
from gptjax.inference.generator import Generator
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.scoring import Scorer, ScoreRequest, first_token

DEFAULT_NEW_TOKENS = 256  # if a task sets no limit
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of the limit; the first counts
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """The model interface of lm_eval: log-likelihoods of continuations and of texts, and generated text."""

    def __init__(
        self,
        pretrained: Pretrained | str,
        batch_size: int | str = 8,
        dtype: str | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        checkpoint: str = "last",
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """`pretrained`: a model, or its name as for `gptjax eval` (a run folder, a Hugging Face folder or a hub name).

        `max_length` None: the context length. `prefix_token_id`: replaces an empty context; None: BOS, else EOS.
        `device` and `max_batch_size`, which lm_eval passes to every model, have no effect.
        """
        super().__init__()
        if isinstance(pretrained, str):
            from gptjax.interop.open import open_model

            pretrained = open_model(pretrained, checkpoint)
        assert isinstance(pretrained, Pretrained)
        check_is_generative(pretrained)
        first = first_token(pretrained.tokenizer) if prefix_token_id is None else prefix_token_id
        if first is None:
            raise PromptError(
                f"{pretrained.name}: its tokenizer has neither a BOS nor an EOS token to put before a text without "
                "context; set one with GptjaxLM(..., prefix_token_id=ID)"
            )
        self.pretrained = pretrained
        self.vocabulary = pretrained.tokenizer
        self.dtype = dtype
        self.batch_size = int(batch_size)
        self.max_length = max_length or pretrained.model.context_length
        self._prefix_id = first
        texts = {i: text for text, i in pretrained.tokenizer.special_tokens.items()}
        self._prefix_text = texts.get(first)

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.pretrained, self.batch_size, self.dtype)

    @cached_property
    def generator(self) -> Generator:
        return Generator(self.pretrained, self.dtype)

    @property
    def eot_token_id(self) -> int:
        end = self.vocabulary.eos_id
        return self._prefix_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.name

    def get_model_info(self) -> dict[str, Any]:
        """Information about the model, which lm_eval stores with the results."""
        size = sum(x.size for x in jax.tree.leaves(self.pretrained.params))
        dtype = self.dtype or self.pretrained.model.dtype
        return {"model_args": self.pretrained.name, "model_num_parameters": size, "model_dtype": dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; BOS is added if the tokenizer has one and the text does not start with it."""
        ids = self.vocabulary.encode_special(string).tolist()
        bos_id = self.vocabulary.bos_id
        if add_special_tokens is None:
            add_special_tokens = self._prefix_text is None or not string.startswith(self._prefix_text)
        return [bos_id, *ids] if add_special_tokens and bos_id is not None else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not 1 <= len(ids) <= self.max_length:
                raise PromptError(
                    f"a continuation of {len(ids)} tokens cannot be scored (1 to {self.max_length} tokens are "
                    f"possible): {continuation[:80]!r} after {context[-80:]!r}"
                )
        scores = self._likelihoods((context, continuation) for _, context, continuation in requests)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _likelihoods(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding generates it."""

        def part(context: list[int], continuation: list[int]) -> ScoreRequest:
            ids = [*(context or [self._prefix_id]), *continuation]
            return ScoreRequest(np.array(ids[-(self.max_length + 1) :], np.int32), len(continuation))

        answers = self.scorer.score_batch(part(*pair) for pair in pairs)
        return [(-float(a.nll.sum(dtype=np.float64)), bool(a.is_argmax.all())) for a in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text: in windows of maximal length, with every token scored once."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows = [make_disjoint_window(pair) for pair in rolled]
            pairs += windows
            counts.append(len(windows))
        scores = iter(self._likelihoods(pairs))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated text after each context, up to one of the task's stop strings."""
        groups: dict[str, list[int]] = {}  # requests with the same settings are batched
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            stop, new_tokens, sampling = parse_generation_kwargs(settings)
            prompts = {n: self._prompt(requests[n].args[0], new_tokens) for n in numbers}
            numbers.sort(key=lambda n: len(prompts[n]), reverse=True)
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                # one seed per request, so that `repeats` of one context differ
                made = self.generator.generate([prompts[n] for n in chosen], new_tokens, sampling, stop, seeds=chosen)
                for n, completion in zip(chosen, made, strict=True):
                    # decoding alone drops the space that such a tokenizer adds before every text
                    texts[n] = completion.text
                    if self.vocabulary.adds_prefix_space:
                        texts[n] = completion.text.removeprefix(" ")
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
        return texts

    def _prompt(self, context: str, new_tokens: int) -> np.ndarray:
        """The ids of a context, truncated on the left to leave space for the new tokens."""
        length = self.max_length - new_tokens
        if length < 1:
            raise PromptError(
                f"{new_tokens} new tokens leave no space for the prompt: the context length of {self.pretrained.name} "
                f"is {self.max_length}; lower max_gen_toks in the task's generation_kwargs"
            )
        return np.array(self.tok_encode(context)[-length:] or [self._prefix_id], np.int32)


def parse_generation_kwargs(settings: dict[str, Any]) -> tuple[list[str], int, SamplingParams]:
    """Translates a task's generation_kwargs: stop strings, number of new tokens, sampling parameters.

    Raises `DataError` for an unsupported setting.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in LENGTHS]
    new_tokens = next((int(n) for n in lengths if n is not None), DEFAULT_NEW_TOKENS)
    temperature = float(left.pop("temperature", 0.0) or 0.0)
    do_sample = left.pop("do_sample", None)
    params = {name: left.pop(name) for name in SAMPLING if left.get(name) is not None}
    if unsupported := [name for name, value in left.items() if value is not None]:
        raise DataError(
            f"generation_kwargs: gptjax does not support {', '.join(unsupported)}; supported are until, do_sample, "
            f"{', '.join((*LENGTHS[:2], *SAMPLING))}"
        )
    sampling = SamplingParams(temperature=temperature if do_sample or do_sample is None else 0.0, **params)
    stop = [until] if isinstance(until, str) else until
    return [s for s in stop if s], new_tokens, sampling


def run_tasks(
    lm: GptjaxLM,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """lm_eval's results for its own tasks, for tasks in `include_path`, or for YAML files of tasks.

    Raises `DataError` for an unknown task, or a task whose data cannot be read.
    """
    if include_path is not None and not include_path.is_dir():
        raise DataError(
            f"include_path = {str(include_path)!r}: is not a folder; name the one with the task's YAML file"
        )
    manager = _manager(tasks, include_path)
    names = []
    for task in tasks:
        found = [task] if Path(task).is_file() else manager.match_tasks([task])
        if not found:
            near = difflib.get_close_matches(task, manager.all_tasks, 3)
            raise DataError(
                f"tasks: lm_eval has no task {task!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " (include_path names the folder of your own tasks; `lm_eval ls tasks` lists all tasks)"
            )
        names += [name for name in found if name not in names]
    try:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            batch_size=lm.batch_size,
        )
    except GptjaxError:
        raise
    except OSError as e:  # also raised by `datasets` for data that it cannot find or download
        raise DataError(f"tasks {', '.join(names)}: their data cannot be read ({e})") from None
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """A task manager for the tasks of lm_eval and of a folder; for the folder alone if possible: it is faster."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        found = [own.match_tasks([task]) for task in tasks]
        if all(found) and {name for names in found for name in names} <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def table(results: dict[str, Any]) -> str:
    """The tables of lm_eval: one of tasks, and one of groups if there are any."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
