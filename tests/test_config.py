"""An experiment is one value: it can be changed, compared, written down, and refused with everything that is wrong."""

import ast
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config
from gptjax.checks import LIMITS, check
from gptjax.commands import parse
from gptjax.config import (
    RENAMED,
    RENAMED_OBJECTIVES,
    Experiment,
    ModelConfig,
    diff,
    grid,
    names_of_format_1,
)
from gptjax.errors import ConfigError, printable
from gptjax.loading import load_experiment
from gptjax.schema import leaves, type_problems, value_at

BASE = Experiment()

changes = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "name": st.text("abc", min_size=1),
        "init": st.none() | st.just("runs/a"),
        "model.num_layers": st.integers(1, 100),
        "model.head_dim": st.none() | st.integers(1, 64),
        "model.ffn": st.sampled_from(["gelu", "swiglu"]),
        "model.dropout": st.floats(0, 0.9),
        "data.source": st.just("pydoc") | st.lists(st.text("xyz", min_size=1), min_size=1).map(tuple),
        "optim.learning_rate": st.floats(1e-9, 1),
        "train.trackers": st.just(("tensorboard",)),
    },
)


@given(changes)
def test_override_sets_exactly_what_it_names(wanted):
    changed = BASE.override(wanted)
    assert all(value_at(changed, path) == value for path, value in wanted.items())
    assert diff(BASE, changed) == {
        path: (value_at(BASE, path), value) for path, value in wanted.items() if value != value_at(BASE, path)
    }


@given(changes)
def test_json_brings_back_an_equal_value(wanted):
    changed = BASE.override(wanted)
    assert Experiment.from_json(changed.to_json()) == changed
    assert hash(Experiment.from_json(changed.to_json())) == hash(changed)


def test_sections_and_dotted_names_are_the_same_override():
    assert BASE.override(model=dict(num_layers=3), seed=2) == BASE.override({"model.num_layers": 3, "seed": 2})


def test_grid_makes_every_combination_under_a_name_of_its_own():
    trials = grid(BASE, {"seed": [1, 2], "model.ffn": ["gelu", "relu"]})
    assert [(t.seed, t.model.ffn) for t in trials] == [(1, "gelu"), (1, "relu"), (2, "gelu"), (2, "relu")]
    assert len({t.name for t in trials}) == 4
    for trial in grid(BASE, {"data.source": ["a/b.txt", ("c", "d")]}):
        check(trial)


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("model.num_layer", "model.num_layers"),
        ("num_layers", "model.num_layers"),
        ("trian.steps", "train.steps"),
        ("sed", "seed"),
        ("optim.learning_rte", "optim.learning_rate"),
    ],
)
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(wrong, meant):
    with pytest.raises(ConfigError, match=f"{wrong}: no such field; did you mean {meant}"):
        BASE.override({wrong: 1})


def test_unknown_fields_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        BASE.override({"model.num_layer": 1, "optim.lr": 2})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_field_says_its_new_name(tmp_path, old, new):
    message = f"{old}: is now called {new}"
    with pytest.raises(ConfigError, match=message):
        BASE.override({old: 1})
    with pytest.raises(ConfigError, match=f"--{message}"):
        parse(Experiment, [f"--{old.replace('_', '-')}=1"], "train FILE")
    section, _, name = old.partition(".")
    (tmp_path / "e.py").write_text(
        f"from gptjax.config import *\nexperiment = Experiment({section}={section.title()}Config({name}=1))\n"
    )
    with pytest.raises(ConfigError, match=f"e.py, line 2: {message}"):
        load_experiment(str(tmp_path / "e.py"))


@pytest.mark.parametrize("old, new", RENAMED_OBJECTIVES.items())
def test_an_old_objective_says_its_new_name(old, new):
    with pytest.raises(ConfigError, match=f"objective.name = '{old}': is now called '{new}'"):
        check(BASE.override({"objective.name": old}))


