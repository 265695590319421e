"""The house: imports go down, never up or round in a circle, and every outside library has one door."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "gptjax",
        "gptjax.errors",
        "gptjax.schema",
        "gptjax.config",
        "gptjax.checks",
        "gptjax.loading",
        "gptjax.cpu",
        "gptjax.sharding",
        "gptjax.atomic_io",
    },
    {"gptjax.model", "gptjax.data"},
    {"gptjax.training", "gptjax.tuning", "gptjax.inference"},
    {"gptjax.interop", "gptjax.probing"},
    {"gptjax.lab"},
    {"gptjax.cli", "gptjax.__main__", "gptjax.commands"},
]
# library -> the only places that may import it
DOORS = {
    "flax": ("gptjax/model/", "gptjax/tuning/lora.py"),
    "orbax": ("gptjax/training/checkpoint.py",),
    "tyro": ("gptjax/cli.py", "gptjax/commands/"),
    "llguidance": ("gptjax/inference/constrained.py",),
    "jinja2": ("gptjax/inference/chat.py",),
    "matplotlib": ("gptjax/lab/report.py", "gptjax/probing/"),
    "datasets": ("gptjax/data/corpus.py",),
    "sentencepiece": ("gptjax/data/tokenizer.py", "gptjax/data/tokenizer_formats.py"),
    "tokenizers": ("gptjax/data/tokenizer.py", "gptjax/data/tokenizer_formats.py", "gptjax/data/words.py"),
    "regex": ("gptjax/data/words.py",),
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
    "sklearn": ("gptjax/tuning/scores.py",),
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
    """Full names of what a file imports, wherever in it; a type-checking import counts too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int:
    room = module if any(module in rooms for rooms in FLOORS) else ".".join(module.split(".")[:2])
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_file_has_a_floor_and_imports_only_from_it_or_below():
    for module, path in FILES.items():
        for imported in imports(path) & FILES.keys():
            assert floor(imported) <= floor(module), f"{path} (floor {floor(module)}) imports {imported} from above"


def test_no_imports_go_round_in_a_circle():
    graph = {module: imports(path) & FILES.keys() - {module, "gptjax"} for module, path in FILES.items()}
    done: set[str] = set()
    while ready := {m for m, needs in graph.items() if m not in done and needs <= done}:
        done |= ready
    packages = {m for m in graph if FILES[m].name == "__init__.py"}
    assert done >= graph.keys() - packages, f"a circle among {sorted(graph.keys() - done)}"


def test_every_library_has_one_door():
    for path in FILES.values():
        name = str(path.relative_to(ROOT))
        for imported in imports(path):
            doors = DOORS.get(imported.split(".")[0])
            assert doors is None or name.startswith(doors), f"{name} imports {imported}, which belongs in {doors}"


def test_the_command_line_imports_nothing_slow_before_it_must():
    tree = ast.parse(FILES["gptjax.cli"].read_text())
    top = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in tree.body
           if isinstance(n, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert not {m for m in top if m.split(".")[0] in {"jax", "flax", "tyro", "numpy", "optax", "datasets"}}
    assert {m for m in top if m.startswith("gptjax")} == {"gptjax", "gptjax.errors"}
