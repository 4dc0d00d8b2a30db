"""The command line: parse, call one operation, print. No logic here, and no import that `orch --help` does not need."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import complete

app = typer.Typer(
    name="orch",
    help="A spec becomes a run that cannot lose work: submit it, look at it, stop it, go on with it.",
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich for --help would cost as much as everything else together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
image_app = typer.Typer(help="Build and pin container images.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(image_app, name="image")
ckpt_app = typer.Typer(
    help="Look at a run's checkpoints, read them again, copy one, go back to one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(ckpt_app, name="ckpt")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Root = Annotated[
    Path | None, typer.Option("--root", help="Orch root; else the spec, the site, $ORCH_ROOT, ./orch_runs.")
]
Run = Annotated[
    str, typer.Argument(help="Run id, the beginning of one, or a run directory.", autocompletion=complete.run_ids)
]
Spec = Annotated[Path, typer.Argument(help="Spec file (YAML).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set resources.time=04:00:00."),
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        import orchestrator

        print(f"orch {orchestrator.__version__}")
        raise typer.Exit


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write; nothing is overwritten.")] = Path("spec.yaml"),
    source: Annotated[str, typer.Option("--from", help="What to start from: digits | module | script | command.")] = (
        "digits"
    ),
    as_json: Json = False,
) -> None:
    """Write a commented spec that runs as it is."""
    from orchestrator.cli import commands

    commands.init(path, source, as_json)


@app.command()
def validate(spec: Spec, sets: Sets = None, root: Root = None, as_json: Json = False) -> None:
    """Check a spec; print every problem with its place."""
    from orchestrator.cli import commands

    commands.validate(spec, sets or [], root, as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    from orchestrator.cli import commands

    commands.schema()


@app.command()
def site(as_json: Json = False) -> None:
    """Show the site profile: the defaults beneath every spec, and the files they come from."""
    from orchestrator.cli import commands

    commands.site(as_json)


@app.command()
def doctor(
    spec: Annotated[Path | None, typer.Argument(help="Spec file; else what the site profile and defaults say.")] = None,
    node: Annotated[bool, typer.Option("--node", help="Look at a compute node, too, by a short job.")] = False,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition, instead of the spec's.")] = None,
    root: Root = None,
    timeout: Annotated[str, typer.Option("--timeout", help="How long the job of --node may wait to start.")] = "2m",
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """What this cluster will do to a run: which signal arrives where, how long a save may take, what to change."""
    from orchestrator.cli import commands

    if spec is None and sets:
        raise typer.BadParameter("--set changes a spec: name one")
    commands.doctor(spec, sets or [], root, node=node, partition=partition, timeout=timeout, as_json=as_json)


@app.command()
def submit(
    spec: Spec,
    sets: Sets = None,
    root: Root = None,
    new: Annotated[bool, typer.Option("--new", help="A fresh copy, though this run exists already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be submitted; needs no scheduler, no engine.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the log until the run ends; exit 1 if it did not succeed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a spec. Safe to repeat: a run that is queued, running or done is left alone, a stopped one goes on."""
    from orchestrator.cli import commands

    commands.submit(spec, sets or [], root, new=new, dry_run=dry_run, follow=follow, as_json=as_json)


@app.command()
def status(run: Run, root: Root = None, as_json: Json = False) -> None:
    """Where a run stands: attempts, steps lost, last checkpoint, and what to do next."""
    from orchestrator.cli import commands

    commands.status(run, root, as_json)


