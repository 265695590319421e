"""`gptjax eval MODEL --data`: the loss of a model on any text."""

import time
from typing import TYPE_CHECKING, Any

from gptjax.commands.eval_options import format_metrics, open_pretrained

if TYPE_CHECKING:
    from gptjax.commands.eval_options import Evaluation


def evaluate_data(options: "Evaluation") -> tuple[dict[str, Any], str]:
    """The metrics over all sources together, and the text to print."""
    from gptjax.config import DataConfig
    from gptjax.data import corpus, synthetic
    from gptjax.data.files import source_files
    from gptjax.inference.scoring import Scorer, evaluate_texts
    from gptjax.lab.report import check_can_plot, plot_by_position

    text = options.text
    for source in options.data:  # before a large model is loaded
        if source != "pydoc" and not source.startswith("hub:") and not synthetic.is_function(source):
            source_files(source)
    if text.plot is not None:
        check_can_plot(text.plot)
    pretrained = open_pretrained(options)
    scorer = Scorer(pretrained, options.batch_size, options.dtype)
    window, stride = scorer.resolve_window(text.context, text.stride)
    data = DataConfig(
        column=text.column,
        hub_config=text.hub_config,
        hub_split=text.hub_split,
        max_documents=text.max_documents,
    )
    documents = (document for source in options.data for document in corpus.iter_documents(source, data))
    start = time.perf_counter()
    totals = evaluate_texts(scorer, documents, stride, window)
    seconds = time.perf_counter() - start
    metrics = totals.metrics() | {"seconds": seconds, "context": window, "stride": stride}
    lines = f"{format_metrics(metrics)}\n{metrics['tokens'] / seconds:,.0f} tokens/s"
    if text.plot is not None:
        plot_by_position(totals.by_position(), text.plot, pretrained.name)
    if text.by_position:
        metrics["by_position"] = totals.by_position()
        lines += "\n\n" + _format_bins(metrics["by_position"])
    return metrics, lines


def _format_bins(bins: list[dict[str, Any]]) -> str:
    """A table of the loss by context size, in nats/token."""
    rows = ["context size   nats/token  std error       tokens"]
    for b in bins:
        size = str(b["to"]) if b["from"] == b["to"] else f"{b['from']}-{b['to']}"
        error = "-" if b["error"] is None else f"{b['error']:.4f}"
        rows.append(f"{size:>12}   {b['loss']:>10.4f}  {error:>9}  {b['tokens']:>11,}")
    return "\n".join(rows)
