"""What every engine on a Qwen3-VL checkpoint does alike: prompt, images, grammars, text. No model here."""
