"""Counting of pages, and what the prefix cache keeps and gives up."""

import pytest

from dflash_jax.errors import InputError
from serve.pages import Memory, Pages
from serve.prefix import PrefixCache

PAGE = 4


def tokens(*pages: int) -> list[int]:
    """Page i of a text is made of i."""
    return [page for page in pages for _ in range(PAGE)]


def cache(count=8, checkpoints=None):
    pages = Pages(count)
    return pages, PrefixCache(pages, PAGE, checkpoints)


def check(pages, prefix, *sequences):
    pages.check(sequences, [n.page for n in prefix.nodes()])


def test_a_page_goes_with_its_last_holder():
    pages = Pages(3)
    taken = pages.take(2)
    pages.share(taken[:1])
    pages.release(taken)
    pages.check([taken[:1]], [])
    pages.release(taken[:1])
    assert pages.free == 3
    with pytest.raises(ValueError, match="nobody holds"):
        pages.release(taken[:1])
    with pytest.raises(ValueError, match="4 pages wanted"):
        pages.take(4)


def test_the_longest_beginning_is_found_and_a_token_left_to_run():
    pages, prefix = cache()
    own = pages.take(3)
    prefix.insert(tokens(1, 2, 3), own)
    assert prefix.match([*tokens(1, 2, 3), 9]).pages == own
    assert prefix.match(tokens(1, 2, 3)).pages == own[:2]
    assert prefix.match(tokens(1, 7, 3)).pages == own[:1]
    assert prefix.match(tokens(2, 3)).pages == []
    check(pages, prefix, own)


def test_the_least_recently_used_goes_first_and_nothing_that_is_held():
    pages, prefix = cache(4)
    first, second = pages.take(2), pages.take(2)
    prefix.insert(tokens(1, 2), first)
    prefix.insert(tokens(3, 4), second)
    pages.release(first)
    pages.release(second)
    prefix.match([*tokens(1, 2), 0])  # now the other is older
    prefix.evict(1)
    assert prefix.match([*tokens(3, 4), 0]).pages == second[:1]
    assert prefix.match([*tokens(1, 2), 0]).pages == first
    pages.share(first)
    prefix.evict(4)
    assert pages.free == 2
    assert prefix.match([*tokens(1, 2), 0]).pages == first
    check(pages, prefix, first)


def test_nothing_is_kept_below_a_page_of_another():
    """Else its page could go while the one below it is in use."""
    pages, prefix = cache()
    first, second = pages.take(1), pages.take(2)
    prefix.insert(tokens(1), first)
    assert prefix.insert(tokens(1, 2), second) is None
    assert [n.page for n in prefix.nodes()] == first
    node = prefix.insert(tokens(1), second[:1])
    assert node is not None and node.page == first[0]


def test_recurrent_targets_hit_where_a_checkpoint_is():
    pages, prefix = cache(8, checkpoints=1)
    own = pages.take(3)
    node = prefix.insert(tokens(1, 2), own[:2])
    prefix.insert(tokens(1, 2, 3), own)
    assert prefix.match([*tokens(1, 2, 3), 0]).pages == []
    assert prefix.checkpoint(node) == 0
    assert prefix.checkpoint(node) is None  # known already
    found = prefix.match([*tokens(1, 2, 3), 0])
    assert (found.pages, found.checkpoint, found.common) == (own[:2], 0, 3)
    other = prefix.insert(tokens(1), own[:1])
    assert prefix.checkpoint(other) == 0  # the only one moves
    assert prefix.match([*tokens(1, 2, 3), 0]).pages == own[:1]
    pages.release(own)
    prefix.evict(8)
    assert pages.free == 8
    assert prefix.checkpoint(prefix.insert(tokens(5), pages.take(1))) == 0


def test_pages_fill_the_memory_that_is_left():
    memory = Memory(weights=1000, slots=200, checkpoints=300, page=50, pages=0)
    assert memory.pages_within(1999, least=9) == 9
    with pytest.raises(InputError, match="the 10 pages of one longest request"):
        memory.pages_within(1999, least=10)
