"""One function per command: call the operation, print its result. Exit codes other than 0 leave as `typer.Exit`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orchestrator import operations
from orchestrator.cli import out
from orchestrator.errors import BackendError, ContainerError, SpecError
from orchestrator.words import count, safety, size

if TYPE_CHECKING:
    from orchestrator.operations.results import RunStatus, Signalled, Submitted, Usage

DID_NOT_SUCCEED = 1


def init(path: Path, source: str, as_json: bool) -> None:
    from orchestrator.operations.starter import write_starter

    write_starter(path, source=source)
    if as_json:
        out.json_document({"path": str(path.absolute()), "from": source})
        return
    out.line(f"wrote {path}")
    out.line(f"  check:  orch validate {path}        run:  orch submit {path}")


def validate(spec: Path, sets: Sequence[str], root: Path | None, as_json: bool) -> None:
    try:
        result = operations.validate(spec, overrides=sets, root=root)
    except SpecError as error:
        problems = [dict(problem) for problem in error.problems] or [{"message": error.message}]
        if as_json:
            out.json_document({"valid": False, "problems": problems, "warnings": []})
        out.error(error.message, error.hint)
        out.error(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}. Nothing was submitted.", None)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        out.json_document(result.as_json())
        return
    out.warnings(result.warnings)
    files = f"{count(result.code_files)} file{'' if result.code_files == 1 else 's'}"
    out.line(f"{spec} is fine: run {result.run_id}, {files} of code ({size(result.code_bytes)})")


def schema() -> None:
    from orchestrator.spec import json_schema

    out.json_document(json_schema())


def site(as_json: bool) -> None:
    import os

    from orchestrator.spec.site import KEYS, load_site, site_files

    profile = load_site(os.environ)
    if as_json:
        out.json_document(profile.as_dict())
        return
    values = profile.as_dict()
    for place in site_files(os.environ):
        out.line(f"{place}" + ("" if place in profile.sources else "   (not there)"))
    for key, meaning in KEYS.items():
        value = values[key]
        out.line((f"  {key:<10} ", "bold"), "not set" if value is None else str(value), (f"   {meaning}", "dim"))


def doctor(
    spec: Path | None,
    sets: Sequence[str],
    root: Path | None,
    *,
    node: bool,
    partition: str | None,
    timeout: str,
    as_json: bool,
) -> None:
    start_s = seconds(timeout, "--timeout")
    result = operations.doctor(spec, overrides=sets, root=root, node=node, partition=partition, start_s=start_s)
    if as_json:
        out.json_document(result.as_json())
    else:
        from orchestrator.cli.examined import examined_lines

        out.lines(examined_lines(result, marks=out.marks()))
    if not result.ok:
        raise typer.Exit(result.exit_code)


def submit(
    spec: Path,
    sets: Sequence[str],
    root: Path | None,
    *,
    new: bool,
    dry_run: bool,
    follow: bool,
    as_json: bool,
) -> None:
    if dry_run:
        _dry_run(spec, sets, root, new, as_json)
        return
    result = operations.submit(spec, overrides=sets, root=root, new=new)
    _after_submit(result, follow, as_json)


def _dry_run(spec: Path, sets: Sequence[str], root: Path | None, new: bool, as_json: bool) -> None:
    plan = operations.plan_of(spec, overrides=sets, root=root, new=new)
    if not as_json:
        print(str(plan), end="")
        return
    document = {
        "run_id": plan.run_id,
        "run_dir": str(plan.run_dir),
        "backend": plan.backend,
        "token": plan.token,
        "script": plan.script,
        "agent": plan.agent,
    }
    out.json_document(document)


def _after_submit(result: Submitted, follow: bool, as_json: bool) -> None:
    out.warnings(result.warnings)
    if not as_json:
        out.lines(_submitted_lines(result))
    if follow:
        with _looking(result.run_id):
            status = _follow(str(result.run_dir), silent=as_json)
        if as_json:
            out.json_document({**result.as_json(), "state": status.state.value})
        else:
            _show(status)
        if not status.succeeded:
            raise typer.Exit(DID_NOT_SUCCEED)
    elif as_json:
        out.json_document(result.as_json())


def _submitted_lines(result: Submitted) -> list[out.Line]:
    run: out.Segment = (result.run_id, "bold")
    if not result.queued_now:
        where = [f"job {result.job_id}"] if result.job_id and result.action != "already_completed" else []
        where += [f"step {count(result.step)}"] if result.step is not None else []
        known = result.action.removeprefix("already_")
        detail = f" ({', '.join(where)})" if where else ""
        return [[run, (f"  is already {known}{detail}. Nothing was submitted. A fresh copy: orch submit --new", "")]]
    where_to = f"to Slurm as {result.job_id}" if result.backend == "slurm" else f"on this machine as {result.job_id}"
    verb = "submitted" if result.action == "submitted" else "goes on: submitted"
    summary = f" ({result.summary})" if result.summary else ""
    hint = f"  follow:  orch logs -f {result.run_id}        stop:  orch cancel {result.run_id}"
    return [[run, (f"  {verb} {where_to}{summary}", "")], [(hint, "dim")]]


@contextmanager
def _looking(run: str) -> Iterator[None]:
    """Ctrl-C stops looking, not the run: say so."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped looking; the run goes on. Look again:  orch logs -f {run}", file=sys.stderr)
        raise


