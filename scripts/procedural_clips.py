"""Captioned procedural clips: textured shapes move, turn, bounce and hide each other.

The shorter side of a frame spans [-1, 1], so that every resolution shows the same picture.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FRAMES = 33  # a whole clip

# name: (dark, light); a texture runs between the two.
COLOURS = {
    "red": ((0.52, 0.03, 0.06), (0.98, 0.24, 0.22)),
    "orange": ((0.74, 0.30, 0.02), (1.00, 0.62, 0.18)),
    "yellow": ((0.78, 0.64, 0.04), (1.00, 0.95, 0.36)),
    "green": ((0.02, 0.34, 0.10), (0.34, 0.80, 0.34)),
    "cyan": ((0.02, 0.48, 0.52), (0.40, 0.94, 0.92)),
    "blue": ((0.04, 0.10, 0.52), (0.24, 0.48, 0.98)),
    "purple": ((0.28, 0.05, 0.44), (0.68, 0.36, 0.90)),
    "pink": ((0.82, 0.30, 0.56), (1.00, 0.70, 0.84)),
    "white": ((0.72, 0.72, 0.76), (1.00, 1.00, 1.00)),
    "gray": ((0.22, 0.22, 0.25), (0.56, 0.56, 0.60)),
}
TEXTURES = ("", "striped", "dotted", "checkered")
SIZES = {"small": (0.24, 0.30), "": (0.36, 0.44), "large": (0.52, 0.60)}
# Pairs no training caption contains, so that prompts with them show composition.
HELD_OUT = {("orange", "star"), ("white", "triangle"), ("cyan", "ring")}


@dataclass(frozen=True)
class Motion:
    """What one verb does over a whole clip, and how a caption may say it."""

    phrases: tuple[str, ...]
    travel: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    growth: float = 0.0
    hops: float = 0.0


MOTIONS = (
    Motion(("moves right", "slides right", "moves to the right"), (1.1, 0.0)),
    Motion(("moves left", "slides left", "moves to the left"), (-1.1, 0.0)),
    Motion(("moves up", "rises"), (0.0, -1.1)),
    Motion(("moves down", "falls"), (0.0, 1.1)),
    Motion(("moves up and right",), (0.9, -0.9)),
    Motion(("moves up and left",), (-0.9, -0.9)),
    Motion(("moves down and right",), (0.9, 0.9)),
    Motion(("moves down and left",), (-0.9, 0.9)),
    Motion(("turns", "spins", "rotates"), spin=3.6),
    Motion(("bounces", "jumps"), hops=2.0),
    Motion(("grows",), growth=0.8),
    Motion(("shrinks",), growth=-0.8),
    Motion(("stays still", "rests")),
)
BACKDROPS = (
    Motion(("",)),
    Motion((" that drifts right",), (0.9, 0.0)),
    Motion((" that drifts left",), (-0.9, 0.0)),
    Motion((" that drifts up",), (0.0, -0.9)),
    Motion((" that drifts down",), (0.0, 0.9)),
    Motion((" that zooms in",), growth=0.5),
    Motion((" that zooms out",), growth=-0.5),
)
PLAIN_MOTIONS = ("moves right", "moves left", "moves up", "moves down", "turns", "bounces")
OPENINGS = ("", "", "", "", "a video of ", "a clip of ")


def _polygon(u, v, sides, apothem):
    sector = 2 * math.pi / sides
    from_normal = torch.remainder(torch.atan2(u, -v), sector) - sector / 2
    return torch.hypot(u, v) * from_normal.cos() - apothem


def _star(u, v):
    sector = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(u, -v) + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(u, v)
    outer, inner = (1.15, 0.0), (0.52 * math.cos(sector / 2), 0.52 * math.sin(sector / 2))
    edge = (inner[0] - outer[0], inner[1] - outer[1])
    along_normal = (radius * angle.cos() - outer[0]) * edge[1] - (
        radius * angle.sin() - outer[1]
    ) * edge[0]
    return along_normal / math.hypot(*edge)


def _cross(u, v):
    u, v = u.abs(), v.abs()
    return torch.minimum(torch.maximum(u - 0.98, v - 0.34), torch.maximum(u - 0.34, v - 0.98))


# Signed distances (negative inside) in units of the shape's radius; u points right, v down.
SHAPES = {
    "circle": lambda u, v: torch.hypot(u, v) - 0.92,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.80,
    "triangle": lambda u, v: _polygon(u, v, 3, 0.58),
    "star": _star,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.72).abs() - 0.25,
    "cross": _cross,
    "diamond": lambda u, v: (u.abs() * 1.35 + v.abs() * 0.9 - 0.95) / 1.62,
    "hexagon": lambda u, v: _polygon(u, v, 6, 0.85),
}


def vocabulary():
    """Every word a caption can contain, in a fixed order."""
    phrases = [phrase for motion in MOTIONS + BACKDROPS for phrase in motion.phrases]
    text = " ".join(
        [*COLOURS, *TEXTURES, *SIZES, *SHAPES, *phrases, *OPENINGS, "an and over on background . ,"]
    )
    return sorted(set(text.split()))


@dataclass(frozen=True)
class World:
    """What scenes are drawn from."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    textures: tuple[str, ...]
    sizes: tuple[str, ...]
    motions: tuple[Motion, ...]
    backdrops: tuple[Motion, ...]
    counts: tuple[int, ...]
    free_wording: bool  # several phrases for one thing, openings, unknown words
    contrast: float = 1.0  # of the backgrounds' textures, in [0, 1]


