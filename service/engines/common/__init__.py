"""What every engine on a Qwen3-VL checkpoint does alike: prompt, pictures, grammars, text. No model here."""
