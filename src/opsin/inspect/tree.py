"""A model's tensors as a tree: parts, shapes and counts. Repeated layers are drawn once."""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Union

from rich.text import Text
from rich.tree import Tree

Shape = tuple[int, ...]
Node = Union["dict[str, Node]", Shape]
"""A module, by the names of what it holds; or one tensor's shape."""


def parameter_tree(title: str, shapes: Mapping[str, Shape], *, notes: Mapping[str, str], depth: int) -> Tree:
    """shapes: of every tensor, by dotted name. notes: a remark on some parts, by dotted name. depth: levels drawn."""
    root = nest(shapes)
    tree = Tree(_line(title, root, ""))
    _grow(tree, root, "", notes, depth)
    return tree


def nest(shapes: Mapping[str, Shape]) -> dict[str, Node]:
    """Dotted names to nested tables."""
    root: dict[str, Node] = {}
    for name, shape in shapes.items():
        *modules, last = name.split(".")
        place = root
        for module in modules:
            inner = place.setdefault(module, {})
            assert isinstance(inner, dict)
            place = inner
        place[last] = shape
    return root


def count_parameters(node: Node) -> int:
    """Numbers in a tensor, or in all tensors of a module."""
    return sum(map(count_parameters, node.values())) if isinstance(node, dict) else math.prod(node)


def readable_count(count: int) -> str:
    """7062902784 -> '7.06 B'."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _grow(tree: Tree, node: dict[str, Node], path: str, notes: Mapping[str, str], depth: int) -> None:
    if depth == 0:
        return
    for name, child, times in _runs(node):
        place = f"{path}.{name}" if path else name
        branch = tree.add(_line(f"{name} x{times}" if times > 1 else name, child, notes.get(place, "")))
        if isinstance(child, dict) and not _is_flat(child):
            _grow(branch, child, place, notes, depth - 1)


def _runs(node: dict[str, Node]) -> list[tuple[str, Node, int]]:
    """(name, child, how many alike): of equal layers in a row one is listed, for all."""
    runs: list[tuple[str, Node, int]] = []
    for name, child in node.items():
        if not (isinstance(child, dict) and all(key.isdigit() for key in child)):
            runs.append((name, child, 1))
            continue
        first = 0
        for alike, group in groupby(child.values()):
            times = len(list(group))
            runs.append((name if times == len(child) > 1 else f"{name}.{first}", alike, times))
            first += times
    return runs


def _is_flat(node: dict[str, Node]) -> bool:
    """A module that holds tensors alone is one line."""
    return not any(isinstance(child, dict) for child in node.values())


def _line(name: str, node: Node, note: str) -> Text:
    line = Text(name, "bold" if isinstance(node, dict) and not _is_flat(node) else "")
    if isinstance(node, tuple):
        line.append(f"  {_shape(node)}", "cyan")
    elif _is_flat(node):
        tensors = ", ".join(f"{key} {_shape(shape)}" for key, shape in node.items() if isinstance(shape, tuple))
        line.append(f"  {tensors}", "cyan")
    line.append(f"  {readable_count(count_parameters(node))}", "green")
    if " x" in name:
        line.append(" each", "green")
    if note:
        line.append(f"  {note}", "dim")
    return line


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))