@app.command()
def ps(
    root: Root = None,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only runs in this state (repeatable).")] = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first: those under --root, or under every root used lately."""
    from orchestrator.cli import commands

    commands.ps(root, state or [], as_json)


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    attempt: Annotated[int | None, typer.Option("--attempt", min=0, help="Attempt; else the newest.")] = None,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Rank whose output to show.")] = 0,
    node: Annotated[int | None, typer.Option("--node", min=0, help="The agent's own log of this node instead.")] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Print what a rank printed."""
    from orchestrator.cli import commands

    commands.logs(run, root, follow=follow, attempt=attempt, rank=rank, node=node, as_json=as_json)


@app.command()
def wait(
    run: Run,
    timeout: Annotated[
        str | None, typer.Option("--timeout", help="Give up after this long: seconds, or 90s, 30m, 2h.")
    ] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Wait until a run has ended; exit 1 if it did not succeed or the time was up."""
    from orchestrator.cli import commands

    commands.wait(run, timeout, root, as_json)


@app.command()
def cancel(run: Run, root: Root = None, as_json: Json = False) -> None:
    """Stop a run for good (`orch resume` lifts it). Its checkpoints stay."""
    from orchestrator.cli import commands

    commands.cancel(run, root, as_json)


@app.command()
def preempt(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Watch the drill until the run goes on (not with --json).")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="Certify it: wait for the next attempt's first step; exit 1 on a failure.")
    ] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="Stop watching after this long.")] = "10m",
    root: Root = None,
    as_json: Json = False,
) -> None:
    """A fire drill: send the preemption signal to a running job and see whether it is safe."""
    from orchestrator.cli import commands

    if verify and not watch:
        raise typer.BadParameter("--verify has to watch; leave --no-wait out")
    commands.preempt(run, root, watch=watch, verify=verify, timeout=timeout, as_json=as_json)


@app.command()
def shell(
    run: Run,
    command: Annotated[list[str] | None, typer.Argument(help="A command instead of a shell, after --.")] = None,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Rank beside which to open it.")] = 0,
    root: Root = None,
) -> None:
    """Open a shell (or run a command) beside a rank of a running job, in its container, with its environment."""
    from orchestrator.cli import commands

    commands.shell(run, root, rank=rank, command=command or [])


@app.command()
def top(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="One look, then end.")] = False,
    interval: Annotated[str, typer.Option("--interval", help="Time between two looks.")] = "2s",
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Show what each rank of a running job uses: CPU, memory, GPU. Ctrl-C ends it, not the run."""
    from orchestrator.cli import commands

    commands.top(run, root, once=once, interval=interval, as_json=as_json)


@app.command()
def resume(
    run: Annotated[
        str | None, typer.Argument(help="Run id, its beginning, or a directory.", autocompletion=complete.run_ids)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every run that waits to be resumed.")] = False,
    sets: Sets = None,
    code: Annotated[bool, typer.Option("--code", help="With the code as it is now.")] = False,
    allow_drift: Annotated[
        list[str] | None,
        typer.Option("--allow-drift", metavar="KEY", help="Let this differ: job.args.lr, code, image, data (repeat)."),
    ] = None,
    root: Root = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Go on with a stopped run, with the code it began with; lifts a cancellation."""
    from orchestrator.cli import commands

    if (run is None) == (not every):
        raise typer.BadParameter("name one run, or give --all")
    if every and (sets or follow or code or allow_drift):
        raise typer.BadParameter("--set, --code, --allow-drift and --follow go with one run, not with --all")
    commands.resume(run, sets or [], root, code=code, allow_drift=allow_drift or [], follow=follow, as_json=as_json)


