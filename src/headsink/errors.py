"""What goes wrong because of the input: one exception, one line that says what, why and what would be right."""


class HeadsinkError(Exception):
    """Input that headsink cannot use. The message is one line, fit to be shown to a user as it is."""
