"""YAML text to plain values plus the place of every key and value: one pass of libyaml, YAML 1.2 core scalars.

PyYAML's own constructor would read `1e-3` as a string, `on` as true, `4:00:00` as 14400, and keep the last of two equal
keys without a word. Here the text is composed once, the nodes are walked, and each of these is what its author meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from orchestrator.spec.problems import KeyPath, Place, Problem, error_of, shown

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a PyYAML built without libyaml is slower, not different

MAX_BYTES = 4 * 1024 * 1024
_MAX_DEPTH = 64
_MAX_NODES = 100_000  # aliases counted each time they are used: nine lines of YAML can expand to gigabytes

_TAG = "tag:yaml.org,2002:"
_CORE: tuple[
    tuple[str, str, str], ...
] = (  # kind, pattern, first characters: https://yaml.org/spec/1.2.2/#103-core-schema
    ("null", r"null|Null|NULL|~|", "nN~\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, firsts in _CORE:
        for first in firsts:
            table.setdefault("" if first == "\0" else first, []).append(
                (_TAG + kind, re.compile(rf"(?:{pattern})\Z", re.ASCII))
            )
    return table


class _Composer(_Loader):  # type: ignore[misc]
    """libyaml's parser with the scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = _resolvers()
    _depth = 0

    # Called on the way down and up. libyaml's composer recurses on the C stack and knows no bound: `- - - - …` of some
    # 30 000 dashes ends the process with a segmentation fault, not with an exception.
    def descend_resolver(self, parent: yaml.Node | None, index: object) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            mark = None if parent is None else parent.start_mark
            raise yaml.composer.ComposerError(None, None, "too deeply nested", mark)

    def ascend_resolver(self) -> None:
        self._depth -= 1


@dataclass
class Document:
    """A value and, for every path in it, where it was written."""

    value: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)
    key_places: dict[KeyPath, Place] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)  # numbers and booleans as they were written

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """The place of a path, or of the nearest thing around it."""
        if key and path in self.key_places:
            return self.key_places[path]
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place()

    def drop(self, path: KeyPath) -> None:
        """Forget everything at and below a path (it is about to be replaced)."""
        for table in (self.places, self.key_places, self.texts):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]

    def adopt(self, path: KeyPath, other: Document) -> None:
        """Take over the places of `other` below `path`."""
        self.places.update({path + known: place for known, place in other.places.items()})
        self.key_places.update({path + known: place for known, place in other.key_places.items()})
        self.texts.update({path + known: text for known, text in other.texts.items()})


