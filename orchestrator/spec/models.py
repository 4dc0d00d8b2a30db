"""What the user asked for: frozen pydantic models of the spec. Unknown keys are refused, text with a unit is parsed.

The fields' descriptions are the reference documentation: docs/spec.md and docs/schema.json are generated from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from orchestrator.paths import is_object_store, parse_url, url_fault
from orchestrator.spec.images import image_refusal, mount_refusal, runtime_refusal, without_tag
from orchestrator.spec.problems import KeyPath, Refusal, kind_of, shown
from orchestrator.spec.sbatch_options import normal_name, owned_by_step, refusal
from orchestrator.spec.units import Duration, Memory, WallTime
from orchestrator.spec.webaddress import is_web_address

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ARGUMENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAIL_ADDRESS = re.compile(r"[A-Za-z0-9_+=/!#$&'*?^{|}~.%][A-Za-z0-9_+=/!#$&'*?^{|}~.%-]*(@[A-Za-z0-9.-]+)?")
_LONGEST = 128 * 1024 - 1  # Linux: MAX_ARG_STRLEN, one argument or NAME=value, with its final NUL


def _carried(value: str) -> str:
    """Text that an argument, a variable and a file name can carry unchanged."""
    if "\0" in value:
        raise ValueError("holds a NUL character, which no argument, variable or file name can carry; remove it")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (a lone surrogate); it must be UTF-8") from None
    if size > _LONGEST:
        raise ValueError(f"is {size} bytes long; Linux passes at most {_LONGEST}. Put it in a file and pass its path")
    return value


def _one_line(value: str) -> str:
    bad = next((char for char in value if ord(char) < 32 or ord(char) == 127 or char in "\x85\u2028\u2029"), None)
    if bad is not None:
        raise ValueError(f"holds {bad!r}; it goes on one #SBATCH line, so no line breaks or control characters")
    if value != value.strip():
        raise ValueError("begins or ends with a space; sbatch would drop it")
    return value


def _number_text(value: object) -> object:
    """Slurm's ids and counts may be written without quotes: `nodelist: 7`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _a_list_of_words(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f'expected a list of words, one per argument, such as ["python3", "x.py"]; got {shown(value)}')
    return value


def _names_a_program(value: tuple[str, ...]) -> tuple[str, ...]:
    if not (value and value[0]):
        raise ValueError("must name a program")
    return value


Text: TypeAlias = Annotated[str, Strict(), AfterValidator(_carried)]
SomeText: TypeAlias = Annotated[str, Strict(), Field(min_length=1), AfterValidator(_carried)]
SlurmText: TypeAlias = Annotated[
    str,
    BeforeValidator(_number_text),
    Strict(),
    Field(min_length=1),
    AfterValidator(_carried),
    AfterValidator(_one_line),
]
ProgramWords: TypeAlias = Annotated[
    tuple[Text, ...], BeforeValidator(_a_list_of_words), AfterValidator(_names_a_program)
]
Count: TypeAlias = Annotated[int, Strict(), Field(ge=0, le=1_000_000)]
Positive: TypeAlias = Annotated[int, Strict(), Field(ge=1, le=1_000_000)]
Steps: TypeAlias = Annotated[int, Strict(), Field(ge=1, le=2**53)]
Flag: TypeAlias = Annotated[bool, Strict()]


class _Section(BaseModel):
    """Frozen; unknown keys refused; `key:` with nothing behind it (null) means the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in fields or fields[key].is_required()
        }


def _json_findings(value: object, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Everything in a value that JSON or the command line could not carry unchanged."""
    if isinstance(value, dict):
        odd = [
            ((*path, str(key)), f"a key must be text, not {kind_of(key)}") for key in value if not isinstance(key, str)
        ]
        return odd + [found for key, item in value.items() for found in _json_findings(item, (*path, str(key)))]
    if isinstance(value, (list, tuple)):
        return [found for index, item in enumerate(value) for found in _json_findings(item, (*path, index))]
    if isinstance(value, str):
        try:
            _carried(value)
        except ValueError as error:
            return [(path, str(error))]
        return []
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, int):
        fits = -(2**63) <= value < 2**64
        return [] if fits else [(path, f"{shown(value)} does not fit 64 bits; put it in quotes to pass it as text")]
    if isinstance(value, float):
        return (
            [] if math.isfinite(value) else [(path, f"{value} is no JSON number; put it in quotes to pass it as text")]
        )
    return [
        (path, f"a {type(value).__name__} is no JSON value; use text, numbers, true/false, null, lists and mappings")
    ]


