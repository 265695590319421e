"""gptjax: GPT-style language models in JAX, from an experiment file to a run you can trust.

Importing the package is cheap on purpose: JAX is loaded by the modules that compute.
"""

__version__ = "0.1.0"
