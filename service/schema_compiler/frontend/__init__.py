"""Stage 1: the text of a schema becomes a checked schema.

Input: the text that a caller sent. Output: ``CheckedSchema``, the JSON document with the pointer and the
reference targets of each subschema, and a validator of answers whose work is bounded. A schema that is
not valid in its draft, is too large, or refers outside itself is refused here with its JSON pointer.
"""
