"""The intermediate representation: the JSON values that a schema allows, as typed data.

``lower`` makes it and ``emit`` reads it. It knows no keyword of JSON Schema and no syntax of a grammar.
``values`` defines it; ``sizes`` computes properties of it: which values have a text at all, and how much
text a grammar for them can force.
"""
