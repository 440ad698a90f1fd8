"""Code that all engines for Qwen3-VL checkpoints share: prompts, images, grammars, text. Contains
no model."""
