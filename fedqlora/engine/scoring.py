"""Scoring: the likeliest of many options after each prompt, exactly, the prompt encoded once.

The probability of an option is the product over its tokens of the probability among the tokens
with which some option goes on there: what a model gives that can answer with options only. The
options of a field sum to one, and a long name is not marked down for its length.

A field whose options continue those of the field before (a category after its chapter) is
answered below the answer given there, as one who writes from left to right would. Searched over
all chapters, the demo's 1,319 categories took ten times as long.

The options form a trie over tokens. A prompt is encoded once and its cache is reused. The
search opens the node of highest probability first, until that is an option. As probabilities
only fall along a path, that option beats every one below a node that was never opened: the
result equals scoring each option by itself, and a step with one way to go costs nothing.

Shape letters: B prompts, R rows (a path after a prompt), L tokens of a path, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedqlora.engine.prompts import Path, Prompts
from fedqlora.errors import DataError

# Measured with the demo model on two cores: a pass of a few rows costs most of a full one.
_OPENED_AT_ONCE = 2
# Bounds the logits in memory: 512 tokens of a vocabulary of 150,000 are 0.3 GB as float32.
_TOKENS_AT_ONCE = 512


@dataclass(eq=False)
class Node:
    """A token in the trie, with what follows it.

    Attributes:
        path: tokens from the first of the completion up to here.
        children: by next token.
        options: field -> index of the option that ends here.
        fields: fields that have an option here or below.
    """

    path: Path
    children: dict[int, Node] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)


def build_trie(options: Mapping[str, Sequence[Path]]) -> Node:
    """One trie of every field's options, given as token paths.

    Raises:
        DataError: two options of a field are the same tokens, or one starts another, as when
            the tokenizer does not know their characters.
    """
    root = Node(())
    for name, paths in options.items():
        root.fields.add(name)
        for index, path in enumerate(paths):
            node = root
            for depth, token in enumerate(path, start=1):
                node = node.children.setdefault(token, Node(path[:depth]))
                if name in node.options:
                    raise _same(name, node.options[name], index)
                node.fields.add(name)
            if not path or any(name in child.fields for child in node.children.values()):
                raise _same(name, index, index)
            node.options[name] = index
    return root


def _same(name: str, one: int, other: int) -> DataError:
    numbers = f"option {one + 1}" + (f" and {other + 1}" if other != one else " and another")
    return DataError(
        f"choices.json, field `{name}`: the base model's tokenizer does not tell {numbers} apart; "
        "reword them"
    )


Entry = tuple[float, Path, Node]


class Search:
    """The search over one batch of prompts."""

    def __init__(self, prompts: Prompts, count: int, trie: Node) -> None:
        self._prompts = prompts
        self._trie = trie
        # For each prompt, opened node -> logit of each child, in the order of its children.
        self._opened: list[dict[Path, list[float]]] = [{} for _ in range(count)]
        self._first = prompts.first().float()
        tokens = list(trie.children)
        for opened, row in zip(self._opened, self._first[:, tokens].tolist(), strict=True):
            opened[()] = row

    def score(self, completions: Sequence[Path]) -> list[float]:
        """Log-likelihood of each prompt's own completion; opens the nodes on its way."""
        first = self._first.log_softmax(dim=-1)
        totals = [first[i, path[0]].item() for i, path in enumerate(completions)]
        wanted = [(i, path[:-1]) for i, path in enumerate(completions) if len(path) > 1]
        for owners, logits in self._run(wanted):
            norms = logits.logsumexp(dim=-1)
            for row, owner in enumerate(owners):
                path = torch.tensor(completions[owner][1:], device=logits.device)
                steps = torch.arange(len(path), device=logits.device)
                totals[owner] += (logits[row, steps, path] - norms[row, steps]).sum().item()
        return totals

    def best(self, name: str, after: Sequence[Node] | None = None) -> list[Node]:
        """The likeliest option of a field for each prompt, as its node in the trie.

        Args:
            name: the field.
            after: for each prompt, the answer to the field before; where options of `name`
                continue it, only these are searched.
        """
        found: dict[int, Node] = {}
        roots = [self._trie] * len(self._opened) if after is None else after
        starts = [node if name in node.fields else self._trie for node in roots]
        heaps: list[list[Entry]] = [[(0.0, node.path, node)] for node in starts]
        while len(found) < len(heaps):
            wanted: list[tuple[int, Path]] = []
            for owner, heap in enumerate(heaps):
                if owner not in found:
                    best = self._advance(owner, heap, name, wanted)
                    if best is not None:
                        found[owner] = best
            for _ in self._run(wanted):
                pass  # opening the nodes is all that is wanted here
        return [found[owner] for owner in range(len(heaps))]

    def _advance(
        self,
        owner: int,
        heap: list[Entry],
        name: str,
        wanted: list[tuple[int, Path]],
    ) -> Node | None:
        """Pop nodes in order of cost until an option is certain or the model must be asked.

        The cost is the negative log-probability. Several nodes are asked for at once, as a
        forward pass of few rows costs most of a full one.
        """
        waiting: list[Entry] = []
        while heap and len(waiting) < _OPENED_AT_ONCE:
            cost, path, node = heapq.heappop(heap)
            if name in node.options:
                if not waiting:
                    return node
                waiting.append((cost, path, node))
                break
            ways = [
                (index, child)
                for index, child in enumerate(node.children.values())
                if name in child.fields
            ]
            if len(ways) == 1:
                heapq.heappush(heap, (cost, ways[0][1].path, ways[0][1]))
            elif path in self._opened[owner]:
                logits = [self._opened[owner][path][index] for index, _ in ways]
                peak = max(logits)
                norm = peak + math.log(sum(math.exp(value - peak) for value in logits))
                for (_, child), value in zip(ways, logits, strict=True):
                    heapq.heappush(heap, (cost + norm - value, child.path, child))
            else:
                waiting.append((cost, path, node))
                wanted.append((owner, path))
        for entry in waiting:
            heapq.heappush(heap, entry)
        return None

    def _run(self, wanted: Sequence[tuple[int, Path]]) -> Iterator[tuple[list[int], Tensor]]:
        """Ask the model for (prompt, path) pairs and open every trie node on the paths.

        Yields, part by part, the prompts of its rows and their float32 logits (R, L, V).
        """
        rest = list(wanted)
        while rest:
            longest = 0
            taken = 0
            for _, path in rest:
                longest = max(longest, len(path))
                if taken and (taken + 1) * longest > _TOKENS_AT_ONCE:
                    break
                taken += 1
            part, rest = rest[:taken], rest[taken:]
            owners = [owner for owner, _ in part]
            paths = [path for _, path in part]
            logits = self._prompts.after(owners, paths).float()
            self._open(owners, paths, logits)
            yield owners, logits

    def _open(self, owners: Sequence[int], paths: Sequence[Path], logits: Tensor) -> None:
        """Note the children's logits of every trie node on the paths."""
        found: list[tuple[int, int, Node]] = []
        for row, path in enumerate(paths):
            node = self._trie
            for depth, token in enumerate(path):
                if token not in node.children:
                    break
                node = node.children[token]
                if len(node.children) > 1 and node.path not in self._opened[owners[row]]:
                    found.append((row, depth, node))
        places = [(row, depth, token) for row, depth, node in found for token in node.children]
        if places:
            rows, depths, tokens = torch.tensor(places, device=logits.device).T
            values = iter(logits[rows, depths, tokens].tolist())
            for row, _, node in found:
                self._opened[owners[row]][node.path] = [next(values) for _ in node.children]