def _follow(run: str, *, silent: bool) -> RunStatus:
    """Print the log until the run ends."""
    for line in operations.logs(run, follow=True):
        if not silent:
            _print_log_line(line.text, line.heading)
    return operations.wait(run).status


def _print_log_line(text: str, heading: bool) -> None:
    if heading:
        out.line((text, "dim"))
    else:
        print(text, flush=True)


def status(run: str, root: Path | None, as_json: bool) -> None:
    result = operations.status(run, root=root)
    out.warnings(result.warnings)
    if as_json:
        out.json_document(result.as_json())
    else:
        _show(result)


def _show(status: RunStatus) -> None:
    from orchestrator.cli.view import status_lines
    from orchestrator.operations.sparklines import trends
    from orchestrator.paths import RunPaths

    out.lines(status_lines(status, trends(RunPaths(status.run_dir))))


def ps(root: Path | None, states: Sequence[str], as_json: bool) -> None:
    rows, warnings = operations.ps(root=root, states=[_state(name) for name in states])
    out.warnings(warnings)
    if as_json:
        out.json_document([row.as_json() for row in rows])
        return
    from orchestrator.cli.view import PS_HEADING, row_of

    if not rows:
        out.line("no runs" + (f" in {root}" if root else " in any known root; --root DIR looks elsewhere"))
        return
    now = time.time()
    out.lines(out.table(PS_HEADING, [row_of(row, now) for row in rows], width=out.terminal_width()))


def _state(name: str) -> Any:
    from orchestrator.states import JobState

    known = {state.value: state for state in JobState}
    if name not in known:
        raise typer.BadParameter(f"--state {name}: one of {', '.join(known)}")
    return known[name]


def logs(
    run: str, root: Path | None, *, follow: bool, attempt: int | None, rank: int, node: int | None, as_json: bool
) -> None:
    lines = operations.logs(run, root=root, follow=follow, attempt=attempt, rank=rank, node=node)
    if not as_json:
        with _looking(run) if follow else nullcontext():
            for line in lines:
                _print_log_line(line.text, line.heading)
        return
    kept = [line for line in lines if not line.heading]
    last = kept[-1].attempt if kept else attempt
    out.json_document({"attempt": last, "rank": rank, "node": node, "lines": [line.text for line in kept]})


def wait(run: str, timeout: str | None, root: Path | None, as_json: bool) -> None:
    result = operations.wait(run, timeout_s=None if timeout is None else seconds(timeout, "--timeout"), root=root)
    if as_json:
        out.json_document(result.as_json())
    else:
        _show(result.status)
    if result.timed_out:
        out.error(
            f"{result.status.run_id} has not ended after {timeout}", f"it goes on; `orch wait {result.status.run_id}`"
        )
    if result.timed_out or not result.status.succeeded:
        raise typer.Exit(DID_NOT_SUCCEED)


