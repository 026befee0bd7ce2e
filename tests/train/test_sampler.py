# SPDX-License-Identifier: Apache-2.0
"""The sampler: a pure function of (seed, step) that holds pairs of one concept apart."""

import pytest
import torch

from fvm_fast.data.sampler import ConceptSampler, generator_for, shuffled_sampler, stream_seed

CASES = [
    (torch.arange(7).repeat(2), 7),  # two styles, one batch a round
    (torch.arange(9).repeat(2), 3),
    (torch.arange(11).repeat(3), 5),  # a prime number of pairs a concept, with a remainder
    (torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1]), 4),  # unequal counts; unknown concepts
    (torch.tensor([0, 0, 1]), 1),
]


@pytest.mark.parametrize(("concepts", "batch_size"), CASES)
def test_concepts_are_apart_and_pairs_are_seen_once(concepts, batch_size):
    sampler = ConceptSampler(concepts, batch_size, seed=3)
    assert len(sampler) == len(concepts) // batch_size
    for epoch in range(4):
        batches = [sampler.batch(epoch * len(sampler) + i) for i in range(len(sampler))]
        for batch in batches:
            assert len(batch) == batch_size
            known = concepts[batch][concepts[batch] >= 0]
            assert len(known.unique()) == len(known)
        assert len(torch.cat(batches).unique()) == len(sampler) * batch_size


def test_every_pair_comes_in_time_despite_the_remainder():
    sampler = ConceptSampler(torch.arange(11).repeat(3), 5, seed=0)
    seen = torch.cat([sampler.batch(step) for step in range(20 * len(sampler))])
    assert len(seen.unique()) == 33


def test_pure_function_of_seed_and_step():
    concepts = torch.arange(20).repeat(2)
    sampler, fresh = (ConceptSampler(concepts, 8, seed=5) for _ in range(2))
    forward = [sampler.batch(step) for step in range(12)]
    for step in (11, 0, 5, 4, 10):
        torch.testing.assert_close(fresh.batch(step), forward[step], rtol=0, atol=0)
    assert not torch.equal(forward[0], forward[5])
    assert not torch.equal(ConceptSampler(concepts, 8, seed=6).batch(0), forward[0])


def test_companions_change_between_epochs():
    sampler = ConceptSampler(torch.arange(12), 6, seed=0)
    first_epochs = {frozenset(sampler.batch(step).tolist()) for step in range(0, 20, 2)}
    assert len(first_epochs) > 5


def test_shuffled_sampler_ignores_concepts():
    sampler = shuffled_sampler(10, 10, seed=2)
    assert sorted(sampler.batch(0).tolist()) == list(range(10))
    assert sampler.batch(0).tolist() != sampler.batch(1).tolist()


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_size_that_does_not_fit(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the number of pairs, 10, got {batch_size}"):
        shuffled_sampler(10, batch_size)


def test_concept_with_too_many_pairs():
    with pytest.raises(ValueError, match=r"3 pairs.*2 batches.*at most 2"):
        ConceptSampler([0, 0, 0, 1, 2, 3, 4], 3)


def test_seeds_of_streams_differ():
    seeds = {stream_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    draws = [torch.rand(3, generator=generator_for(1, 2)) for _ in range(2)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert stream_seed(-1) >= 0
