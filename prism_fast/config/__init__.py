"""One frozen, validated configuration tree per command. Unknown keys are errors.

A stage reads a YAML file and ``key.path=value`` overrides; recipes/*.yaml hold the published settings and the demo's.
``base: NAME`` at the top of a file names a recipe that it lies over. How they are read: `prism_fast/settings.py`.
Every key is described here; docs/settings.md (dev/settings_page.py) and `prism-fast config` tell it from here.

    values         what one value may be                    inputs      a model, data files
    training       optimizer, cluster, run, watch           sampling    how prompts are answered
    objective      advantages, discriminator's step, loss   reward      what is right, what is too long
    stages         sft, upcycle, warmup, align, rlvr        evaluation  eval, probe, serve-discriminator
    data_commands  data pairs, filter, curate
"""

from prism_fast.config.data_commands import (
    RECOMMENDED_HARD_NEGATIVES,
    CurateConfig,
    FilterConfig,
    HardNegativesConfig,
    PairsConfig,
    RatesConfig,
    TeacherConfig,
)
from prism_fast.config.evaluation import BenchmarksConfig, EvaluateConfig, ProbeConfig, ServeConfig
from prism_fast.config.inputs import DataConfig, ModelConfig
from prism_fast.config.objective import AdvantageConfig, CompatConfig, DiscriminatorStep, ObjectiveConfig
from prism_fast.config.reward import BY_THE_JUDGE, OverlongConfig, OwnReward, RewardConfig
from prism_fast.config.sampling import (
    DynamicSamplingConfig,
    EvalConfig,
    RolloutConfig,
    SamplerStart,
    Sampling,
    VLLMConfig,
)
from prism_fast.config.stages import AlignConfig, RLVRConfig, SFTConfig, UpcycleConfig, WarmupConfig
from prism_fast.config.training import ClusterConfig, OptimizerConfig, RunConfig, WatchConfig
from prism_fast.config.values import Node
from prism_fast.settings import RECIPES, load_config, merge, parse_overrides, read_yaml

__all__ = [
    "BY_THE_JUDGE",
    "CONFIGS",
    "RECIPES",
    "RECOMMENDED_HARD_NEGATIVES",
    "AdvantageConfig",
    "AlignConfig",
    "BenchmarksConfig",
    "ClusterConfig",
    "CompatConfig",
    "CurateConfig",
    "DataConfig",
    "DiscriminatorStep",
    "DynamicSamplingConfig",
    "EvalConfig",
    "EvaluateConfig",
    "FilterConfig",
    "HardNegativesConfig",
    "ModelConfig",
    "Node",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "OwnReward",
    "PairsConfig",
    "ProbeConfig",
    "RLVRConfig",
    "RatesConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SamplerStart",
    "Sampling",
    "ServeConfig",
    "TeacherConfig",
    "UpcycleConfig",
    "VLLMConfig",
    "WarmupConfig",
    "WatchConfig",
    "load_config",
    "merge",
    "parse_overrides",
    "read_yaml",
]

CONFIGS: dict[str, type[Node]] = {
    "sft": SFTConfig,
    "upcycle": UpcycleConfig,
    "pairs": PairsConfig,
    "warmup": WarmupConfig,
    "align": AlignConfig,
    "filter": FilterConfig,
    "curate": CurateConfig,
    "rlvr": RLVRConfig,
    "eval": EvaluateConfig,
    "benchmarks": BenchmarksConfig,
    "probe": ProbeConfig,
    "serve-discriminator": ServeConfig,
}
