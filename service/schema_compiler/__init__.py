"""A compiler from JSON Schema, regular expressions and choices to grammars, with a report on each keyword.

The compiler is a library. It imports nothing of the service but errors and plain values, reads no files
and starts no threads. ``service.schema_compiler.api`` is its entry point.

A schema passes through these stages; each is a package, whose docstring describes its input and output:

1. ``frontend`` reads the text as strict JSON, checks it against the metaschema of its draft, and
   resolves references.
2. ``normalize`` turns the keywords into alternatives of conjunctions, one list for each JSON type.
3. ``lower`` turns them into the typed values of ``ir``, and records each keyword that the values do
   not enforce.
4. ``emit`` writes the values as a grammar in EBNF.

``regex`` has the regular expressions that all stages use.
"""
