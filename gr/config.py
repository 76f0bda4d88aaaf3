"""Strict configuration: YAML -> frozen dataclasses <- command-line overrides.

A config is a tree of frozen dataclasses. Fields that choose between registered parts are annotated
``Annotated[Any, OneOf(REGISTRY)]``, where a registry is a plain dict ``name -> (Config, builder)``; the YAML then
says ``kind: name``, or ``kind: package.module:Class`` for a user's own part, whose config is ``Class.Config`` (a frozen
dataclass with a field ``kind``) and which is called as the registry's builders are.

Nothing is guessed: an unknown key, a wrong type or an impossible value is one sentence naming file, field and value.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gr.errors import UserError

T = TypeVar("T")
Registry = Mapping[str, tuple[type, Callable[..., Any]]]


def check_name(name: str, whose: str) -> None:
    """Refuses a name that could not be a folder's.

    Raises:
        UserError: As said.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"name is {name!r}; a {whose}'s name is letters, digits, '.', '_' and '-'")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a field whose config is chosen by its ``kind`` from a registry ``name -> (Config, builder)``."""

    registry: Registry
    default: str | None = None


def runtime(default: Any) -> Any:
    """A field that does not change what is learned (paths, logging): left out of the config's hash."""
    return dataclasses.field(default=default, metadata={"runtime": True})


def unhashed_default(default: Any) -> Any:
    """A field left out of the config's hash while its part says nothing but defaults.

    For parts that most runs do without: their results keep the hash under which they are recorded.
    """
    return dataclasses.field(default=default, metadata={"unhashed_default": default})


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-3`` as a float, ``on`` and ``no`` as words, and refuses repeated keys.

    YAML 1.1 wants ``1.0e-3`` and takes on, off, yes and no for booleans; only true and false are left.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(
                    f"{self.name}: key {key!r} stands twice in one mapping (line {node.start_mark.line + 1})"
                )
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != _BOOL]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML; ``source`` names it in errors."""
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}:{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file into ``cls`` and applies overrides such as ``--train.epochs 3`` or ``--seed=1``.

    Raises:
        UserError: File missing, not YAML, unknown field, wrong type, impossible value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"config {path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    raw = parse_yaml(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must be a mapping of fields, not {type(raw).__name__}")
    source = str(path)
    if overrides:
        raw = apply_overrides(raw, overrides)
        source += " with command-line overrides"
    return from_dict(cls, raw, source)


def apply_overrides(raw: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Sets dotted fields in a raw config; overriding a ``kind`` starts that part from its own defaults."""
    result = json.loads(json.dumps(raw, default=str)) if raw else {}
    rest = list(arguments)
    pairs: list[tuple[str, str]] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"unexpected argument {word!r}; overrides look like --train.epochs 3")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"override --{key} needs a value, as in --{key} 3")
            value = rest.pop(0)
        pairs.append((key, value))
    # A kind resets its part and all within, so kinds go first, outer ones before inner ones, whatever the order given.
    pairs.sort(key=lambda pair: (0, pair[0].count(".")) if pair[0].endswith(".kind") else (1, 0))
    for key, value in pairs:
        node = result
        *parents, leaf = key.split(".")
        for name in parents:
            child = node.get(name)
            if child is None:
                child = node[name] = {}
            if not isinstance(child, dict):
                raise UserError(f"override --{key}: {name} is a value, not a group of fields")
            node = child
        parsed = parse_yaml(value, f"override --{key}")
        if leaf == "kind" and node.get("kind") != parsed:
            node.clear()
        node[leaf] = parsed
    return result


