"""The self-test's process with a fault in it: features are computed and never added."""

from __future__ import annotations

import sys
from pathlib import Path

from lmdeploy_ext.deepstack import trial
from lmdeploy_ext.deepstack.features import Features

if __name__ == "__main__":
    Features._add = lambda self, event: None  # type: ignore[method-assign]
    trial.main(Path(sys.argv[1]))
