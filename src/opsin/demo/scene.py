"""Scenes: what stands in a picture, chosen by a seed. No pixels here; `drawn` paints a scene, `tasks` asks about it.

A picture is SIDE x SIDE pixels, in 3 x 3 cells. Three kinds: objects in cells; a written word, number or both, with
objects around; a bar chart. Some combinations (of shape and colour, of letters, of digits, of bars) never occur in the
`train` split, by a rule on their names: the `heldout` split is made to show them.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
Rgb = tuple[int, int, int]
Cell = tuple[int, int]
"""(row, column), each 0 to 2."""

PATCH = 12
"""Side of a patch of the demo's vision tower, in pixels."""
SIDE = 108
"""Side of a picture, in pixels: 9 x 9 patches."""
CELL = SIDE // 3

COLORS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (238, 214, 40),
    "green": (50, 160, 62),
    "cyan": (50, 190, 210),
    "blue": (45, 85, 205),
    "purple": (140, 60, 180),
    "pink": (240, 120, 190),
    "brown": (120, 72, 38),
    "gray": (128, 130, 132),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring", "moon", "arrow")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORD_LIST = """
ACE ACT ADD AGE AID AIM AIR ANT APE ARC ARM ART ASH BAD BAG BAR BAT BED BEE BIG BOX BOY BUS CAP CAR CAT COW CUP CUT
DAY DIG DOG DRY DUO EAR EAT EGG ELF END EYE FAN FAR FIG FIN FIX FLY FOG FOX FUN GAP GAS GEM GUM HAM HAT HEN HIP HOP
HUB HUT ICE INK JAM JAR JET JOB JOY KEY KID KIT LAB LAP LEG LID LIP LOG MAP MIX MUD NET NUT OAK OIL OWL PAN PEA PEN
PIE PIN POT RAG RAT RAY RED RIB ROD ROW RUG SAW SEA SKY SUN TAP TEA TOE TOY TUB URN VAN VET WAX WEB WIG YAK ZIP ZOO
ATOM AUTO BABY BALL BAND BARK BATH BEAN BEAR BELL BIRD BLUE BOAT BONE BOOK BOWL CAGE CAKE CAMP CARD CAVE CHEF CITY
CLAY COAL COIN CORN CRAB CROW DARK DEER DESK DICE DOOR DOVE DRUM DUCK DUST ECHO EXIT FARM FERN FILM FIRE FISH FLAG
FLUX FOOD FORK FROG GATE GIFT GLUE GOAT GOLD GULF HAND HARP HAWK HERB HILL HOME HOOK HORN IRON JAZZ JUMP KING KITE
KIWI KNOT LACE LAKE LAMP LEAF LIME LION LOCK MAZE MILK MINT MOON MOTH NAVY NEST NOTE OVEN PARK PEAR PINE PLUM POND
QUIZ RAIN RICE RING ROAD ROCK ROPE ROSE SALT SAND SEED SHIP SHOE SNOW SOAP SONG STAR SURF SWAN TAXI TENT TIDE TOAD
TREE TUNA VASE VINE WAVE WIND WOLF WOOD WORM YARD YOGA ZERO ZONE APPLE ARROW BEACH BERRY BLOCK BRAIN BREAD BRICK
BRUSH CABLE CANDY CHAIR CHALK CHESS CLOCK CLOUD COMET CRANE CROWN DAISY DANCE DREAM EAGLE EARTH FENCE FLAME FLUTE
FROST FRUIT GHOST GLASS GLOVE GRAPE GRASS HEART HONEY HORSE HOUSE JEWEL JUICE KAYAK KNIFE LEMON LIGHT LUNCH MAPLE
MELON METAL MONEY MOUSE MUSIC NURSE OASIS OCEAN OLIVE ONION OPERA OTTER PAPER PEACH PIANO PILOT PIZZA PLANE PLANT
PRIZE QUEEN QUILT RADIO RIVER ROBOT ROUND SALAD SHARK SHEEP SHELL SKATE SMILE SNAKE SPACE SPOON STORM SUGAR TABLE
TIGER TOAST TOWER TRAIN TRUCK VIOLA WATCH WATER WHALE WHEEL ZEBRA
"""
WORDS = tuple(_WORD_LIST.split())
MAX_BAR = 9
BAR_STEP = 10
"""Pixels per unit of a bar."""
INK_STYLES = ("outline", "bitmap", "stroke", "bold", "slanted", "segments")
"""See `fonts`; `segments` draws digits only."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape in one cell."""

    shape: str
    color: str
    cell: Cell
    x: float
    """Centre, in pixels."""
    y: float
    size: int
    """Side of its box, in pixels."""
    turn: int
    """Degrees, counter-clockwise."""
    rgb: Rgb

    @property
    def name(self) -> str:
        """Such as `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Writing:
    """A word or a number across one row of cells."""

    text: str
    color: str
    row: int
    style: str
    """One of INK_STYLES."""
    height: int
    """Height of a capital letter, in pixels."""
    pitch: tuple[float, ...]
    """Centre of each character from the left edge of the picture, in pixels."""
    baseline: int
    rgb: Rgb

    @property
    def kind(self) -> str:
        """`word` or `number`."""
        return "number" if self.text.isdigit() else "word"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart."""

    color: str
    value: int
    """1 to MAX_BAR."""
    left: int
    right: int
    rgb: Rgb


