"""How XLA compiles in the tests: without optimisation, with its older emitters and in one module.

The tests compile many programs and run each only a few times; so compiled, a program takes a quarter of the time.
GPTJAX_TEST_XLA_FLAGS replaces these flags; empty, it stands for a user's flags (`.ci/run` runs some tests so).
"""

import os

QUICK_FLAGS = os.environ.get(
    "GPTJAX_TEST_XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
