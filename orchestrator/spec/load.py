"""File, site profile and `--set` become one JobSpec, or one SpecError that lists everything wrong at its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import SpecError
from orchestrator.paths import url_fault
from orchestrator.spec.images import NAME, file_pin, find_lock, read_lock
from orchestrator.spec.models import ARGUMENT_NAME, ENV_NAME, RESERVED_TOP_KEYS, JobSpec
from orchestrator.spec.problems import KeyPath, Place, Problem, Refusal, did_you_mean, error_of, kind_of, shown
from orchestrator.spec.reader import Document, parse_yaml, read_yaml
from orchestrator.spec.site import SiteProfile, resolve_root

# Below these paths keys are the user's own and may hold dots: `--set job.args.model.depth=3` sets "model.depth".
_FREE_KEYS: tuple[KeyPath, ...] = (("job", "args"), ("env",), ("slurm", "extra_sbatch"))
_NO_PIN = "sha256:" + "0" * 64
_TEXT_SECTIONS: tuple[tuple[str, ...], ...] = (("env",), ("slurm",), ("slurm", "extra_sbatch"))


def load_spec(
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    site: SiteProfile | None = None,
    root: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> JobSpec:
    """A spec file to a JobSpec with absolute paths. `overrides`: "a.b=c"; `root`: --root. Raises one SpecError."""
    file = Path(path)
    document = read_yaml(file, what="the spec")
    if document.value is None:
        hint = "Write a first one:  orch init FILE"
        raise error_of([Problem("is empty; expected at least name: and job:", (), Place(str(file)))], hint=hint)
    base_dir = Path(os.path.abspath(file)).parent  # noqa: PTH100 - resolve() would leave the directory the user is in
    return _build(document, base_dir, overrides, site, root, os.environ if environ is None else environ)


def parse_spec(
    mapping: Mapping[str, Any],
    *,
    base_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    site: SiteProfile | None = None,
    root: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> JobSpec:
    """The same for a Python mapping; relative paths start at `base_dir` (the current directory). Raises SpecError."""
    document = Document(_thawed(mapping))
    base = Path(os.path.abspath(base_dir or Path.cwd()))  # noqa: PTH100
    return _build(document, base, overrides, site, root, os.environ if environ is None else environ)


def _thawed(value: Any) -> Any:
    """A copy whose mappings may be changed; models and path objects become what YAML would have said."""
    if isinstance(value, BaseModel):
        return _thawed(value.model_dump(exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _build(
    document: Document,
    base_dir: Path,
    overrides: Sequence[str],
    site: SiteProfile | None,
    root: str | None,
    environ: Mapping[str, str],
) -> JobSpec:
    if not isinstance(document.value, dict):
        what = f"a spec is a mapping of keys such as name: and job:; this is {kind_of(document.value)}"
        raise error_of([Problem(what, (), document.place(()))])
    problems = _apply_overrides(document, overrides)
    if problems:
        raise error_of(problems)
    if site is not None:
        _lay_beneath(document, site)
    _as_written(document)
    problems = _resolve_paths(document, base_dir) + _resolve_image_name(document, base_dir)
    if root or document.value.get("root") is None:
        document.drop(("root",))
        document.value["root"] = str(resolve_root(root, environ, base_dir=base_dir))
    return _validated(document, problems)


def _resolve_image_name(document: Document, base_dir: Path) -> list[Problem]:
    """A name from the nearest lock file becomes what it pins. Without such a file a lone word is an unpinned image."""
    container = document.value.get("container")
    name = container.get("image") if isinstance(container, dict) else None
    if not isinstance(container, dict) or not isinstance(name, str) or not NAME.fullmatch(name):
        return []
    path = find_lock(base_dir)
    if path is None:
        return []
    lock = read_lock(path)
    pin = lock.pin(name)
    if pin is not None:
        container["image"] = pin
        return []
    container["image"] = _NO_PIN  # one message is enough
    known = ", ".join(sorted(lock.images)) or "none"
    close = did_you_mean(name, lock.images)
    words = f"{shown(name)} is not a name in {path} ({known}).{close} Add it:  orch image lock TAG --name {name}"
    return [Problem(words, ("container", "image"), document.place(("container", "image")))]


def _validated(document: Document, problems: list[Problem]) -> JobSpec:
    try:
        spec = JobSpec.model_validate(document.value)
    except ValidationError as error:
        problems = problems + [found for detail in error.errors() for found in _translated(detail, document)]
        raise error_of(problems) from None
    if problems:
        raise error_of(problems)
    return spec


# --- --set


def _apply_overrides(document: Document, overrides: Iterable[str]) -> list[Problem]:
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        place = Place(f"--set {key}")
        if not equals or not key or not all(key.split(".")):
            problems.append(
                Problem(
                    f"expected KEY=VALUE, such as resources.time=04:00:00; got {shown(override)}", (), Place("--set")
                )
            )
            continue
        try:
            given = parse_override_value(text, place)
        except SpecError as error:
            problems.append(Problem(str(error.problems[0]["message"]), tuple(key.split(".")), place))
            continue
        try:
            _put(document, _path_of(document.value, key), given, place)
        except ValueError as error:
            problems.append(Problem(str(error), tuple(key.split(".")), place))
    return problems


def parse_override_value(text: str, place: Place) -> Document:
    """`[…]`, `{…}` and quoted text as YAML; anything else as one YAML 1.2 scalar, verbatim. Raises SpecError."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{") or (len(stripped) > 1 and stripped[0] in "'\"" and stripped[-1] == stripped[0]):
        return parse_yaml(stripped, "", fixed=place)
    document = Document(text, places={(): place})
    if "\0" in text:
        raise error_of([Problem("holds a NUL character; remove it", (), place)])
    if re.fullmatch(r"[-+.\w~]*", text, re.ASCII):
        plain = parse_yaml(text, "", fixed=place) if text not in ("-", "---", "...") else document
        return plain if not isinstance(plain.value, (dict, list)) else document
    return document


