"""The ``qwen3vl`` command line: run a server, or call one."""
