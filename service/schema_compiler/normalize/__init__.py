"""Stage 2: keywords become alternatives in normal form.

Input: a checked schema. Output: for each state (a set of subschemas that one value satisfies or
violates), and for each JSON type, a list of alternatives. An alternative is a conjunction of constraints
on strings, numbers, properties or items; ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if``, references
and dependencies are gone. Where a product of alternatives would be too large, a part is dropped: the
result then describes more values than the schema, and the keyword is recorded.
"""
