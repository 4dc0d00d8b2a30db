"""`init`: a first spec, commented, that runs as it is."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import RefusedError, RegistryError, SpecError

_JOBS = {
    "digits": """job:
  module: jobs.pretrain            # SimCLR on a folder of images; `python -m jobs.pretrain --help` lists its arguments
  args:
    data: {data}
    method: simclr
    model: orch/resnet9
    epochs: 4
    batch_size: 64
    seed: 0
    num_workers: 2
""",
    "module": """job:
  module: package.train            # run as `python -m package.train` under torchrun
  args:                            # become --key=value
    epochs: 4
""",
    "script": """job:
  script: train.py                 # inside workspace.path, run under torchrun
  args:                            # become --key=value
    epochs: 4
""",
    "command": """job:
  command: [python3, -c, "print('hello')"]     # once per node, without torchrun and without a shell
""",
}

_FRAME = """# {name}: submit with   orch submit {file}
# Everything left out has a default; `orch schema` lists all keys, `orch validate {file}` checks this file.
name: {name}
backend: local                     # local = this machine; slurm = sbatch
# root: /shared/orch               # where runs live; else the site profile, $ORCH_ROOT, ./orch_runs
{job}
container:
  runtime: none                    # docker needs image: an image pinned by digest (`orch image lock TAG` prints it)
  # image: "registry/repo@sha256:..."
  # mounts: [{{source: /data, target: /data, read_only: true}}]

resources:
  nodes: 1
  gpus_per_node: 0
  cpus_per_task: 2                 # per node
  # mem: 16G                       # per node
  time: "01:00:00"                 # of one attempt; a run that needs longer is continued

# slurm: {{partition: preempt, account: null}}

torchrun:
  nproc_per_node: 1                # training processes per node; with GPUs: one for each

checkpoint:
  every_steps: 50                  # besides the save at a preemption and at the end of every epoch
  keep_last: 3

preemption:
  lead_time: 120s                  # how long before the time limit to save

workspace:
  path: .                          # this code is copied at submit; later edits do not reach the run
  # exclude: ["data/", "*.ipynb"]

env: {{}}
secrets: []                        # names of variables, such as [WANDB_API_KEY]; values come from your shell
tags: []
notes: ""
"""


def write_starter(path: Path, *, source: str = "digits") -> str:
    """Write a first spec; returns its text. Raises RefusedError if the file exists, SpecError for an unknown source."""
    if source not in _JOBS:
        raise SpecError(f"--from {source}: there is no such example", hint=f"one of: {', '.join(_JOBS)}")
    name = "digits-simclr" if source == "digits" else _name_from(path)
    job = _JOBS[source].format(data="data/digits") if source == "digits" else _JOBS[source]
    text = _FRAME.format(name=name, file=path, job=job)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise RefusedError(
            f"{path} exists already", hint="choose another name; `orch init` overwrites nothing"
        ) from None
    except OSError as error:
        raise RegistryError(
            f"cannot write {path}: {error.strerror}", hint="choose a directory you may write"
        ) from error
    return text


def _name_from(path: Path) -> str:
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in path.stem
    )
    return (kept.strip("._-") or "run")[:64]
