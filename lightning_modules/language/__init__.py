"""What papers on language models share."""