@dataclass(frozen=True, slots=True)
class Ground:
    """How the background looks."""

    rgb: Rgb
    gradient: tuple[int, int]
    """Change of brightness from edge to edge, across and down."""
    noise: int
    """Amplitude of the grain."""
    noise_offset: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a picture shows."""

    kind: Literal["objects", "text", "bars"]
    ground: Ground
    things: tuple[Thing, ...] = ()
    """Row by row."""
    writings: tuple[Writing, ...] = ()
    bars: tuple[Bar, ...] = ()
    """From left to right."""
    baseline: int = 0
    """Foot of the bars, in pixels from the top."""
    gridlines: bool = False
    size: tuple[int, int] = (SIDE, SIDE)
    """(width, height) in pixels."""


def is_heldout(kind: Literal["pair", "word", "number", "bars"], name: str) -> bool:
    """Whether a combination is kept from training: about one in six pairs and one in five of the others.

    A rule on the name, not on a list, so that it holds for any combination and in every process.
    """
    return zlib.crc32(f"opsin:{kind}:{name}".encode()) % 60 < (10 if kind == "pair" else 12)


TRAIN_PAIRS = tuple((s, c) for s in SHAPES for c in COLORS if not is_heldout("pair", f"{c} {s}"))
HELDOUT_PAIRS = tuple((s, c) for s in SHAPES for c in COLORS if is_heldout("pair", f"{c} {s}"))
_PAIRS = {"train": TRAIN_PAIRS, "heldout": HELDOUT_PAIRS}


def draw_scene(rng: random.Random, split: Split) -> Scene:
    """A random scene of the split."""
    ground = draw_ground(rng)
    dice = rng.random()
    if dice < 0.42:
        cells = [(row, column) for row in range(3) for column in range(3)]
        count = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8))
        return Scene("objects", things=_things(rng, split, cells, count), ground=ground)
    if dice < 0.78:
        return _text_scene(rng, split, ground)
    return _bar_scene(rng, split, ground)


def draw_ground(rng: random.Random) -> Ground:
    """A light or dark background, slightly coloured, sloped and grainy."""
    value = rng.randint(205, 250) if rng.random() < 0.7 else rng.randint(8, 55)
    red, green, blue = (min(255, max(0, value + rng.randint(-7, 7))) for _ in range(3))
    return Ground(
        rgb=(red, green, blue),
        gradient=(rng.randint(-14, 14), rng.randint(-14, 14)),
        noise=rng.choice((0, 4, 8, 14)),
        noise_offset=(rng.randrange(128), rng.randrange(128)),
    )


def pick_pair(
    rng: random.Random, split: Split, *, shape: str | None = None, color: str | None = None
) -> tuple[str, str]:
    """A (shape, colour) that fits; every second one of the `heldout` split is a held-out pair where one fits."""
    for pool in ("heldout", "train") if split == "heldout" and rng.random() < 0.6 else ("train",):
        fitting = [p for p in _PAIRS[pool] if shape in (None, p[0]) and color in (None, p[1])]
        if fitting:
            return rng.choice(fitting)
    raise AssertionError(f"every shape and colour has a pair in training, but {shape} {color} has none")


def pick_pairs(rng: random.Random, split: Split, count: int) -> list[tuple[str, str]]:
    """`count` (shape, colour). Often several share a shape or a colour, so that there is something to count."""
    repeated = rng.randint(1, count) if count > 1 and rng.random() < 0.75 else 0
    shape = color = None
    if rng.random() < 0.5:
        shape = rng.choice(SHAPES)
    else:
        color = rng.choice(list(COLORS))
    pairs = [pick_pair(rng, split, shape=shape, color=color) for _ in range(repeated)]
    pairs += [pick_pair(rng, split) for _ in range(count - repeated)]
    return pairs


def _things(rng: random.Random, split: Split, cells: list[Cell], count: int) -> tuple[Thing, ...]:
    """`count` things in random cells."""
    pairs = pick_pairs(rng, split, count)
    chosen = sorted(rng.sample(cells, count))
    rng.shuffle(pairs)
    return tuple(_thing(rng, *pair, cell) for pair, cell in zip(pairs, chosen, strict=True))


def _thing(rng: random.Random, shape: str, color: str, cell: Cell) -> Thing:
    size = rng.randrange(20, 36, 2)
    slack = (CELL - size) / 2
    x = (cell[1] + 0.5) * CELL + rng.uniform(-slack, slack)
    y = (cell[0] + 0.5) * CELL + rng.uniform(-slack, slack)
    return Thing(shape, color, cell, x, y, size, rng.choice((-16, -8, 0, 8, 16)), tint(rng, color))


def tint(rng: random.Random, color: str) -> Rgb:
    """The colour, a little brighter or darker and a little off."""
    factor = rng.uniform(0.88, 1.1)
    red, green, blue = (min(255, max(0, round(channel * factor + rng.uniform(-9, 9)))) for channel in COLORS[color])
    return red, green, blue


def _text_scene(rng: random.Random, split: Split, ground: Ground) -> Scene:
    kinds = rng.choice((("word",), ("number",), ("word", "number"), ("number", "word")))
    rows = sorted(rng.sample(range(3), len(kinds)))
    writings = tuple(_writing(rng, split, kind, row) for kind, row in zip(kinds, rows, strict=True))
    cells = [(row, column) for row in range(3) if row not in rows for column in range(3)]
    things = _things(rng, split, cells, rng.randint(0, 3))
    return Scene("text", things=things, writings=writings, ground=ground)


def pick_word(rng: random.Random, split: Split) -> str:
    """A real word, or for training every second time any letters, so that reading cannot be guessing from a list."""
    while True:
        if split == "train" and rng.random() < 0.5:
            word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 5)))
        else:
            word = rng.choice(WORDS)
        if is_heldout("word", word) == (split == "heldout"):
            return word


def pick_number(rng: random.Random, split: Split) -> str:
    """Two or three digits."""
    while True:
        number = str(rng.randint(10, 99) if rng.random() < 0.4 else rng.randint(100, 999))
        if is_heldout("number", number) == (split == "heldout"):
            return number


def _writing(rng: random.Random, split: Split, kind: str, row: int) -> Writing:
    from opsin.demo.fonts import advance, heights

    text = pick_word(rng, split) if kind == "word" else pick_number(rng, split)
    style = rng.choice(INK_STYLES if kind == "number" else INK_STYLES[:-1])
    height = rng.choice(heights(style))
    gap = rng.randint(2, 4)
    # At least one patch from letter to letter: smaller type is below what the tower is made to resolve.
    while True:
        steps = [max(PATCH, advance(style, height, char) + gap) for char in text]
        if sum(steps) <= SIDE - 4 or height == heights(style)[0]:
            break
        height = max(h for h in heights(style) if h < height)
    left = rng.uniform(2, SIDE - 2 - sum(steps))
    pitch = tuple(left + sum(steps[:i]) + step / 2 for i, step in enumerate(steps))
    slack = CELL - height
    baseline = row * CELL + height + rng.randint(slack // 4, slack - slack // 4)
    color = rng.choice(list(COLORS))
    return Writing(text, color, row, style, height, pitch, baseline, tint(rng, color))


def pick_bars(rng: random.Random, split: Split, count: int) -> list[tuple[str, int]]:
    """`count` different colours with values. One bar is the tallest and one the shortest, so that both have a name."""
    while True:
        colors = rng.sample(list(COLORS), count)
        values = [rng.randint(1, MAX_BAR) for _ in colors]
        name = " ".join(f"{color} {value}" for color, value in zip(colors, values, strict=True))
        unique = values.count(max(values)) == 1 and values.count(min(values)) == 1
        if unique and is_heldout("bars", name) == (split == "heldout"):
            return list(zip(colors, values, strict=True))


def _bar_scene(rng: random.Random, split: Split, ground: Ground) -> Scene:
    count = rng.randint(2, 6)
    chosen = pick_bars(rng, split, count)
    room = 96 // count
    width = rng.randint(10, min(room - 4, 18))
    first = 6 + rng.randint(0, room - width) + rng.randint(0, 96 - room * count)
    bars = tuple(
        Bar(color, value, first + i * room, first + i * room + width, tint(rng, color))
        for i, (color, value) in enumerate(chosen)
    )
    return Scene("bars", bars=bars, baseline=rng.randint(97, 101), gridlines=rng.random() < 0.6, ground=ground)
