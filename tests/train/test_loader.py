# SPDX-License-Identifier: Apache-2.0
"""The loader: batch number `step` is the same however one gets there."""

from itertools import islice

import pytest
import torch
from toy import InMemoryPairs, OnDemandPairs, toy_loader

from fvm_fast.data.loader import choose_captions


def take(loader, start, count):
    return list(islice(loader.batches(start), count))


def assert_same(left, right):
    assert left.keys() == right.keys() == {"images", "tokens", "concepts"}
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0)


def test_starting_late_gives_the_same_batches():
    whole = take(toy_loader(), 0, 9)
    for late, expected in zip(take(toy_loader(), 5, 4), whole[5:], strict=True):
        assert_same(late, expected)
    assert not torch.equal(whole[0]["images"], whole[4]["images"])


def test_augmentation_and_captions_change_with_step_rank_and_seed():
    sampler_of_one_batch = {"batch_size": 8}
    views = [take(toy_loader(**sampler_of_one_batch), 0, 3), take(toy_loader(**sampler_of_one_batch, seed=2), 0, 1)]
    batches = [*views[0], *views[1]]
    for i, left in enumerate(batches):
        for right in batches[i + 1 :]:
            same = left["concepts"][:, None] == right["concepts"]
            rows, columns = same.nonzero(as_tuple=True)
            assert len(rows) > 0
            assert not (left["images"][rows] == right["images"][columns]).flatten(1).all(dim=1).any()
    assert not all(
        torch.equal(batch["tokens"].sort(0).values, batches[0]["tokens"].sort(0).values) for batch in batches
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_what_memory_gives(workers):
    from_memory = take(toy_loader(InMemoryPairs()), 3, 5)
    on_demand = take(toy_loader(OnDemandPairs(), workers=workers), 3, 5)
    for left, right in zip(from_memory, on_demand, strict=True):
        assert_same(left, right)


def test_images_captions_and_concepts_belong_together():
    pairs = InMemoryPairs()
    batch = take(toy_loader(pairs, label_share=1.0), 0, 1)[0]
    for image, tokens, concept in zip(batch["images"], batch["tokens"], batch["concepts"], strict=True):
        originals = pairs.images[pairs.concepts == concept].int()
        assert ((image.int() - originals).abs().amax(dim=(1, 2, 3)) < 32).any()  # noise adds less than 32
        name = pairs.captions[int(concept)][0]
        assert tokens[1 : 1 + len(name)].tolist() == [ord(letter) % 120 for letter in name]


def test_ranks_share_the_batch():
    whole = toy_loader().sampler.batch(2).tolist()
    shares = [toy_loader(rank=rank, world_size=2).indices(2) for rank in range(2)]
    assert shares[0] + shares[1] == whole
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
        toy_loader(rank=0, world_size=3)


def test_caption_shares():
    captions = [("label", "tag", "other")] * 4000 + [("alone",)] * 10
    texts = choose_captions(captions, 0.7, torch.Generator().manual_seed(0))
    assert texts[4000:] == ["alone"] * 10
    counts = [texts.count(word) / 4000 for word in ("label", "tag", "other")]
    torch.testing.assert_close(torch.tensor(counts), torch.tensor([0.7, 0.15, 0.15]), rtol=0, atol=0.03)
    assert choose_captions(captions, 1.0, torch.Generator()).count("label") == 4000
    assert choose_captions([], 0.5, torch.Generator()) == []
