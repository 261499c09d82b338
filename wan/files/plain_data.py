"""YAML and JSON that may come from anyone, as plain values: bounded, no key twice, all that a sidecar can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import yaml

# Far beyond what settings and indexes of checkpoints need, and read within a second.
MAX_BYTES = 16 * 2**20
# YAML, which people write, is read far more slowly.
MAX_YAML = 2**19
MAX_NODES = 30_000
MAX_DEPTH = 100
MAX_DIGITS = 64


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark; raises `OSError`, and `ValueError` for too large a one."""
    with path.open("rb") as file:
        # One byte too many is enough to know, also of a device or pipe that has no size and no end.
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    return content.decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises `OSError`, and `ValueError` as `parse_json` does."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises `OSError`, and `ValueError` as `parse_yaml` does."""
    return parse_yaml(read_text(path))


def parse_json(text: str) -> Any:
    """The value of JSON; raises `ValueError`, in one short line, for what is not JSON, or beyond what is allowed.

    Beyond that are a key that stands twice in an object, numbers that are not finite, and nesting without end.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            # Python's parser would take 1e999 as infinite, and NaN and Infinity, which are no JSON.
            parse_float=_number,
            parse_constant=_not_finite,
        )
        _check_depth(value)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return value


def parse_yaml(text: str) -> Any:
    """The value of YAML, of mappings with texts as keys, lists, texts, numbers, true, false and null alone.

    Raises `ValueError`, in one short line, for anything else, as `parse_json` does; also for aliases that stand for
    more than a file of settings can mean. What YAML would read as a date stays text.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"it is larger than {MAX_YAML // 2**10} KiB")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except (ArithmeticError, LookupError, TypeError) as error:
        # PyYAML's own, of values that are not of the type that a tag gives them, and of characters beyond Unicode.
        raise ValueError(f"a value is not of its type ({str(error)[:100]}); write it without a tag") from None
    finally:
        if loader is not None:
            loader.dispose()


TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"
TOO_MANY = f"it stands for more than {MAX_NODES} values; settings need far fewer"
# So many letters of a text count as a value, since aliases may repeat a long one.
LETTERS = 1000


class _Loader(yaml.SafeLoader):
    """Of the types of YAML those that JSON has too."""

    composed = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Counted while the tree grows: half a megabyte can be more nodes than are made within a second. An alias counts
        # as one here, and as all that it stands for in `_count_nodes`.
        self.composed += 1
        if self.composed > MAX_NODES:
            raise ValueError(TOO_MANY)
        if self.depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before the merge of "<<", whose keys others may replace.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"{_place(key_node)}: a key is no text; put it in quotes")
            if key_node.value in seen:
                raise ValueError(f"{_place(key_node)}: the key {key_node.value[:60]!r} stands twice; keep one")
            seen.add(key_node.value)
        return node

    def int_(self, node: yaml.ScalarNode) -> int:
        # Before Python's own limit, which hexadecimal numbers pass, and with a line for people.
        if len(node.value) > MAX_DIGITS:
            raise ValueError(f"{_place(node)}: a number of {len(node.value)} digits; the most is {MAX_DIGITS}")
        return self.construct_yaml_int(node)

    def float_(self, node: yaml.ScalarNode) -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise ValueError(f"{_place(node)}: {node.value[:60]!r} is not a finite number")
        return value

    def other(self, node: yaml.Node) -> NoReturn:
        raise ValueError(f"{_place(node)}: {node.tag[:60]!r} is not a type that is read; write a text, number or list")


# YAML's own resolvers without dates, on a copy, since yaml keeps them on the class.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# All the types that are made. Any other tag, such as !!binary, !!set or !!python/object, comes to `other` below.
_Loader.yaml_constructors = {
    f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
    for kind in ("null", "bool", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.int_)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.float_)
# None: every tag that has no constructor.
_Loader.add_constructor(None, _Loader.other)


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"


def _count_nodes(root: yaml.Node) -> None:
    """Refuse what its aliases make too large, without following one twice, and what contains itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        # An alias is the very node that its anchor names.
        if id(node) in above:
            raise ValueError(f"{_place(node)}: it contains itself; an alias may not stand within what it names")
        if len(above) > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        if id(node) not in sizes:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            # A mapping has pairs of nodes, a sequence has nodes.
            flat = [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
            own = 1 if isinstance(node, yaml.CollectionNode) else 1 + len(node.value) // LETTERS
            # Of each node once, for all aliases of it: nested ones can stand for exponentially many values.
            sizes[id(node)] = own + sum(size(child, (*above, id(node))) for child in flat)
            if sizes[id(node)] > MAX_NODES:
                raise ValueError(TOO_MANY)
        return sizes[id(node)]

    size(root, ())


def _check_depth(value: Any) -> None:
    # Level by level, since a recursion might itself end where it is to find a limit.
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        containers = (one for one in level if isinstance(one, (dict, list)))
        level = [inner for one in containers for inner in (one.values() if isinstance(one, dict) else one)]
        depth += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} stands twice in one object; keep one")
        found[key] = value
    return found


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; the most is {MAX_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text[:60]} is not a finite number")
