"""Tasks: a prompt, the grammar of its answer, and a parser of the answer."""
