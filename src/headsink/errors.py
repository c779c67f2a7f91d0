"""What goes wrong because of the input: one exception, one line that says what, why and what would be right."""


class HeadsinkError(Exception):
    """Input that headsink cannot use. The message is one line, fit to be shown to a user as it is."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # names from files may hold line breaks and terminal escapes


def printable(text: str) -> str:
    r"""The text on one line: every character that a terminal would not show as itself is escaped, as in \x1b or \n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def must_be(what: str, found: object, right: object) -> None:
    """Raise unless a kernel is given what it takes for granted: it goes by addresses, and would read and write elsewhere."""
    if found != right:
        raise HeadsinkError(f"{what}: {found}, and must be {right}")