def from_dict(cls: type[T], raw: Mapping[str, Any], source: str = "config") -> T:
    """Builds ``cls`` from plain data, strictly. ``source`` names the data in errors."""
    return _build(cls, raw, "", source)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data (dict, list, scalars) of a config, complete with defaults; ``from_dict`` inverts it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def config_hash(config: Any) -> str:
    """12 hex digits of the sha256 of the canonical JSON of everything but ``runtime`` fields (and some defaults)."""

    def strip(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = [f for f in dataclasses.fields(value) if not f.metadata.get("runtime")]
            found = {f.name: (strip(getattr(value, f.name)), f.metadata.get("unhashed_default")) for f in fields}
            return {name: part for name, (part, silent) in found.items() if silent is None or part != strip(silent)}
        return to_dict(value)

    text = json.dumps(strip(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dump(config: Any) -> str:
    """YAML of the whole config, defaults included."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def find(registry: Registry, kind: str, field: str, source: str = "config") -> tuple[type, Callable[..., Any]]:
    """The (Config, builder) of a kind: registered, or imported from ``package.module:Class``."""
    if kind in registry:
        return registry[kind]
    if ":" in kind:
        module, _, name = kind.partition(":")
        try:
            owner = getattr(importlib.import_module(module), name)
            return owner.Config, owner
        except (ImportError, AttributeError) as error:
            raise UserError(f"{source}: {field}.kind {kind!r} cannot be imported: {error}") from None
    near = difflib.get_close_matches(str(kind), registry, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"{source}: {field}.kind {kind!r} is unknown; {hint}one of {', '.join(sorted(registry))}, "
        "or package.module:Class"
    )


def build(registry: Registry, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Builds the registered part that ``config.kind`` names: ``builder(config, *args, **kwargs)``."""
    return find(registry, config.kind, "config")[1](config, *args, **kwargs)


def _build(annotation: Any, raw: Any, path: str, source: str) -> Any:
    where = f"{source}: {path or 'the config'}"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        choice = next((a for a in args[1:] if isinstance(a, OneOf)), None)
        if choice is None:
            return _build(args[0], raw, path, source)
        if dataclasses.is_dataclass(raw):
            return raw
        if not isinstance(raw, Mapping):
            raise UserError(f"{where} must be a mapping with a kind, not {raw!r}")
        kind = raw.get("kind", choice.default)
        if not isinstance(kind, str):
            raise UserError(f"{where}.kind is missing; one of {', '.join(sorted(choice.registry))}")
        return _build(find(choice.registry, kind, path, source)[0], {**raw, "kind": kind}, path, source)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, raw, path, source)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _build(option, raw, path, source)
            except UserError:
                continue
        return _build(options[-1], raw, path, source)
    if origin is typing.Literal:
        if raw not in args or isinstance(raw, bool) != any(isinstance(a, bool) and a == raw for a in args):
            near = difflib.get_close_matches(str(raw), [str(a) for a in args], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{where} is {raw!r}; {hint}it must be one of {', '.join(map(repr, args))}")
        return raw
    if origin is tuple:
        if not isinstance(raw, (list, tuple)):
            raise UserError(f"{where} is {raw!r}; it must be a list")
        inner = [args[0]] * len(raw) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(raw):
            raise UserError(f"{where} has {len(raw)} values; it must have {len(inner)}")
        return tuple(_build(a, r, f"{path}[{i}]", source) for i, (a, r) in enumerate(zip(inner, raw, strict=True)))
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise UserError(f"{where} is {raw!r}; it must be a mapping")
        return {str(k): _build(args[1], v, f"{path}.{k}", source) for k, v in raw.items()}
    if annotation is Any:
        return raw
    if annotation is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, annotation) or (isinstance(raw, bool) and annotation is not bool):
        raise UserError(f"{where} is {raw!r} ({type(raw).__name__}); it must be of type {annotation.__name__}")
    return raw


def _build_dataclass(cls: type, raw: Any, path: str, source: str) -> Any:
    if dataclasses.is_dataclass(raw) and isinstance(raw, cls):
        return raw
    where = f"{source}: {path or 'the config'}"
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is {raw!r}; it must be a mapping of the fields of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{path}." if path else ""
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known fields: {', '.join(fields)}"
            raise UserError(f"{source}: unknown field {prefix}{key}; {hint}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _build(hints[name], raw[name], prefix + name, source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: field {prefix}{name} is missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
