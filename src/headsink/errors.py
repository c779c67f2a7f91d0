"""HeadsinkError, the exception for bad input. Its message is one line: what is wrong, why, and what would be right."""


class HeadsinkError(Exception):
    """headsink cannot use its input. The message is one line that can be shown to a user as it is."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # names from files may contain line breaks and terminal escapes


def printable(text: str) -> str:
    r"""Return the text on one line, with every non-printable character escaped, as in \x1b or \n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def must_be(what: str, found: object, right: object) -> None:
    """Raise unless `found` equals `right`. Kernels use raw addresses, so a wrong shape or dtype would corrupt memory."""
    if found != right:
        raise HeadsinkError(f"{what}: {found}, and must be {right}")
