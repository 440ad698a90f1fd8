"""Documentation; `docs.generate` writes what comes from the code."""
