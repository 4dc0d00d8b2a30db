"""`init`: a first spec, commented, that runs as it is."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import RefusedError, RegistryError


def write_starter(path: Path, *, source: str = "digits") -> str:
    """Write a first spec; returns its text. Raises RefusedError if the file exists, SpecError for an unknown source."""
    from orchestrator.spec.templates import render_template, suggest_name

    text = render_template(source, suggest_name(path.name), file=path.name, directory=path.absolute().parent)
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