def _path_of(value: Any, key: str) -> KeyPath:
    """The dotted key as a path into `value`; keys that are the user's own may hold dots themselves."""
    parts = key.split(".")
    path: KeyPath = ()
    while parts:
        if any(path == free for free in _FREE_KEYS):
            rest = ".".join(parts)
            inside = isinstance(value, dict) and rest not in value and isinstance(value.get(parts[0]), dict)
            if not inside:
                return (*path, rest)
        part: str | int = parts.pop(0)
        if isinstance(value, list) and str(part).isdigit():
            part = int(part)
        path = (*path, part)
        value = _step(value, part)
    return path


def _step(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _put(document: Document, path: KeyPath, given: Document, place: Place) -> None:
    holder = document.value
    for depth, part in enumerate(path[:-1]):
        following = _step(holder, part)
        if following is None:
            if not isinstance(holder, dict):
                raise ValueError(f"there is no {'.'.join(map(str, path[: depth + 1]))} to set anything in")
            following = holder[part] = {}
            document.places[path[: depth + 1]] = document.key_places[path[: depth + 1]] = place
        holder = following
    last = path[-1]
    if isinstance(holder, list):
        if not isinstance(last, int) or last >= len(holder):
            raise ValueError(f"the list has {len(holder)} entries; count from 0, or set the whole list: …=[a, b]")
    elif not isinstance(holder, dict):
        raise ValueError(f"{'.'.join(map(str, path[:-1]))} is {kind_of(holder)}, nothing can be set in it")
    document.drop(path)
    holder[last] = given.value
    document.adopt(path, given)
    document.key_places[path] = place


# --- the site profile


def _lay_beneath(document: Document, site: SiteProfile) -> None:
    for path, value, place in site.beneath():
        holder: Any = document.value
        for part in path[:-1]:
            if isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
            holder = holder[part] if isinstance(holder, dict) else None
        absent = isinstance(holder, dict) and (path[-1] not in holder or (path == ("root",) and holder["root"] is None))
        if absent:  # elsewhere an explicit null in the spec means: without
            holder[path[-1]] = value
            document.places[path] = document.key_places[path] = place
    container = document.value.get("container")
    if site.caches is not None and isinstance(container, dict) and container.get("runtime", "none") != "none":
        _mount_caches(container, site.caches)


def _mount_caches(container: dict[str, Any], caches: str) -> None:
    mounts = container.get("mounts")
    if mounts is None:
        mounts = container["mounts"] = []
    if isinstance(mounts, list) and not any(
        isinstance(mount, dict) and mount.get("target") == caches for mount in mounts
    ):
        mounts.append({"source": caches, "target": caches, "read_only": False})


def _as_written(document: Document) -> None:
    """`env: {N: 007}` means the text 007, and so does `nodelist: 007`: variables and Slurm's options are text."""
    for path in _TEXT_SECTIONS:
        section: Any = document.value
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        for key, value in section.items() if isinstance(section, dict) else ():
            text = document.texts.get((*path, key))
            if text is not None and (path == ("env",) or not isinstance(value, bool)):
                section[key] = value if (*path, key) == ("slurm", "nice") else text


# --- paths


def _absolute(text: str, base_dir: Path) -> str:
    return os.path.abspath(base_dir / Path(text).expanduser() if text.startswith("~/") else base_dir / text)  # noqa: PTH100


def _resolve_paths(document: Document, base_dir: Path) -> list[Problem]:
    """Makes every path of the spec absolute, job.script relative to the workspace. Wrong types: see the models."""
    spec = document.value
    _resolve_key(spec, "root", base_dir)
    _resolve_key(spec.get("slurm"), "template", base_dir)
    uri = spec["checkpoint"].get("uri") if isinstance(spec.get("checkpoint"), dict) else None
    if isinstance(uri, str) and "://" not in uri and url_fault(uri) is None:
        _resolve_key(spec["checkpoint"], "uri", base_dir)
    container = spec.get("container")
    mounts = container.get("mounts") if isinstance(container, dict) else None
    for mount in mounts if isinstance(mounts, list) else ():
        _resolve_key(mount, "source", base_dir)
    if isinstance(container, dict) and isinstance(container.get("image"), str) and file_pin(container["image"]):
        _resolve_key(container, "image", base_dir)
    after = spec.get("after")
    if isinstance(after, list):  # what holds no `/` is a run id
        spec["after"] = [_absolute(e, base_dir) if isinstance(e, str) and "/" in e else e for e in after]
    if spec.get("workspace") is None:
        spec["workspace"] = {}
    if isinstance(spec["workspace"], dict):
        spec["workspace"]["path"] = spec["workspace"].get("path") or "."
        _resolve_key(spec["workspace"], "path", base_dir)
    return _resolve_script(document, base_dir)


def _resolve_key(section: Any, key: str, base_dir: Path) -> None:
    if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
        section[key] = _absolute(section[key], base_dir)


def _resolve_script(document: Document, base_dir: Path) -> list[Problem]:
    job, workspace = document.value.get("job"), document.value["workspace"]
    script = job.get("script") if isinstance(job, dict) else None
    top = workspace.get("path") if isinstance(workspace, dict) else None
    if not isinstance(script, str) or not script or not isinstance(top, str):
        return []
    absolute = _absolute(script, base_dir)
    for inner, outer in ((absolute, top), (os.path.realpath(absolute), os.path.realpath(top))):
        if PurePosixPath(inner) != PurePosixPath(outer) and PurePosixPath(inner).is_relative_to(outer):
            job["script"] = str(PurePosixPath(inner).relative_to(outer))
            return []
    what = f"{shown(script)} is not inside workspace.path ({top}), so it would not be in the code snapshot"
    return [Problem(what, ("job", "script"), document.place(("job", "script")))]


# --- pydantic's errors in the spec's words


def _translated(detail: ErrorDetails, document: Document) -> list[Problem]:
    path: KeyPath = tuple(detail["loc"])
    kind = detail["type"]
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, Refusal):
        at_values = [Problem(what, path + below, document.place(path + below)) for below, what in error.findings]
        at_keys = [
            Problem(what, path + below, document.place(path + below, key=True)) for below, what in error.key_findings
        ]
        return at_values + at_keys
    if kind == "extra_forbidden":
        return [Problem(_unknown_key(path), path, document.place(path, key=True))]
    if kind == "missing":
        model = _model_at(path[:-1])
        about = model.model_fields[str(path[-1])].description if model else None
        return [Problem(f"is missing. {about or ''}".strip(), path, document.place(path[:-1]))]
    return [Problem(_reworded(detail, error), path, document.place(path))]


