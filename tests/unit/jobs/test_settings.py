from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from jobs.pretrain.arguments import parse_arguments, parse_value
from jobs.pretrain.settings import parse_settings
from orchestrator.errors import SpecError
from orchestrator.spec.arguments import render_argument


@pytest.mark.parametrize(
    "value",
    ["plain", "123", "true", "null", "NaN", "", " a b ", '"quoted"', "[1", 7, 0.1, None, True, [1, "a"], {"lr": 0.3}],
)
def test_arguments_survive_the_specs_rendering(value: Any) -> None:
    assert parse_value(render_argument(value)) == value


def test_words_become_settings() -> None:
    words = ["--data=/d", "--epochs=4", '--optim_args={"lr":0.1}', "--seed=null", "--out=a=b"]
    settings = parse_settings(parse_arguments(words))
    assert (settings.data_paths, settings.epochs, settings.seed, settings.out) == (("/d",), 4, None, "a=b")
    assert settings.optim_args.lr == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--data"], "cannot read"), (["data=/d"], "cannot read"), (["--epochs=1", "--epochs=2"], "given twice")],
)
def test_words_that_are_no_settings(words: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data: is required"),
        ({"data": "d", "epoch": 3}, "epoch: unknown setting; did you mean epochs?"),
        (
            {"data": "d", "optim_args": {"learning_rate": 1}},
            r"optim_args.learning_rate: unknown setting; known: betas, lr",
        ),
        ({"data": "d", "epochs": 0}, r"epochs: input should be greater than or equal to 1 \(given: 0\)"),
        ({"data": "d", "epochs": "4"}, "epochs: input should be a valid integer"),
        ({"data": "d", "method": "simcrl"}, "method: input should be 'simclr'"),
        ({"data": "d", "transform_args": {"blur": 2}}, "transform_args.blur: input should be less than or equal to 1"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_settings(values)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SpecError) as refused:
        parse_settings({"epochs": 0, "batch_size": 1, "sead": 3})
    assert len(str(refused.value).splitlines()) == 5


def test_the_command_line_answers_without_importing_torch() -> None:
    program = (
        "import sys; from jobs.pretrain.__main__ import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "--epochs=none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "data: is required" in done.stderr
    assert "hint: see docs/training.md" in done.stderr
