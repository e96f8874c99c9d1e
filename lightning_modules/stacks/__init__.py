"""Many nets of one shape side by side in one program."""
