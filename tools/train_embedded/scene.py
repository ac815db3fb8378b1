"""Scenes: what a caption means, drawn exactly. The training data of the embedded model is made here.

Sizes and paths are fractions of the frame, so that a scene looks alike on every token grid.
"""

import random
from dataclasses import dataclass

import torch

from pointillist.pipelines.embedded.vocabulary import BACKGROUNDS, COLORS, MOTION_PHRASES, MOTIONS, SHAPES

ROTATION = 2.6  # radians over the whole clip
STAR_INNER = 0.45  # inner radius of the star over its outer radius


@dataclass(frozen=True)
class Words:
    """The four attributes that a caption names."""

    color: str
    shape: str
    motion: str
    background: str

    def caption(self) -> str:
        """The canonical wording."""
        return f"{article(self.color)} {self.color} {self.shape} {MOTION_PHRASES[self.motion][0]} on {self.background}"


def article(word: str) -> str:
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def all_words() -> list[Words]:
    """Every drawable combination: the object differs from its background, and a rotation is visible."""
    return [
        Words(color, shape, motion, background)
        for color in COLORS
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
        if color != background and not (shape == "circle" and motion == "rotating")
    ]


def split_words(held_out: int = 96, seed: int = 7) -> tuple[list[Words], list[Words]]:
    """(training, held-out) combinations; a held-out combination is never drawn in training."""
    words = all_words()
    random.Random(seed).shuffle(words)
    return words[held_out:], words[:held_out]


def free_caption(words: Words, rng: random.Random) -> str:
    """One of many wordings of the same scene."""
    motion = rng.choice(MOTION_PHRASES[words.motion])
    before = rng.choice([f"{article(words.color)} ", f"{article(words.color)} ", "the ", ""])
    thing = f"{words.color} {words.shape}"
    ground = "grey" if words.background == "gray" and rng.random() < 0.3 else words.background
    place = rng.choice([f"on {ground}", f"on a {ground} background", f"on {ground}", f"{ground} background"])
    pattern = rng.choice(["{a}{t} {m} {p}", "{a}{t} {m} {p}", "{a}{t}, {m}, {p}", "{p}, {a}{t} {m}", "{a}{t} {p} {m}"])
    return pattern.format(a=before, t=thing, m=motion, p=place)


@dataclass(frozen=True)
class Scene:
    """One clip to draw. Lengths in fractions of the frame's shorter side, positions of each side."""

    words: Words
    start: tuple[float, float]  # centre (x, y) in the first frame
    end: tuple[float, float]  # … in the last one
    radius: tuple[float, float]  # circumscribed radius in the first and the last frame
    turn: tuple[float, float]  # angle in the first and the last frame, radians


def sample_scene(words: Words, rng: random.Random) -> Scene:
    """A scene with these words: position, size and speed vary a little."""
    x, y = 0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.06, 0.06)
    reach = rng.uniform(0.19, 0.23)
    dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(words.motion, (0, 0))
    radius = rng.uniform(0.18, 0.21)
    radii = {"growing": (0.55 * radius, 1.5 * radius), "shrinking": (1.5 * radius, 0.55 * radius)}
    return Scene(
        words,
        start=(x - dx * reach, y - dy * reach),
        end=(x + dx * reach, y + dy * reach),
        radius=radii.get(words.motion, (radius, radius)),
        turn=(0.0, ROTATION if words.motion == "rotating" else 0.0),
    )


def _signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to the outline, negative inside (exact near the edges, which is where it matters)."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.78 * radius
    pi = torch.pi
    corners, inner = (3, 0.5) if shape == "triangle" else (5, STAR_INNER)
    distance, angle = torch.hypot(x, y), torch.atan2(x, -y)  # 0 points up
    folded = torch.remainder(angle + pi / corners, 2 * pi / corners) - pi / corners
    px, py = distance * torch.cos(folded), distance * torch.sin(folded).abs()
    tip = torch.tensor([1.0, 0.0])
    dent = inner * torch.tensor([torch.cos(torch.tensor(pi / corners)), torch.sin(torch.tensor(pi / corners))])
    edge = dent - tip
    normal = torch.stack([edge[1], -edge[0]]) / edge.norm()
    scale = 1.08 if shape == "triangle" else 1.1
    return (px - tip[0] * scale * radius) * normal[0] + py * normal[1]


def render(scene: Scene, frames: int, height: int, width: int) -> torch.Tensor:
    """Draw `scene`: float32 [3, frames, height, width] in [0, 1], edges antialiased over one pixel."""
    time = torch.linspace(0, 1, frames)[:, None, None]
    side = min(height, width)

    def blend(pair: tuple[float, float]) -> torch.Tensor:
        return pair[0] + (pair[1] - pair[0]) * time

    y = ((torch.arange(height) + 0.5)[None, :, None] - height * blend((scene.start[1], scene.end[1]))) / side
    x = ((torch.arange(width) + 0.5)[None, None, :] - width * blend((scene.start[0], scene.end[0]))) / side
    angle = blend(scene.turn)
    turned_x = x * torch.cos(angle) + y * torch.sin(angle)
    turned_y = y * torch.cos(angle) - x * torch.sin(angle)
    distance = _signed_distance(scene.words.shape, turned_x, turned_y, blend(scene.radius))
    inside = (0.5 - distance * side).clamp(0, 1)
    color = torch.tensor(COLORS[scene.words.color])[:, None, None, None]
    ground = torch.tensor(BACKGROUNDS[scene.words.background])[:, None, None, None]
    return ground + (color - ground) * inside
