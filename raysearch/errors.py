"""The one exception that reaches a user as a single line. It carries no logic."""


class UserError(Exception):
    """Something the user can put right: the message is one line with the value, the rule and the remedy."""
