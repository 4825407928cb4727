"""docs/settings.md from the configuration: python dev/settings_page.py > docs/settings.md"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from prism_fast.config import CONFIGS
from prism_fast.settings import allowed, node_of, scalar

HEAD = """# Settings

Every key of every command, read off `prism_fast/config/`. `prism-fast config STAGE [--config FILE] [KEY=VALUE ...]`
prints the same for one command, with the values that it would run with, as YAML that `--config` reads again.

- **Layers**: the keys' defaults; the file or recipe of `--config` (`base: NAME` at its top names a recipe, or a file
  beside it, that it lies over); then `key.path=value` on the command line, its values in YAML. The later layer wins;
  `steps` puts `epochs` of an earlier layer out of force, and the other way round. In a file, keys nest
  (`run: {out: runs/sft}`), and a key that stands twice is an error.
- **Paths**: relative ones start from the folder in which the command runs, in a configuration file too; `~` is the home
  folder. Images in a data file are relative to that file.
- **Numbers** are finite. What is out of range, unknown or missing is named, all of it in one line, before a model is
  loaded.
"""


def title(stage: str) -> str:
    """The command, as it is typed."""
    if stage == "benchmarks":
        return "eval --lmms TASKS"
    return f"data {stage}" if stage in ("pairs", "filter", "curate") else stage


def section(cls: type[BaseModel]) -> str:
    """The heading under which a group of keys stands."""
    return cls.__name__.removesuffix("Config")


def table(cls: type[BaseModel]) -> Iterator[str]:
    yield from ("| key | default | takes | meaning |", "|---|---|---|---|")
    schema = cls.model_json_schema()["properties"]
    for name, field in cls.model_fields.items():
        node = node_of(field)
        if node is not None:
            default = "off" if not field.is_required() and field.default is None else ""
            link = f"the keys of [{section(node)}](#{section(node).lower()})"
            changed = _changed(field.default)
            yield f"| `{name}` | {default} | {link} | {'; '.join(filter(None, [field.description, changed]))} |"
            continue
        default = "**must be set**" if field.is_required() else f"`{scalar(field.default)}`"
        yield f"| `{name}` | {default} | {allowed(schema[name])} | {field.description} |"


def _changed(default: object) -> str:
    """What a section's default sets otherwise than the section's own table says."""
    set_here = default.model_fields_set if isinstance(default, BaseModel) else ()
    return ", ".join(f"`{name}` is {scalar(getattr(default, name))}" for name in sorted(set_here))


def page() -> str:
    lines, sections = [HEAD], {}
    for name, cls in CONFIGS.items():
        lines += [f"## {title(name)}", *table(cls), ""]
        waiting = [node_of(field) for field in cls.model_fields.values()]
        while waiting:
            node = waiting.pop(0)
            if node is not None and section(node) not in sections:
                sections[section(node)] = node
                waiting += [node_of(field) for field in node.model_fields.values()]
    for name, node in sections.items():
        text = (node.__doc__ or "").replace("``", "`").strip()
        lines += [f"## {name}", *([text, ""] if text else []), *table(node), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
