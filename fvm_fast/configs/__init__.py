# SPDX-License-Identifier: Apache-2.0
"""Configurations: what a run can be told, the bundled experiments, and how a command line overrides them.

A configuration is a YAML file that reads like an experiment. ``fvm-fast train --config clip_emoji --optimizer.lr 1e-3``
takes the bundled file and changes one value.
"""

from fvm_fast.configs.parse import bundled_configs, find_config, parse_config, to_yaml
from fvm_fast.configs.schema import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "bundled_configs",
    "find_config",
    "parse_config",
    "to_yaml",
]