@dataclass
class Shape:
    kind: str
    colour: str
    texture: str
    size: str
    motion: Motion
    numbers: list[float]  # radius, centre x and y, angle, spin, growth, travel x and y, hops

    def words(self, rng, world):
        parts = (self.size, self.texture, self.colour, self.kind)
        noun = " ".join(part for part in parts if part)
        phrases = self.motion.phrases if world.free_wording else self.motion.phrases[:1]
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} {rng.choice(phrases)}"


@dataclass
class Scene:
    shapes: list[Shape]
    colour: str
    backdrop: Motion
    caption: str
    numbers: list[float]  # pan x and y, zoom, light x and y, contrast


# Everything that can be drawn, and the part of it that a tiny model learns in minutes.
RICH = World(
    shapes=tuple(SHAPES),
    colours=tuple(COLOURS),
    textures=("", *TEXTURES),
    sizes=("small", "", "", "large"),
    motions=MOTIONS,
    backdrops=BACKDROPS,
    counts=(1, 2),
    free_wording=True,
)
PLAIN = World(
    shapes=("circle", "square", "triangle", "star", "ring", "cross"),
    colours=("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    textures=("",),
    sizes=("", "", "large"),
    motions=tuple(m for m in MOTIONS if m.phrases[0] in PLAIN_MOTIONS),
    backdrops=(*BACKDROPS[:1] * 3, *BACKDROPS[1:3]),
    counts=(1, 1, 2),
    free_wording=False,
    # What nobody can predict from a caption drowns the shapes' outlines in the loss.
    contrast=0.2,
)


def _sample_shape(rng, offset, taken, world):
    while True:
        kind = rng.choice(world.shapes)
        colour = rng.choice([c for c in world.colours if c not in taken])
        if (colour, kind) not in HELD_OUT:
            break
    size, motion = rng.choice(world.sizes), rng.choice(world.motions)
    texture = rng.choice(world.textures)
    pace = rng.uniform(0.85, 1.15)
    numbers = [
        rng.uniform(*SIZES[size]),
        offset[0] + rng.uniform(-0.08, 0.08),
        offset[1] + rng.uniform(-0.08, 0.08),
        rng.uniform(-0.25, 0.25),
        motion.spin * pace,
        motion.growth * pace,
        motion.travel[0] * pace,
        motion.travel[1] * pace,
        motion.hops,
    ]
    return Shape(kind, colour, texture, size, motion, numbers)


def sample_scene(rng: random.Random, world: World) -> Scene:
    """Draw one scene with its caption: one or two shapes in front of one background."""
    background, backdrop = rng.choice(world.colours), rng.choice(world.backdrops)
    count = rng.choice(world.counts)
    angle, radius = (
        rng.uniform(0, 2 * math.pi),
        rng.uniform(0.0, 0.25) if count == 1 else rng.uniform(0.3, 0.55),
    )
    offset, shapes = (radius * math.cos(angle), radius * math.sin(angle)), []
    for _ in range(count):
        taken = {background, *(shape.colour for shape in shapes)}
        shapes.append(_sample_shape(rng, offset, taken, world))
        offset = (-offset[0], -offset[1])
    place = (
        f"{'an' if background[0] in 'aeiou' else 'a'} {background} background{backdrop.phrases[0]}"
    )
    subject = " and ".join(shape.words(rng, world) for shape in shapes)
    opening, relation, end = map(rng.choice, (OPENINGS, ("over", "over", "on"), ("", "", ".")))
    caption = f"{opening}{subject} {relation} {place}{end}"
    if not world.free_wording:
        caption = f"{subject} over {place}"
    elif rng.random() < 0.05:
        caption = caption.replace(
            " background", " <unk> background"
        )  # an unknown word must do no harm
    light, pace = rng.uniform(0, 2 * math.pi), rng.uniform(0.8, 1.2)
    numbers = [backdrop.travel[0] * pace, backdrop.travel[1] * pace, backdrop.growth * pace]
    numbers += [math.cos(light), math.sin(light), world.contrast]
    return Scene(shapes, background, backdrop, caption, numbers)


def _noise(count, generator, size=256):
    """Smooth octave noise in about [0, 1], `[count, 1, size, size]`."""
    total = 0
    for cells, weight in ((4, 0.5), (8, 0.4), (16, 0.3), (28, 0.2)):
        grid = torch.randn(count, 1, cells, cells, generator=generator, device=generator.device)
        total = total + weight * F.interpolate(grid, size=(size, size), mode="bicubic")
    return torch.sigmoid(3.0 * total)


def _look_up(noise, x, y):
    """Noise at the points x, y `[B, T, H, W]`; the canvas spans [-2, 2] and is mirrored beyond."""
    batch, frames, height, width = x.shape
    grid = torch.stack((x, y), -1).view(batch, frames * height, width, 2) / 2
    values = F.grid_sample(noise, grid, padding_mode="reflection", align_corners=False)
    return values.view(batch, frames, height, width)


def _mix(colours, names, amount, device):
    """Colour `[B, 3, T, H, W]` between the dark and the light tone of each named colour."""
    tones = torch.tensor([colours[name] for name in names], device=device).view(
        len(names), 2, 3, 1, 1, 1
    )
    return torch.lerp(tones[:, 0], tones[:, 1], amount.unsqueeze(1))


def _texture(kinds, u, v, noise):
    """Texture amount in [0, 1] at shape coordinates u, v `[B, T, H, W]`."""
    grain = 0.25 * (_look_up(noise, u * 0.8, v * 0.8) - 0.5)
    stripes = torch.sigmoid(5 * torch.sin(7.5 * u))
    dots = torch.sigmoid(12 * ((torch.cos(4.5 * u) * torch.cos(4.5 * v)).square() - 0.4))
    checks = torch.sigmoid(8 * torch.sin(5 * u) * torch.sin(5 * v))
    patterns = torch.stack((0.6 - 0.3 * v + grain, stripes + grain, dots + grain, checks + grain))
    return patterns[kinds, torch.arange(len(kinds), device=u.device)].clamp(0, 1)


def render(scenes, height, width, times, generator) -> torch.Tensor:
    """Clips `[len(scenes), 3, len(times), height, width]` in [-1, 1], on the generator's device.

    `times` are frame times; 0 is the first frame of a whole clip and 1 the last.
    """
    device, short = generator.device, min(height, width)
    t = torch.as_tensor(times, dtype=torch.float32, device=device).view(1, -1, 1, 1) - 0.5
    extent_x, extent_y = width / short, height / short
    x = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * extent_x
    y = ((torch.arange(height, device=device) + 0.5) / height * 2 - 1) * extent_y
    y, x = torch.meshgrid(y, x, indexing="ij")
    noise = _noise(len(scenes), generator)

    values = torch.tensor([scene.numbers for scene in scenes], device=device)
    pan_x, pan_y, zoom, light_x, light_y, contrast = values.view(-1, 6, 1, 1, 1).unbind(1)
    scale = torch.exp(-zoom * (t + 0.5 * zoom.sign()))
    here = _look_up(noise, x * scale - pan_x * t, y * scale - pan_y * t)
    here = 0.5 + contrast * (here - 0.5)
    video = 0.88 * _mix(COLOURS, [scene.colour for scene in scenes], here, device)

    for layer in range(max(len(scene.shapes) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.shapes) > layer]
        shapes = [scenes[row].shapes[layer] for row in rows]
        values = torch.tensor([shape.numbers for shape in shapes], device=device)
        radius, at_x, at_y, angle, spin, growth, go_x, go_y, hops = values.view(
            len(rows), 9, 1, 1, 1
        ).unbind(1)
        radius = radius * torch.exp(growth * t)
        hop = 0.7 * torch.sin(math.pi * hops * (t + 0.5)).abs() - 0.35 * (hops > 0)
        from_x = (x - (at_x + go_x * t) * extent_x) / radius
        from_y = (y - (at_y + go_y * t - hop) * extent_y) / radius
        cos, sin = torch.cos(angle + spin * t), torch.sin(angle + spin * t)
        u, v = cos * from_x + sin * from_y, cos * from_y - sin * from_x

        distance = torch.empty_like(u)
        for kind, signed_distance in SHAPES.items():
            which = [i for i, shape in enumerate(shapes) if shape.kind == kind]
            if which:
                distance[which] = signed_distance(u[which], v[which])
        kinds = torch.tensor([TEXTURES.index(shape.texture) for shape in shapes], device=device)
        paint = _mix(
            COLOURS, [shape.colour for shape in shapes], _texture(kinds, u, v, noise[rows]), device
        )
        paint = paint * (1 - 0.45 * torch.sigmoid(18 * (distance + 0.1))).unsqueeze(1)
        cover = (0.5 - distance * radius * short / 2).clamp(0, 1).unsqueeze(1)
        video[rows] = torch.lerp(video[rows], paint, cover)

    light = 1 + 0.18 * (light_x * x + light_y * y)
    return (video * light.unsqueeze(1)).clamp(0, 1) * 2 - 1


class ClipSource:
    """Endless fresh clips from one seed, drawn on `device`."""

    def __init__(self, seed, device, world=RICH):
        self.rng, self.world = random.Random(seed), world
        self.generator = torch.Generator(device).manual_seed(seed)

    def scenes(self, count):
        """Scenes to caption or to draw."""
        return [sample_scene(self.rng, self.world) for _ in range(count)]

    def draw(self, batch, frames, height, width):
        """Captions and clips `[batch, 3, frames, height, width]`, a stretch of whole clips."""
        scenes = self.scenes(batch)
        start = self.rng.randint(0, FRAMES - frames)
        times = [(start + frame) / (FRAMES - 1) for frame in range(frames)]
        captions = [scene.caption for scene in scenes]
        return captions, render(scenes, height, width, times, self.generator)
