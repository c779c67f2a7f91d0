"""What goes wrong because of the input: one exception, one line that says what, why and what would be right."""


class HeadsinkError(Exception):
    """Input that headsink cannot use. The message is one line, fit to be shown to a user as it is."""


def must_be(what: str, found: object, right: object) -> None:
    """Raise unless a kernel is given what it takes for granted: it goes by addresses, and would read and write elsewhere."""
    if found != right:
        raise HeadsinkError(f"{what}: {found}, and must be {right}")
