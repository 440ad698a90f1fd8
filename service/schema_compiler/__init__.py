"""JSON Schema, regular expressions and choices -> grammar and report.

Imports no other part of the service but errors and types.
"""
