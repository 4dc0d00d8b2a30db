"""Values that carry their unit: `Memory` (bytes), `WallTime`, `Duration` (seconds). Text becomes a number here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

_BYTES = {"B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(?:i?B)?|B)", re.IGNORECASE | re.ASCII)
_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?", re.ASCII)
_LIMIT = 2**53  # beyond this a float no longer counts single bytes or seconds; nothing real comes near


class _Quantity(int):
    """An int that is written and read as text with a unit; a bare number is refused: nobody can tell its unit."""

    allowed: ClassVar[str]
    pattern: ClassVar[str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Text to value. Raises ValueError with what is allowed."""
        raise NotImplementedError

    @classmethod
    def _validate(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise ValueError(f"{value} has no unit; write {cls.allowed}")
        raise ValueError(f"expected text with a unit: {cls.allowed}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": cls.pattern, "description": cls.allowed}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class Memory(_Quantity):
    """Bytes. "2G" is 2 x 1024^3, as in Slurm; K, M, G, T, with or without B or iB, and plain B."""

    allowed = 'a size such as "512M", "2G" or "1.5T" (K, M, G, T are powers of 1024)'
    pattern = r"^\d+(\.\d+)? ?([KMGTkmgt]([iI]?[bB])?|[bB])$"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"2G"` to bytes."""
        match = _MEMORY.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a size; write {cls.allowed}")
        number, unit = match.groups()
        size = float(number) * _BYTES[(unit or "B").upper()]
        if size > _LIMIT:
            raise ValueError(f"{text!r} is more than any machine has; write {cls.allowed}")
        return cls(int(number) * _BYTES[(unit or "B").upper()] if number.isdigit() else int(size))

    def __str__(self) -> str:
        for unit in "TGMK":
            if self and self % _BYTES[unit] == 0:
                return f"{int(self) // _BYTES[unit]}{unit}"
        return f"{int(self)}B"


def _parse_parts(text: str) -> int | None:
    match = _PARTS.fullmatch(text)
    if match is None or not text:
        return None
    return sum(int(number or 0) * seconds for number, seconds in zip(match.groups(), _SECONDS.values(), strict=True))


class Duration(_Quantity):
    """Seconds, written "120s", "2m", "1h30m"."""

    allowed = 'a duration such as "120s", "2m" or "1h30m"'
    pattern = r"^(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?$"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"120s"` to seconds."""
        seconds = _parse_parts(text.strip())
        if seconds is None or seconds > _LIMIT:
            raise ValueError(f"{text!r} is not a duration; write {cls.allowed}")
        return cls(seconds)

    def __str__(self) -> str:
        return f"{int(self)}s"


class WallTime(_Quantity):
    """Seconds, written as Slurm does ("04:00:00", "2-12:00:00", "2-12", "30:00" = 30 minutes) or "4h", "90m"."""

    allowed = 'a time such as "04:00:00", "2-12:00:00" (days-hours:minutes:seconds), "4h" or "90m"'
    pattern = r"^(\d+-\d+(:\d{1,2}){0,2}|\d+(:\d{1,2}){1,2}|(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?)$"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`"04:00:00"` to seconds."""
        seconds = _parse_parts(text.strip())
        if seconds is None:
            seconds = cls._parse_clock(text.strip())
        if seconds is None or seconds > _LIMIT:
            raise ValueError(f"{text!r} is not a time; write {cls.allowed}")
        return cls(seconds)

    @staticmethod
    def _parse_clock(text: str) -> int | None:
        match = _CLOCK.fullmatch(text)
        if match is None:
            return None
        days, first, second, third = (None if part is None else int(part) for part in match.groups())
        if first is None or (days is None and second is None):
            return None  # a bare number: Slurm reads minutes, people mean hours or seconds
        if days is None and third is None:
            hours, minutes, seconds = 0, first, second or 0
        else:
            hours, minutes, seconds = first, second or 0, third or 0
        if seconds > 59 or (hours and minutes > 59) or (days is not None and hours > 23):
            return None
        return (days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    def __str__(self) -> str:
        days, rest = divmod(int(self), 86400)
        clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
        return f"{days}-{clock}" if days else clock
