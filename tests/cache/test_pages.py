"""PagePool: free list, references, prefix cache."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from moe_runtime.cache.pages import PagePool
from moe_runtime.errors import ConfigError

PAGES, SIZE = 7, 2


def publish(pool: PagePool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Allocate pages for `tokens`, publish the full ones, return them held."""
    pages = pool.allocate(pool.pages_for(len(tokens)))
    assert pages is not None
    pool.commit(pages, tokens, pool.new_chain(salt), first=0, last=len(tokens) // pool.page_size)
    return pages


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(3, 4, prefix_caching=True)
    first = pool.allocate(2)
    assert first == [0, 1]
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.release(first)
    assert pool.num_free == 3


def test_prefix_is_full_pages_without_the_last_token() -> None:
    pool = PagePool(8, 4, prefix_caching=True)
    pages = publish(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == pages[:2]
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8]) == pages[:1]
    assert pool.match_prefix([1, 2, 3, 4]) == []
    assert pool.match_prefix([1, 2, 3, 4, 0, 6, 7, 8, 9]) == pages[:1]
    assert pool.match_prefix([0, 2, 3, 4, 5, 6, 7, 8, 9]) == []
    assert pool.match_prefix([5, 6, 7, 8, 9]) == [], "a page is found behind its own prefix only"


def test_a_given_chain_is_extended_and_reused() -> None:
    pool = PagePool(8, 2, prefix_caching=True)
    pages = publish(pool, [1, 2, 3, 4])
    chain = pool.new_chain()
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7], chain) == pages
    assert len(chain) == 4
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 7], chain) == pages
    assert len(chain) == 4


def test_salts_keep_apart() -> None:
    pool = PagePool(8, 2, prefix_caching=True)
    pages = publish(pool, [1, 2, 3], b"tenant")
    assert pool.match_prefix([1, 2, 3]) == []
    assert pool.match_prefix([1, 2, 3], pool.new_chain(b"other")) == []
    assert pool.match_prefix([1, 2, 3], pool.new_chain(b"tenant")) == pages[:1]


def test_tokens_are_compared_on_a_hit() -> None:
    pool = PagePool(8, 2, prefix_caching=True)
    publish(pool, [1, 2, 3])
    victim = pool.new_chain()
    pool.match_prefix([1, 2, 3], victim)
    assert pool.match_prefix([8, 9, 3], victim) == [], "a forged or colliding name does not serve another's content"


def test_eviction_takes_the_least_recently_used_and_tails_first() -> None:
    pool = PagePool(4, 2, prefix_caching=True)
    old, new = publish(pool, [1, 2, 3, 4]), publish(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.match_prefix([1, 2, 3, 4, 0]) == old[:1]
    hit = pool.match_prefix([1, 2, 0])
    pool.acquire(hit)
    pool.release(hit)  # used now
    assert pool.allocate(1) == [new[1]]
    assert pool.match_prefix([1, 2, 0]) == old[:1]


def test_blank_pages_go_before_cached_ones() -> None:
    pool = PagePool(4, 2, prefix_caching=True)
    pages = publish(pool, [1, 2])
    pool.release(pages)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.match_prefix([1, 2, 0]) == pages


def test_forgotten_pages_are_not_found_again() -> None:
    pool = PagePool(4, 2, prefix_caching=True)
    held, free = publish(pool, [1, 2]), publish(pool, [3, 4])
    pool.release(free)
    pool.forget(held + free)
    assert pool.match_prefix([1, 2, 0]) == pool.match_prefix([3, 4, 0]) == []
    pool.release(held)
    assert pool.num_free == 4


def test_content_published_twice_stays_where_it_is() -> None:
    pool = PagePool(4, 2, prefix_caching=True)
    first, second = publish(pool, [1, 2]), publish(pool, [1, 2])
    assert pool.match_prefix([1, 2, 0]) == first
    pool.release(second)
    assert pool.allocate(3) is not None
    assert pool.match_prefix([1, 2, 0]) == first


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = PagePool(4, 2, prefix_caching=False)
    publish(pool, [1, 2, 3, 4])
    assert pool.match_prefix([1, 2, 3, 4, 5]) == []


def test_misuse_is_noticed() -> None:
    pool = PagePool(2, 2, prefix_caching=True)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)
    with pytest.raises(ConfigError, match=r"0 pages of 2 tokens.*kv_cache_bytes"):
        PagePool(0, 2, prefix_caching=True)


class PoolMachine(RuleBasedStateMachine):
    """Sequences of a two-letter alphabet (so prefixes meet) that live, grow, share and die, beside a plain model.

    The model writes every page's content where a runner would; a prefix hit must find exactly that content.
    """

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE, prefix_caching=True)
        self.held: dict[int, tuple[list[int], list[int], list[bytes], int]] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.next_id = 0

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens: list[int]) -> int:
        pool, chain = self.pool, self.pool.new_chain()
        found = pool.match_prefix(tokens, chain)
        assert len(found) * SIZE < len(tokens)
        for index, page in enumerate(found):
            assert self.content[page] == tuple(tokens[: (index + 1) * SIZE]), "a hit serves another prefix"
        pool.acquire(found)
        free = pool.num_free
        fresh = pool.allocate(pool.pages_for(len(tokens)) - len(found))
        self.next_id += 1
        if fresh is None:
            assert free < pool.pages_for(len(tokens)) - len(found)
            pool.release(found)
            return self.next_id
        for index, page in enumerate(fresh, start=len(found)):
            self.content[page] = tuple(tokens[: (index + 1) * SIZE])
        self.held[self.next_id] = (tokens, found + fresh, chain, len(found))
        return self.next_id

    @rule(sequence=sequences)
    def publish(self, sequence: int) -> None:
        if sequence in self.held:
            tokens, pages, chain, published = self.held[sequence]
            full = len(tokens) // SIZE
            self.pool.commit(pages, tokens, chain, first=published, last=full)
            self.held[sequence] = (tokens, pages, chain, full)

    @rule(sequence=consumes(sequences), poisoned=st.booleans())
    def end(self, sequence: int, poisoned: bool) -> None:
        if sequence in self.held:
            pages = self.held.pop(sequence)[1]
            if poisoned:
                self.pool.forget(pages)
            self.pool.release(pages)

    @precondition(lambda self: not self.held)
    @rule()
    def everything_can_be_taken_when_nothing_is_held(self) -> None:
        pages = self.pool.allocate(PAGES)
        assert sorted(pages or ()) == list(range(PAGES))
        assert not any(self.pool.match_prefix([*tokens, 0]) for tokens in self.content.values())
        self.pool.release(pages or ())

    @invariant()
    def references_are_the_holders(self) -> None:
        holders = [page for _, pages, _, _ in self.held.values() for page in pages]
        assert self.pool.num_free == PAGES - len(set(holders))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
