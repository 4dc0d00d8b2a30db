"""Writes docs/spec.md and docs/schema.json from the models: `make docs`, or python docs/generate_spec_reference.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.spec import json_schema
from orchestrator.spec.models import RESERVED_TOP_KEYS
from orchestrator.spec.sbatch_options import OWNED
from orchestrator.spec.units import Duration, Memory, WallTime

FOLDER = Path(__file__).parent

HEAD = """\
# The spec, key by key

Generated from the models by `make docs`; do not edit. The same as a JSON Schema: [schema.json](schema.json)
(`orch schema` prints it).

A spec is one YAML file. Scalars are read as YAML 1.2 says: `1e-3` is a number, `on` and `4:00:00` are text. A key given
twice is refused, and so is a key that is not listed here. A key with nothing behind it (null) has its default.

- **Overrides.** `--set a.b=c` replaces one value. The value is read as YAML would read it: `[a, b]` is a list, `'5'` is
  text. Below `job.args`, `env` and `slurm.extra_sbatch` the rest of the key is one name, dots included, unless a
  mapping of that name is there already. `--set container.mounts.0.source=/x` changes an entry of a list.
- **Site profile.** What a site sets once lies beneath every spec: [site-profile.md](site-profile.md).
- **Paths.** `root`, `job.script`, `workspace.path`, `checkpoint.uri`, `slurm.template` and the sources of mounts are
  relative to the spec file (so are values given by `--set`); `~/` is the home directory. Arguments are never
  touched: give a path in `job.args` as an absolute one, since the job runs in its copy of the code.
- **Text** arrives as it is, whatever is in it. Only a NUL character, invalid Unicode, and more than 131 071 bytes in
  one value are refused, because no argument and no variable can carry them.
- **Units.** {units}
- **Kept for later versions** (refused for now): {later}.
"""

ARGUMENTS = """\
### How `job.args` become words

Each `key: value` becomes one word, `--key=value`, in the order given. Text is passed as it is, unless it would parse as
JSON: then it is passed in JSON quotes. Everything else is passed as JSON. So a program that tries JSON first and takes
the text itself otherwise gets back exactly what was written:

| in the spec | the word |
|---|---|
| `data: /data/digits` | `--data=/data/digits` |
| `lr: 1e-3` | `--lr=0.001` |
| `flag: true` | `--flag=true` |
| `name: "true"` | `--name="true"` |
| `sizes: [1, 2]` | `--sizes=[1,2]` |
| `nothing: null` | `--nothing=null` |

Names hold letters, digits, `_`, `.` and `-`. Whole numbers must fit 64 bits; NaN and infinity are no JSON.
"""

SNAPSHOT = """\
### What the snapshot holds

In git: every file that is tracked, and every one that is not ignored, submodules included. Elsewhere: `job.script` and
`*.py`, without hidden directories and virtual environments. Never: the root, `checkpoint.uri`, the submitted spec,
`.git`, any directory called `orch_runs`, and what `exclude` names. A link to something in the snapshot stays a link; a
link to another file becomes that file; a link to a directory outside is refused. The job runs in the snapshot, which is
read-only: write to `$ORCH_RUN_DIR`.
"""


def reference() -> str:
    """The text of spec.md."""
    schema = json_schema()
    units = {"size": Memory.allowed, "time": WallTime.allowed, "duration": Duration.allowed}
    head = HEAD.format(
        units="".join(f"\n  - {name}: {allowed}" for name, allowed in units.items()),
        later=", ".join(f"`{key}`" for key in RESERVED_TOP_KEYS),
    )
    sections = {
        name: schema["$defs"][reference_of(field)]
        for name, field in schema["properties"].items()
        if reference_of(field)
    }
    parts = [head, "## Top level\n", table(schema), *(section(name, model, schema) for name, model in sections.items())]
    return "\n".join(parts)


def section(name: str, model: dict[str, Any], schema: dict[str, Any]) -> str:
    """One top-level key with its table, and what belongs to it."""
    text = f"## `{name}`\n\n{model['description']}\n\n{table(model)}"
    if name == "job":
        text += "\n" + ARGUMENTS
    if name == "container":
        mount = schema["$defs"]["Mount"]
        text += f"\n### `container.mounts`\n\n{mount['description']}\n\n{table(mount)}"
    if name == "checkpoint":
        best = schema["$defs"]["KeepBest"]
        text += f"\n### `checkpoint.keep_best`\n\n{best['description']}\n\n{table(best)}"
    if name == "slurm":
        owned = "\n".join(f"| `{option}` | {where} |" for option, where in sorted(OWNED.items()))
        text += f"\n### What `extra_sbatch` refuses\n\n| option | instead |\n|---|---|\n{owned}\n"
    if name == "workspace":
        text += "\n" + SNAPSHOT
    return text


def table(model: dict[str, Any]) -> str:
    """The keys of one mapping."""
    rows = [
        f"| `{name}` | {words(field)} | {default_of(name, field, model)} | {field.get('description', '')} |"
        for name, field in model["properties"].items()
    ]
    return (
        "| key | value | default | meaning |\n|---|---|---|---|\n"
        + "\n".join(row.replace("a100|h100", "a100\\|h100") for row in rows)
        + "\n"
    )


def reference_of(field: dict[str, Any]) -> str:
    """Name of the section a field refers to (or null), or an empty string."""
    choices = [field, *field.get("anyOf", ())]
    return next((choice["$ref"].removeprefix("#/$defs/") for choice in choices if "$ref" in choice), "")


def default_of(name: str, field: dict[str, Any], model: dict[str, Any]) -> str:
    """The default as YAML, or that there is none."""
    if name in model.get("required", ()):
        return "**required**"
    if "default" not in field:
        return "`{}`"
    return "" if "$ref" in field else f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def words(field: dict[str, Any]) -> str:
    """A type as people say it, with an example where one is given."""
    example = f", such as `{json.dumps(field['examples'][0], ensure_ascii=False)}`" if field.get("examples") else ""
    return _type(field) + example


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "mapping"
    if "anyOf" in field:
        kinds = list(dict.fromkeys(_type(choice) for choice in field["anyOf"]))
        return " or ".join(kinds)
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in field.get("enum", [field.get("const")]))
    for unit, name in ((Memory, "size"), (WallTime, "time"), (Duration, "duration")):
        if field.get("pattern") == unit.pattern:
            return name
    if field.get("type") == "array":
        return "list of mappings" if "$ref" in field["items"] else "list of text"
    kind = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "object": "mapping",
    }
    least = f" ≥ {field['minimum']}" if field.get("minimum", -1) >= 0 else ""
    return kind.get(field.get("type", "null"), "null") + least


def schema_text() -> str:
    """The text of schema.json: what `orch schema` prints, byte for byte."""
    return json.dumps(json_schema(), indent=2) + "\n"


def main() -> None:
    """Write both files."""
    (FOLDER / "spec.md").write_text(reference(), encoding="utf-8")
    (FOLDER / "schema.json").write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
