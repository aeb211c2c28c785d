"""The memory of the branching cache: who owns which page, and what the copies move."""

from __future__ import annotations

import math

import pytest
import torch

from pyengine import InputError
from pyengine.cache import LEAF, PAGE, BranchingCache

LAYERS = [(2, 16), (1, 32), (2, 16)]  # as Gemma 3n and 4 mix them
TOKEN = sum(2 * heads * width * 4 for heads, width in LAYERS)


def make(pages=8, tails=64):
    budget = max(pages * PAGE / 0.75, tails / 0.25) * TOKEN
    return BranchingCache(LAYERS, budget, torch.float32, torch.device("cpu"))


def tokens(n, start=0):
    return list(range(start, start + n))


def fill(cache, sequence):
    """Each token's keys and values are its position, over all layers, heads and widths."""
    for at in range(sequence.shared, sequence.length):
        for layer in range(len(LAYERS)):
            for store in cache.layers[layer][:2]:
                store[sequence.pages[at // PAGE], :, at % PAGE] = at


def held(cache, sequence, layer=0, which=0):
    """What a sequence holds, one number a token; asserts that heads and widths agree."""
    pages = cache.layers[layer][:2][which][sequence.pages].transpose(0, 1).flatten(1, 2)[:, : sequence.length]
    assert (pages == pages[:1, :, :1]).all()
    return pages[0, :, 0].tolist()


def test_the_books_balance_from_an_empty_cache_on():
    cache = make()
    cache.check_integrity()
    sequence = cache.add(tokens(100), 60)
    assert len(sequence.pages) == 3
    cache.check_integrity()
    cache.release(sequence)
    cache.check_integrity()
    assert cache.pages_in_use == 0
    assert cache.pages_free == 8


def test_a_page_is_known_by_all_that_is_before_it():
    """[1][2] and [3][4] are there: [1][4] shares its first page and never its second."""
    cache = make(pages=20)
    one, two, three, four = ([i] * PAGE for i in (1, 2, 3, 4))
    first = cache.add([*one, *two, 9])
    cache.add([*three, *four, 9])
    mixed = cache.add([*one, *four, 9])
    assert mixed.shared == PAGE
    assert mixed.pages[0] == first.pages[0]
    held = [set(sequence.pages) for sequence in cache._sequences]
    assert sum(mixed.pages[1] in pages for pages in held) == 1
    assert cache.add([*four, 9]).shared == 0


def test_equal_prefixes_share_whole_pages_but_never_the_last_token():
    cache = make(pages=20)
    first = cache.add(tokens(2 * PAGE + 1))
    assert first.shared == 0
    assert cache.add(tokens(2 * PAGE + 9)).shared == 2 * PAGE
    assert cache.add(tokens(2 * PAGE)).shared == PAGE
    assert cache.add(tokens(PAGE)).shared == 0
    assert cache.add([*tokens(PAGE), 7, *tokens(PAGE)]).shared == PAGE
    assert cache.add(tokens(2 * PAGE, start=1)).shared == 0
    cache.check_integrity()


def test_a_page_is_named_after_all_that_comes_before_it():
    cache = make(pages=20)
    cache.add([1] * (2 * PAGE + 1))
    other = cache.add([*[2] * PAGE, *[1] * (PAGE + 1)])
    assert other.shared == 0


def test_released_prompts_stay_until_their_memory_is_wanted():
    cache = make(pages=4)
    cache.release(cache.add(tokens(2 * PAGE + 1)))  # 3 pages, two of them named
    again = cache.add(tokens(2 * PAGE + 1))
    assert again.shared == 2 * PAGE
    cache.release(again)
    other = cache.add(tokens(3 * PAGE, start=5))  # takes the two free ones and gives one up
    cache.check_integrity()
    cache.release(other)
    back = cache.add(tokens(2 * PAGE + 1))
    assert back.shared == PAGE, "the end of a prefix is given up before its beginning"
    cache.check_integrity()


def test_a_prefix_whose_beginning_was_given_up_is_named_anew():
    cache = make(pages=3)
    kept = cache.add(tokens(2 * PAGE + 1))
    cache._forget(kept.fresh[0])
    cache.release(kept)
    again = cache.add(tokens(2 * PAGE + 1))
    assert again.shared == 0
    cache.check_integrity()
    cache.release(again)
    assert cache.add(tokens(2 * PAGE + 1)).shared == 2 * PAGE
    cache.check_integrity()


def test_running_out_takes_nothing():
    cache = make(pages=4)
    first = cache.add(tokens(2 * PAGE + 1))
    with pytest.raises(InputError, match="1 free pages of 64 tokens, 2 are needed"):
        cache.add([*tokens(2 * PAGE), 5, 5], PAGE)
    cache.check_integrity()
    with pytest.raises(InputError, match="free pages"):
        cache.grow(first, 5 * PAGE)
    cache.check_integrity()
    cache.grow(first, 4 * PAGE)
    assert len(first.pages) == 4
    cache.check_integrity()
    with pytest.raises(InputError, match=f"{cache.leaves} free leaves of 16 tokens, {cache.leaves + 1} are needed"):
        cache.take_leaves(cache.leaves + 1)


def test_a_commit_crosses_pages_and_leaves_and_moves_nothing_else():
    cache = make(pages=6, tails=128)
    for pair in (*cache._pages, *cache._tails):
        for store in pair:
            store.fill_(math.nan)
    one, two = cache.add(tokens(PAGE - 3), 30), cache.add(tokens(5, start=9), 3)
    fill(cache, one)
    fill(cache, two)
    for layer in range(len(LAYERS)):
        for store in cache.layers[layer][2:]:
            for leaf, first in ((3, 100.0), (1, 116.0), (2, 200.0)):
                store[leaf] = torch.arange(first, first + LEAF)[None, :, None]
    cache.commit([(one, [3, 1], 19), (two, [2], 2)])
    for layer in range(len(LAYERS)):
        for which in (0, 1):
            assert held(cache, one, layer, which) == [*range(PAGE - 3), *range(100, 119)]
            assert held(cache, two, layer, which) == [0, 1, 2, 3, 4, 200, 201]
            written = cache.layers[layer][:2][which].isfinite().any(-1).any(1).sum()
            assert written == PAGE - 3 + 19 + 5 + 2


def test_a_leaf_has_one_owner():
    cache = make(pages=1, tails=160)
    assert cache.leaves in (10, 11)
    assert cache.layers[1][2].shape == (cache.leaves, 1, LEAF, 32)
    one, two = cache.take_leaves(3), cache.take_leaves(4)
    assert len({*one, *two}) == 7
    cache.give_leaves(one)
    assert cache.leaves_free == cache.leaves - 4
    cache.check_integrity()
    cache.give_leaves(one)
    with pytest.raises(AssertionError, match="a leaf is free twice"):
        cache.check_integrity()


def test_a_budget_without_a_page_is_refused():
    with pytest.raises(InputError, match="too small: one page and tail take"):
        BranchingCache(LAYERS, 1000, torch.float32, torch.device("cpu"))
