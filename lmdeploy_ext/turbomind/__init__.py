"""Qwen3-VL as a source model of TurboMind. Only `records` may be imported before LMDeploy is."""
