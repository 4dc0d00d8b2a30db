"""The documentation says what the models say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.spec import json_schema, load_site, load_spec
from orchestrator.spec.site import KEYS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate_spec_reference", DOCS / "generate_spec_reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_reference_has_not_drifted(generator: ModuleType) -> None:
    assert (DOCS / "spec.md").read_text(encoding="utf-8") == generator.reference(), "run: make docs"


def test_schema_has_not_drifted(generator: ModuleType) -> None:
    assert (DOCS / "schema.json").read_text(encoding="utf-8") == generator.schema_text(), "run: make docs"


def test_schema_is_json_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    assert schema["required"] == ["name", "job"]
    for model in [schema, *schema["$defs"].values()]:
        assert model["additionalProperties"] is False
        assert all(field.get("description") for field in model["properties"].values())
    assert "title" not in schema["properties"]["name"]


def patterns_in(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
        return own + [pattern for value in schema.values() for pattern in patterns_in(value)]
    return [pattern for item in schema for pattern in patterns_in(item)] if isinstance(schema, list) else []


def test_patterns_of_the_schema_can_be_read() -> None:
    patterns = patterns_in(json_schema())
    assert len(patterns) >= 6
    for pattern in patterns:
        re.compile(pattern)


def test_example_of_the_site_profile_is_valid(tmp_path: Path) -> None:
    text = (DOCS / "site-profile.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "site.yaml").write_text(text)
    site = load_site({"ORCH_SITE_CONFIG": str(tmp_path / "site.yaml"), "USER": "ada"})
    assert all(getattr(site, key) is not None for key in KEYS)
    (tmp_path / "spec.yaml").write_text("name: x\njob: {module: m}\ncontainer: {runtime: none}\n")
    assert load_spec(tmp_path / "spec.yaml", site=site, environ={}).root == "/shared/ada/orch"