class _Walk:
    """Nodes to values. Collects every problem instead of stopping at the first."""

    def __init__(self, source: str, *, fixed: Place | None = None) -> None:
        self.document = Document(None)
        self.problems: list[Problem] = []
        self._source = source
        self._fixed = fixed
        self._nodes = 0

    def place(self, node: yaml.Node) -> Place:
        if self._fixed is not None:
            return self._fixed
        return Place(self._source, node.start_mark.line + 1, node.start_mark.column + 1)

    def refuse(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        self.problems.append(Problem(what, path, self.place(node)))

    def value(self, node: yaml.Node, path: KeyPath, depth: int = 0) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise error_of(
                [Problem("too large or too deeply nested (aliases that expand each other?)", (), self.place(node))]
            )
        self.document.places[path] = self.place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != _TAG + "seq":
                self.refuse(node, path, f"the YAML tag {node.tag} is not supported; leave it out")
            return [self.value(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        if node.tag != _TAG + "map":
            self.refuse(node, path, f"the YAML tag {node.tag} is not supported; leave it out")
        result: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged.append(value_node)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, path, "a key must be text, not a list or a mapping")
                continue
            key = str(key_node.value)
            inner = (*path, key)
            self._check_text(key_node, inner, key)
            if key in result:
                first = self.document.key_places[inner]
                where = "" if first.line is None else f" (first in line {first.line})"
                self.refuse(key_node, inner, f"this key is given twice{where}; keep one")
                continue
            self.document.key_places[inner] = self.place(key_node)
            result[key] = self.value(value_node, inner, depth + 1)
        for value_node in merged:
            self._merge(value_node, path, result, depth)
        return result

    def _merge(self, node: yaml.Node, path: KeyPath, result: dict[str, Any], depth: int) -> None:
        """`<<: *base`: keys written in the mapping itself win, then the earlier of several bases."""
        for base in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(base, yaml.MappingNode):
                self.refuse(base, path, "`<<` takes a mapping (or a list of them), such as `<<: *base`")
                continue
            walk = _Walk(self._source, fixed=self._fixed)
            walk._nodes = self._nodes
            values = walk.value(base, (), depth + 1)
            self._nodes = walk._nodes
            self.problems += walk.problems
            for key in [key for key in values if key not in result]:
                result[key] = values[key]
                for table, other in (
                    (self.document.places, walk.document.places),
                    (self.document.key_places, walk.document.key_places),
                ):
                    table.update({path + known: place for known, place in other.items() if known[:1] == (key,)})
                self.document.texts.update(
                    {path + known: text for known, text in walk.document.texts.items() if known[:1] == (key,)}
                )

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
        if kind in ("str", "merge"):
            self._check_text(node, path, text)
            return text
        if kind not in ("null", "bool", "int", "float") or not _matches(kind, text):
            self.refuse(node, path, f"the YAML tag {node.tag} is not supported here; leave it out")
            return text
        if kind == "null":
            return None
        self.document.texts[path] = text
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return self._integer(node, path, text)

    def _integer(self, node: yaml.Node, path: KeyPath, text: str) -> int:
        if len(text) > 64:  # int() itself gives up at 4 300 digits with an error of its own
            self.refuse(node, path, f"{shown(text)} is too large a number; put it in quotes to pass it as text")
            return 0
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def _check_text(self, node: yaml.Node, path: KeyPath, text: str) -> None:
        if "\0" in text:
            self.refuse(
                node, path, "holds a NUL character, which no argument, variable or file name can carry; remove it"
            )
        elif not _encodable(text):
            self.refuse(node, path, "is not valid Unicode (a lone surrogate); it must be UTF-8")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(kind: str, text: str) -> bool:
    """True when a tagged scalar (`!!int "5"`) really is of its kind."""
    return any(re.fullmatch(pattern, text, re.ASCII) for name, pattern, _ in _CORE if name == kind)


def parse_yaml(text: str, source: str, *, fixed: Place | None = None) -> Document:
    """YAML text to a Document. `fixed`: every place is this one (`--set`). Raises SpecError with all problems found."""
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = fixed or (Place(source) if mark is None else Place(source, mark.line + 1, mark.column + 1))
        raise error_of([Problem(_broken(error), (), place)]) from None
    except yaml.reader.ReaderError as error:
        raise error_of([Problem(_unreadable(error), (), fixed or _offset_place(text, source, error))]) from None
    except RecursionError:
        raise error_of([Problem("too deeply nested", (), fixed or Place(source, 1, 1))]) from None
    if node is None:
        return Document(None, places={(): fixed or Place(source, 1, 1)})
    walk = _Walk(source, fixed=fixed)
    walk.document.value = walk.value(node, ())
    if walk.problems:
        raise error_of(walk.problems)
    return walk.document


def _broken(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if problem == "too deeply nested":
        return problem
    context = f" ({error.context})" if error.context else ""
    if "character that cannot start any token" in problem:
        return f"not valid YAML: {problem}{context}; a tab in the indentation, or text that needs quotes"
    if "another document" in problem:
        return "a second YAML document starts here; a spec file holds one"
    if "mapping values are not allowed" in problem:
        return f"not valid YAML: {problem}{context}; text with `: ` in it needs quotes"
    return f"not valid YAML: {problem}{context}"


def _unreadable(error: yaml.reader.ReaderError) -> str:
    return f"not valid YAML: a control character is not allowed here ({error.reason}); write it as an escape in quotes"


def _offset_place(text: str, source: str, error: yaml.reader.ReaderError) -> Place:
    position = error.position if isinstance(error.position, int) else 0
    before = text.encode()[:position].decode(errors="replace")
    return Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))


def read_yaml(path: Path, *, what: str) -> Document:
    """A file to a Document. Raises SpecError when it is missing, unreadable, too large, not UTF-8 or not YAML."""
    source = str(path)

    def refuse(problem: str, hint: str | None = None) -> Any:
        return error_of([Problem(problem, (), Place(source))], hint=hint)

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise refuse(f"no such file ({what})", "Write a first one:  orch init FILE") from None
    except IsADirectoryError:
        raise refuse(f"is a directory; expected a YAML file ({what})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refuse(f"cannot be read ({what}): {reason}") from None
    if len(data) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES // 1024**2} MiB; that is no {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        place = Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise error_of([Problem("not UTF-8 text; save the file as UTF-8", (), place)]) from None
    return parse_yaml(text, source)
