# SPDX-License-Identifier: Apache-2.0
"""Thirty steps of our loop and of a plain open_clip loop, on the same pictures and weights, give the same losses."""

import pytest

from fvm_fast.compare import compare_open_clip
from fvm_fast.configs import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from fvm_fast.data.tokenizer import BPETokenizer


@pytest.fixture
def config(tmp_path):
    BPETokenizer.from_merges([]).save(tmp_path / "tokenizer.json")  # bytes only: 514 entries
    return TrainConfig(
        data=DataConfig(
            styles=["google"], image_size=32, tokenizer=str(tmp_path / "tokenizer.json"), captions="label+tags"
        ),
        model=ModelConfig("clip_vit_test"),
        optimizer=OptimizerConfig(lr=2e-3, batch_size=32),
        schedule=ScheduleConfig(steps=60, warmup_steps=5),
    )


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_losses_agree_over_thirty_steps(config, quick_gelu):
    config.model.kwargs["quick_gelu"] = quick_gelu
    comparison = compare_open_clip(config, 30)
    assert comparison.steps == 30
    assert 0 < comparison.loss_difference < 1e-4
    assert comparison.ours_ms > 0 and comparison.theirs_ms > 0
    assert 0 <= comparison.ops_share <= 1
    assert "first 30 steps against a plain open_clip loop" in comparison.sentence()


def test_an_objective_open_clip_does_not_have(config):
    config.objective = ObjectiveConfig(loss="siglip")
    with pytest.raises(ValueError, match="no counterpart of this objective"):
        compare_open_clip(config, 3)