def _plain(value: Any) -> Any:
    """Tuples as lists, so that equal JSON is equal Python."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class Job(_Section):
    """What runs: one of `module`, `script` (both under torchrun), `command` (once per node, without torchrun)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [kind], "properties": {kind: {"not": {"type": "null"}}}}
                for kind in ("module", "script", "command")
            ]
        }
    )

    module: SomeText | None = Field(
        None, description="A Python module, run as `python -m` under torchrun.", examples=["jobs.pretrain"]
    )
    script: SomeText | None = Field(
        None,
        description="A Python file inside `workspace.path`, run under torchrun. Relative to the spec file.",
        examples=["train.py"],
    )
    command: ProgramWords | None = Field(
        None,
        description="A program and its arguments, run once per node without torchrun and without a shell.",
        examples=[["python3", "prepare.py"]],
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Arguments, passed as `--key=value`: text as it is unless it would parse as JSON (then in JSON "
            "quotes), everything else as JSON."
        ),
        examples=[{"lr": 0.001, "data": "/data/digits"}],
    )
    argv: tuple[Text, ...] = Field(
        (), description="Arguments passed as they are, after `args`.", examples=[["--verbose"]]
    )

    @field_validator("module")
    @classmethod
    def _module_name(cls, value: str | None) -> str | None:
        if value is not None and not all(part.isidentifier() for part in value.split(".")):
            suggestion = " A file is set by job.script." if value.endswith(".py") or "/" in value else ""
            raise ValueError(f"{shown(value)} is not a module name such as package.module.{suggestion}")
        return value

    @field_validator("args")
    @classmethod
    def _arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        what = "an argument's name has letters, digits, `_`, `.`, `-` only, and starts with neither `.` nor `-`"
        names: list[tuple[KeyPath, str]] = [((key,), what) for key in value if not ARGUMENT_NAME.fullmatch(key)]
        findings = _json_findings(value)
        if findings or names:
            raise Refusal(*findings, keys=names)
        return {key: _plain(item) for key, item in value.items()}

    @model_validator(mode="after")
    def _exactly_one(self) -> Job:
        given = [kind for kind in ("module", "script", "command") if getattr(self, kind) is not None]
        if not given:
            raise Refusal(((), "nothing to run; give one of module, script and command"))
        if len(given) > 1:
            what = f"{' and '.join(given)} exclude each other; keep one"
            raise Refusal(keys=[((kind,), what) for kind in given[1:]])
        return self

    @property
    def kind(self) -> Literal["module", "script", "command"]:
        """Which of the three it is."""
        if self.module is not None:
            return "module"
        return "script" if self.script is not None else "command"


class Mount(_Section):
    """A directory or file of the host, seen inside the container."""

    source: SomeText = Field(description="Path on every node. Relative to the spec file.")
    target: SomeText = Field(description="Absolute path inside the container.")
    read_only: Flag = Field(False, description="Refuse writes from inside.")

    @field_validator("target")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{shown(value)} must be an absolute path inside the container")
        if value.rstrip("/") == "":
            raise ValueError("the container's own / cannot be mounted over")
        return value


