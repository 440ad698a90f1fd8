"""A promise that plain LMDeploy keeps with the extension, with its off switch.

A promise is a set of records, and the environment variable that decides whether they are applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmdeploy_ext.patch import Record
from lmdeploy_ext.switches import is_on


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that LMDeploy does with the extension and would not do without.

    Attributes:
        variable: the switch; see `is_on`.
        on, off: what the log says about LMDeploy while the switch is on and off.
        records: the changes to LMDeploy.
        names: names of LMDeploy that the changes use, in addition to their targets; see
            `lmdeploy_ext.host`.
        applied_when: the value of the switch with which the records are applied.
    """

    variable: str
    on: str
    off: str
    records: tuple[Record, ...]
    names: Mapping[str, str | None]
    applied_when: bool = True

    @property
    def applies(self) -> bool:
        """Whether the records are to be applied. Raises ``ExtensionError`` for an invalid value."""
        return is_on(self.variable) is self.applied_when

    @property
    def shown(self) -> str:
        """What the log says. Raises ``ExtensionError`` for an invalid value."""
        return self.on if is_on(self.variable) else self.off

    @property
    def way_out(self) -> str:
        """How to run without the records."""
        value = "off" if self.applied_when else "on"
        return f"{self.variable}={value} runs LMDeploy without these changes."
