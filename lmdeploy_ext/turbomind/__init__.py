"""Qwen3-VL as a source model of TurboMind. All modules except `records` and `names` import
LMDeploy."""
