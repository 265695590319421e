from gptjax.checks import check as check
from gptjax.config import DataConfig as DataConfig
from gptjax.config import Experiment as Experiment
from gptjax.config import MeshConfig as MeshConfig
from gptjax.config import ModelConfig as ModelConfig
from gptjax.config import ObjectiveConfig as ObjectiveConfig
from gptjax.config import OptimConfig as OptimConfig
from gptjax.config import Search as Search
from gptjax.config import TrainConfig as TrainConfig
from gptjax.config import Uniform as Uniform
from gptjax.config import diff as diff
from gptjax.config import grid as grid
from gptjax.config import zip_ as zip_
from gptjax.inference.generator import Generator as Generator
from gptjax.inference.sampling import SamplingParams as SamplingParams
from gptjax.inference.scoring import Scorer as Scorer
from gptjax.interop.open import open_model as open_model
from gptjax.lab.comparison import compare as compare
from gptjax.lab.records import find_runs as find_runs
from gptjax.lab.variants import variants_of as variants_of
from gptjax.loading import load_experiment as load_experiment
from gptjax.loading import load_sweep as load_sweep
from gptjax.training.run import open_run as open_run
from gptjax.training.train import train as train

__version__: str
