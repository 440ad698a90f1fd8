"""Qwen3-VL as a source model of TurboMind. `records` and `names` do not import LMDeploy, the others do."""
