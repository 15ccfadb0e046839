"""Who holds which page of the paged cache: reference counts, free list, prefix cache. Bookkeeping only, no storage.

A page is blank (free, content worthless), cached (free, content published and evictable, least recently used first) or
held (one or more references). A published page is found again by a hash chain: page i of a sequence is named by
`blake2b(name of page i-1, its token ids as int64)`, and the page's tokens are compared on every hit, so even a
collision cannot give one request another one's context.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from moe_runtime.errors import ConfigError

_DIGEST_BYTES = 32


class PagePool:
    """`num_pages` pages of `page_size` tokens. Pages are numbered 0..num_pages-1.

    Every operation costs O(pages touched).
    """

    __slots__ = ("_blank", "_cached", "_name_of", "_page_named", "_references", "_tokens_of", "num_pages",
                 "page_size", "prefix_caching")  # fmt: skip

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool) -> None:
        if num_pages < 1 or page_size < 1:
            raise ConfigError(
                f"a cache of {num_pages} pages of {page_size} tokens holds nothing: both must be at least 1 "
                "(raise engine.kv_cache_bytes or lower engine.page_size)"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._name_of: dict[int, bytes] = {}
        self._tokens_of: dict[int, array[int]] = {}
        self._page_named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, cached ones included."""
        return len(self._blank) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None, and nothing changed, where fewer are free."""
        if count > len(self._blank) + len(self._cached):
            return None
        taken: list[int] = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _none = self._cached.popitem(last=False)
                self._unname(page)
            self._references[page] = 1
            taken.append(page)
        return taken

    def acquire(self, pages: Iterable[int]) -> None:
        """One more reference to pages that are held or cached (what `match_prefix` returned)."""
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less. Later pages become evictable first: a chain is useless without its beginning."""
        for page in reversed(pages):
            count = self._references[page] - 1
            assert count >= 0, f"page {page} released more often than acquired"
            self._references[page] = count
            if count == 0:
                if page in self._name_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def new_chain(self, salt: bytes = b"") -> list[bytes]:
        """The beginning of a sequence's hash chain; `chain[i + 1]` will name its page i. Requests of different salt
        never share pages."""
        return [blake2b(salt, digest_size=_DIGEST_BYTES, person=b"page chain").digest()]

    def match_prefix(self, token_ids: Sequence[int], chain: list[bytes] | None = None) -> list[int]:
        """Published pages that hold the beginning of `token_ids`, in order, not yet acquired.

        Full pages only, and never the one holding the last token, so at least one token is left to compute. `chain`
        (from `new_chain`) is extended in place as far as it was hashed; passing it again saves the hashing.
        """
        found: list[int] = []
        if not self.prefix_caching:
            return found
        chain = self.new_chain() if chain is None else chain
        size = self.page_size
        for index in range((len(token_ids) - 1) // size):
            tokens = array("q", token_ids[index * size : (index + 1) * size])
            if len(chain) == index + 1:
                chain.append(_name(chain[index], tokens))
            page = self._page_named.get(chain[index + 1])
            if page is None or self._tokens_of[page] != tokens:
                break
            found.append(page)
        return found

    def commit(
        self, pages: Sequence[int], token_ids: Sequence[int], chain: list[bytes], *, first: int, last: int
    ) -> None:
        """Publish pages `first..last-1` of a sequence: all their tokens (`token_ids` are the sequence's) are computed.

        Content that is published already stays where it is; the second copy simply remains private.
        """
        if not self.prefix_caching:
            return
        size = self.page_size
        for index in range(first, last):
            page = pages[index]
            assert self._references[page] > 0, f"page {page} published while free"
            tokens = array("q", token_ids[index * size : (index + 1) * size])
            assert len(tokens) == size, f"page {page} published with {len(tokens)} of {size} tokens"
            if len(chain) == index + 1:
                chain.append(_name(chain[index], tokens))
            name = chain[index + 1]
            if page not in self._name_of and name not in self._page_named:
                self._name_of[page] = name
                self._page_named[name] = page
                self._tokens_of[page] = tokens

    def forget(self, pages: Iterable[int]) -> None:
        """Unpublish pages whose content must not be found again (a sequence whose numbers were not finite)."""
        for page in pages:
            if page in self._name_of:
                self._unname(page)
                if page in self._cached:
                    del self._cached[page]
                    self._blank.append(page)

    def _unname(self, page: int) -> None:
        del self._page_named[self._name_of.pop(page)]
        del self._tokens_of[page]


def _name(parent: bytes, tokens: array[int]) -> bytes:
    return blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest()