_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str, option: str) -> float:
    """`90`, `90s`, `1.5h` → seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{option} {text}: expected seconds, or a time such as 90s, 30m, 2h")
    return float(match[1]) * _UNITS_S[match[2]]


def cancel(run: str, root: Path | None, as_json: bool) -> None:
    result = operations.cancel(run, root=root)
    if as_json:
        out.json_document(result.as_json())
        return
    words = {
        "cancelled": "cancelled",
        "cancelling": "is being stopped",
        "already_cancelled": "was cancelled already",
        "already_completed": "has already completed; there is nothing to cancel",
    }[result.action]
    safe = f" Step {count(result.step)} is safe." if result.step is not None else ""
    if result.lost_step is not None and result.action != "cancelling":  # then it saves once more
        safe = f" {safety(result.step, result.lost_step)}"
    more = "" if result.action == "already_completed" else f"{safe} Go on with it:  orch resume {result.run_id}"
    out.line((result.run_id, "bold"), f"  {words}.{more}")


def preempt(run: str, root: Path | None, *, watch: bool, verify: bool, timeout: str, as_json: bool) -> None:
    limit_s = seconds(timeout, "--timeout")
    result = operations.preempt(run, root=root)
    if verify:
        _verify(result, limit_s, as_json)
        return
    if as_json:
        out.json_document(result.as_json())
        return
    print(f"signalled (SIG{result.signal})", end="", flush=True)
    if not watch:
        print(f"; watch:  orch status {result.run_id}")
        return
    from orchestrator.cli.drilled import narrate

    if not narrate(result, limit_s):
        raise typer.Exit(DID_NOT_SUCCEED)


def _verify(drill: Signalled, limit_s: float, as_json: bool) -> None:
    """The drill with a certificate at its end; the story is for people only."""
    if as_json:
        certificate = operations.verify_drill(drill, timeout_s=limit_s)
        out.json_document(certificate.as_json())
    else:
        from orchestrator.cli.drilled import certificate_lines, tell_verified

        print(f"signalled (SIG{drill.signal})", end="", flush=True)
        certificate = operations.verify_drill(
            drill, timeout_s=limit_s, tell=tell_verified, reading=out.Bar("reading the checkpoint again")
        )
        print()
        out.lines(certificate_lines(certificate))
    if not certificate.passed:
        raise typer.Exit(DID_NOT_SUCCEED)


def shell(run: str, root: Path | None, *, rank: int, command: Sequence[str]) -> None:
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    beside = operations.shell(run, rank=rank, command=command, terminal=terminal, root=root)
    if terminal:
        where = f"container {beside.container[:12]} on {beside.node}" if beside.container is not None else beside.node
        print(
            f"rank {beside.rank} of {beside.run_id}, {where}; `exit` leaves, the job goes on",
            file=sys.stderr,
            flush=True,
        )
    raise typer.Exit(operations.open_shell(beside))


_MIN_INTERVAL_S = 0.5


def top(run: str, root: Path | None, *, once: bool, interval: str, as_json: bool) -> None:
    interval_s = seconds(interval, "--interval")
    if interval_s < _MIN_INTERVAL_S:
        raise typer.BadParameter(f"--interval {interval}: at least {_MIN_INTERVAL_S} s")
    with closing(operations.top(run, interval_s=interval_s, root=root)) as looks:
        if as_json or once or not out.live():
            _show_usage(next(looks, None), as_json)
        else:
            _show_usages(looks)


def _show_usage(usage: Usage | None, as_json: bool) -> None:
    from orchestrator.cli.view import usage_lines

    if usage is None:
        raise BackendError(
            "the attempt ended before it could be looked at", hint="`orch status` shows where the run is"
        )
    if as_json:
        out.json_document(usage.as_json())
    else:
        out.lines(usage_lines(usage))


def _show_usages(looks: Iterator[Usage]) -> None:
    """On a terminal, until Ctrl-C or the end of the attempt."""
    from orchestrator.cli.view import usage_lines

    with suppress(KeyboardInterrupt):
        out.repainted(usage_lines(usage) for usage in looks)


def resume(
    run: str | None,
    sets: Sequence[str],
    root: Path | None,
    *,
    code: bool,
    allow_drift: Sequence[str],
    follow: bool,
    as_json: bool,
) -> None:
    if run is not None:
        result = operations.resume(run, overrides=sets, code=code, allow_drift=allow_drift, root=root)
        _after_submit(result, follow, as_json)
        return
    done, problems = operations.resume_all(root=root)
    for run_id, error in problems.items():
        out.error(f"{run_id}: {error.message}", error.hint)
    if as_json:
        errors = {run_id: {"message": error.message, "hint": error.hint} for run_id, error in problems.items()}
        out.json_document({"resumed": [result.as_json() for result in done], "errors": errors})
    else:
        for result in done:
            out.lines(_submitted_lines(result))
        if not done and not problems:
            out.line("no run waits to be resumed")
    if problems:
        raise typer.Exit(max(error.exit_code for error in problems.values()))


def lock_image(reference: str, name: str | None, as_json: bool) -> None:
    named = None if name is None else operations.name_image(reference, name)
    result = operations.lock_image(reference) if named is None else named.image
    if as_json:
        out.json_document(result.as_json() if named is None else named.as_json())
        return
    print(result.image)
    if named is not None:
        what = "was already so" if named.before == result.image else "is what it stands for now"
        out.line(f"{named.name} in {named.path}: {what}; write container.image: {named.name}")
    if result.source == "local":
        out.error(
            "warning: this image was never pushed or pulled, so only its id pins it: it must exist on every node",
            "push it to a registry and lock the pushed tag to let nodes pull it",
        )


def build_image(
    directory: Path, *, tag: str | None, base: str | None, lock: Path | None, builder: str | None, as_json: bool
) -> None:
    told = out.progress if sys.stderr.isatty() else None
    result = operations.build_image(directory, tag=tag, base=base, lock=lock, builder=builder, tell=told)
    if not result.reproducible:
        out.warnings([f"{result.builder} gives this image another id each time; --builder podman the same one"])
    if as_json:
        out.json_document(result.as_json())
        return
    print(result.image)
    out.progress(f"{result.tag}, in the store of {result.builder}; push it, then:  orch image lock {result.tag}")


def list_images(as_json: bool) -> None:
    images = operations.list_images()
    if as_json:
        out.json_document([image.as_json() for image in images])
        return
    if not images:
        out.line("no images have names here: orch image lock TAG --name NAME")
        return
    width = max(len(image.name) for image in images)
    for image in images:
        print(f"{image.name:{width}}  {image.image.image}  (from {image.image.given})")


def pull_image(image: str, runtime: str | None, root: Path | None, as_json: bool) -> None:
    result = operations.pull_image(image, runtime=runtime, root=root, report=out.Bar("pulling"))
    if as_json:
        out.json_document(result.as_json())
        return
    where = result.path or f"{result.runtime} of this machine"
    taken = "" if result.size_bytes is None else f", {size(result.size_bytes)}"
    out.line(f"{'was already in' if result.was_here else 'now in'} {where}{taken}")


def verify_images(images: Sequence[str], runtime: str | None, root: Path | None, as_json: bool) -> None:
    checked = operations.verify_images(images, runtime=runtime, root=root)
    if as_json:
        out.json_document([image.as_json() for image in checked])
    elif not checked:
        out.line("no image has a name here, and none was imported")
    else:
        good, _, bad = out.marks()
        for image in checked:
            sign = (f"{good} ", "green") if image.problem is None else (f"{bad} ", "red")
            out.line(sign, f"{image.path or image.image}", "" if image.problem is None else f": {image.problem}")
    if any(image.problem is not None for image in checked):
        raise typer.Exit(ContainerError.exit_code)


def prune_images(max_age: str | None, max_size: str | None, dry_run: bool, root: Path | None, as_json: bool) -> None:
    result = operations.prune_images(max_age=max_age, max_size=max_size, dry_run=dry_run, root=root)
    if as_json:
        out.json_document(result.as_json())
        return
    for image in result.removed:
        out.line(f"  {image.path}  {image.image}")
    verb = "would be removed" if dry_run else "removed"
    files = len(result.removed)
    left = size(result.left_bytes)
    out.line(f"{files} file{'' if files == 1 else 's'} {verb}, {size(result.freed_bytes)}; {left} left")
