"""The pages for people name every command, every option and each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.cli.main import app

REPOSITORY = Path(__file__).resolve().parents[3]
EVERYWHERE = {"--json", "--root"}  # named once, for all commands


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def headings() -> dict[str, str]:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    return {match[2]: match[1] for match in re.finditer(r"^### (`orch (\w+).*)$", page, re.MULTILINE)}


def test_the_page_has_a_section_for_every_command() -> None:
    assert headings().keys() == commands().keys()


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_heading_names_every_option(name: str) -> None:
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", headings()[name]))
    for option in commands()[name].params:
        names = {*option.opts, *option.secondary_opts}
        if option.param_type_name == "option" and not names & (EVERYWHERE | {"--help"}):
            assert names & shown, f"docs/cli.md, {name}: {sorted(names)}"
            shown -= names
    assert not {word for word in shown - EVERYWHERE if word.startswith("--")}, "options that the command does not have"


@pytest.mark.parametrize("group", ["ckpt", "image"])
def test_subcommands_have_a_heading_with_every_option(group: str) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    found = {match[2]: match[1] for match in re.finditer(rf"^#### (`orch {group} (\w+).*)$", page, re.MULTILINE)}
    members = commands()[group].commands
    assert found.keys() == members.keys()
    for name, command in members.items():
        options = {word for param in command.params for word in param.opts if word.startswith("--")}
        assert set(re.findall(r"--[a-z][a-z-]*", found[name])) == options - EVERYWHERE - {"--help"}, name


def test_the_readme_leads_to_every_page() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [page.name for page in (REPOSITORY / "docs").glob("*.md") if f"(docs/{page.name})" not in readme] == []