def test_names_of_format_1_are_those_that_old_hashes_were_made_of():
    e = BASE.override({"objective.name": "rloo", "model.sliding_window": 3})
    objective, model = names_of_format_1("objective", e.objective), names_of_format_1("model", e.model)
    assert (
        list(objective)
        == """name mask_rate whole_words next_sentence fill_in_rate z_loss reference beta divergence
        score samples new_tokens""".split()
    )
    assert (objective["name"], model["window"], len(model)) == ("risk", 3, len(leaves(ModelConfig)))


CLASSES = {
    "data.source": "task:sentiment",
    "data.answers": "classes",
    "objective.name": "sft",
    "train.sample_tokens": 0,
}

CUDNN = {"model.attention_kernel": "cudnn", "model.dtype": "bfloat16"}

# One entry for each rule: (what makes the experiment impossible, what the message must name)
IMPOSSIBLE = [
    ({"train.steps": "100"}, "train.steps = '100'"),
    ({"model.ffn": "gleu"}, "model.ffn = 'gleu'"),
    ({"model.dropout": True}, "model.dropout = True"),
    ({"model.num_layers": 2.0}, "model.num_layers = 2.0"),
    ({"data.source": 3}, "data.source = 3"),
    ({"optim.learning_rate": -1.0}, "optim.learning_rate = -1.0"),
    ({"train.eval_every": -1}, "train.eval_every = -1"),
    ({"model.dropout": 1.0}, "model.dropout = 1.0"),
    ({"optim.ema_decay": 1.0}, "optim.ema_decay = 1.0"),
    ({"model.num_heads": 5}, "model.num_heads = 5"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads = 4"),
    ({"model.positions": "rope", "model.head_dim": 3}, "model.head_dim = 3"),
    ({"model.rope_scaling": "linear"}, "model.rope_scaling = 'linear'"),
    ({"model.rope_factor": 2.0}, "model.rope_factor = 2.0"),
    ({"model.ffn": "none", "model.parallel_residual": True}, "model.parallel_residual = True"),
    ({"model.ffn": "none", "model.head": "mlm"}, "model.head = 'mlm'"),
    ({"init": "x", "model.ffn": "none", "model.lora_rank": 2, "model.lora_targets": ("up",)}, "model.lora_targets"),
    ({"model.mup_base_width": 64, "optim.name": "muon"}, "optim.name = 'muon'"),
    ({"data.source": "function:a.b:c"}, "data.source = 'function:a.b:c'"),
    ({"data.val_source": "function:a.b:c"}, "max_documents"),
    ({"model.attention_kernel": "cudnn"}, "model.attention_kernel = 'cudnn'"),
    (CUDNN | {"model.head_dim": 264}, "a multiple of 8 and at most 256, and it is 264"),
    (CUDNN | {"model.head_dim": 12}, "a multiple of 8 and at most 256, and it is 12"),
    (CUDNN | {"model.context_length": 33, "model.sliding_window": 8}, "with ALiBi, and it is 33"),
    (CUDNN | {"model.context_length": 35, "model.positions": "alibi"}, "with ALiBi, and it is 35"),
    (CUDNN | {"model.context_length": 37, "data.document_mask": True}, "under a mask or with ALiBi, and it is 37"),
    (CUDNN | {"model.context_length": 39, "objective.name": "prefix_lm"}, "under a mask or with ALiBi, and it is 39"),
    ({"model.causal": False}, "model.causal = False"),
    ({"objective.name": "mlm"}, "model.causal = True"),
    ({"objective.name": "mlm", "model.causal": False}, "train.sample_tokens = 200"),
    ({"objective.name": "sft"}, "objective.name = 'sft'"),
    ({"objective.name": "dpo", "data.source": "task:addition", "init": "x"}, "objective.name = 'dpo': compares two"),
    ({"objective.name": "dpo", "data.source": "task:addition", "data.rejected": "{wrong}"}, "needs a reference model"),
    ({"objective.name": "dpo", "objective.beta": 0.0}, "objective.beta = 0"),
    ({"objective.name": "dpo", "train.batch_size": 9, "init": "x"}, "reads 2 rows together, in every microbatch"),
    ({"data.rejected": "{b}"}, "data.rejected: is read with objective.name = 'dpo' only"),
    ({"objective.name": "grpo", "train.batch_size": 12, "init": "x"}, "reads 8 rows together"),
    ({"objective.name": "grpo", "objective.num_generations": 1, "init": "x"}, "objective.num_generations = 1"),
    ({"objective.name": "rloo", "objective.max_new_tokens": 256}, "objective.max_new_tokens = 256"),
    (
        {"objective.name": "rloo", "model.dropout": 0.1, "init": "x"},
        "model.dropout = 0.1: with objective.name = 'rloo'",
    ),
    ({"objective.name": "rloo", "objective.beta": 0.0, "objective.reference": "x"}, "objective.reference = 'x'"),
    ({"objective.name": "grpo", "init": "x", "data.source": ("task:addition", "task:sentiment")}, "give one source"),
    ({"objective.name": "distill"}, "there is no teacher"),
    ({"objective.name": "distill", "objective.reference": "x", "objective.z_loss": 0.1}, "objective.z_loss = 0.1"),
    (
        {"objective.num_generations": 4},
        "has no effect with objective.name = 'causal'; set objective.name = 'rloo' or 'grpo'",
    ),
    ({"objective.reference": "x"}, "objective.reference = x: has no effect"),
    ({"model.num_classes": 2}, "model.num_classes = 2: has no effect; set data.answers = 'classes'"),
    (CLASSES | {"model.num_classes": -1}, "model.num_classes = -1: must not be negative"),
    (
        CLASSES | {"data.prompt": "{a}", "data.answer": "{b}"},
        "data.labels = (): data.answers = 'classes' needs at least two labels",
    ),
    (CLASSES | {"data.labels": ("a", "b", "a")}, "data.labels = ('a', 'b', 'a'): has a label twice"),
    (
        CLASSES | {"objective.name": "causal"},
        "objective.name = 'causal': with data.answers = 'classes' only the labels",
    ),
    (CLASSES | {"model.causal": False, "objective.name": "mlm"}, "objective.name = 'mlm': with data.answers"),
    (CLASSES | {"objective.z_loss": 0.1}, "objective.z_loss = 0.1: has no effect with data.answers = 'classes'"),
    (
        CLASSES | {"train.sample_tokens": 9},
        "train.sample_tokens = 9: a classifier (data.answers = 'classes') cannot generate text; set 0",
    ),
    (CLASSES | {"data.source": "pydoc"}, "objective.name = 'sft': needs examples with answers"),
    ({"objective.name": "dpoo"}, "objective.name = 'dpoo': no such objective; did you mean 'dpo'?"),
    ({"objective.name": "nowhere:Nothing"}, "objective.name = 'nowhere:Nothing': cannot be imported"),
    ({"objective.name": "math:pi"}, "objective.name = 'math:pi': must be a subclass of"),
    ({"objective.mask_rate": 1.0}, "objective.mask_rate = 1.0: must lie between"),
    ({"objective.fim_rate": 1.5}, "objective.fim_rate = 1.5: must be"),
    (
        {"objective.mask_rate": 0.3},
        "objective.mask_rate = 0.3: has no effect with objective.name = 'causal'; set objective.name = 'mlm'",
    ),
    ({"objective.next_sentence": True}, "objective.next_sentence = True: has no effect"),
    ({"objective.name": "fim", "model.context_length": 7}, "model.context_length = 7"),
    (
        {"objective.name": "mlm", "objective.next_sentence": True, "data.document_mask": True},
        "set data.document_mask = False",
    ),
    ({"optim.warmup_steps": 1000}, "optim.warmup_steps = 1000"),
    ({"optim.final_learning_rate": 1.0}, "optim.final_learning_rate = 1.0"),
    ({"optim.name": "schedule_free"}, "optim.schedule = 'cosine'"),
    ({"data.source": ()}, "data.source = ()"),
    ({"data.weights": (1.0, 2.0)}, "data.weights = (1.0, 2.0)"),
    ({"data.val_fraction": 0.0}, "data.val_fraction = 0"),
    ({"data.streaming": True}, "data.streaming = True"),
    ({"name": "a/b"}, "name = 'a/b'"),
    ({"seed": 2**63}, "must be below 2**63"),
    ({"data": "mytext.txt"}, "data = 'mytext.txt': DataConfig(...) is needed"),
    ({"optim.name": "schedule_free", "optim.schedule": "constant", "optim.beta1": 0.0}, "optim.beta1 = 0"),
    ({"train.microbatches": 5}, "train.microbatches = 5"),
    ({"mesh.model": 3}, "mesh = 2 x 3"),
    ({"train.batch_size": 12}, "train.batch_size = 12"),
]


@pytest.mark.parametrize("changes, named", IMPOSSIBLE, ids=[named for _, named in IMPOSSIBLE])
def test_each_rule_names_field_and_value(changes, named):
    with pytest.raises(ConfigError) as caught:
        check(BASE.override(changes), num_devices=8)
    assert named in str(caught.value)


def test_everything_that_is_wrong_is_reported_at_once():
    wrong = {"train.steps": "100", "model.num_heads": 5, "optim.learning_rate": -1.0, "data.weights": (1.0, 2.0)}
    with pytest.raises(ConfigError) as caught:
        check(BASE.override(wrong))
    assert len(caught.value.problems) == 4


def test_the_default_experiment_is_possible_on_any_fitting_number_of_devices():
    for devices in (None, 1, 2, 8, 32):
        assert check(BASE, devices) == BASE


def test_cudnn_may_be_asked_for_where_some_gpu_can_do_it():
    check(BASE.override(CUDNN | {"model.context_length": 33, "model.head_dim": 256}))
    check(BASE.override(CUDNN | {"model.context_length": 34, "model.sliding_window": 8, "data.document_mask": True}))


def test_a_model_that_looks_ahead_may_be_a_classifier():
    for changes in ({}, {"model.causal": False}):
        check(BASE.override(CLASSES | changes))


def test_derived_sizes_are_written_out():
    m = ModelConfig(embed_dim=96, num_heads=6, ffn="swiglu").resolved()
    assert (m.num_kv_heads, m.head_dim, m.ffn_dim) == (6, 16, 256)
    assert m.resolved() == m
    assert ModelConfig(embed_dim=96).resolved().ffn_dim == 384
    e = BASE.resolved(5, ("a", "b"))
    assert (e.model.vocab_size, e.model.num_classes, e.data.labels) == (5, 2, ("a", "b"))


def test_the_config_stays_small_and_every_field_says_what_it_is():
    assert len(leaves(Experiment)) <= 105
    assert type_problems(BASE) == {}
    source = inspect.getsource(config)
    lines = source.splitlines()
    fields = [
        node
        for kind in ast.parse(source).body
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, ast.AnnAssign)
    ]
    assert len(fields) > 70
    for node in fields:
        section = isinstance(node.value, ast.Call)  # documented by the docstring of its class
        assert section or "  # " in lines[node.lineno - 1], f"{lines[node.lineno - 1]}: has no comment"


