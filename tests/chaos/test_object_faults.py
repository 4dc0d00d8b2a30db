"""Saves, take-overs, collections and loads through a network that breaks three requests in ten.

`ORCH_CHAOS_FAULTY_ATTEMPTS` sets how many attempts there are for each kind of server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import Fence, Manifest, objects, take_over
from orchestrator.checkpoint.objects import POINTER_OBJECT, ObjectStore
from orchestrator.errors import CheckpointError
from tests.chaos.nursery import SIZE, committer
from tests.objects.faulty import FAULTS, HANG, TRICKLE, Proxy, Request, always, faulty, once, randomly
from tests.objects.servers import KEY, KINDS, SECRET, Server, serving

ATTEMPTS = int(os.environ.get("ORCH_CHAOS_FAULTY_ATTEMPTS", "4"))
RATE = 0.3
LARGE = 20 << 20  # three parts
MOST_REQUESTS = 120  # of one operation, at RATE; 8 to 12 when nothing breaks


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with faulty(server) as running:
        yield running


class Run:
    """One run's checkpoints, reached through the proxy and past it."""

    def __init__(self, proxy: Proxy, scratch: Path) -> None:
        self.proxy, self.scratch = proxy, scratch
        self.patience_s = 60.0
        self.url = f"s3://{proxy.direct.new_bucket()}/run"

    def store(self, **options: Any) -> ObjectStore:
        """As the run opens it."""
        return ObjectStore(
            self.url,
            storage_options={**self.proxy.server.storage_options, **options},
            scratch=self.scratch / "through",
            patience_s=lambda: self.patience_s,
            sleep=self.wait,
        )

    def wait(self, seconds: float) -> None:
        """Ten times as eager, where patience need not run out."""
        time.sleep(seconds if self.patience_s < 60 else seconds / 10)

    def newest(self) -> int:
        """Step of the checkpoint that a reader with a good network takes; its bytes are what it claims."""
        options = {**self.proxy.direct.storage_options, "skip_instance_cache": False}  # one client for all tests
        store = ObjectStore(self.url, storage_options=options, scratch=self.scratch / "direct")
        found = store.find()
        assert not [name for name in store.medium.names() if "corrupt" in name]
        if found is None:
            return 0
        assert found.skipped == ()
        step, _ = committer.parse_content(found.path.read_bytes())
        assert step == found.manifest.step
        assert store.medium.pointer() == found.manifest.name.data
        return int(step)


@pytest.fixture
def run(proxy: Proxy, tmp_path: Path) -> Run:
    return Run(proxy, tmp_path)


def save(store: ObjectStore, fence: Fence, step: int, size: int = SIZE) -> Manifest:
    data = committer.content(step, fence.attempt, size)
    return store.commit(fence, lambda f: f.write(data), step=step, epoch=0, world_size=1)


def test_nothing_is_lost_when_three_requests_in_ten_break(proxy: Proxy, run: Run) -> None:
    proxy.decide = randomly(RATE, seed=ATTEMPTS)
    step = 0
    for attempt in range(ATTEMPTS):
        store = run.store()
        found, fence = take_over(store, attempt=attempt)
        assert (found.manifest.step if found else 0) == step
        for _ in range(2):
            step += 1
            before = len(proxy.requests)
            save(store, fence, step)
            assert len(proxy.requests) - before < MOST_REQUESTS
            assert run.newest() == step
            before = len(proxy.requests)
            store.collect_garbage(fence, keep_last=2)
            assert len(proxy.requests) - before < MOST_REQUESTS
            assert run.newest() == step
    assert set(proxy.injected) == {*FAULTS, "none"}
    share = 1 - proxy.injected["none"] / len(proxy.requests)
    assert RATE / 2 < share < RATE * 2


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_alone(proxy: Proxy, run: Run, kind: str) -> None:
    proxy.decide = randomly(RATE, seed=1, kinds=(kind,))
    for attempt in range(2):
        store = run.store()
        _, fence = take_over(store, attempt=attempt)
        save(store, fence, attempt + 1)
        store.collect_garbage(fence, keep_last=2)
        assert run.newest() == attempt + 1
    assert proxy.injected[kind] > 5


def test_a_large_checkpoint_in_parts(proxy: Proxy, run: Run) -> None:
    proxy.decide = randomly(RATE, seed=2)
    store = run.store()
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1, LARGE)
    assert sum("partNumber=" in request for request in proxy.requests) >= 3
    found, _ = take_over(run.store(), attempt=1)
    assert found is not None
    assert committer.parse_content(found.path.read_bytes())[0] == 1
    assert run.newest() == 1


