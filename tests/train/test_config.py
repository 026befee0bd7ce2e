# SPDX-License-Identifier: Apache-2.0
"""The configuration: the file, the overrides, and a sentence for each thing that does not fit."""

from dataclasses import fields

import pytest

from fvm_fast.configs import TrainConfig, bundled_configs, find_config, parse_config, to_yaml
from fvm_fast.run_folder import RunFolder


def test_defaults_without_a_file():
    assert parse_config([]) == (TrainConfig(), None)


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_configs_read_and_say_how_to_run_them(name):
    parse_config(["--config", name])
    header = find_config(name).read_text().split("\ndata:")[0]
    assert all(line.startswith("#") for line in header.strip().splitlines())
    assert f"fvm-fast train --config {name}" in header


def test_overrides_win_over_the_file(tmp_path):
    argv = ["--config=clip_emoji", "--optimizer.lr", "5e-4", "--data.styles", "[google]", "--resume", "auto"]
    config, resume = parse_config([*argv, "--model.kwargs.vision_layers", "2", "--schedule.steps", "1_000"])
    assert (config.optimizer.lr, config.data.styles, resume) == (5e-4, ["google"], "auto")
    assert config.model.kwargs == {"vision_layers": 2}
    assert config.schedule.steps == 1000
    assert config.data.subset == "concrete"


def test_yaml_round_trip(tmp_path):
    config, _ = parse_config(
        ["--config", "clip_emoji", "--run.out", str(tmp_path), "--model.kwargs.quick_gelu", "true"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == (config, None)


def test_resuming_reads_the_configuration_of_the_run(tmp_path):
    begun, _ = parse_config(["--config", "clip_emoji", "--run.out", str(tmp_path), "--optimizer.lr", "0.5"])
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    assert parse_config(["--run.out", str(tmp_path), "--resume", "auto"]) == (begun, "auto")
    changed, _ = parse_config(["--run.out", str(tmp_path), "--resume", "auto", "--optimizer.lr", "0.1"])
    assert changed.optimizer.lr == 0.1 and changed.data == begun.data
    assert RunFolder(tmp_path).changes(to_yaml(changed)) == ["optimizer.lr was 0.5 and is 0.1 now"]
    assert RunFolder(tmp_path).changes(to_yaml(begun)) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.lr", "fast"], "optimizer.lr should be of type float, got fast"),
        (["--schedule.steps", "1.5"], "schedule.steps should be of type int, got 1.5"),
        (["--optimizer.lrr", "1"], "no option --optimizer.lrr; did you mean optimizer.lr?"),
        (["stray"], "no option stray"),
    ],
)
def test_bad_words(argv, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_config(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  lr: fast\n", "optimizer.lr should be of type float, got fast"),
        ("optimizer:\n  lrr: 1\n", r"no key optimizer.lrr; did you mean optimizer.lr\?"),
        ("optimzer:\n  lr: 1\n", r"no key optimzer.lr; did you mean optimizer.lr\?"),
        ("optimizer: [1,\n", "config"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", str(tmp_path / "c.yaml")])


def test_missing_file_suggests_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"called 'clip_emoij'; did you mean 'clip_emoji'\?"):
        parse_config(["--config", "clip_emoij"])


def test_every_option_is_explained():
    for section in fields(TrainConfig):
        text = section.default_factory.__doc__
        for option in fields(section.default_factory):
            assert f"{option.name}:" in text or f"{option.name}," in text, f"{section.name}.{option.name}"
