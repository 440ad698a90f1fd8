"""Regular expressions: syntax, matching in linear time, and finite automata.

``syntax`` parses the dialect of ECMA-262 that JSON Schema uses; ``matching`` compiles a pattern for
validation; ``nfa`` and ``dfa`` turn patterns into minimal deterministic automata for grammars. Sets of
characters are sorted ranges of ``codepoints``.
"""