@pytest.mark.parametrize(
    ("name", "size"), [("epoch-0001.json", SIZE), (POINTER_OBJECT, SIZE), (".ckpt", LARGE), (".json", SIZE)]
)
@pytest.mark.parametrize("kind", ["reset-after", "duplicate"])
def test_a_request_that_was_done_though_its_answer_got_lost(
    proxy: Proxy, run: Run, kind: str, name: str, size: int
) -> None:
    def match(request: Request) -> bool:
        path = request.target.partition("?")[0]
        if name == ".ckpt":
            return request.is_upload_completion
        return request.method == "PUT" and path.endswith(name) and (name != ".json" or "/step-" in path)

    proxy.decide = once(kind, match)
    store = run.store()
    _, fence = take_over(store, attempt=0)
    assert fence.epoch == 1  # its own fence was recognised
    for step in (1, 2):
        save(store, fence, step, size)
        assert run.newest() == step
    assert proxy.injected[kind] == 1


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("503", "reduce your request rate"),
        ("500", "internal error"),
        ("expired", "credentials were refused as expired"),
        ("reset-before", "onnection"),
        (HANG, "no answer in time"),
        (TRICKLE, "no answer in time"),
    ],
)
def test_the_end_of_patience_is_one_clear_error(
    proxy: Proxy, run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, cause: str
) -> None:
    # Where it is the answer that is bad, a busy machine must have the time to give it.
    monkeypatch.setattr(objects, "_LEAST_S", 1.0 if kind in (HANG, TRICKLE) else 60.0)
    store = run.store()
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    proxy.decide, run.patience_s = always(kind), 1.0
    for action in (lambda: save(store, fence, 2), lambda: take_over(store, attempt=1), store.find):
        before, began = len(proxy.requests), time.monotonic()
        with pytest.raises(CheckpointError, match=cause) as caught:
            action()
        assert "gave up after" in caught.value.message
        assert caught.value.hint
        assert time.monotonic() - began < 60  # upload, taking it back, asking who owns the run
        assert 1 <= len(proxy.requests) - before < 100
    proxy.decide, run.patience_s = lambda request: None, 60.0
    assert run.newest() == 1
    save(store, fence, 2)
    assert run.newest() == 2


def test_a_server_that_is_gone_in_the_middle_of_a_save(proxy: Proxy, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_LEAST_S", 1.0)
    store = run.store()
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    began, run.patience_s = time.monotonic(), 1.0
    proxy.decide = lambda request: HANG if proxy.injected[HANG] or request.method == "PUT" else None
    with pytest.raises(CheckpointError, match="no answer in time"):
        save(store, fence, 2)
    assert time.monotonic() - began < 60  # the upload, taking it back, asking who owns the run
    proxy.decide = lambda request: None
    assert run.newest() == 1


def test_downloads_that_are_always_cut_short_are_no_damage(proxy: Proxy, run: Run) -> None:
    store = run.store()
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 1)
    proxy.decide = lambda r: "truncated" if r.method == "GET" and manifest.name.data in r.target else None
    run.patience_s = 1.0
    with pytest.raises(CheckpointError) as caught:
        store.find()
    assert "nothing was changed" in (caught.value.hint or "")
    assert proxy.injected["truncated"] > 1
    assert manifest.name.data in caught.value.message
    assert run.newest() == 1


def test_missing_credentials_are_told_at_once(
    proxy: Proxy, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    pauses: list[float] = []
    run.wait = pauses.append  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="NoCredentialsError") as caught:
        run.store(key=None, secret=None).find()
    assert "check the credentials" in (caught.value.hint or "")
    assert (proxy.requests, pauses) == ([], [])


def test_credentials_that_are_renewed_meanwhile(
    proxy: Proxy, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "credentials"

    def write(token: str) -> None:
        profile.write_text(
            f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\naws_session_token = {token}\n"
        )

    def decide(request: Request) -> str | None:
        if b"old-token" not in request.head:
            return None
        if proxy.injected["expired"] == 3:
            write("new-token")
        return "expired"

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    write("old-token")
    store = run.store(key=None, secret=None)
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    proxy.decide = decide
    save(store, fence, 2)
    assert proxy.injected["expired"] == 4
    proxy.decide = lambda request: None
    assert run.newest() == 2
