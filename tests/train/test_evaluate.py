# SPDX-License-Identifier: Apache-2.0
"""Scores against their definitions, and the yardsticks beside them."""

import pytest
import torch
from toy import InMemoryPairs, tokenize

from fvm_fast.evaluate import PIXELS, encode_images, encode_texts, pixel_scores, top_k_percent
from fvm_fast.models import create_model
from fvm_fast.retrieval import evaluate_retrieval, recall_at_k, search


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("clip_vit_test").eval()


def test_top_k_is_the_rank_of_the_target():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    targets = torch.tensor([0, 0, 1, 0])  # ranks 1, 3, 2, 3
    assert top_k_percent(scores, targets, (1, 2, 3)) == {"top1": 25.0, "top2": 50.0, "top3": 100.0}


def test_ties_and_nan_earn_nothing():
    assert top_k_percent(torch.zeros(4, 20), torch.arange(4), (1, 10)) == {"top1": 0.0, "top10": 0.0}
    assert top_k_percent(torch.full((2, 20), torch.nan), torch.arange(2), (1, 10)) == {"top1": 0.0, "top10": 0.0}


def test_pixel_scores_are_the_nearest_picture_of_each_concept():
    generator = torch.Generator().manual_seed(0)
    images, gallery = (
        torch.randint(0, 256, (n, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8) for n in (3, 7)
    )
    concepts = torch.tensor([0, 1, 1, 4, 0, 2, 4])
    scores = pixel_scores(images, gallery, concepts, 5, chunk=3)
    for row in range(3):
        for concept in range(5):
            own = gallery[concepts == concept].double()
            distances = ((own - images[row].double()) / 255).square().flatten(1).mean(1)
            expected = -distances.min().item() if len(own) else -torch.inf
            assert scores[row, concept].item() == pytest.approx(expected, rel=1e-4)


def test_a_picture_finds_itself_among_larger_ones():
    images = torch.randint(0, 256, (6, 3, 48, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert pixel_scores(images, images, torch.arange(6), 6).argmax(1).tolist() == list(range(6))


def test_features_have_unit_length_and_do_not_depend_on_the_batch(model):
    pairs = InMemoryPairs()
    whole = encode_images(model, pairs.images)
    torch.testing.assert_close(encode_images(model, pairs.images, batch_size=5), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(pairs)))
    assert encode_images(model, pairs.images[:0]).shape == (0, whole.shape[1])


def test_templates_are_averaged(model):
    texts, templates = ["red", "blue"], ["{}", "a {} thing"]
    parts = [encode_texts(model, tokenize, [t.replace("{}", text) for text in texts]) for t in templates]
    expected = (parts[0] + parts[1]) / (parts[0] + parts[1]).norm(dim=1, keepdim=True)
    torch.testing.assert_close(encode_texts(model, tokenize, texts, templates), expected)


def test_search_ranks_by_similarity(model):
    images = InMemoryPairs().images
    scores, indices = search(model, tokenize, images, "pink", k=5)
    similarities = encode_images(model, images) @ encode_texts(model, tokenize, ["pink"])[0]
    order = similarities.argsort(descending=True)[:5]
    torch.testing.assert_close(similarities[indices], similarities[order])
    torch.testing.assert_close(scores, similarities[order])
    by_features = search(model, tokenize, encode_images(model, images), "pink", k=99)
    assert len(by_features[1]) == len(images)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        search(model, tokenize, images, "pink", k=0)


def test_recall_counts_any_item_of_the_same_id():
    items = torch.eye(4)
    queries = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.0, 0.2, 0.3, 0.9], [0.4, 0.3, 0.2, 0.1]])
    recalls = recall_at_k(queries, items, torch.tensor([7, 7, 8]), torch.tensor([7, 7, 8, 9]), (1, 2, 10), chunk=2)
    # query 0 finds item 0 at once, query 1 items 3 and 2 first, query 2 items 0 and 1
    assert recalls == pytest.approx({"R@1": 100 / 3, "R@2": 100 / 3, "R@10": 100.0})


def test_retrieval_of_pairs_treats_equal_captions_as_one_text(model):
    pairs = InMemoryPairs()
    scores = evaluate_retrieval(model, tokenize, pairs, lambda images: images, chunk=5)
    texts = sorted({captions[0] for captions in pairs.captions})
    similarities = encode_images(model, pairs.images) @ encode_texts(model, tokenize, texts).T
    best = [texts[i] == captions[0] for i, captions in zip(similarities.argmax(1), pairs.captions, strict=True)]
    assert scores["image to text"]["R@1"] == pytest.approx(100 * sum(best) / len(best))
    found = [pairs.captions[i][0] == text for i, text in zip(similarities.argmax(0), texts, strict=True)]
    assert scores["text to image"]["R@1"] == pytest.approx(100 * sum(found) / len(found))
