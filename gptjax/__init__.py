"""gptjax: GPT language models in JAX, from an experiment file to a run you can trust.

    import gptjax

    experiment = gptjax.load_experiment("mine.py")
    metrics = gptjax.train(experiment, "runs/mine")
    generator = gptjax.Generator(gptjax.open_model("runs/mine"))
    print(generator.texts("Once upon a time", 50, 1)[0])

The public names are loaded on first use (PEP 562), so importing the package is fast and does not load JAX.
`__init__.pyi` lists the same names for type checkers.
"""

import importlib

__version__ = "0.2.0.dev0"

_MODULES = {  # module -> its public names
    "config": "DataConfig Experiment MeshConfig ModelConfig ObjectiveConfig OptimConfig Search TrainConfig Uniform "
    "diff grid zip_",
    "checks": "check",
    "loading": "load_experiment load_sweep",
    "training.train": "train",
    "training.run": "open_run",
    "interop.open": "open_model",
    "inference.generator": "Generator",
    "inference.sampling": "SamplingParams",
    "inference.scoring": "Scorer",
    "lab.records": "find_runs",
    "lab.variants": "variants_of",
    "lab.comparison": "compare",
}
_MODULE_OF = {name: f"gptjax.{module}" for module, names in _MODULES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
