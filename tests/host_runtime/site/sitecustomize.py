"""Python runs this at its start when this folder is on its path: every process of a test, also
``lmdeploy serve`` and the workers that it spawns, finds the device of the host runtime in torch."""

from tests.host_runtime.device import patch_torch_when_imported

patch_torch_when_imported()
