"""Stage 4: values become text that an engine reads.

Input: the values of ``ir``. Output: a grammar in xgrammar's EBNF. This package alone knows the syntax of
grammars; it knows no keyword of JSON Schema.
"""
