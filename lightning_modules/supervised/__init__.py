"""Plain supervised training, for studies whose subject is an observer."""
