"""File + site profile + --set = one spec with absolute paths; and back to text without loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec import JobSpec, dump_spec, load_spec, parse_spec
from orchestrator.spec.site import SiteProfile

DIGEST = "sha256:" + "0" * 64
HOSTILE = [
    "a b",
    'it\'s "quoted"',
    "; touch pwned",
    "$(touch pwned) `touch pwned` ${HOME}",
    "two\nlines\n",
    "\ttab\r\n",
    "# no comment",
    "{{ jinja }} {% raw %}",
    "é 日本語 🦔 \u2028 \x85 \ufeff",
    "\x01\x1b[31m\x7f",
    "- not a list",
    "key: value",
    "<<",
    "!!int 5",
    "&a *a",
    " leading and trailing ",
    "%2F\\n\\",
    "on",
    "null",
    "1e-3",
    "0x1F",
    "4:00:00",
    "2020-01-01",
    "=",
    "~",
    "|",
    ">-",
]


def minimal(**more: Any) -> dict[str, Any]:
    return {"name": "x", "job": {"module": "m"}, **more}


def written(folder: Path, text: str, name: str = "spec.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(mapping: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(mapping, environ={}, **options)
    return str(caught.value)


def round_trip(spec: JobSpec, folder: Path) -> JobSpec:
    elsewhere = folder / "else" / "where"
    elsewhere.mkdir(parents=True, exist_ok=True)
    return load_spec(written(elsewhere, dump_spec(spec)), environ={})


# --- the whole issue example


def test_every_documented_key(tmp_path: Path) -> None:
    text = f"""
name: digits-simclr
backend: slurm
root: /shared/orch
job:
  module: jobs.pretrain
  args: {{data: /data/digits, method: simclr, epochs: 4, lr: 1e-3, on: off, tags: [a, 1, null]}}
  argv: []
container: {{runtime: docker, image: "{DIGEST}", mounts: [{{source: data, target: /data, read_only: true}}]}}
resources: {{nodes: 2, gpus_per_node: 0, cpus_per_task: 2, mem: 2G, time: "00:30:00"}}
slurm: {{partition: low, account: null, qos: null, constraint: null, setup: [], srun_args: [], extra_sbatch: {{}},
        template: null, python: null}}
