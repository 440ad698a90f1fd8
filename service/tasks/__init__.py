"""Tasks: what is asked of the model, what shape the answer has, and how the answer is read."""
