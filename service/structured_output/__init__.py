"""Grammars at work: worker processes, compilation, validation of finished answers."""
