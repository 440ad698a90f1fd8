"""Lengths of strings, counted beside the grammar.

A grammar that counts characters has a state for each count, and a compiler goes through all tokens for
each state. Instead, a follower reads the JSON text token by token, counts the characters of the string
that is being written, and narrows the mask of the grammar: no token exceeds ``maxLength``, and none
closes a string before ``minLength``.

`table` reads the limits of a schema. `follower` has the rules, in Python; `vocabulary` applies them to
all tokens of a vocabulary at once.
"""
