"""What LMDeploy's builders make of a checkpoint, for code in a child on the host runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lmdeploy.turbomind import _tm
from lmdeploy.turbomind.checkpoint import SafetensorsCheckpoint
from lmdeploy.turbomind.model_loader import ModelLoader

import lmdeploy_ext
from tests.host_runtime.weights import exported


def export(checkpoint: str, result: str, **changes: Any) -> dict[str, Any]:
    """Install the extension, export a checkpoint and say what became of it.

    Args:
        result: file that gets the committed tensors, path in the module tree -> tensor.
        changes: engine settings.

    Returns:
        ``read``: names of the tensors that were read; ``all``: names of all (both after the
        loader's mappings); ``configs``: path -> fields of each module's C++ configuration.
    """
    lmdeploy_ext.install()
    with _reading() as seen, _configs() as configs:
        torch.save(exported(checkpoint, **changes), result)
    return {"read": sorted(seen["read"]), "all": sorted(seen["all"]), "configs": configs}


@contextmanager
def _reading() -> Iterator[dict[str, set[str]]]:
    seen: dict[str, set[str]] = {"read": set(), "all": set()}

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Any, key: str, index: Any = None) -> Any:
            value = original(self, key, index)
            if not isinstance(index, slice):  # an empty slice only takes the tensor out
                seen["read"].add(key)
            return value

        return read

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        opened(self, *arguments, **keywords)
        seen["all"].update(self.keys())

    opened = SafetensorsCheckpoint.__init__
    with (
        mock.patch.object(SafetensorsCheckpoint, "__init__", init),
        mock.patch.object(SafetensorsCheckpoint, "get", noting(SafetensorsCheckpoint.get)),
        mock.patch.object(SafetensorsCheckpoint, "pop", noting(SafetensorsCheckpoint.pop)),
    ):
        yield seen


@contextmanager
def _configs() -> Iterator[dict[str, dict[str, Any]]]:
    configs: dict[str, dict[str, Any]] = {}
    made: list[tuple[Any, dict[str, Any]]] = []
    create, export_all = _tm.create_module, ModelLoader.export

    def note(config: Any) -> Any:
        module = create(config)
        made.append((module, fields(config)))
        return module

    def export_and_name(self: Any) -> None:
        export_all(self)
        configs.update({module.full_path(): values for module, values in made})
        assert len(configs) == len(made)

    with (
        mock.patch.object(_tm, "create_module", note),
        mock.patch.object(ModelLoader, "export", export_and_name),
    ):
        yield configs


def fields(config: Any) -> dict[str, Any]:
    """Every field of a C++ configuration, enums as text."""
    values = {}
    for name in dir(config):
        value = getattr(config, name)
        if name.startswith("_") or callable(value):
            continue
        if isinstance(value, _tm.RopeConfig):
            value = fields(value)
        elif isinstance(value, _tm.DataFormat):
            continue  # the weights' own format; the tensors show it
        elif not isinstance(value, bool | int | float | str | list):
            value = str(value)
        values[name] = value
    return values
