"""The architecture: imports point down the layers, never up or in a cycle, and each library has one importer."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# from the lowest layer to the highest; a module may import from its own layer and from those before it
LAYERS = [
    {
        "gptjax",
        "gptjax.errors",
        "gptjax.schema",
        "gptjax.config",
        "gptjax.loading",
        "gptjax.cpu",
        "gptjax.environment",
        "gptjax.sharding",
        "gptjax.random_streams",
        "gptjax.atomic_io",
    },
    {"gptjax.model", "gptjax.data"},
    {"gptjax.inference"},
    {"gptjax.tuning"},
    {"gptjax.objectives"},
    {"gptjax.checks", "gptjax.training"},
    {"gptjax.interop", "gptjax.probing"},
    {"gptjax.lab"},
    {"gptjax.cli", "gptjax.__main__", "gptjax.commands"},
]
# library -> the only files and folders that may import it
SOLE_IMPORTERS = {
    "flax": ("gptjax/model/",),
    "orbax": ("gptjax/training/checkpoint.py",),
    "tyro": ("gptjax/commands/",),
    "llguidance": ("gptjax/inference/constrained.py",),
    "jinja2": ("gptjax/inference/render_template.py",),
    "matplotlib": ("gptjax/lab/report.py",),
    "datasets": ("gptjax/data/corpus.py",),
    "sentencepiece": ("gptjax/data/tokenizer/builtin.py", "gptjax/data/tokenizer/huggingface_read.py"),
    "tokenizers": ("gptjax/data/tokenizer/",),
    "regex": ("gptjax/data/tokenizer/word_cache.py",),
    "tensorboardX": ("gptjax/training/metrics.py",),
    "wandb": ("gptjax/training/metrics.py",),
    "tqdm": ("gptjax/training/metrics.py",),
    "optax": ("gptjax/training/",),
    "lm_eval": ("gptjax/interop/harness.py",),
    "safetensors": ("gptjax/interop/",),
    "huggingface_hub": ("gptjax/interop/",),
    "transformers": ("gptjax/interop/",),
    "torch": ("gptjax/interop/",),
    "peft": ("gptjax/interop/",),
    "sacrebleu": ("gptjax/tuning/scores.py",),
    "rouge_score": ("gptjax/tuning/scores.py",),
    "seqeval": ("gptjax/tuning/scores.py",),
    "rapidfuzz": ("gptjax/tuning/scores.py",),
    "scipy": ("gptjax/tuning/intervals.py",),
    "dp_accounting": ("gptjax/training/privacy.py",),
    "jax_privacy": ("gptjax/training/privacy.py",),
    "submitit": ("gptjax/lab/slurm.py",),
    "optuna": ("gptjax/lab/search.py",),
    "rich": ("gptjax/lab/live_table.py",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "gptjax").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it; an import for type checking counts too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_entry(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to: the module itself or its package."""
    if any(module in layer for layer in LAYERS):
        return module
    return ".".join(module.split(".")[:2])


def layer_of(module: str) -> int:
    entry = layer_entry(module)
    numbers = [number for number, layer in enumerate(LAYERS) if entry in layer]
    assert len(numbers) == 1, f"{entry} is in {len(numbers)} layers of LAYERS; it must be in one"
    return numbers[0]


def test_every_module_has_a_layer_and_imports_only_from_it_or_below():
    for module, path in FILES.items():
        for imported in imports(path) & FILES.keys():
            assert layer_of(imported) <= layer_of(module), (
                f"{path} (layer {layer_of(module)}) imports {imported} from a higher layer"
            )


def test_every_entry_of_the_layers_is_a_module():
    unused = set().union(*LAYERS) - {layer_entry(module) for module in FILES}
    assert not unused, f"no module belongs to these entries of LAYERS: {sorted(unused)}"


def test_imports_have_no_cycle():
    graph = {module: imports(path) & FILES.keys() - {module, "gptjax"} for module, path in FILES.items()}
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done}:
        done |= ready
    packages = {module for module in graph if FILES[module].name == "__init__.py"}
    assert done >= graph.keys() - packages, f"a cycle among {sorted(graph.keys() - done)}"


def test_every_library_has_a_sole_importer():
    for path in FILES.values():
        name = str(path.relative_to(ROOT))
        for imported in imports(path):
            allowed = SOLE_IMPORTERS.get(imported.split(".")[0])
            assert allowed is None or name.startswith(allowed), f"{name} imports {imported}, which belongs in {allowed}"


def test_every_sole_importer_imports_its_library():
    importers: dict[str, set[str]] = {}
    for path in FILES.values():
        for imported in imports(path):
            importers.setdefault(imported.split(".")[0], set()).add(str(path.relative_to(ROOT)))
        for library in SOLE_IMPORTERS:
            if f'"{library}"' in path.read_text():  # imported by its name
                importers.setdefault(library, set()).add(str(path.relative_to(ROOT)))
    for library, allowed in SOLE_IMPORTERS.items():
        for place in allowed:
            used = any(name.startswith(place) for name in importers.get(library, ()))
            assert used, f"SOLE_IMPORTERS allows {library} in {place}, where nothing imports it; remove the entry"


def test_the_command_line_imports_nothing_slow_at_start():
    tree = ast.parse(FILES["gptjax.cli"].read_text())
    top = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in tree.body
           if isinstance(n, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert not {m for m in top if m.split(".")[0] in {"jax", "flax", "tyro", "numpy", "optax", "datasets"}}
    assert {m for m in top if m.startswith("gptjax")} == {"gptjax", "gptjax.errors"}
