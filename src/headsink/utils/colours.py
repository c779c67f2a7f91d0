"""Colours of pages and charts: Okabe and Ito's, which people with colour blindness can tell apart."""

BLUE, ORANGE, SKY, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#BBBBBB"
ROLE_COLOURS = {"sink": BLUE, "local": ORANGE, "mixed": SKY, "diffuse": GREY, "retrieval": VERMILION}

Colour = tuple[int, int, int]
# Of little and of much attention, in one hue, on light ground and on dark ground.
ON_LIGHT: tuple[Colour, Colour] = (255, 255, 255), (8, 48, 107)
ON_DARK: tuple[Colour, Colour] = (18, 23, 30), (158, 202, 255)


def ramp(steps: int, dark: bool) -> list[tuple[str, str]]:
    """Background and text colour of the steps 0 to `steps` of a shaded text."""
    low, high = ON_DARK if dark else ON_LIGHT
    mixed = ([round(a + (b - a) * n / steps) for a, b in zip(low, high, strict=True)] for n in range(steps + 1))
    return [("rgb({} {} {})".format(*one), "#1c2430" if _light(*one) else "white") for one in mixed]


def _light(red: int, green: int, blue: int) -> bool:
    """Whether dark text is easier to read on a colour than white text: by its approximate luma."""
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128
