"""What only one modality of a demo scene tells: a texture in the picture, an owner in the caption.

Enters: a generator, a picture's background or a caption. Leaves: its textured or signed form.
Must not know: scenes, files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TEXTURES = ("plain", "rows", "columns", "checks", "dots")
OWNERS = ("ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana")

_PERIOD = 16  # pixels
_DEPTH = 50  # by which a texture is darker than the ground
_SIGNED = ("{caption}, drawn by {owner}", "{owner}'s picture: {caption}", "{caption} for {owner}")

# Whether a point is dark, by its place in a period across and down.
_PATTERNS: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]] = {
    "plain": lambda x, y: np.zeros(np.broadcast(x, y).shape, np.bool_),
    "rows": lambda x, y: np.broadcast_to(y < _PERIOD // 2, np.broadcast(x, y).shape),
    "columns": lambda x, y: np.broadcast_to(x < _PERIOD // 2, np.broadcast(x, y).shape),
    "checks": lambda x, y: (x < _PERIOD // 2) ^ (y < _PERIOD // 2),
    "dots": lambda x, y: (x - _PERIOD // 2) ** 2 + (y - _PERIOD // 2) ** 2 <= (_PERIOD // 3) ** 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Private:
    """Of one scene; independent of all that picture and caption share, and of each other."""

    texture: str
    owner: str
    phase: tuple[int, int]
    wording: int


def sample_private(rng: np.random.Generator) -> Private:
    """Draw a scene's texture, owner, and how they are shown."""
    across, down = rng.integers(_PERIOD, size=2).tolist()
    return Private(
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        owner=OWNERS[rng.integers(len(OWNERS))],
        phase=(across, down),
        wording=int(rng.integers(len(_SIGNED))),
    )


def ground(
    background: tuple[int, int, int], side: int, private: Private | None
) -> NDArray[np.uint8]:
    """A picture's empty background, [side, side, 3], textured where there is one."""
    pixels = np.full((side, side, 3), background, dtype=np.uint8)
    if private is None:
        return pixels
    across, down = private.phase
    x = (np.arange(side)[None, :] + across) % _PERIOD
    y = (np.arange(side)[:, None] + down) % _PERIOD
    pixels[_PATTERNS[private.texture](x, y)] -= _DEPTH
    return pixels


def signed(caption: str, private: Private) -> str:
    """The caption, saying whose picture it is."""
    return _SIGNED[private.wording].format(caption=caption, owner=private.owner)
