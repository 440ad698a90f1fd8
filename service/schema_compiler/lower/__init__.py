"""Stage 3: alternatives in normal form become values that a grammar can express.

Input: the alternatives of each state. Output: the values of ``ir``, and the reason for each keyword that
they do not enforce. Strings become automata, numbers become automata over digits, conjunctions on
objects and arrays become lists of properties and items.
"""
