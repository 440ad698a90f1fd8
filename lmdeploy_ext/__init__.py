"""Qwen3-VL for LMDeploy's TurboMind: position packing, split vision encoder, model registration."""