@image_app.command()
def lock(
    reference: Annotated[str, typer.Argument(help="repository:tag")],
    name: Annotated[
        str | None, typer.Option("--name", help="Write it into containers/images.lock.json under this name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Resolve a tag to the digest to write into the spec."""
    from orchestrator.cli import commands

    commands.lock_image(reference, name, as_json)


@image_app.command()
def build(
    directory: Annotated[Path, typer.Argument(help="Holds a Dockerfile and a requirements.lock with hashes.")],
    tag: Annotated[str | None, typer.Option("--tag", help="Name of the image; else orch/DIRECTORY:LOCK.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Image to stand on, or its name in images.lock.json.")
    ] = None,
    lock: Annotated[Path | None, typer.Option("--lock", help="Another lock than DIRECTORY/requirements.lock.")] = None,
    builder: Annotated[
        str | None, typer.Option("--builder", help="podman (the same image each time) | docker; else what is there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an image without network, from wheels that a lock pins by their hashes."""
    from orchestrator.cli import commands

    commands.build_image(directory, tag=tag, base=base, lock=lock, builder=builder, as_json=as_json)


@image_app.command("ls")
def image_ls(as_json: Json = False) -> None:
    """The images that have names here, and what they pin."""
    from orchestrator.cli import commands

    commands.list_images(as_json)


Runtime = Annotated[
    str | None, typer.Option("--runtime", help="docker, podman, apptainer or pyxis; else the site profile's.")
]


@image_app.command("pull")
def image_pull(
    image: Annotated[str, typer.Argument(help="repository@sha256:… or a name from containers/images.lock.json.")],
    runtime: Runtime = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Fetch an image before a run needs it: into the engine here, or as a file that every node sees."""
    from orchestrator.cli import commands

    commands.pull_image(image, runtime, root, as_json)


@image_app.command("verify")
def image_verify(
    images: Annotated[
        list[str] | None, typer.Argument(help="Pins or names; else all names and imported files.")
    ] = None,
    runtime: Runtime = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Compare images with their pins; exit 4 if one is missing or another one."""
    from orchestrator.cli import commands

    commands.verify_images(images or [], runtime, root, as_json)


@image_app.command("prune")
def image_prune(
    max_age: Annotated[
        str | None, typer.Option("--max-age", metavar="30d", help="Unused for longer than that.")
    ] = None,
    max_size: Annotated[str | None, typer.Option("--max-size", metavar="200G", help="What the rest may take.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Remove imported image files that no run needs (engines have their own: `docker image prune`)."""
    from orchestrator.cli import commands

    commands.prune_images(max_age, max_size, dry_run, root, as_json)


Step = Annotated[int | None, typer.Option("--step", min=0, help="Optimizer step of the checkpoint.")]


@ckpt_app.command("ls")
def ckpt_ls(run: Run, root: Root = None, as_json: Json = False) -> None:
    """List the checkpoints, newest first. valid: it can be resumed from, as far as manifest and sizes tell."""
    from orchestrator.cli import checkpoints

    checkpoints.ls(run, root, as_json)


@ckpt_app.command("verify")
def ckpt_verify(run: Run, step: Step = None, root: Root = None, as_json: Json = False) -> None:
    """Read the bytes again and compare them with their hashes; exit 5 if one is damaged. Changes nothing."""
    from orchestrator.cli import checkpoints

    checkpoints.verify(run, step, root, as_json)


@ckpt_app.command("pull")
def ckpt_pull(
    run: Run,
    directory: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to copy into; made if missing.")],
    step: Step = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint and its manifest (the newest, or that of --step), compared on its way."""
    from orchestrator.cli import checkpoints

    checkpoints.pull(run, directory, step, root, as_json)


@ckpt_app.command("push")
def ckpt_push(run: Run, root: Root = None, as_json: Json = False) -> None:
    """Bring a save that had no time for the object store there; the next attempt would do it, too."""
    from orchestrator.cli import checkpoints

    checkpoints.push(run, root, as_json)


@ckpt_app.command("gc")
def ckpt_gc(
    run: Run,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Remove what the spec does not keep, and what killed attempts left; not while the run is queued or running."""
    from orchestrator.cli import checkpoints

    checkpoints.gc(run, dry_run, root, as_json)


@ckpt_app.command("rollback")
def ckpt_rollback(
    run: Run,
    step: Annotated[int, typer.Option("--step", min=0, help="Optimizer step to go back to.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Let the next attempt go on from an older checkpoint; newer work is given up."""
    from orchestrator.cli import checkpoints

    checkpoints.rollback(run, step, yes, root, as_json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (PROTOCOLS 3) and never lets an exception out."""
    from orchestrator.cli import failures

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return failures.guarded(lambda: _run(arguments), json="--json" in arguments)
    finally:
        failures.close_quietly()


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    result = command.main(args=arguments, prog_name="orch", standalone_mode=False)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
