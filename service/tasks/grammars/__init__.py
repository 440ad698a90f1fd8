"""Grammars made from JSON schemas and regular expressions, exact wherever a grammar can be."""
