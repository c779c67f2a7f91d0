"""Colours of pages and charts: Okabe and Ito's, which people with colour blindness can tell apart."""

BLUE, ORANGE, SKY, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#BBBBBB"
ROLE_COLOURS = {"sink": BLUE, "local": ORANGE, "mixed": SKY, "diffuse": GREY, "retrieval": VERMILION}

Colour = tuple[int, int, int]
# Of little and of much attention, in one hue, on light ground and on dark ground; and where the text on it changes.
ON_LIGHT: tuple[Colour, Colour] = (255, 255, 255), (8, 48, 107)
ON_DARK: tuple[Colour, Colour] = (18, 23, 30), (158, 202, 255)


def ramp(steps: int, dark: bool) -> list[tuple[str, str]]:
    """Background and text colour of the steps 0 to `steps` of a shaded text."""
    low, high = ON_DARK if dark else ON_LIGHT
    mixed = ([round(a + (b - a) * n / steps) for a, b in zip(low, high, strict=True)] for n in range(steps + 1))
    return [
        ("rgb({} {} {})".format(*colour), "white" if dark != (n > steps / 2) else "#1c2430")
        for n, colour in enumerate(mixed)
    ]
