"""Mistakes that a user can mend."""


class UserError(Exception):
    """Printed as one message without a traceback; the command ends with exit code 1."""
