"""Environment variables that are on or off. Imports nothing of LMDeploy."""

from __future__ import annotations

import os

ON = ("1", "true", "on", "yes")
OFF = ("0", "false", "off", "no")


def is_on(variable: str) -> bool:
    """The value of a variable in the environment; on without the variable.

    Raises:
        lmdeploy_ext.patch.ExtensionError: the value is not understood.
    """
    value = os.environ.get(variable, "").strip().lower()
    if value not in ("", *ON, *OFF):
        from lmdeploy_ext.patch import ExtensionError

        raise ExtensionError(
            f"{variable}={os.environ[variable]!r} is not understood. {', '.join(ON)} or no "
            f"variable mean on; {', '.join(OFF)} mean off."
        )
    return value not in OFF
