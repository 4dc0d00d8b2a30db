"""What `orch doctor` says to people."""

from __future__ import annotations

from orchestrator.cli.out import Line
from orchestrator.operations.checkup.findings import Examined, Level

_LEVEL_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.BAD: "bold red"}


def examined_lines(result: Examined, marks: tuple[str, str, str]) -> list[Line]:
    """The findings in their order, each fix below its finding, and the sum."""
    mark = dict(zip(Level, marks, strict=True))
    widest = max(len(word) for word in marks)
    column = max((len(finding.topic) for finding in result.findings), default=0)
    content: list[Line] = []
    for finding in result.findings:
        sign = (f"  {mark[finding.level]:<{widest}} ", _LEVEL_STYLES[finding.level])
        content.append([sign, (f"{finding.topic:<{column}} ", "dim"), (finding.message, "")])
        if finding.fix is not None:
            content.append([(f"{'':{widest + column + 4}}do: {finding.fix}", "dim")])
    bad, known = (sum(finding.level is level for finding in result.findings) for level in (Level.BAD, Level.WARN))
    verdict = f"{bad} wrong" if bad else "nothing is wrong"
    verdict += f", {known} thing{'' if known == 1 else 's'} to know" if known else ""
    content.append([(verdict, "bold red" if bad else "bold green")])
    return content
