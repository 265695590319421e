"""What LoRA saves in trainable parameters, peak memory and step time, compared with full fine-tuning.

    python benchmarks/lora.py [--rounds 5] [--rank 8] [--shapes quickstart gpt2] [--tiny] [--json]

Each learns random tokens in a process of its own, so that its peak of memory is its own, and they take turns: a few
steps of one, a few of the other, `--rounds` times. `peak` is that of the whole process, from its start, Python and the
compiler included; `step` is the room that the compiled step takes in addition to weights and moments. A time ratio
above 1 means that LoRA is faster; the spread is that of the single rounds.
"""

import argparse
import json
import statistics
from pathlib import Path

import side_by_side
from steps import step_of

SHAPES = {  # experiment file, vocabulary, context, batch, steps a round
    "quickstart": ("quickstart.py", 1024, 128, 8, 20),
    "gpt2": ("baselines/gpt2_124m.py", 50257, 256, 1, 3),
}
TINY = dict(num_layers=2, embed_dim=32, num_heads=2)


def serve(kind: str, shape: str, rank: int, tiny: bool) -> None:
    """A worker: warms up, then times as many steps as each line of its input asks for."""
    from gptjax.config import Experiment
    from gptjax.loading import load_experiment
    from gptjax.model.size import num_params
    from gptjax.training.optim import num_trainable

    file, vocabulary, context, batch, _ = SHAPES[shape]
    e: Experiment = load_experiment(str(Path(__file__).parent.parent / "experiments" / file))
    e = e.override(model=dict(context_length=context, layers="unrolled", dtype="float32", remat="none"))
    e = e.override(train=dict(batch_size=batch, microbatches=1))
    e = e.override(model=dict(lora_rank=rank if kind == "lora" else 0) | (TINY if tiny else {})).resolved(vocabulary)
    one, figures = step_of(e)
    for _ in range(2):
        one()
    size = {"total": num_params(e.model)["total"], "trainable": num_trainable(e)}
    side_by_side.serve(one, size | {"step": figures["step"]})


def compare(shape: str, rounds: int, rank: int, tiny: bool) -> dict[str, float]:
    """Prints the figures of both, and returns the ratios of full fine-tuning to LoRA."""
    worker_arguments = ["--shapes", shape, "--rank", str(rank), *(["--tiny"] if tiny else [])]
    workers = {kind: side_by_side.Worker(kind, *worker_arguments) for kind in ("full", "lora")}
    times = side_by_side.take_turns(workers, SHAPES[shape][-1], rounds)
    print(f"{shape}, batch {SHAPES[shape][3]} x {SHAPES[shape][2]} tokens", flush=True)
    for kind, worker in workers.items():
        f, seconds = worker.figures, statistics.median(times[kind])
        print(f"  {kind}  {f['trainable']:>11,} of {f['total']:,} trainable ({f['trainable'] / f['total']:.2%}), peak "
              f"{f['peak'] / 1e6:,.0f} MB, step {f['step'] / 1e6:,.1f} MB, {seconds * 1e3:.1f} ms/step")  # fmt: skip
    full, lora = workers["full"], workers["lora"]
    faster, text = side_by_side.ratio(times["lora"], times["full"])
    found = {
        "time": faster,
        **{name: full.figures[name] / lora.figures[name] for name in ("peak", "step")},
        "trainable_share": lora.figures["trainable"] / lora.figures["total"],
    }
    print(f"  LoRA is {text} as fast; full takes "
          f"{found['peak']:.2f}x the peak, {found['step']:.2f}x the memory of a step", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tiny", action="store_true", help="small models, to see that the script works")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the ratios")
    parser.add_argument("--serve", choices=["full", "lora"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.shapes[0], options.rank, options.tiny)
        return
    found = {shape: compare(shape, options.rounds, options.rank, options.tiny) for shape in options.shapes}
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
