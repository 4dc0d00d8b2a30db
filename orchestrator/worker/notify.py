"""Telling people that a run has ended (`notify`): on the host, after the state is written, once per submission and
state.

Whoever creates the marker file tells, everybody else does not; a crash right after that loses the message rather than
sending it twice. Nothing here changes a state or an exit code, and everything has a deadline. No URL and no secret
reaches an event, a log, an argument or an environment.

python -m orchestrator.worker.notify   ends that no agent could tell, as a JSON list on stdin: what `orch status` starts
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, load_run, read_events
from orchestrator.registry.usable import usable_checkpoint
from orchestrator.spec.webaddress import is_web_address
from orchestrator.states import ExitReason, JobState
from orchestrator.words import spoken, story

WEBHOOK_S, MAIL_S, COMMAND_S = 10.0, 20.0, 30.0
"""Deadlines of the channels, which run side by side."""

_KILL_S = 2.0  # for a program that has missed its deadline and was killed

_TRY_S = 3.0
_TRIES = 3
_LONGEST_MESSAGE = 4000
_SENDMAIL = "/usr/sbin/sendmail"


class NotSent(Exception):
    """A channel failed; the words go into an event, so they hold no URL and no secret."""


class Notifier:
    """Tells the end of one run. Made before the end is written: with the end, the secrets are gone."""

    def __init__(self, orders: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._orders = orders
        self._wanted: Mapping[str, Any] = orders.get("notify") or {"on": ()}
        self._paths = RunPaths(Path(orders["run_dir"]))
        self._environ = environ
        self._url = self._find_url()

    def _find_url(self) -> str | None:
        given = self._wanted.get("webhook")
        if given is None or not given.startswith("$"):
            return given
        values: Mapping[str, str] = self._environ  # of a login node, where the run's own are gone
        with contextlib.suppress(OSError, OrchError):  # then the channel says that there is no URL
            values = {**values, **read_json(self._paths.secrets)}
        return values.get(given[1:], "")

    def tell(
        self, state: JobState, reason: ExitReason | None, message: str, *, job_id: str, attempt: int | None
    ) -> None:
        """Send it through every channel, unless somebody has; blocks at most 34 s. Never raises."""
        if state.value not in self._wanted["on"]:
            return
        try:
            if not claim(self._paths.notified(job_id, state.value)):
                return
            document = describe_end(self._orders, self._paths, state, reason, message, job_id=job_id, attempt=attempt)
            log = EventLog(self._paths, "notify", attempt=attempt)
            for channel, failure in side_by_side(self._channels(document)):
                if failure is None:
                    log.append("action", action="notified", channel=channel, state=state.value)
                else:
                    log.append("action", action="notify_failed", channel=channel, state=state.value, message=failure)
        except (OrchError, OSError) as error:  # the disk is full, say: what was written about the run stands
            print(f"orch: nobody was told of the end: {error}", file=sys.stderr, flush=True)

    def _channels(self, document: Mapping[str, Any]) -> dict[str, tuple[float, Callable[[], None]]]:
        """Deadline and work of each channel that was asked for."""
        body = json.dumps(document).encode()
        channels: dict[str, tuple[float, Callable[[], None]]] = {}
        if (url := self._url) is not None:
            channels["webhook"] = WEBHOOK_S, lambda: post(url, body)
        if addresses := self._wanted["mail"]:
            channels["mail"] = MAIL_S + 2 * _KILL_S, lambda: send_mail(addresses, document, self._clean_environ())
        if (argv := self._wanted["command"]) is not None:
            environ = {**self._clean_environ(), **_variables(document)}
            # What it prints is not quoted: it may name what only the program knows.
            channels["command"] = (
                COMMAND_S + 2 * _KILL_S,
                lambda: run_program(argv, body, environ, document["run_dir"], COMMAND_S),
            )
        return channels

    def _clean_environ(self) -> dict[str, str]:
        """On this machine the submitter's environment holds the secrets; nobody else gets them."""
        return {name: value for name, value in self._environ.items() if name not in self._orders["secrets"]}