torchrun: {{nproc_per_node: 2, max_restarts: 0, rdzv_backend: c10d}}
checkpoint: {{uri: null, every_steps: 50, every_minutes: null, every_epochs: 1, keep_last: 3}}
preemption: {{signal: USR1, lead_time: 120s, max_requeues: 100}}
retry: {{time_limit: 20, node_failure: 10, out_of_memory: 0, failure: 0}}
workspace: {{path: ., exclude: [], max_size: 200M}}
env: {{OMP: 007, RATE: 1e-3, FLAG: true, TEXT: "x"}}
secrets: [WANDB_API_KEY]
tags: []
notes: ""
"""
    spec = load_spec(written(tmp_path, text), environ={})
    assert spec.root == "/shared/orch"
    assert spec.job.args == {
        "data": "/data/digits", "method": "simclr", "epochs": 4, "lr": 0.001, "on": "off", "tags": ["a", 1, None]
    }  # fmt: skip
    assert spec.container.mounts[0].source == str(tmp_path / "data")
    assert (spec.resources.mem, spec.resources.time) == (2 * 1024**3, 1800)
    assert spec.preemption.lead_time == 120
    assert spec.workspace.path == str(tmp_path)
    assert spec.workspace.max_size == 200 * 1024**2
    assert spec.env == {"OMP": "007", "RATE": "1e-3", "FLAG": "true", "TEXT": "x"}
    assert spec.slurm.options() == {"partition": "low"}
    assert round_trip(spec, tmp_path) == spec


def test_defaults(tmp_path: Path) -> None:
    spec = load_spec(
        written(tmp_path, "name: x\njob: {module: m}\nslurm:\ncontainer:\nresources: {nodes: null}\n"), environ={}
    )
    assert (spec.backend, spec.container.runtime, spec.torchrun.nproc_per_node) == ("slurm", "none", 1)
    assert (spec.retry.time_limit, spec.retry.failure, spec.preemption.max_requeues) == (20, 0, 100)
    assert spec.root == str(tmp_path / "orch_runs")
    assert spec.resources.mem is None
    assert round_trip(spec, tmp_path) == spec


def test_null_means_never_for_saves(tmp_path: Path) -> None:
    spec = parse_spec(minimal(checkpoint={"every_steps": None, "every_epochs": None, "keep_last": None}), environ={})
    assert (spec.checkpoint.every_steps, spec.checkpoint.every_epochs, spec.checkpoint.keep_last) == (None, None, 3)
    assert round_trip(spec, tmp_path) == spec


@pytest.mark.parametrize(("gpus", "given_value", "processes"), [(0, None, 1), (4, None, 4), (4, 2, 2), (0, 3, 3)])
def test_one_process_per_gpu(gpus: int, given_value: int | None, processes: int) -> None:
    torchrun = {"nproc_per_node": given_value}
    assert (
        parse_spec(minimal(resources={"gpus_per_node": gpus}, torchrun=torchrun)).torchrun.nproc_per_node == processes
    )
    if given_value is None:
        assert parse_spec(minimal(resources={"gpus_per_node": gpus})).torchrun.nproc_per_node == processes


def test_specs_are_frozen() -> None:
    spec = parse_spec(minimal())
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "y"  # type: ignore[misc]


# --- hostile text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_survives_loading_and_dumping(text: str, tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "name": "x",
            "job": {"command": ["prog", text], "args": {"a": text, "b": [text, {text: text}]}, "argv": [text]},
            "container": {
                "runtime": "docker",
                "image": DIGEST,
                "mounts": [{"source": "/" + text, "target": "/" + text}],
            },
            "slurm": {"setup": [text], "srun_args": [text]},
            "workspace": {"exclude": [text]},
            "env": {"A": text},
            "tags": [text],
            "notes": text,
        },
        environ={},
    )
    assert spec.job.args == {"a": text, "b": [text, {text: text}]}
    assert spec.env["A"] == spec.notes == spec.tags[0] == spec.job.argv[0] == text
    assert spec.container.mounts[0].target == "/" + text
    assert round_trip(spec, tmp_path) == spec


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=any_json, note=any_text, root=any_text)
def test_any_value_survives_dumping(tmp_path: Path, value: Any, note: str, root: str) -> None:
    spec = parse_spec(
        minimal(job={"module": "m", "args": {"a": value}}, notes=note, root="/" + root.strip("/")), environ={}
    )
    again = round_trip(spec, tmp_path)
    assert again == spec
    assert repr(again.job.args) == repr(spec.job.args)  # 1, 1.0 and true are equal in Python


@pytest.mark.parametrize(
    "where",
    [
        {"notes": "a\0b"},
        {"env": {"A": "\0"}},
        {"tags": ["\ud800"]},
        {"job": {"module": "m", "argv": ["\0"]}},
        {"job": {"module": "m", "args": {"a": [{"b": "\0"}]}}},
        {"job": {"command": ["\0"]}},
        {"root": "/a\0"},
        {"workspace": {"path": "/a\0"}},
    ],
)
def test_what_no_argument_can_carry(where: dict[str, Any]) -> None:
    message = refused(minimal(**where))
    assert "NUL" in message or "Unicode" in message or "null byte" in message


def test_too_long_for_linux() -> None:
    assert "131071" in refused(minimal(env={"A": "x" * 200_000}))
    parse_spec(minimal(env={"A": "x" * 131_000}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**64, -(2**63) - 1, object(), {1: 2}, b"x"])
def test_what_is_no_json(value: Any) -> None:
    assert "job.args.a" in refused(minimal(job={"module": "m", "args": {"a": value}}))


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x0bb", "a\u2028b", "\x85", " a", "a ", "", "\x00"])
def test_what_cannot_stand_on_an_sbatch_line(value: str) -> None:
    for slurm in ({"qos": value}, {"python": value}, {"extra_sbatch": {"hint": value}}):
        assert "slurm." in refused(minimal(slurm=slurm))


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "é", "a\n", "x" * 65, "a\nb"])
def test_names_refused(name: str) -> None:
    assert "name:" in refused({"name": name, "job": {"module": "m"}})


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64])
def test_names_allowed(name: str) -> None:
    assert parse_spec({"name": name, "job": {"module": "m"}}).name == name


@pytest.mark.parametrize("module", ["", "a b", "a.py.", "a/b.py", ".a", "a..b", "-m", "a;b"])
def test_modules_refused(module: str) -> None:
    assert "job.module" in refused({"name": "x", "job": {"module": module}})


# --- images


@pytest.mark.parametrize(
    "image",
    [
        DIGEST,
        f"train@{DIGEST}",
        f"lab/train@{DIGEST}",
        f"ghcr.example:5000/Lab/train@{DIGEST}".lower(),
        f"localhost:5000/a/b_c-d.e@{DIGEST}",
        f"train:v1@{DIGEST}",
    ],
)
def test_pins(image: str) -> None:
    found = parse_spec(minimal(container={"runtime": "docker", "image": image})).container.image
    assert found == image.replace(":v1@", "@"), "beside a digest a tag says nothing"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("train", "Pin it:  orch image lock train"),
        ("train:latest", "Pin it:  orch image lock train:latest"),
        ("host:5000/train", "Pin it:  orch image lock host:5000/train"),
        ("sha256:abc", "64 hexadecimal digits"),
        ("sha256:" + "A" * 64, "lower case"),
        ("train@sha256:" + "g" * 64, "64 hexadecimal digits"),
        ("train@md5:" + "0" * 64, "not a digest"),
        (f"Upper@{DIGEST}", "not a repository name"),
        (f"@{DIGEST}", "not a repository name"),
        (f"a b@{DIGEST}", "not a repository name"),
        ("docker://x", "not an image reference"),
        (f"{DIGEST}\n", "64 hexadecimal digits"),
        ("a$(b)", "not an image reference"),
    ],
)
def test_not_pins(image: str, message: str) -> None:
    assert message in refused(minimal(container={"runtime": "docker", "image": image}))


# --- paths


def test_paths_are_relative_to_the_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    written(
        tmp_path / "sub",
        "name: x\nroot: ../runs\njob: {script: code/t.py}\nworkspace: {path: code}\ncheckpoint: {uri: ckpt}\n"
        "slurm: {template: my.j2}\n",
    )
    monkeypatch.chdir(tmp_path)
    spec = load_spec("sub/spec.yaml", environ={})
    assert spec.root == str(tmp_path / "runs")
    assert spec.workspace.path == str(tmp_path / "sub" / "code")
    assert spec.job.script == "t.py"
    assert spec.checkpoint.uri == str(tmp_path / "sub" / "ckpt")
    assert spec.slurm.template == str(tmp_path / "sub" / "my.j2")
    assert round_trip(spec, tmp_path) == spec


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    spec = parse_spec(minimal(root="~/runs", workspace={"path": "~/code"}, notes="~/x"))
    assert (spec.root, spec.workspace.path, spec.notes) == ("/home/ada/runs", "/home/ada/code", "~/x")


def test_arguments_are_never_touched(tmp_path: Path) -> None:
    spec = parse_spec(
        minimal(job={"module": "m", "args": {"a": "~/x", "b": "./y"}, "argv": ["../z"]}), base_dir=tmp_path
    )
    assert spec.job.args == {"a": "~/x", "b": "./y"}
    assert spec.job.argv == ("../z",)


@pytest.mark.parametrize("uri", ["/a/b c", "file:///a/b%20c", "FILE://localhost/a/b c"])
def test_checkpoint_uris(uri: str) -> None:
    assert parse_spec(minimal(checkpoint={"uri": uri})).checkpoint.uri == "/a/b c"


@pytest.mark.parametrize("uri", ["s3://bucket/pre fix", "gs://bucket"])
def test_object_stores(uri: str) -> None:
    options = {"endpoint_url": "http://127.0.0.1:9000", "client_kwargs": {"region_name": "x"}}
    checkpoint = {"uri": uri, "storage_options": options, "scratch": "/local/scratch", "fence": "disk"}
    spec = parse_spec(minimal(checkpoint=checkpoint), environ={})
    assert spec.checkpoint.model_dump(include=set(checkpoint)) == checkpoint


def test_the_scheme_of_an_object_store_is_in_lower_case() -> None:
    assert parse_spec(minimal(checkpoint={"uri": "S3://Bucket/A"})).checkpoint.uri == "s3://Bucket/A"


@pytest.mark.parametrize(
    ("uri", "right"),
    [
        ("s3:/bucket/p", "s3://bucket/p"), ("S3:bucket/p", "s3://bucket/p"), ("file:/a/b", "file:///a/b"),
        ("simplecache::s3://b/p", "s3://b/p"), ("s3://b/p::s3://c/q", "s3://c/q"), ("gs:", "gs://bucket/prefix"),
        ("s3:/key:hunter2@bucket", "s3://bucket/prefix"), ("a::s3://key:hunter2@bucket", "s3://bucket/prefix"),
    ],
)  # fmt: skip
def test_what_looks_like_a_url_is_no_directory(uri: str, right: str, tmp_path: Path) -> None:
    message = refused(minimal(checkpoint={"uri": uri}), base_dir=tmp_path)
    assert "checkpoint.uri" in message
    assert f"write {right}" in message
    assert "hunter2" not in message


def test_a_directory_may_have_a_colon(tmp_path: Path) -> None:
    uri = parse_spec(minimal(checkpoint={"uri": "./run:2"}), base_dir=tmp_path).checkpoint.uri
    assert uri == str(tmp_path / "run:2")


@pytest.mark.parametrize(
    "uri",
    [
        "file://relative", "file:///a?b", "s3://", "s3:///key", "s3://bucket/a?b", "s3://bucket/a#b",
        "s3://key:secret@bucket/a", "memory://a", "local:///a", "s3://[bucket",
    ],
)  # fmt: skip
def test_checkpoint_uris_that_are_refused(uri: str) -> None:
    assert "checkpoint.uri" in refused(minimal(checkpoint={"uri": uri}))


@pytest.mark.parametrize(
    "options",
    [
        {"secret": "hunter2"}, {"SECRET": "hunter2"}, {"secret_key": "hunter2"}, {"passphrase": "hunter2"},
        {"client_kwargs": {"aws_session_token": "hunter2"}}, {"a": [{"secret": "hunter2"}]}, {"api-key": "hunter2"},
        {"client_kwargs": {"headers": {"Authorization": "Bearer hunter2"}}}, {"token": "hunter2"},
        {"token": {"private_key": "hunter2"}}, {"s3_additional_kwargs": {"CopySourceSSECustomerKey": "hunter2"}},
        {"endpoint_url": "https://user:hunter2@host"}, {"config_kwargs": {"proxies": ["http://u:hunter2@proxy"]}},
    ],
)  # fmt: skip
def test_a_secret_in_storage_options_is_refused_and_not_shown(options: dict[str, Any]) -> None:
    message = refused(minimal(checkpoint={"uri": "s3://bucket/a", "storage_options": options}))
    assert "checkpoint.storage_options" in message
    assert "`secrets`" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"token": "google_default"}, {"token": "anon"}, {"token": None}, {"token": "/home/ada/.config/key.json"},
        {"endpoint_url": "https://host:9000/a@b:c"}, {"secret": None}, {"anon": True}, {"key": "AKIA"},
        {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}},
    ],
)  # fmt: skip
def test_what_is_no_secret_may_stand_in_storage_options(options: dict[str, Any]) -> None:
    spec = parse_spec(minimal(checkpoint={"uri": "gs://bucket/a", "storage_options": options}), environ={})
    assert spec.checkpoint.storage_options == options


@pytest.mark.parametrize("given", [{"storage_options": {"anon": True}}, {"scratch": "/scratch"}])
def test_options_of_object_stores_with_a_directory_are_refused(given: dict[str, Any]) -> None:
    assert f"checkpoint.{next(iter(given))}" in refused(minimal(checkpoint={"uri": "/shared/a", **given}))


def test_scratch_is_absolute() -> None:
    assert "checkpoint.scratch" in refused(minimal(checkpoint={"uri": "s3://bucket/a", "scratch": "here"}))


@pytest.mark.parametrize("script", ["/etc/passwd", "../t.py", "."])
def test_script_outside_the_workspace(script: str, tmp_path: Path) -> None:
    assert "workspace.path" in refused({"name": "x", "job": {"script": script}}, base_dir=tmp_path)


def test_script_through_a_linked_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    spec = parse_spec(
        {"name": "x", "job": {"script": "link/t.py"}, "workspace": {"path": "real"}}, base_dir=tmp_path, environ={}
    )
    assert spec.job.script == "t.py"


@pytest.mark.parametrize(
    ("given_root", "in_spec", "site", "environ", "expected"),
    [
        ("/flag", "/spec", "/site", {"ORCH_ROOT": "/env"}, "/flag"),
        (None, "/spec", "/site", {"ORCH_ROOT": "/env"}, "/spec"),
        (None, None, "/site", {"ORCH_ROOT": "/env"}, "/site"),
        (None, None, None, {"ORCH_ROOT": "/env"}, "/env"),
        (None, None, None, {}, "BASE/orch_runs"),
    ],
)
def test_root_order(
    given_root: str | None,
    in_spec: str | None,
    site: str | None,
    environ: dict[str, str],
    expected: str,
    tmp_path: Path,
) -> None:
    spec = parse_spec(
        minimal(root=in_spec), base_dir=tmp_path, root=given_root, site=SiteProfile(root=site), environ=environ
    )
    assert spec.root == expected.replace("BASE", str(tmp_path))


def test_the_file_may_be_a_pipe() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"name: x\njob: {module: m}\n")
    os.close(write_end)
    assert load_spec(f"/dev/fd/{read_end}", environ={}).name == "x"
    os.close(read_end)


# --- Python users


def test_python_values() -> None:
    spec = parse_spec(
        {"name": "x", "job": {"script": Path("t.py"), "argv": ("a",)}, "resources": {"mem": "1G"}, "tags": ("a",)},
        base_dir=Path("/w"),
    )
    assert (spec.job.script, spec.job.argv, spec.tags) == ("t.py", ("a",), ("a",))


def test_the_mapping_is_not_changed() -> None:
    mapping = minimal(container={"mounts": None}, env={"A": "b"})
    before = repr(mapping)
    parse_spec(mapping, overrides=["env.A=c", "container.runtime=none"], site=SiteProfile(partition="p", root="/r"))
    assert repr(mapping) == before


def test_problems_without_a_file_have_no_place() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(minimal(tags=5))
    assert str(caught.value) == "tags: expected a list; got a number (5)"
    assert caught.value.problems == (
        {"file": None, "line": None, "column": None, "field": "tags", "message": "expected a list; got a number (5)"},
    )


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_no_mapping(value: Any) -> None:
    assert "a spec is a mapping" in refused(value)


def test_reading_a_site_profile_needs_no_pydantic() -> None:
    code = "import sys; from orchestrator.spec import load_site; load_site({'HOME': '/nowhere'})\n"
    code += "print('pydantic' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_time_limit_within_the_lead_time_is_refused() -> None:
    base = {"name": "run", "backend": "slurm", "job": {"module": "m"}}
    with pytest.raises(SpecError, match=r"resources\.time.*told to stop at its start"):
        parse_spec({**base, "resources": {"time": "00:02:00"}})
    assert parse_spec({**base, "resources": {"time": "00:02:00"}, "preemption": {"lead_time": "30s"}})
    assert parse_spec({**base, "backend": "local", "resources": {"time": "00:02:00"}})
