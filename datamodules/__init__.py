"""Data modules, one file per kind of data."""
