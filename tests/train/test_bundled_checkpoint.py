# SPDX-License-Identifier: Apache-2.0
"""What the README claims of the bundled checkpoint, measured anew."""

from fvm_fast.build import load_trained
from fvm_fast.cli import BUNDLED
from fvm_fast.evaluate import evaluate_emoji
from fvm_fast.experiment import search_emoji


def test_it_names_an_unseen_style_anywhere_three_times_as_often_as_pixels_do():
    scores = evaluate_emoji(load_trained(BUNDLED), ["twitter"])["twitter"]["anywhere"]
    trained, pixels, untrained, chance = (scores[row] for row in ("trained", "raw pixels", "untrained", "chance"))
    assert trained["top1"] > 3 * pixels["top1"] > 0
    assert trained["top5"] > pixels["top5"] > chance["top5"]
    assert trained["top10"] > pixels["top10"]
    assert untrained["top10"] < pixels["top10"]


def test_it_finds_images_by_words_that_are_no_label():
    found = dict(search_emoji(load_trained(BUNDLED), ["twitter"], ["red fruit", "clock"], k=8))
    assert len({"red apple", "cherries", "strawberry", "tomato"} & set(found["red fruit"])) >= 2
    assert sum("clock" in label or "thirty" in label for label in found["clock"]) >= 4