class Container(_Section):
    """Where it runs. `none` is the interpreter that runs `orch`, or `slurm.python`."""

    runtime: Literal["docker", "podman", "apptainer", "pyxis", "none"] = Field(
        "none",
        description="`docker`, `podman`, or `none` for no container; experimental: `apptainer`, `pyxis` (enroot).",
    )
    image: SomeText | None = Field(
        None,
        description=(
            "Pinned by digest: `repository@sha256:…`, `sha256:…` for an image id of the node, a file with its hash "
            "(`PATH.sif@sha256:…` for apptainer, `PATH.sqsh@…` for pyxis), or a name from "
            "`containers/images.lock.json`. A tag is refused; `orch image lock` resolves one."
        ),
    )
    mounts: tuple[Mount, ...] = Field((), description="Host paths seen inside the container.")

    @field_validator("runtime", mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        if value == "singularity":
            raise ValueError("singularity is called apptainer here")
        if value == "enroot":
            raise ValueError("enroot is called pyxis here")
        return value

    @field_validator("image")
    @classmethod
    def _pinned(cls, value: str | None) -> str | None:
        reason = None if value is None else image_refusal(value)
        if reason is not None:
            raise ValueError(reason)
        return None if value is None else without_tag(value)

    @field_validator("mounts")
    @classmethod
    def _distinct_targets(cls, value: tuple[Mount, ...]) -> tuple[Mount, ...]:
        seen: set[str] = set()
        for index, mount in enumerate(value):
            target = mount.target.rstrip("/")
            if target in seen:
                raise Refusal(((index, "target"), f"{shown(mount.target)} is mounted twice"))
            seen.add(target)
        return value

    @model_validator(mode="after")
    def _image_fits_runtime(self) -> Container:
        if self.runtime != "none" and self.image is None:
            raise Refusal(
                ((), f"runtime {self.runtime} needs image: repository@sha256:… (from a tag:  orch image lock TAG)")
            )
        if self.runtime == "none" and self.image is not None:
            raise Refusal(
                (
                    ("image",),
                    "runtime none uses no image; set container.runtime, or leave image out",
                )
            )
        if self.image is not None and (reason := runtime_refusal(self.image, self.runtime)):
            raise Refusal((("image",), reason))
        paths = [((i, key), getattr(m, key)) for i, m in enumerate(self.mounts) for key in ("source", "target")]
        if odd := [(("mounts", *at), why) for at, path in paths if (why := mount_refusal(path, self.runtime))]:
            raise Refusal(*odd)
        if self.runtime == "none" and self.mounts:
            raise Refusal((("mounts",), "runtime none has no mounts: the job sees the node's own files"))
        return self


class Resources(_Section):
    """What is asked of the scheduler: one task per node; `cpus_per_task` and `mem` are per node."""

    nodes: Positive = Field(1, description="Nodes.")
    gpus_per_node: Count = Field(0, description="GPUs on each node.")
    cpus_per_task: Positive = Field(1, description="CPU cores on each node (one task per node).")
    mem: Memory | None = Field(
        None, description="Memory on each node; null = the partition's default.", examples=["2G"]
    )
    time: WallTime | None = Field(
        None, description="Wall time of one attempt; null = the partition's default.", examples=["04:00:00"]
    )

    @field_validator("mem")
    @classmethod
    def _enough(cls, value: Memory | None) -> Memory | None:
        if value is not None and value < 1024**2:
            raise ValueError(f"{value} is too little; at least 1M")
        return value

    @field_validator("time")
    @classmethod
    def _some_time(cls, value: WallTime | None) -> WallTime | None:
        if value is not None and value < 1:
            raise ValueError("no time at all; at least 1s (Slurm rounds up to minutes)")
        return value


ExtraValue: TypeAlias = Literal[True] | str


class Slurm(_Section):
    """Slurm's options by Slurm's own long names in snake_case, and what surrounds the job in the batch script."""

    partition: SlurmText | None = Field(None, description="Partition (several: comma-separated).")
    account: SlurmText | None = Field(None, description="Account that is charged.")
    qos: SlurmText | None = Field(None, description="Quality of service.")
    constraint: SlurmText | None = Field(None, description="Node features.", examples=["a100|h100"])
    exclude: SlurmText | None = Field(None, description="Nodes not to use.", examples=["n[01-03]"])
    nodelist: SlurmText | None = Field(None, description="Nodes to use.")
    reservation: SlurmText | None = Field(None, description="Reservation.")
    dependency: SlurmText | None = Field(None, description="Start after other jobs.", examples=["afterany:4711"])
    begin: SlurmText | None = Field(None, description="Not before this time.", examples=["now+1hour"])
    mail_type: SlurmText | None = Field(None, description="Events that send mail.", examples=["END,FAIL"])
    mail_user: SlurmText | None = Field(None, description="Who gets the mail.")
    nice: Annotated[int, Strict(), Field(ge=-2147483645, le=2147483645)] | None = Field(
        None, description="Lower the priority by this much."
    )
    licenses: SlurmText | None = Field(None, description="Licenses.", examples=["matlab:1"])
    gres: SlurmText | None = Field(
        None, description="Generic resources other than GPUs (those: `resources.gpus_per_node`)."
    )
    wckey: SlurmText | None = Field(None, description="Workload characterisation key.")
    exclusive: Flag = Field(False, description="Whole nodes, not shared with other jobs.")
    setup: tuple[Text, ...] = Field(
        (), description="Shell lines run on the first node before the job starts.", examples=[["module load cuda"]]
    )
    srun_args: tuple[SomeText, ...] = Field(
        (), description="Further arguments of srun, one word each.", examples=[["--cpu-bind=cores"]]
    )
    extra_sbatch: dict[str, ExtraValue] = Field(
        default_factory=dict,
        description="Any other sbatch option by its long name; `true` = a bare flag. What orch owns is refused.",
        examples=[{"hint": "nomultithread", "overcommit": True}],
    )
    template: SomeText | None = Field(
        None, description="Your own batch script template instead of the packaged one. Relative to the spec file."
    )
    python: SlurmText | None = Field(
        None,
        description=(
            "The Python that runs the agent on the nodes, and the job when `container.runtime` is none; null = "
            "the one running orch."
        ),
    )

    @field_validator("srun_args")
    @classmethod
    def _not_owned(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        findings: list[tuple[KeyPath, str]] = [
            ((index,), f"{shown(word)} is set by orch") for index, word in enumerate(value) if owned_by_step(word)
        ]
        if findings:
            raise Refusal(*findings)
        return value

    @field_validator("extra_sbatch", mode="before")
    @classmethod
    def _passed_through(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys: list[tuple[KeyPath, str]] = []
        values: list[tuple[KeyPath, str]] = []
        result: dict[str, ExtraValue] = {}
        for key, given in value.items():
            reason = refusal(str(key))
            if reason is None and normal_name(str(key)) in result:
                reason = "the same option is given twice"
            if reason is not None:
                keys.append(((str(key),), reason))
                continue
            fault = _extra_value_fault(given)
            if fault is not None:
                values.append(((str(key),), fault))
            result[normal_name(str(key))] = given if given is True else str(given)
        if keys or values:
            raise Refusal(*values, keys=keys)
        return result

    def options(self) -> dict[str, str | None]:
        """Options for `#SBATCH` lines by sbatch's long name without dashes; None = a bare flag. Values unquoted."""
        surrounding = {"setup", "srun_args", "extra_sbatch", "template", "python", "exclusive"}
        named = {
            field.replace("_", "-"): str(getattr(self, field))
            for field in type(self).model_fields
            if field not in surrounding and getattr(self, field) is not None
        }
        flags: dict[str, str | None] = {"exclusive": None} if self.exclusive else {}
        extra = {key: None if value is True else str(value) for key, value in sorted(self.extra_sbatch.items())}
        return {**named, **flags, **extra}


def _extra_value_fault(value: object) -> str | None:
    if value is True or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)):
        return None
    if value is False or value is None:
        return f"{shown(value)} means nothing to sbatch; true is a bare flag, otherwise leave the key out"
    if not isinstance(value, str):
        return f"expected text, a number, or true for a bare flag; got {kind_of(value)}"
    try:
        _one_line(_carried(value))
    except ValueError as error:
        return str(error)
    return None if value else "is empty; true is a bare flag, otherwise leave the key out"


class Torchrun(_Section):
    """How torchrun starts the training processes (module and script jobs)."""

    nproc_per_node: Positive = Field(
        1, description="Training processes on each node; left out: one per GPU, or 1 without GPUs."
    )
    max_restarts: Count = Field(0, description="torchrun's own restarts inside one attempt.")
    rdzv_backend: Literal["c10d"] = Field("c10d", description="torchrun's rendezvous backend.")


class KeepBest(_Section):
    """The best checkpoints by a metric that was logged when they were saved; they stay beside the newest ones."""

    metric: SomeText = Field(description="Its name, as it is logged, such as `val_loss`.")
    mode: Literal["min", "max"] = Field(description="Whether small or large values are good.")
    k: Positive = Field(1, description="How many; of equal values the earlier one.")


class Checkpoint(_Section):
    """Where and how often the job saves. It also saves whenever it is told to stop."""

    model_config = ConfigDict(serialize_by_alias=True)

    uri: SomeText | None = Field(
        None,
        description=(
            "A directory on the shared disk (a path or file://), or an object store (s3://bucket/prefix, or another "
            "URL that fsspec knows); null = inside the run directory. A path is relative to the spec file."
        ),
    )
    storage_options: dict[str, Any] = Field(
        {},
        description=(
            "Of an object store, handed to fsspec unchanged: endpoint_url, profile, client_kwargs … No secret keys and "
            "passwords: name their variables in `secrets`."
        ),
    )
    scratch: SomeText | None = Field(
        None,
        description=(
            "A directory of every node where saves to an object store are staged; it needs room for two checkpoints. "
            "null = the temporary directory of the job."
        ),
    )
    fence: Literal["store", "disk"] = Field(
        "store",
        description=(
            "Where attempts claim the run: beside the checkpoints, or in the run directory, for object stores without "
            "conditional writes."
        ),
    )
    every_steps: Steps | None = Field(
        500, description="Save every so many optimizer steps; null = never for this reason."
    )
    every_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Save every so many minutes."
    )
    every_epochs: Steps | None = Field(
        1, description="Save at the end of every so many epochs; null = never for this reason."
    )
    keep_last: Positive = Field(
        3, description="Newest checkpoints kept; at least two. Older ones go after the newest was read back."
    )
    asynchronous: bool = Field(
        False,
        alias="async",
        description=(
            "Write beside the training, which waits only while the state is copied into host memory. Takes as much "
            "memory again as the state."
        ),
    )
    keep_every: Steps | None = Field(
        None, description="Keep also the first checkpoint at or after each multiple of so many steps."
    )
    keep_best: KeepBest | None = Field(None, description="Keep also the best ones by a logged metric.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        """For every_… null is a value: no saves for that reason."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None or key.startswith("every_") or key not in (*cls.model_fields, "async")
        }

    @field_validator("every_minutes", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"expected a number of minutes; got {kind_of(value)} ({shown(value)})")
        return value

    @field_validator("uri")
    @classmethod
    def _place(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if fault := url_fault(value):
            raise ValueError(fault)
        url = parse_url(value)
        if url is None:
            return value
        if url.scheme == "file":
            return _path_of_file_url(value)
        if url.scheme in ("local", "memory"):
            raise ValueError(f"{url.scheme}:// is no place other nodes see; give a path, file:// or an object store")
        if "@" in url.netloc:
            raise ValueError("holds credentials; a spec is written to disk. Name their variables in `secrets`")
        if not url.netloc or url.query or url.fragment:
            raise ValueError(f"an object store is written {url.scheme}://bucket/prefix, without ? and #")
        return url.scheme + value[len(url.scheme) :]  # in lower case, the only one that fsspec knows

    @field_validator("storage_options")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        secret = "holds a secret, and a spec is written to disk; name the variable that the store's library reads "
        secret += "(AWS_SECRET_ACCESS_KEY …) in `secrets`"
        if given := [(path, secret) for path, item in _items_below(value) if _is_secret(path[-1], item)]:
            raise Refusal(keys=given)
        if findings := _json_findings(value):
            raise Refusal(*findings)
        return value

    @field_validator("scratch")
    @classmethod
    def _on_every_node(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError("must be an absolute path: it is a directory of the nodes, not of this machine")
        return value

    @model_validator(mode="after")
    def _options_belong_to_object_stores(self) -> Checkpoint:
        if not is_object_store(self.uri):
            for name in ("storage_options", "scratch"):
                if getattr(self, name):
                    raise Refusal(((name,), "is for an object store, and checkpoint.uri names none"))
        return self


# Names under which fsspec's file systems and the libraries beneath them take a secret itself: in lower case and without
# separators, because each library spells them in its own way.
SECRET_OPTIONS = frozenset(
    (
        "accesstoken",
        "accountkey",
        "apikey",
        "authorization",
        "awssecretaccesskey",
        "awssessiontoken",
        "clientsecret",
        "connectionstring",
        "copysourcessecustomerkey",
        "passphrase",
        "passwd",
        "password",
        "privatekey",
        "proxyauthorization",
        "refreshtoken",
        "sastoken",
        "secret",
        "secretaccesskey",
        "secretkey",
        "sessiontoken",
        "ssecustomerkey",
        "token",
        "xapikey",
        "xamzsecuritytoken",
    )
)
WAYS_TO_A_TOKEN = ("anon", "browser", "cache", "cloud", "google_default")
"""What gcsfs takes as `token` that is none, besides the path of a file."""


def _is_secret(key: str | int, value: Any) -> bool:
    """True also for the password in a URL, whatever its key."""
    if isinstance(value, str) and re.search(r"://[^/\s]*:[^/\s]*@", value):
        return True
    name = re.sub(r"[^a-z0-9]", "", str(key).lower())
    if name not in SECRET_OPTIONS or value is None:
        return False
    return not (name == "token" and (value in WAYS_TO_A_TOKEN or _names_a_json_file(value)))


def _names_a_json_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("/") and value.endswith(".json")


def _items_below(options: Any) -> Iterator[tuple[KeyPath, Any]]:
    """Everything in it, with its path."""
    if isinstance(options, dict):
        items: Iterable[tuple[str | int, Any]] = ((str(key), value) for key, value in options.items())
    else:
        items = enumerate(options) if isinstance(options, (list, tuple)) else ()
    for key, value in items:
        yield (key,), value
        yield from (((key, *path), item) for path, item in _items_below(value))


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError("a file:// URI must hold an absolute path: file:///path")
    if parts.query or parts.fragment:
        raise ValueError("in a file:// URI, ? and # are written %3F and %23; or give the path itself")
    return unquote(parts.path)


class Preemption(_Section):
    """How the job is told to stop, and how often it may come back."""

    signal: Literal["USR1", "USR2"] = Field(
        "USR1", description="Signal that asks for a save before the time limit. TERM is always understood too."
    )
    lead_time: Duration = Field(
        Duration(120),
        description="How long before the time limit the signal comes: time for two steps and one save.",
        examples=["120s"],
    )
    max_requeues: Count = Field(100, description="Requeues after preemption before the run is left as needs_resume.")

    @field_validator("signal", mode="before")
    @classmethod
    def _short_name(cls, value: Any) -> Any:
        return value.removeprefix("SIG") if isinstance(value, str) else value

    @field_validator("lead_time")
    @classmethod
    def _in_range(cls, value: Duration) -> Duration:
        if not 1 <= value <= 65535:
            raise ValueError(f"{value} is out of Slurm's range; from 1s to 65535s")
        return value


class Retry(_Section):
    """Automatic requeues per cause; 0 = stop and wait for `orch resume`."""

    time_limit: Count = Field(20, description="After the time limit.")
    node_failure: Count = Field(10, description="After a lost node.")
    out_of_memory: Count = Field(0, description="After running out of memory.")
    failure: Count = Field(0, description="After the program failed.")
    hung: Count = Field(3, description="After `watchdog.no_progress` found it standing still.")
    backoff: Duration = Field(
        Duration(30),
        description=(
            "Pause before the next attempt when one failed or hung without a new step; four times as long after a "
            "second one in a row. A third one ends the run (no_progress)."
        ),
        examples=["30s"],
    )


class Watchdog(_Section):
    """Finding out that a run stands still, without a signal from anybody."""

    no_progress: Duration | None = Field(
        None,
        description=(
            "Stop and requeue (`retry.hung`) when no step is completed for this long; must exceed the longest "
            "validation and the first step. Every rank's Python stack goes to the log directory first. null = never."
        ),
        examples=["30m"],
    )

    @field_validator("no_progress")
    @classmethod
    def _some_time(cls, value: Duration | None) -> Duration | None:
        if value is not None and value < 1:
            raise ValueError(f"{value} is no time at all; at least 1s")
        return value


class Workspace(_Section):
    """The code that is snapshotted at submission and used by every attempt."""

    path: SomeText = Field(
        ".",
        description=(
            "The directory. In git: tracked and untracked files that are not ignored; elsewhere `job.script` and "
            "`*.py`. Relative to the spec file."
        ),
    )
    exclude: tuple[SomeText, ...] = Field(
        (), description="Patterns as in .gitignore, for files to leave out.", examples=[["*.ipynb", "/data/"]]
    )
    max_size: Memory = Field(
        Memory(200 * 1024**2), description="A larger snapshot is refused, naming its biggest files.", examples=["200M"]
    )


_ONE_OR_SEVERAL = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}


class Notify(_Section):
    """Who is told when a run has ended: sent by the host, after the state is written, once per submission and state."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [channel], "properties": {channel: {"not": {"type": "null"}}}}
                for channel in ("mail", "webhook", "command")
            ]
        }
    )

    on: tuple[Literal["failed", "completed", "needs_resume", "lost", "cancelled"], ...] = Field(
        ("failed", "needs_resume", "lost"), description="The final states that are told."
    )
    mail: Annotated[tuple[SomeText, ...], WithJsonSchema(_ONE_OR_SEVERAL)] = Field(
        (),
        description="A mail address or several, sent to through the node's `sendmail` or `mail`.",
        examples=["me@example.org"],
    )
    webhook: SomeText | None = Field(
        None,
        description=(
            "A JSON document is POSTed to this http(s) URL. `$NAME` takes the URL from a variable listed in `secrets`, "
            "so that it stands in no file."
        ),
        examples=["$SLACK_URL"],
    )
    command: ProgramWords | None = Field(
        None,
        description="A program and its arguments, without a shell; the document is its standard input.",
        examples=[["/home/me/bin/tell-me"]],
    )

    @field_validator("mail", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("on")
    @classmethod
    def _some_state(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no state, so nothing would ever be told; leave notify out instead")
        return tuple(dict.fromkeys(value))

    @field_validator("mail")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        findings: list[tuple[KeyPath, str]] = [
            ((index,), f"{shown(address)} is not a mail address such as me@example.org")
            for index, address in enumerate(value)
            if not MAIL_ADDRESS.fullmatch(address)
        ]
        if findings:
            raise Refusal(*findings)
        return value

    @field_validator("webhook")
    @classmethod
    def _url_or_name(cls, value: str | None) -> str | None:
        if value is None or (value.startswith("$") and ENV_NAME.fullmatch(value[1:])):
            return value
        if value.startswith("$"):
            raise ValueError("after `$` comes the name of a variable and nothing else, such as $SLACK_URL")
        if not is_web_address(value):  # the value is not repeated: it may be a secret
            raise ValueError("is no http:// or https:// URL; or write $NAME, a variable listed in secrets")
        return value

    @model_validator(mode="after")
    def _some_channel(self) -> Notify:
        if not self.mail and self.webhook is None and self.command is None:
            raise Refusal(((), "tells nobody; give at least one of mail, webhook and command"))
        return self

    @property
    def webhook_secret(self) -> str | None:
        """Name of the secret that holds the URL; None where the URL itself was written."""
        return self.webhook[1:] if self.webhook is not None and self.webhook.startswith("$") else None


class JobSpec(_Section):
    """One run, as it was asked for."""

    name: Annotated[str, Strict()] = Field(
        description="Name of the run: letters, digits, `.`, `_`, `-`; at most 64.", pattern=f"^{NAME_PATTERN}$"
    )
    backend: Literal["slurm", "local"] = Field(
        "slurm", description="`slurm`, or `local` for a detached process on this machine."
    )
    root: SomeText | None = Field(
        None,
        description=(
            "Directory on the shared disk that holds all runs. Left out: the site profile's, $ORCH_ROOT, or "
            "orch_runs beside the spec. Relative to the spec file."
        ),
    )
    job: Job = Field(description="What runs.")
    container: Container = Field(Container(), description="Where it runs.")
    resources: Resources = Field(Resources(), description="What is asked of the scheduler.")
    slurm: Slurm = Field(Slurm(), description="Slurm's options and the batch script.")
    torchrun: Torchrun = Field(Torchrun(), description="The training processes.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="Saving.")
    preemption: Preemption = Field(Preemption(), description="Stopping and coming back.")
    retry: Retry = Field(Retry(), description="Requeues per cause.")
    watchdog: Watchdog = Field(Watchdog(), description="Standing still.")
    workspace: Workspace = Field(Workspace(), description="The code snapshot.")
    notify: Notify | None = Field(None, description="Who is told when the run has ended.")
    after: tuple[SomeText, ...] = Field(
        (),
        description=(
            "Start when these runs are completed: run ids, unique beginnings of one, or run directories under the "
            "same root. A directory is relative to the spec file."
        ),
        examples=[["prepare-3f9a1c20b7"]],
    )
    env: dict[str, Text] = Field(
        default_factory=dict,
        description="Environment of the job. Values are text; numbers and true/false are passed as written.",
    )
    secrets: tuple[Text, ...] = Field(
        (),
        description=(
            "Names of variables taken from the environment of `orch submit`; their values appear in no file that "
            "is kept."
        ),
        examples=[["WANDB_API_KEY"]],
    )
    tags: tuple[SomeText, ...] = Field((), description="Labels to find runs by.")
    notes: Text = Field("", description="Free text.")

    @model_validator(mode="before")
    @classmethod
    def _one_process_per_gpu(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        resources, torchrun = data.get("resources"), data.get("torchrun") or {}
        gpus = resources.get("gpus_per_node") if isinstance(resources, dict) else None
        if isinstance(resources, Resources):
            gpus = resources.gpus_per_node
        if isinstance(gpus, int) and gpus > 0 and isinstance(torchrun, dict) and torchrun.get("nproc_per_node") is None:
            return {**data, "torchrun": {**torchrun, "nproc_per_node": gpus}}
        return data

    @field_validator("env")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        findings = [((key,), reason) for key in value if (reason := _variable_fault(key))]
        if findings:
            raise Refusal(keys=findings)
        return value

    @field_validator("secrets")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        findings: list[tuple[KeyPath, str]] = []
        for index, name in enumerate(value):
            reason = _variable_fault(name)
            if reason is not None and "=" in name:
                reason = "write only the variable's name; its value is taken from your environment"
            if name in value[:index]:
                reason = f"{shown(name)} is listed twice"
            if reason is not None:
                findings.append(((index,), reason))
        if findings:
            raise Refusal(*findings)
        return value

    @model_validator(mode="after")
    def _the_notice_leaves_time_to_work(self) -> JobSpec:
        time, lead = self.resources.time, self.preemption.lead_time
        if self.backend == "slurm" and time is not None and time <= lead:
            raise Refusal(
                (
                    ("resources", "time"),
                    f"{time} is not longer than preemption.lead_time ({lead}): every attempt would be told to stop at "
                    "its start; ask for more time, or set a shorter lead_time",
                )
            )
        return self

    @model_validator(mode="after")
    def _the_webhook_is_a_secret(self) -> JobSpec:
        name = None if self.notify is None else self.notify.webhook_secret
        if name is not None and name not in self.secrets:
            what = f"${name} is not listed in secrets; add it there:  secrets: [{name}]"
            raise Refusal((("notify", "webhook"), what))
        return self

    @model_validator(mode="after")
    def _dependencies_can_be_combined(self) -> JobSpec:
        if self.after and "?" in (self.slurm.dependency or ""):
            what = (
                "alternatives (`?`) cannot be combined with after: Slurm takes either all or any; drop one of the two"
            )
            raise Refusal((("slurm", "dependency"), what))
        return self

    @model_validator(mode="after")
    def _secrets_are_not_in_env(self) -> JobSpec:
        both = [
            (("env", name), "is listed in secrets too; a secret's value must not be in the spec")
            for name in self.secrets
            if name in self.env
        ]
        if both:
            raise Refusal(keys=both)
        return self


def _variable_fault(name: str) -> str | None:
    if not ENV_NAME.fullmatch(name):
        return "is not a variable name (letters, digits, `_`; not starting with a digit)"
    if name.startswith("ORCH_"):
        return "names starting with ORCH_ are set by orch itself"
    return None


RESERVED_TOP_KEYS = ("sweep",)