def claim(marker: Path) -> bool:
    """True for the one who creates the marker. Raises OSError when nobody could."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True


# --- what is told
def describe_end(
    orders: Mapping[str, Any],
    paths: RunPaths,
    state: JobState,
    reason: ExitReason | None,
    message: str,
    *,
    job_id: str,
    attempt: int | None,
) -> dict[str, Any]:
    """The JSON document; `text` is what people read."""
    progress = load_run(paths).progress or {}
    usable = usable_checkpoint(read_events(paths), paths.run_dir, look=True)
    step, max_steps = _whole(progress.get("step")), _whole(progress.get("max_steps"))
    checkpoint = None if usable.newest is None else usable.newest["step"]
    said = _sendable(message)
    text = story(
        orders["run_id"],
        state,
        reason,
        said,
        step=step,
        max_steps=max_steps,
        checkpoint_step=checkpoint,
        lost_step=usable.lost,
    )
    return {
        "run_id": orders["run_id"],
        "name": orders["name"],
        "state": state.value,
        "exit_reason": None if reason is None else reason.value,
        "message": said,
        "step": step,
        "max_steps": max_steps,
        "last_checkpoint_step": checkpoint,
        "job_id": job_id,
        "run_dir": orders["run_dir"],
        "attempt": attempt,
        "text": text,
    }


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _sendable(message: str) -> str:
    """What a program printed last may be part of it: short, and fit for a variable and for UTF-8."""
    short = message[:_LONGEST_MESSAGE].replace("\0", "")
    return short.encode(errors="replace").decode()


def _variables(document: Mapping[str, Any]) -> dict[str, str]:
    named = ("run_id", "state", "exit_reason", "message", "run_dir", "step")
    return {f"ORCH_{key.upper()}": "" if document[key] is None else str(document[key]) for key in named}


# --- the channels
def side_by_side(channels: Mapping[str, tuple[float, Callable[[], None]]]) -> list[tuple[str, str | None]]:
    """Run all at once; each with its failure in words, None for one that worked. Blocks until the latest deadline.

    Daemon threads: one that hangs in a name server is left behind, and does not keep the process alive.
    """
    outcomes: dict[str, str | None] = {}

    def attempt(channel: str, work: Callable[[], None]) -> None:
        try:
            work()
        except NotSent as error:
            outcomes[channel] = str(error)
        except Exception as error:  # noqa: BLE001 - its text, and that of a traceback, may hold the URL
            outcomes[channel] = type(error).__name__
        else:
            outcomes[channel] = None

    begin = time.monotonic()
    threads = {name: threading.Thread(target=attempt, args=(name, work), daemon=True)
               for name, (_, work) in channels.items()}  # fmt: skip
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, begin + channels[name][0] - time.monotonic()))
    late = {name: f"not done after {deadline:g} s" for name, (deadline, _) in channels.items()}
    return [(name, outcomes.get(name, late[name])) for name in channels]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST arrives as a GET without its document, and would look like a success."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(url: str, body: bytes) -> None:
    """POST the document; three tries within ten seconds. Raises NotSent."""
    import tenacity

    if not is_web_address(url):
        raise NotSent("no http:// or https:// URL is known: its secret is gone, or holds something else")
    headers = {"Content-Type": "application/json", "User-Agent": "orch"}
    opener = urllib.request.build_opener(_NoRedirects)
    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=0.5),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        for attempt in tries:
            with attempt:
                request = urllib.request.Request(url, body, headers, method="POST")
                opener.open(request, timeout=_TRY_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise NotSent(f"the server answered {error.code}") from None
    except OSError as error:
        raise NotSent(_network_words(error)) from None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    return isinstance(error, OSError)


def _network_words(error: OSError) -> str:
    """The kind of failure, without the text: that may name the host."""
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError) else error
    if isinstance(cause, TimeoutError):
        return "the server gave no answer"
    known = type(cause).__module__ == "builtins" and cause.errno is not None
    return os.strerror(cause.errno) if known and cause.errno is not None else type(cause).__name__


def send_mail(addresses: Sequence[str], document: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Through the machine's own mail program. Raises NotSent."""
    message = compose_mail(addresses, document)
    path = environ.get("PATH", os.defpath)
    if sendmail := shutil.which(_SENDMAIL) or shutil.which("sendmail", path=path):
        run_program([sendmail, "-i", "-t"], message.as_bytes(), environ, document["run_dir"], MAIL_S, quoted=True)
    elif mail := shutil.which("mail", path=path):
        # Some of these programs obey `~!command` at the beginning of a line, whatever they read from.
        text = ("\n" + document["text"]).replace("\n~", "\n ~").lstrip("\n")
        argv = [mail, "-s", message["Subject"], *addresses]
        run_program(argv, text.encode() + b"\n", environ, document["run_dir"], MAIL_S, quoted=True)
    else:
        raise NotSent(f"found neither {_SENDMAIL} nor sendmail nor mail on PATH")


def compose_mail(addresses: Sequence[str], document: Mapping[str, Any]) -> EmailMessage:
    """The mail. EmailMessage refuses line breaks in headers, and only names that cannot hold any go there."""
    mail = EmailMessage()
    mail["To"] = ", ".join(addresses)
    mail["Subject"] = f"orch: {document['run_id']} {spoken(document['state'])}"
    mail.set_content(f"{document['text']}\n\nrun directory: {document['run_dir']}\njob: {document['job_id']}\n")
    return mail


def run_program(
    argv: Sequence[str],
    given: bytes,
    environ: Mapping[str, str],
    cwd: str,
    timeout_s: float,
    *,
    quoted: bool = False,
) -> None:
    """Run to its end without a shell, `given` on stdin; killed with its children at the deadline. Raises NotSent."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as output:
        # Files, not pipes: a program that does not read, or leaves a child behind, blocks nobody.
        stdin.write(given)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                list(argv), stdin=stdin, stdout=output, stderr=output, env=dict(environ), cwd=cwd,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise NotSent(f"{argv[0]}: {getattr(error, 'strerror', None) or type(error).__name__}") from None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it is not waited for yet, so its group is there
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a dead disk say
                process.wait(_KILL_S)
            raise NotSent(f"{argv[0]} had not ended after {timeout_s:g} s and was killed") from None
        if code != 0:
            output.seek(0)
            lines = output.read(4096).decode(errors="replace").split("\n")
            words = next((f": {line.strip()[:300]}" for line in lines if line.strip()), "") if quoted else ""
            raise NotSent(f"{argv[0]} ended with exit code {code}{words}")


# --- ends that no agent could tell
def main() -> int:
    """Tell the ends on stdin, one after the other; started by `orch status` and left alone."""
    for end in json.load(sys.stdin):
        reason = None if end["exit_reason"] is None else ExitReason(end["exit_reason"])
        try:
            orders = read_json(RunPaths(Path(end["run_dir"])).agent_plan)
        except (OrchError, OSError):  # removed since: nobody is left to be told about
            continue
        # The directory may have been moved since it was planned.
        notifier = Notifier({**orders, "run_dir": end["run_dir"]}, os.environ)
        notifier.tell(JobState(end["state"]), reason, end["message"], job_id=end["job_id"], attempt=end["attempt"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
