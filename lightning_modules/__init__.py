"""Methods: one file per paper, folders for what papers share."""
