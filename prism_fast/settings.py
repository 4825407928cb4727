"""YAML files, recipes and ``key.path=value`` overrides as one tree; faults in plain words; a tree printed as YAML.

Knows no key: `prism_fast/config/` says what there is.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from prism_fast import DataError

RECIPES = Path(__file__).parent / "recipes"
INSTEAD = {"steps": "epochs", "epochs": "steps"}  # where a higher layer sets one, the other of a lower layer gives way
QUOTED = ("'", '"', "|", ">", "!", "&")  # how a text begins that YAML reads otherwise than it stands
OPTIONS = {"config": "--config NAME", "base": "--config NAME", "resume": "--resume"}  # taken for keys
MISSING = "Value error, missing"  # how a check says that one of several keys must be set
GOT_LENGTH = 60  # a wrong value is quoted up to here

Config = TypeVar("Config", bound=BaseModel)


# ---- files and overrides


class _Loader(yaml.SafeLoader):
    """YAML of which keys are unique, and in which 10:30 is a text, 010 is ten and a date is no date."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; remove one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_REPLACED = {"int": r"[-+]?(0|[1-9][0-9_]*)", "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"}
_REPLACED["float"] += r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(f"(?:{_REPLACED[tag.removeprefix(_TAG)]})$") if tag.removeprefix(_TAG) in _REPLACED else regex)
        for tag, regex in resolvers
        if tag != f"{_TAG}timestamp"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """What _Loader reads back as it was."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a file in YAML or JSON. A top-level ``base: NAME`` is a recipe, or a file beside it, below it."""
    if path in seen:
        raise DataError(f"{path}: base: the files name each other in a circle; remove one of them")
    if not _is_file(path):
        raise DataError(f"{plain(path)}: {_no_file(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        as_json = path.suffix == ".json"
        tree = (json.loads(text, object_pairs_hook=_unique) if as_json else yaml.load(text, _Loader)) or {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not valid YAML (no text in UTF-8); save it as such") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}{_syntax_fault(error)}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a mapping of keys at the top level, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base.strip():
        raise DataError(f"{path}: base: expected the name of a recipe or a file, got {got(base)}")
    return merge(read_yaml(find_file(base, path.parent), (*seen, path)), tree)


def find_file(name: str | Path, folder: Path = Path()) -> Path:
    """The file of that name in ``folder``; where there is none, the recipe. ~ is the home folder."""
    try:
        path = folder / Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name}: {error}") from None
    recipe = RECIPES / f"{name}.yaml"
    return recipe if not _is_file(path) and _is_file(recipe) else path


def _is_file(path: Path) -> bool:
    """A file, or the pipe of a shell's <(...); what is no name is none."""
    try:
        return path.is_file() or path.is_fifo()
    except (OSError, ValueError):
        return False


def _no_file(path: Path) -> str:
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    close = difflib.get_close_matches(path.stem.lower(), recipes, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    try:
        fault = "is a folder, expected a file" if path.is_dir() else "no such configuration file"
    except (OSError, ValueError):
        fault = "no such configuration file"
    return f"{fault}; {meant}give a YAML file or a recipe ({', '.join(recipes)})"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the key {name!r} stands twice; remove one")
    return dict(pairs)


def _syntax_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "msg", None) or str(error)
    number = mark.line + 1 if mark else getattr(error, "lineno", None)
    line = f":{number}" if number else ""
    if problem.endswith("remove one"):
        return f"{line}: {problem}"
    language = "JSON" if isinstance(error, json.JSONDecodeError) else "YAML"
    return f"{line}: not valid {language} ({' '.join(problem.split())[:120]}); check indentation and quotes"


def plain(value: Any) -> str:
    """A name that was given, for one line of a terminal."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 2 * GOT_LENGTH else f"{text[: 2 * GOT_LENGTH]}..."


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key.path=value`` strings as one tree; values are YAML."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            is_file = override.endswith((".yaml", ".yml", ".json")) or _is_file(RECIPES / f"{override}.yaml")
            hint = f"; a file or recipe goes after --config: --config {override}" if is_file else ""
            raise DataError(f"override {got(override)}: expected key.path=value, for example run.seed=1{hint}")
        try:
            branch = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problem = getattr(error, "problem", None) or ""
            remedy = problem if problem.endswith("remove one") else "the value is not YAML; quote it"
            raise DataError(f"override {got(override)}: {remedy}") from None
        if isinstance(branch, str) and value.strip()[:1] not in QUOTED:
            branch = value.strip()  # as it stands: YAML ends a text at " #", and folds its lines
        for name in reversed(names):
            branch = {name: branch}
        tree = merge(tree, branch, instead=False)  # one layer: both are a contradiction
    return tree


def merge(low: dict[str, Any], high: dict[str, Any], instead: bool = True) -> dict[str, Any]:
    """``high`` over ``low``, mappings merged key by key. Of INSTEAD, what ``high`` sets puts the other out of force."""
    merged = dict(low)
    for other in _given_way(low, high) if instead else ():
        del merged[other]
    for key, value in high.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value, instead)
        else:
            merged[key] = value
    return merged


def _given_way(low: dict[str, Any], high: dict[str, Any]) -> list[str]:
    return [o for one, o in INSTEAD.items() if high.get(one) is not None and o not in high and low.get(o) is not None]


def load_config(
    cls: type[Config],
    file: Path | None,
    overrides: Sequence[str] = (),
    base: dict | None = None,
    note: Callable[[str], None] | None = None,
) -> Config:
    """A validated configuration from a YAML file, then ``key.path=value`` overrides (values are YAML).

    ``file`` may also be the name of a recipe. ``note`` is told what an override has put out of force. Raises DataError
    in one line that names file, and every wrong key with what was expected.
    """
    tree, place = _layers(cls, file, overrides, base, note)
    try:
        return cls.model_validate(tree)
    except (ValidationError, RecursionError) as error:
        raise DataError(f"{place}: {_faults(cls, error)}") from None


def _layers(
    cls: type[BaseModel],
    file: Path | None,
    overrides: Sequence[str],
    base: dict | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], str]:
    """(the merged tree, how errors name it)"""
    tree: dict[str, Any] = dict(base or {})
    place = "configuration"
    if file is not None:
        path = find_file(file)
        place = str(path)
        tree = merge(tree, read_yaml(path))
    high, instead = parse_overrides(overrides), INSTEAD.keys() <= cls.model_fields.keys()
    for other in _given_way(tree, high) if note and instead else ():
        note(f"{INSTEAD[other]}={high[INSTEAD[other]]} takes the place of {other}: {tree[other]} in {place}")
    return merge(tree, high, instead), place


# ---- faults in plain words


class Leaf(NamedTuple):
    """One key: ``("optimizer", "lr")``, and where it is described."""

    path: tuple[str, ...]
    field: FieldInfo
    schema: dict[str, Any]  # JSON schema of its value

    @property
    def name(self) -> str:
        return ".".join(self.path)


def node_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a section of keys, None for a plain value."""
    options = (field.annotation, *get_args(field.annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


@cache
def _schema(cls: type[BaseModel]) -> dict[str, Any]:
    return cls.model_json_schema()["properties"]


def leaves(cls: type[BaseModel], above: tuple[str, ...] = (), sections: bool = False) -> Iterator[Leaf]:
    """Every key of a configuration; ``sections``: those that hold others too."""
    schema = _schema(cls)
    for name, field in cls.model_fields.items():
        node = node_of(field)
        if node is None or sections:
            yield Leaf((*above, name), field, schema[name])
        if node is not None:
            yield from leaves(node, (*above, name), sections)


def allowed(schema: dict[str, Any]) -> str:
    """What a key takes, in words: "a number above 0, at most 1"."""
    if "anyOf" in schema:
        return " or ".join("null" if s.get("type") == "null" else allowed(s) for s in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(repr(choice) for choice in schema.get("enum", [schema.get("const")]))
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a text"}
    kind = schema.get("type")
    if kind == "array":
        return "a path or a list of paths"
    if schema.get("format") == "path":
        return "a path"
    if "minimum" in schema and "maximum" in schema:
        return f"{kinds[kind]} from {schema['minimum']:.15g} to {schema['maximum']:.15g}"
    bounds = [
        f"{words} {schema[key]:.15g}"
        for key, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "at most"),
        )
        if key in schema
    ]
    return " ".join([kinds.get(kind, "a mapping of keys"), ", ".join(bounds)]).strip()


def _faults(cls: type[BaseModel], error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply; expected keys and values"
    known = {leaf.path: leaf for leaf in leaves(cls, sections=True)}
    found: dict[str, None] = {}
    for fault in error.errors(include_url=False):
        path = tuple(part for part in fault["loc"] if isinstance(part, str))
        if path[:-1] in known and path not in known and node_of(known[path[:-1]].field) is None:
            found[_wants(known[path[:-1]], fault["input"])] = None  # one of several kinds that a key takes
            continue
        above = node_of(known[path[:-1]].field) if path[:-1] in known else cls
        refused = getattr(above, "refused", {}).get(path[-1]) if fault["type"] == "extra_forbidden" else None
        for text in [f"{'.'.join(path)} {refused}"] if refused else _fault(known, path, fault):
            found[text] = None
    return "; ".join(found)


def _fault(known: dict[tuple[str, ...], Leaf], path: tuple[str, ...], fault: Any) -> list[str]:
    name = plain(".".join(part if part and part.isprintable() else repr(part) for part in path)) or "(top level)"
    kind, leaf = fault["type"], known.get(path)
    if kind == "extra_forbidden":
        return [f"{name}: unknown key{_meant(known, path)}"]
    if kind == "missing" and leaf is not None and node_of(leaf.field) is not None:
        below = [other for other in known.values() if other.path[: len(path)] == path and node_of(other.field) is None]
        return [f"{other.name}: missing" for other in below if other.field.is_required()]
    if kind == "missing":
        return [f"{name}: missing"]
    if kind == "value_error":
        return [f"{name}: {fault['msg'].removeprefix('Value error, ')}"]
    if leaf is None:
        return [f"{name}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"]
    if node_of(leaf.field) is not None:
        below = next(other for other in known.values() if other.path[: len(path)] == path != other.path)
        return [f"{name}: expected keys below it, for example {below.name}, got {got(fault['input'])}"]
    return [_wants(leaf, fault["input"])]


def _wants(leaf: Leaf, value: Any) -> str:
    wants = allowed(leaf.schema)
    quoted = " (in quotes it is one)" if wants.startswith("a text") and isinstance(value, (int, float, dict)) else ""
    return f"{leaf.name}: expected {wants}, got {got(value)}{quoted}"


def _meant(known: dict[tuple[str, ...], Leaf], path: tuple[str, ...]) -> str:
    names = {leaf.name: leaf for leaf in known.values()}
    dotted = ".".join(path)
    if len(path) == 1 and dotted in names:
        return f"; in a file it is {': {'.join(dotted.split('.'))}: ...{'}' * dotted.count('.')}"
    if len(path) == 1 and dotted in OPTIONS:
        return f"; it is an option: {OPTIONS[dotted]}"
    letters = {_letters(name): name for name in names}
    if meant := letters.get(_letters(dotted)):
        return f", did you mean {meant}?"
    beside = {leaf.path[-1]: leaf.name for leaf in known.values() if leaf.path[:-1] == path[:-1]}
    instead = INSTEAD.get(path[-1], "")
    near = [instead] if instead in beside else difflib.get_close_matches(path[-1], beside, 1, 0.7)
    close = [beside[name] for name in near]
    if not close:  # under another section, mistyped or not
        last = difflib.get_close_matches(path[-1], {leaf.path[-1] for leaf in known.values()}, 1, 0.8)
        close = [name for name in names if last and name.split(".")[-1] == last[0]][:2]
    if close:
        return f", did you mean {' or '.join(close)}?"
    return f"; known here: {', '.join(sorted(beside))}"


def _letters(name: str) -> str:
    """A name without what people spell otherwise: case, and what joins words."""
    return re.sub(r"[\W_]", "", name.lower())


def got(value: Any) -> str:
    """A wrong value, quoted in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (dict, list, tuple)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}" if value else "an empty list"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= GOT_LENGTH else f"{text[:GOT_LENGTH]}..."


# ---- a tree as YAML


def show_config(cls: type[BaseModel], file: Path | None, overrides: Sequence[str] = ()) -> str:
    """The configuration of a command as YAML, a comment per key; load_config reads it again.

    What must be set and is not stands in a comment of its own.
    """
    tree, place = _layers(cls, file, overrides)
    missing: dict[tuple[str, ...], Leaf] = {}
    try:
        config = cls.model_validate(tree)
    except ValidationError as error:
        if not all(fault["type"] == "missing" or fault["msg"].startswith(MISSING) for fault in error.errors()):
            raise DataError(f"{place}: {_faults(cls, error)}") from None
        known = {leaf.path: leaf for leaf in leaves(cls)}
        for fault in error.errors():
            below = {path: leaf for path, leaf in known.items() if path[: len(fault["loc"])] == fault["loc"]}
            missing |= {path: leaf for path, leaf in below.items() if leaf.field.is_required() or path == fault["loc"]}
        config = load_config(cls, None, base=_filled(tree, missing))
    return "\n".join([*_lines(config, frozenset(missing), ()), ""])


def _filled(tree: dict[str, Any], missing: dict[tuple[str, ...], Leaf]) -> dict[str, Any]:
    """The tree with something valid in the place of every key that is missing."""
    for path, leaf in missing.items():
        numbers = {"integer", "number"} & {part.get("type") for part in (leaf.schema, *leaf.schema.get("anyOf", ()))}
        branch: Any = leaf.schema.get("examples", [1 if numbers else "x"])[0]
        for name in reversed(path):
            branch = {name: branch}
        tree = merge(tree, branch)
    return tree


def _lines(config: BaseModel, missing: frozenset[tuple[str, ...]], above: tuple[str, ...]) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        value, path, indent = getattr(config, name), (*above, name), "  " * len(above)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, missing, path)
            continue
        line = f"{indent}{name}: {scalar(value)}"
        if path in missing:
            line = f"{indent}# {name}: MUST BE SET"
        yield f"{line:<40}  # {field.description}"


def scalar(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(scalar(entry) for entry in value)}]"
    value = str(value) if isinstance(value, Path) else value
    style = {"default_style": '"'} if isinstance(value, str) and not value.isprintable() else {}
    text = yaml.dump([value], Dumper=_Dumper, width=math.inf, allow_unicode=True, default_flow_style=True, **style)
    return text.strip().removeprefix("[").removesuffix("]")
