"""Tasks: what is asked of the model (prompt), what shape the answer has (grammar), how it is read (parser)."""
