"""The fields of config.json, checked as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ModelError
from hybrid.formats.families import Switch
from profiler.common.errors import shown

MOST = 2**31 - 1  # of any size: kernels count in int32


class Fields:
    """The fields of a JSON object, checked as they are asked for; null is as if missing. It knows which were not.

    names: the object's own names for some fields; None for those that count as missing there. defaults: of fields that
    are asked for without one.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        names: Mapping[str, str | None] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.where, self._values, self._names, self._defaults = where, values, names or {}, defaults or {}
        self._asked = {"model_type"}

    def name(self, field: str) -> str:
        """What the object calls `field`."""
        return self._names.get(field, field) or field

    def get(self, field: str, default: Any = None) -> Any:
        name = self._names.get(field, field)
        default = self._defaults.get(field) if default is None else default
        if name is None:
            return default
        self._asked.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def has(self, field: str) -> bool:
        """Whether the field is there, though it be null."""
        return self._names.get(field, field) in self._values

    def size(self, field: str, default: int | None = None, most: int = MOST) -> int:
        value = self.get(field, default)
        if value is None:
            raise ModelError(f"{self.where} has no field '{self.name(field)}'; the model cannot be built without it")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(field, value, f"a whole number of at least 1 and at most {most}")
        return value

    def number(self, field: str, default: float, least: float = 1e-30) -> float:
        value = self.get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= 1e30:
            raise self.wrong(field, str(value), f"a number of at least {least:g}, at most 1e+30")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, str(value), "true or false")
        return value

    def switch(self, rule: Switch | bool) -> bool:
        return rule if isinstance(rule, bool) else self.flag(rule.field, rule.default)

    def wrong(self, field: str, value: object, expected: str) -> ModelError:
        """What is wrong with a field, as an error to raise."""
        return ModelError(f"{self.where}: '{self.name(field)}' is {shown(value)}, expected {expected}")

    def rest(self) -> dict[str, Any]:
        """The fields that were never asked for."""
        return {name: value for name, value in self._values.items() if name not in self._asked}
