"""The lm-evaluation-harness of EleutherAI, run on a gptjax model: the same numbers as its own `hf` backend gives.

Texts are taken as `HFLM` takes them: context and continuation are tokenised together and split, the words of special
tokens become their ids, an empty context is the begin_of_text (else the end_of_text), and what is too long is cut on
the left. The only file that needs lm_eval: `pip install 'gptjax[harness]'`. With this module imported, `gptjax` is a
model of lm_eval like any other: `simple_evaluate("gptjax", "pretrained=runs/quickstart", tasks=[...])`.
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
from gptjax.inference.scoring import Part, Scorer, first_token

MOST_TOKENS = 256  # to generate where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of that, the first counts
RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """A model as lm_eval asks for it: log-likelihoods of continuations and of whole texts, and generated text."""

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
        """`pretrained`: a model, or what `gptjax eval` takes: a run folder, a folder of Hugging Face, a hub name.

        `max_length` None: the model's context. `prefix_token_id` goes before what has no context; None: begin_of_text,
        else end_of_text. `device` and `max_batch_size`, which lm_eval passes to every model, have no meaning here.
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
                f"{pretrained.name}: its tokenizer has neither begin_of_text nor end_of_text, so that there is nothing "
                "to put before a text without context; GptjaxLM(..., prefix_token_id=ID) names a token for that"
            )
        self.pretrained, self.vocabulary, self.dtype = pretrained, pretrained.tokenizer, dtype
        self.batch_size = int(batch_size)
        self.max_length = max_length or pretrained.model.context_length
        self._first, words = first, {i: word for word, i in pretrained.tokenizer.special_tokens.items()}
        self._first_word = words.get(first)

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.pretrained, self.batch_size, self.dtype)

    @cached_property
    def writer(self) -> Generator:
        return Generator(self.pretrained, self.dtype)

    @property
    def eot_token_id(self) -> int:
        end = self.vocabulary.eos_id
        return self._first if end is None else end

    @property
    def prefix_token_id(self) -> int:
        return self._first

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.name

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval keeps about the model beside the results."""
        size = sum(x.size for x in jax.tree.leaves(self.pretrained.params))
        dtype = self.dtype or self.pretrained.model.dtype
        return {"model_args": self.pretrained.name, "model_num_parameters": size, "model_dtype": dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; begin_of_text goes before it where the model wants one and the text has none itself."""
        ids = self.vocabulary.encode_special(string).tolist()
        begin = self.vocabulary.bos_id
        if add_special_tokens is None:
            add_special_tokens = self._first_word is None or not string.startswith(self._first_word)
        return [begin, *ids] if add_special_tokens and begin is not None else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not 1 <= len(ids) <= self.max_length:
                raise PromptError(
                    f"a continuation of {len(ids)} tokens cannot be scored: 1 to {self.max_length} are possible; it is "
                    f"{continuation[:80]!r} after {context[-80:]!r}"
                )
        answers = self._likelihoods((context, continuation) for _, context, continuation in requests)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _likelihoods(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """ln of the probability of each continuation, and whether it is what the model would have written."""

        def part(context: list[int], continuation: list[int]) -> Part:
            whole = [*(context or [self._first]), *continuation]
            return Part(np.array(whole[-(self.max_length + 1) :], np.int32), len(continuation))

        answers = self.scorer.answer(part(*pair) for pair in pairs)
        return [(-float(a.nats.sum(dtype=np.float64)), bool(a.likeliest.all())) for a in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln of the probability of each whole text: windows as long as they can be, every token asked for once."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._first,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [make_disjoint_window(pair) for pair in rolled]
            pairs += own
            counts.append(len(own))
        answers = iter(self._likelihoods(pairs))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the strings that the task stops at."""
        groups: dict[str, list[int]] = {}  # requests with the same settings are answered together
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            stop, new_tokens, sampling = generation(settings)
            prompts = {n: self._prompt(requests[n].args[0], new_tokens) for n in numbers}
            numbers.sort(key=lambda n: len(prompts[n]), reverse=True)
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                # a seed of its own for each request, so that `repeats` of one context are drawn anew
                made = self.writer.complete([prompts[n] for n in chosen], new_tokens, sampling, stop, seeds=chosen)
                for n, completion in zip(chosen, made, strict=True):
                    # decoding by itself drops the space that such a tokenizer writes before every text
                    whole = self.vocabulary.adds_prefix_space
                    texts[n] = completion.text.removeprefix(" ") if whole else completion.text
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
        return texts

    def _prompt(self, context: str, new_tokens: int) -> np.ndarray:
        """The ids of a context, cut on the left so that there is room for the new tokens."""
        room = self.max_length - new_tokens
        if room < 1:
            raise PromptError(
                f"{new_tokens} tokens are to be generated, and the context of {self.pretrained.name} has "
                f"{self.max_length}: nothing of the prompt would be seen; set max_gen_toks in the task's "
                "generation_kwargs to less"
            )
        return np.array(self.tok_encode(context)[-room:] or [self._first], np.int32)


def generation(settings: dict[str, Any]) -> tuple[list[str], int, SamplingParams]:
    """A task's generation_kwargs as strings to stop at, number of new tokens, and how tokens are chosen.

    Raises `DataError` for a setting that has no meaning here.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in LENGTHS]
    new_tokens = next((int(n) for n in lengths if n is not None), MOST_TOKENS)
    temperature = float(left.pop("temperature", 0.0) or 0.0)
    drawn = left.pop("do_sample", None)
    rules = {name: left.pop(name) for name in RULES if left.get(name) is not None}
    if strange := [name for name, value in left.items() if value is not None]:
        raise DataError(
            f"generation_kwargs: {', '.join(strange)} has no meaning for gptjax; known are until, do_sample, "
            f"{', '.join((*LENGTHS[:2], *RULES))}"
        )
    sampling = SamplingParams(temperature=temperature if drawn or drawn is None else 0.0, **rules)
    stop = [until] if isinstance(until, str) else until
    return [s for s in stop if s], new_tokens, sampling


def run_tasks(
    lm: GptjaxLM,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """lm_eval's results for tasks of its own, of YAML files in `include_path`, or for the YAML files themselves.

    Raises `DataError` for a task that there is not, or whose data cannot be read.
    """
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"include_path = {str(include_path)!r}: is no folder; name the one that holds the task's YAML")
    manager = _manager(tasks, include_path)
    names = []
    for task in tasks:
        found = [task] if Path(task).is_file() else manager.match_tasks([task])
        if not found:
            near = difflib.get_close_matches(task, manager.all_tasks, 3)
            raise DataError(
                f"tasks: lm_eval has no {task!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
                + " (give include_path, the folder of your own tasks; `lm_eval ls tasks` lists all)"
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
    except OSError as e:  # also what `datasets` raises for data that it cannot find or fetch
        raise DataError(f"tasks {', '.join(names)}: their data cannot be read ({e})") from None
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Knows the tasks of lm_eval and of a folder; of the folder alone, which is much quicker, where that is enough."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        found = [own.match_tasks([task]) for task in tasks]
        if all(found) and {name for names in found for name in names} <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def table(results: dict[str, Any]) -> str:
    """The tables that lm_eval prints: one of tasks, one of groups where there are any."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
