# SPDX-License-Identifier: Apache-2.0
"""Figures: PNG files of a sensible size whose marks stand where the numbers say."""

import json

import pytest
import torch
from PIL import Image

from fvm_fast.figures import _running_mean, loss_curve, search_strip, similarity_matrix


def picture(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 24, 24)


def test_loss_curve(tmp_path):
    rows = [{"step": step, "loss": 5.0 / step, "seconds": float(step)} for step in range(1, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = Image.open(loss_curve(tmp_path / "metrics.jsonl", tmp_path / "figures" / "loss.png", baseline=5.6))
    assert image.format == "PNG" and image.width > 600
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (0x1F, 0x5F, 0xA8) in colours


def test_loss_curve_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no line yet"):
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        loss_curve(tmp_path / "absent.jsonl", tmp_path / "loss.png")


def test_similarity_matrix_and_search_strip_show_the_images(tmp_path):
    images = torch.stack([picture((255, 0, 0)), picture((0, 128, 255)), picture((255, 0, 255))])
    matrix = similarity_matrix(torch.eye(3), images, ["one", "two", "three"], tmp_path / "matrix.png")
    strip = search_strip([("warm", images[:1]), ("all of them", images)], tmp_path / "strip.png")
    for path in (matrix, strip):
        colours = {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}
        assert {(255, 0, 0), (0, 128, 255), (255, 0, 255)} <= colours


def test_running_mean():
    assert _running_mean([1.0, 2.0, 6.0, 0.0], 2) == [1.0, 1.5, 4.0, 3.0]
    assert _running_mean([1.0, 2.0], 1) == [1.0, 2.0]
