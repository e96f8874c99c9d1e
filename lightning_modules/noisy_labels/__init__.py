"""Parts shared by methods against noisy labels."""
