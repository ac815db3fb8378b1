"""The words that the embedded model was trained on, and what they look like."""

import re

RGB = tuple[float, float, float]

COLORS: dict[str, RGB] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.8, 0.0),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "orange": (1.0, 0.55, 0.0),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (0.0, 0.0, 0.0),
    "gray": (0.5, 0.5, 0.5),
    "navy": (0.0, 0.0, 0.35),
    "white": (1.0, 1.0, 1.0),
    "brown": (0.4, 0.25, 0.1),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "growing", "shrinking", "rotating", "still")

# How a motion may be worded. The first wording of each is the canonical one.
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    **{
        way: (
            f"moving {way}",
            f"that moves {way}",
            f"moves {way}",
            *((f"moving to the {way}", f"that moves to the {way}") if way in ("left", "right") else ()),
            *((f"moving {way}wards", f"that moves {way}ward") if way in ("up", "down") else ()),
        )
        for way in ("left", "right", "up", "down")
    },
    "growing": ("growing", "that grows", "grows", "getting bigger", "that gets bigger"),
    "shrinking": ("shrinking", "that shrinks", "shrinks", "getting smaller", "that gets smaller"),
    "rotating": ("rotating", "that rotates", "rotates", "spinning", "that spins"),
    "still": ("still", "standing still", "that stands still", "that does not move", "not moving"),
}
_GLUE = "a an the on in of and is with background grey it to"


def words_of(text: str) -> list[str]:
    """The lower-case words of `text`, without punctuation."""
    return re.findall(r"\w+", text.lower())


KNOWN_WORDS: frozenset[str] = frozenset(
    words_of(" ".join([_GLUE, *COLORS, *BACKGROUNDS, *SHAPES, *(p for ps in MOTION_PHRASES.values() for p in ps)]))
)


def unknown_words(prompt: str) -> list[str]:
    """Words of `prompt` that the embedded model has never seen, in order, each once."""
    return list(dict.fromkeys(word for word in words_of(prompt) if word not in KNOWN_WORDS))
