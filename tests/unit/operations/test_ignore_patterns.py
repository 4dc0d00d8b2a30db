"""`workspace.exclude` means what .gitignore means: compared with git itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.operations.ignore_patterns import IgnorePatterns

PATHS = [
    "a.py",
    "b.txt",
    "data/x.bin",
    "data/deep/x.bin",
    "src/data/x.bin",
    "src/a.py",
    "src/build/out.o",
    "build/out.o",
    "doc/a b.md",
    "doc/[x].md",
    "#note",
    "!bang",
    "deep/er/still/a.py",
]
PATTERNS = [
    ["*.py"],
    ["/a.py"],
    ["data"],
    ["data/"],
    ["/data/"],
    ["src/data"],
    ["**/build"],
    ["build/**"],
    ["src/**/out.o"],
    ["deep/**/a.py"],
    ["**/still/"],
    ["*.py", "!src/a.py"],
    ["data/", "!data/x.bin"],
    ["*", "!*.py"],
    ["*.?in"],
    ["[ab].*"],
    ["[!ab].*"],
    ["doc/a b.md"],
    ["doc/\\[x\\].md"],
    ["\\#note", "\\!bang"],
    ["# comment", ""],
    ["doc/*"],
    ["a.py/"],
    ["[a-c].py"],
    ["**"],
    ["src/"],
    ["x.bin"],
    ["*/x.bin"],
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", top], check=True)
    for path in PATHS:
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).touch()
    return top


@pytest.mark.parametrize("patterns", PATTERNS, ids=" ".join)
def test_as_git(patterns: list[str], repository: Path) -> None:
    (repository / ".git" / "info" / "exclude").write_text("\n".join(patterns) + "\n")
    command = ["git", "-C", str(repository), "ls-files", "-z", "--others", "--exclude-standard"]
    kept = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    ignore = IgnorePatterns(patterns)
    assert [path for path in PATHS if not ignore.excludes(path)] == [path for path in PATHS if path in kept]


def test_unreadable_pattern() -> None:
    with pytest.raises(ValueError, match="is not a pattern"):
        IgnorePatterns(["[z-a]"])


def test_odd_characters() -> None:
    assert IgnorePatterns(["*.\udcff", "two\nlines"]).excludes("x.\udcff")
    assert IgnorePatterns(["a\nb"]).excludes("a\nb")
    assert not IgnorePatterns(["a.b"]).excludes("axb")
