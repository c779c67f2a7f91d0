"""What a head does, in one word, read from where its attention goes.

A head looks far if the attention on far keys is at least `FAR`: `retrieval` if much of that falls on one key at a time,
`diffuse` if it is spread. Otherwise it is `sink` or `local` if one of the two has most of the rest, `mixed` if neither.
A role always belongs to a length, a text and these thresholds.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["sink", "local", "mixed", "diffuse", "retrieval"]
ROLES: tuple[Role, ...] = ("sink", "local", "mixed", "diffuse", "retrieval")

FAR = 0.25  # far mass from which a head looks far
PEAK = 0.25  # share of the far mass on its strongest key from which looking far is retrieval
MOST = 0.75  # share of sink + local mass that names the head


def role(sink: float, local: float, far: float, far_peak: float) -> Role:
    """The role of a head with these mean masses (each 0 to 1)."""
    if far >= FAR:
        return "retrieval" if far_peak >= PEAK * far else "diffuse"
    near = sink + local
    if sink >= MOST * near:
        return "sink"
    return "local" if local >= MOST * near else "mixed"
