"""Networks that papers share."""