@pytest.mark.parametrize("path", LIMITS)
def test_a_value_beyond_all_measure_is_refused_before_any_work(path):
    for value in (LIMITS[path] + 1, 10**30, 10**4000):
        e = Experiment().override({"data.tokenizer": "byte", path: value})
        with pytest.raises(ConfigError) as caught:
            check(e)
        assert any(f"{path} = " in p and f"must be at most {LIMITS[path]:,}" in p for p in caught.value.problems)
        assert all(len(problem) < 400 for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("name", "message"),
    [("实验" * 45, "has 270 bytes; at most 230"), ("x" * 10**6, "has 1,000,000 bytes"),
     ("a\x1b[31mb", "cannot be printed"), ("a\nb", "cannot be printed"), ("a\ud83d", "cannot be printed"),
     ("a/b", "must name a folder")],
)  # fmt: skip
def test_a_name_is_a_folders_name_that_can_be_printed(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(Experiment(name=name))
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
    check(Experiment(name="实验\u3000一"))
    assert printable("一\u3000二 \U0001f469\u200d\U0001f52c\n\x1b[31m\r\u202e") == (
        "一\u3000二 \U0001f469\u200d\U0001f52c\n\\x1b[31m\\r\\u202e"
    )
    check(Experiment(name="lr $\\frac{$ 实验 é"))
