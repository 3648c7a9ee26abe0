"""The prefix cache: a radix tree over pages, so that what two prompts begin with alike is run once.

A page holds the target's and the drafter's keys and values of its tokens, so a hit brings both, and acceptance after
it is that of a cold start. Recurrent layers cannot be resumed from keys and values: for targets that have some, chosen
nodes have a checkpoint of the recurrent state behind their last token, and a hit reaches to the deepest of these only.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve.pages import Pages


@dataclass(eq=False)
class Node:
    """One page of tokens, behind those of its parents."""

    tokens: tuple[int, ...]
    page: int
    parent: "Node | None"
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)
    used: int = 0  # when last, by a counter
    checkpoint: int | None = None
    salt: str = ""  # of a root


@dataclass(frozen=True)
class Match:
    """What the cache knows of a prompt's beginning."""

    pages: list[int]  # that can be used at once
    checkpoint: int | None  # of the recurrent state behind them
    common: int  # pages whose tokens are known, with a checkpoint behind them or not


class PrefixCache:
    """Which pages begin with which tokens. It keeps pages, and gives up those that nobody holds when asked to."""

    def __init__(self, pages: Pages, page_size: int, checkpoints: int | None):
        """`checkpoints` is how many there is room for; None: the target needs none."""
        self.pages, self.page_size = pages, page_size
        self.recurrent = checkpoints is not None
        self._roots: dict[str, Node] = {}  # by salt: prompts with different ones share nothing
        self._spare = list(reversed(range(checkpoints or 0)))
        self._marked: dict[Node, None] = {}  # nodes with a checkpoint
        self._leaves: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._clock = itertools.count(1)
        self.hits = self.misses = 0  # pages of prompts that were found, and that were not

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest known beginning of a prompt that leaves at least one of its tokens to run."""
        most = (len(tokens) - 1) // self.page_size
        path = self._path(tokens, most, salt)
        usable = len(path)
        if self.recurrent:
            usable = max((i + 1 for i, node in enumerate(path) if node.checkpoint is not None), default=0)
        now = next(self._clock)
        for node in path:
            self._touch(node, now)
        self.hits += usable
        self.misses += most - usable
        checkpoint = path[usable - 1].checkpoint if usable else None
        return Match([node.page for node in path[:usable]], checkpoint, len(path))

    def _path(self, tokens: Sequence[int], most: int, salt: str) -> list[Node]:
        node, path = self._roots.get(salt), []
        if node is None:
            return path
        for key in itertools.islice(self._keys(tokens), most):
            if (child := node.children.get(key)) is None:
                break
            path.append(node := child)
        return path

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self.page_size
        return (tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size))

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> Node | None:
        """Keep a sequence's pages, as far as `tokens` fill them; the node of the last one, None if there is none.

        Where the same tokens lie in another page already, that one stays, and nothing new is kept below it: a page in
        use must have all pages before it in use.
        """
        root = self._roots.setdefault(salt, Node((), -1, None, salt=salt))
        node, own = root, True
        now = next(self._clock)
        for key, page in zip(self._keys(tokens), pages, strict=False):
            child = node.children.get(key)
            if child is None and not own:
                return None
            if child is None:
                child = node.children[key] = Node(key, page, node)
                self.pages.keep(page)
                self._leaves.pop(node, None)
                self._leaves[child] = None
            own = own and child.page == page
            node = child
            self._touch(node, now)
        self._drop_if_empty(root)
        return None if node is root else node

    def _drop_if_empty(self, root: Node) -> None:
        if not root.children:
            self._roots.pop(root.salt, None)

    def _touch(self, node: Node, now: int) -> None:
        node.used = now
        if node in self._leaves:
            self._leaves.move_to_end(node)

    def checkpoint(self, node: Node) -> int | None:
        """Where to put the recurrent state behind `node`; None where it is known, or there is no room at all."""
        if node.checkpoint is not None:
            return None
        if not self._spare:
            if not self._marked:
                return None
            self._unmark(min(self._marked, key=lambda n: n.used))
        node.checkpoint = self._spare.pop()
        self._marked[node] = None
        return node.checkpoint

    def _unmark(self, node: Node) -> None:
        if node.checkpoint is not None:
            self._spare.append(node.checkpoint)
            node.checkpoint = None
            del self._marked[node]

    def evict(self, count: int) -> None:
        """Give up pages, least recently used first, until `count` are free or none is idle."""
        while self.pages.free < count:
            node = next((n for n in self._leaves if not self.pages.held(n.page)), None)
            if node is None:
                return
            self._remove(node)

    def _remove(self, leaf: Node) -> None:
        self._unmark(leaf)
        self.pages.drop(leaf.page)
        del self._leaves[leaf]
        parent = leaf.parent
        if parent is None:
            return
        del parent.children[leaf.tokens]
        if parent.parent is None:
            self._drop_if_empty(parent)
        elif not parent.children:
            self._leaves[parent] = None
            self._leaves.move_to_end(parent, last=False)  # nothing else was begun with it, so it is as old

    def nodes(self) -> Iterator[Node]:
        """All nodes that hold a page."""
        stack = [node for root in self._roots.values() for node in root.children.values()]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node