_EXPECTED = {
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}


def _reworded(detail: ErrorDetails, error: object) -> str:
    kind, given, ctx = detail["type"], detail["input"], detail.get("ctx", {})
    if isinstance(error, ValueError):
        return str(error)
    if kind in _EXPECTED:
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(given, (int, float)) else ""
        return f"expected {_EXPECTED[kind]}; got {kind_of(given)} ({shown(given)}){quotes}"
    if kind == "literal_error":
        allowed = str(ctx["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        choice = f"one of {', '.join(allowed)}" if len(allowed) > 1 else f"only {allowed[0]}"
        return f"{shown(given)} is not allowed; {choice}.{did_you_mean(str(given), allowed)}"
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        bound = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
                 "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}[kind]  # fmt: skip
        return f"{shown(given)} is out of range; {bound[0]} {ctx[bound[1]]}"
    if kind == "string_too_short":
        return "is empty"
    if kind == "string_pattern_mismatch":
        return (
            f"{shown(given)} is not a name: letters, digits, `.`, `_`, `-`, starting with a letter or digit, at most 64"
        )
    return f"{detail['msg']}; got {shown(given)}"


def _unknown_key(path: KeyPath) -> str:
    key = str(path[-1])
    if len(path) == 1 and key in RESERVED_TOP_KEYS:
        return "comes in a later version; leave it out"
    model = _model_at(path[:-1])
    known = _keys(model) if model else []
    homes = [f"{section}.{key}" if section else key for section, fields in _all_fields().items() if key in fields]
    if homes:  # the right key in the wrong section
        return f"unknown key. Did you mean `{homes[0]}`?"
    return f"unknown key.{did_you_mean(key, known) or ' Known: ' + ', '.join(known)}"


def _all_fields() -> dict[str, list[str]]:
    fields = {"": _keys(JobSpec)}
    for name, info in JobSpec.model_fields.items():
        model = _model_in(info.annotation)
        if model is not None:
            fields[name] = _keys(model)
    return fields


def _keys(model: type[BaseModel]) -> list[str]:
    """As they are written: `async` is no name in Python."""
    return [info.alias or name for name, info in model.model_fields.items()]


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] = JobSpec
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        inner = _model_in(info.annotation) if info else None
        if inner is None:
            return None
        model = inner
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


# --- back to text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not plainly plain, so that any YAML reader gets the same text back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*", re.ASCII)
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})  # YAML 1.1 and 1.2 together


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def dump_spec(spec: JobSpec) -> str:
    """YAML that loads to an equal spec from any directory: everything resolved, defaults included."""
    values = spec.model_dump(mode="json")
    if spec.job.script is not None:
        values["job"]["script"] = str(PurePosixPath(spec.workspace.path) / spec.job.script)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec file, for editors."""
    schema: dict[str, Any] = _without_titles(JobSpec.model_json_schema())
    schema["properties"]["env"]["additionalProperties"] = {"type": ["string", "number", "boolean"]}  # as written
    schema["properties"]["env"]["propertyNames"] = {"pattern": f"^{ENV_NAME.pattern}$"}
    schema["$defs"]["Job"]["properties"]["args"]["propertyNames"] = {"pattern": f"^{ARGUMENT_NAME.pattern}$"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "orch spec", **schema}


def _without_titles(schema: Any) -> Any:
    """pydantic's titles repeat the names of the keys (a property of that name, a mapping, stays)."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema
