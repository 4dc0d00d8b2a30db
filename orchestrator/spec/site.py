"""The site profile: defaults that lie beneath every spec, from the user's or the site's configuration directory.

Validated by hand, without pydantic: `orch status` reads it to find the root and must start fast.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.paths import DEFAULT_ROOT
from orchestrator.spec.problems import Place, Problem, did_you_mean, error_of, kind_of, shown

if TYPE_CHECKING:
    from orchestrator.spec.reader import Document

SITE_DIR = Path("/etc/orch")
FILE_NAME = "site.yaml"
RUNTIMES = ("docker", "podman", "apptainer", "pyxis", "none")

KEYS: dict[str, str] = {
    "root": "Directory on the shared disk that holds all runs; spec key `root`.",
    "partition": "Slurm partition; spec key `slurm.partition`.",
    "account": "Slurm account; spec key `slurm.account`.",
    "runtime": "Container runtime; spec key `container.runtime`.",
    "setup": "Shell lines run before the job; spec key `slurm.setup` (a spec's own list replaces this one).",
    "caches": "Directory for caches: XDG_CACHE_HOME, HF_HOME, TORCH_HOME beneath `env`; mounted into containers.",
    "python": "The Python on the nodes; spec key `slurm.python`.",
}
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))", re.ASCII)


@dataclass(frozen=True)
class SiteProfile:
    """What a site (or a user) sets once. None = not set."""

    root: str | None = None
    partition: str | None = None
    account: str | None = None
    runtime: str | None = None
    setup: tuple[str, ...] | None = None
    caches: str | None = None
    python: str | None = None
    sources: tuple[Path, ...] = ()  # the files read, strongest first
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)

    def beneath(self) -> list[tuple[tuple[str, ...], Any, Place]]:
        """The defaults as (path in the spec, value, place)."""
        values: dict[tuple[str, ...], tuple[str, Any]] = {
            ("root",): ("root", self.root),
            ("slurm", "partition"): ("partition", self.partition),
            ("slurm", "account"): ("account", self.account),
            ("container", "runtime"): ("runtime", self.runtime),
            ("slurm", "setup"): ("setup", None if self.setup is None else list(self.setup)),
            ("slurm", "python"): ("python", self.python),
        }
        if self.caches is not None:
            for name, below in (("XDG_CACHE_HOME", ""), ("HF_HOME", "/huggingface"), ("TORCH_HOME", "/torch")):
                values[("env", name)] = ("caches", self.caches.rstrip("/") + below)
        return [
            (path, value, self.places.get(key, Place())) for path, (key, value) in values.items() if value is not None
        ]

    def as_dict(self) -> dict[str, Any]:
        """For `orch site --json`: every key, null where not set, and the files it came from."""
        values = {key: getattr(self, key) for key in KEYS}
        values["setup"] = None if self.setup is None else list(self.setup)
        return {**values, "sources": [str(source) for source in self.sources]}


def site_files(environ: Mapping[str, str]) -> list[Path]:
    """Where a profile may be, strongest first. $ORCH_SITE_CONFIG stands alone."""
    explicit = environ.get("ORCH_SITE_CONFIG")
    if explicit:
        return [Path(explicit)]
    return [user_config_dir(environ) / FILE_NAME, SITE_DIR / FILE_NAME]


def user_config_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_CONFIG_HOME/orch, ~/.config/orch, or what the platform has instead."""
    if environ is not os.environ:  # a test, or a caller acting for someone else
        base = environ.get("XDG_CONFIG_HOME") or (Path(environ["HOME"]) / ".config" if environ.get("HOME") else "")
        if base:
            return Path(base) / "orch"
    import platformdirs

    return Path(platformdirs.user_config_dir("orch"))


def load_site(environ: Mapping[str, str]) -> SiteProfile:
    """The profile of the user over the profile of the site. Raises SpecError, positioned like a spec's."""
    files = site_files(environ)
    required = bool(environ.get("ORCH_SITE_CONFIG"))
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    sources: list[Path] = []
    problems: list[Problem] = []
    for path in files:
        if not required and not _exists(path):
            continue
        from orchestrator.spec.reader import read_yaml  # yaml costs 34 ms; most people have no profile

        document = read_yaml(path, what="the site profile")
        sources.append(path)
        for key, value in _checked(document, environ, problems).items():
            if key not in values:
                values[key], places[key] = value, document.place((key,))
    if problems:
        raise error_of(problems)
    return SiteProfile(**values, sources=tuple(sources), places=places)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # there is one, and reading it will say what is wrong
    return True


def _checked(document: Document, environ: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    if document.value is None:
        return {}
    if not isinstance(document.value, dict):
        what = f"the site profile must be a mapping of keys; this is {kind_of(document.value)}"
        problems.append(Problem(what, (), document.place(())))
        return {}
    result: dict[str, Any] = {}
    for key, value in document.value.items():
        if key not in KEYS:
            what = f"unknown key.{did_you_mean(key, KEYS)} Known: {', '.join(KEYS)}"
            problems.append(Problem(what, (key,), document.place((key,), key=True)))
            continue
        try:
            checked = _value(key, value, environ)
        except ValueError as error:
            problems.append(Problem(str(error), (key,), document.place((key,))))
            continue
        if checked is not None:
            result[key] = checked
    return result


def _value(key: str, value: Any, environ: Mapping[str, str]) -> Any:
    if value is None:
        return None
    if key == "setup":
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise ValueError(f"expected a list of shell lines; got {kind_of(value)}")
        return tuple(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text; got {kind_of(value)} ({shown(value)})")
    if key == "runtime" and value not in RUNTIMES:
        raise ValueError(f"{shown(value)} is not allowed; one of {', '.join(RUNTIMES)}.{did_you_mean(value, RUNTIMES)}")
    if key in ("root", "caches"):
        return _absolute(value, environ)
    if key in ("partition", "account", "python") and any(ord(char) < 32 for char in value):
        raise ValueError(f"{shown(value)} holds a line break or control character")
    return value


def _absolute(value: str, environ: Mapping[str, str]) -> str:
    """Expands ~ and $NAME (a site writes /scratch/$USER/orch once for everybody); must be absolute then."""
    text = environ.get("HOME", "~") + value[1:] if value == "~" or value.startswith("~/") else value
    for match in _VARIABLE.finditer(text):
        if (match[1] or match[2]) not in environ:
            raise ValueError(f"{shown(value)} uses ${match[1] or match[2]}, which is not set in the environment")
    text = _VARIABLE.sub(lambda match: environ[match[1] or match[2]], text)
    if not text.startswith("/"):
        raise ValueError(f"{shown(value)} must be an absolute path")
    return os.path.normpath(text)


def resolve_root(given: str | Path | None, environ: Mapping[str, str], *, base_dir: Path | None = None) -> Path:
    """The root: `given` (`--root`, else what spec and site profile say), $ORCH_ROOT, orch_runs in `base_dir`."""
    chosen = given or environ.get("ORCH_ROOT") or (base_dir or Path.cwd()) / DEFAULT_ROOT
    return Path(os.path.abspath(Path(chosen).expanduser()))  # noqa: PTH100 - resolve() would follow symlinks
