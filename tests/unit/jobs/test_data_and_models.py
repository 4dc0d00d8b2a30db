from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs.augmentation.views import RandomViews
from jobs.data.digits import main, write_digits
from jobs.data.images import ImageFolder
from jobs.evaluation.knn import knn_accuracy, knn_votes
from jobs.models import build_backbone
from jobs.optimization.optimizers import OptimizerPlan, build_optimizer
from jobs.optimization.schedule import warmup_cosine, warmup_cosine_factor
from jobs.pretrain.settings import TransformSettings
from orchestrator.errors import SpecError
from orchestrator.integrations.randomness import seed_torch


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# --- data


def test_images_are_sorted_by_name_and_labelled_by_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/10.png", "a/9.PNG", "b/deep/1.png"):
        write_image(tmp_path / name, (10, 20, 30))
    (tmp_path / "notes.txt").write_text("no image")
    data = ImageFolder([str(tmp_path)])
    assert data.names == ["a/10.png", "a/9.PNG", "b/2.png", "b/deep/1.png"]
    assert data.labels == [0, 0, 1, 2]
    assert data.image_size == 16
    image = data[2, 5]
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [10, 20, 30]


def test_sizes_are_evened_out(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png", (0, 0, 0), size=(40, 30))
    data = ImageFolder([str(tmp_path)])
    assert data.image_size == 48
    assert data[0].shape == (3, 48, 48)
    assert data.labels is None
    assert ImageFolder([str(tmp_path / "1.png")], image_size=32)[0].shape == (3, 32, 32)


def test_empty_files_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "good.png", (0, 0, 0))
    (tmp_path / "bad.png").touch()
    with caplog.at_level(logging.WARNING):
        assert len(ImageFolder([str(tmp_path)])) == 1
    assert "bad.png" in caplog.text


@pytest.mark.parametrize(("make", "message"), [("nothing", "does not exist"), ("folder", "no images")])
def test_missing_data_is_explained(tmp_path: Path, make: str, message: str) -> None:
    if make == "folder":
        (tmp_path / "data").mkdir()
    with pytest.raises(SpecError, match=message):
        ImageFolder([str(tmp_path / "data")])


@pytest.mark.parametrize("cut", [20, 60])
def test_a_damaged_image_is_named(tmp_path: Path, cut: int) -> None:
    write_image(tmp_path / "1.png", (0, 0, 0), size=(200, 200))
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "2.png").write_bytes(content[:cut])
    with pytest.raises(SpecError, match=r"2\.png"):
        _ = ImageFolder([str(tmp_path)])[1]


def test_digits_are_written_once_and_the_same(tmp_path: Path) -> None:
    assert write_digits(tmp_path / "one", limit=25) == 25
    before = (tmp_path / "one").stat().st_mtime_ns
    assert write_digits(tmp_path / "one", limit=25) == 25
    assert (tmp_path / "one").stat().st_mtime_ns == before
    write_digits(tmp_path / "two", limit=25)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(names) == 25
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert {name.parent.name for name in names} == set("0123456789")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_digits_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main(["--out", str(tmp_path / "mine"), "--limit", "3"]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- views


def test_views_are_a_function_of_the_seed() -> None:
    views = RandomViews(TransformSettings(), image_size=16)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    drawn = []
    for part in (0, 0, 1):
        seed_torch(part)
        drawn.append(views(images))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (4, 3, 16, 16)
    assert not isinstance(views, torch.nn.Module)


# --- models


def test_resnet9_maps_images_to_features() -> None:
    backbone, width = build_backbone("orch/resnet9", {"width": 4})
    assert width == 32
    assert backbone(torch.rand(2, 3, 16, 16)).shape == (2, 32)
    assert backbone(torch.rand(2, 3, 40, 40)).shape == (2, 32)


def test_timm_models_have_no_head() -> None:
    pytest.importorskip("timm")
    backbone, width = build_backbone("timm/resnet10t", {})
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.parametrize(
    ("name", "args", "hint"),
    [
        ("orch/resnet", {}, "did you mean orch/resnet9"),
        ("timm/resnet81", {}, "did you mean timm/resnet"),
        ("orch/resnet9", {"width": 0}, "width"),
        ("orch/resnet9", {"depth": 3}, "width"),
        ("timm/resnet10t", {"no_such": 3}, "timm's resnet10t"),
    ],
)
def test_unknown_models_are_explained(name: str, args: dict[str, int], hint: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(SpecError) as refused:
        build_backbone(name, args)
    assert hint in (refused.value.hint or "")


def test_the_built_in_model_does_not_import_timm() -> None:
    program = (
        "import sys, jobs.methods.simclr.method; from jobs.models import build_backbone; "
        "build_backbone('orch/resnet9', {}); assert 'timm' not in sys.modules"
    )  # torchmetrics imports torchvision where it is installed, so that cannot be asked
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


# --- optimization


def test_schedule_warms_up_then_falls_to_zero() -> None:
    factors = [warmup_cosine_factor(step, warmup_steps=4, steps=12) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)
    assert math.isclose(factors[8], 0.5)
    assert factors[12] == 0.0
    assert warmup_cosine_factor(0, warmup_steps=0, steps=5) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_are_not_decayed(name: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    plan = OptimizerPlan(name, 0.1, 0.01, 0.9, (0.9, 0.99), steps=10, warmup_steps=2)
    optimizer = build_optimizer(module, plan)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in module.parameters()] == [0.01, 0.0, 0.0, 0.0]
    assert warmup_cosine(optimizer, warmup_steps=2, steps=10).get_last_lr() == [0.05, 0.05]


# --- evaluation


def test_neighbours_vote_by_similarity() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9949874]])
    labels = torch.tensor([2, 1, 1])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert knn_votes(queries, bank, labels, neighbors=1).tolist() == [2, 1]
    assert knn_votes(queries, bank, labels, neighbors=50).tolist() == [2, 1]


def test_knn_tells_colours_apart(tmp_path: Path) -> None:
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        for index in range(10):
            write_image(tmp_path / label / f"{index}.png", colour)
    backbone, _ = build_backbone("orch/resnet9", {"width": 2})
    calls: list[int] = []
    data = ImageFolder([str(tmp_path)])
    accuracy = knn_accuracy(backbone, data, neighbors=3, batch_size=8, between_batches=lambda: calls.append(1))
    assert accuracy == 1.0
    assert backbone.training
    assert len(calls) == 3
    shutil.rmtree(tmp_path / "blue")
