"""Semantic object accuracy (SOA): does a detector find the objects of the caption in the generated image?

We chose the words that name each class. So the captions used differ slightly from those of published numbers.

Source: T. Hinz et al., "Semantic Object Accuracy for Generative Text-to-Image Synthesis"; docs/papers/xmc_gan.md [9.3].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.data.datasets.coco import CLASSES
from common.metrics.gathering import Seen, gather_objects

# Singular phrases that name a class; "" is no class. The longest match uses up its words, so a hot dog is not a dog and
# a teddy bear is not a bear.
_PHRASES: dict[str, str] = {
    "person": "person|man|woman|boy|girl|child|kid|baby|toddler|guy|lady|people|player|skier|snowboarder|skateboarder|"
    "surfer|rider|cyclist|pedestrian|batter|pitcher|umpire|catcher|officer|policeman|worker|farmer|chef|bride|groom|"
    "crowd|passenger|fireman|soldier|gentleman|spectator|family",
    "bicycle": "bicycle|bike|cycle",
    "car": "car|taxi|cab|sedan|minivan|jeep|suv|automobile|police car|sports car",
    "motorcycle": "motorcycle|motorbike|motor cycle|moped|motor bike|dirt bike|motor scooter",
    "airplane": "airplane|plane|aeroplane|jet|airliner|aircraft|jetliner|air plane|biplane",
    "bus": "bus|minibus|double decker|school bus",
    "train": "train|locomotive|subway train|tram",
    "truck": "truck|lorry|fire engine|fire truck|pickup|pick up truck|semi",
    "boat": "boat|sailboat|ship|canoe|kayak|gondola|ferry|yacht|rowboat|speedboat|raft",
    "traffic light": "traffic light|traffic signal|stop light|stoplight|street signal",
    "fire hydrant": "fire hydrant|hydrant|fireplug",
    "stop sign": "stop sign",
    "parking meter": "parking meter",
    "bench": "bench|park bench",
    "bird": "bird|baby bird|family of duck|crowd of bird|seagull|gull|pigeon|parrot|duck|goose|geese|swan|owl|eagle|"
    "hawk|crow|flamingo|ostrich|penguin|hummingbird|peacock|pelican|sparrow|dove",
    "cat": "cat|baby cat|kitten|kitty",
    "dog": "dog|baby dog|puppy|hound|poodle|corgi|terrier|retriever|bulldog|dalmatian|labrador",
    "horse": "horse|baby horse|pony|foal|stallion|mare",
    "sheep": "sheep|baby sheep|lamb|ram|ewe",
    "cow": "cow|baby cow|bull|calf|cattle|ox|oxen|steer",
    "elephant": "elephant|baby elephant",
    "bear": "bear|baby bear|polar bear|grizzly|grizzly bear|brown bear|black bear|panda bear|panda",
    "zebra": "zebra|baby zebra",
    "giraffe": "giraffe|baby giraffe",
    "backpack": "backpack|back pack|rucksack|knapsack",
    "umbrella": "umbrella|parasol",
    "handbag": "handbag|hand bag|purse",
    "tie": "tie|necktie|bow tie|bowtie",
    "suitcase": "suitcase|suit case|luggage|baggage",
    "frisbee": "frisbee|frisbie|flying disc|flying disk",
    "skis": "skis|ski",
    "snowboard": "snowboard|snow board",
    "sports ball": "ball|soccer ball|tennis ball|football|basketball|baseball ball|beach ball|volleyball",
    "kite": "kite",
    "baseball bat": "baseball bat|bat",
    "baseball glove": "baseball glove|baseball mitt|mitt|catcher glove",
    "skateboard": "skateboard|skate board",
    "surfboard": "surfboard|surf board|surfing board",
    "tennis racket": "tennis racket|tennis racquet|racket|racquet",
    "bottle": "bottle",
    "wine glass": "wine glass|glass of wine|wineglass|goblet",
    "cup": "cup|mug|coffee cup|tea cup|teacup",
    "fork": "fork",
    "knife": "knife|knive",
    "spoon": "spoon",
    "bowl": "bowl",
    "banana": "banana",
    "apple": "apple",
    "sandwich": "sandwich|burger|hamburger|cheeseburger|panini",
    "orange": "orange fruit|orange slice|slice of orange|bowl of orange|mandarin|tangerine|clementine",
    "broccoli": "broccoli|brocolli",
    "carrot": "carrot|baby carrot",
    "hot dog": "hot dog|hotdog|chili dog|corn dog",
    "pizza": "pizza",
    "donut": "donut|doughnut",
    "cake": "cake|cupcake|birthday cake|wedding cake|cheesecake",
    "chair": "chair|armchair|arm chair|recliner|stool",
    "couch": "couch|sofa|loveseat|love seat",
    "potted plant": "potted plant|house plant|houseplant|pot plant|potted flower|plant in a pot",
    "bed": "bed|bunk bed|mattress",
    "dining table": "dining table|dinner table|dining room table|kitchen table|table",
    "toilet": "toilet|urinal|commode",
    "tv": "tv|tvs|television|television set|tv set|flat screen|flatscreen",
    "laptop": "laptop|apple laptop|laptop computer|notebook computer|macbook",
    "mouse": "computer mouse|mouse",
    "remote": "remote|remote control|remote controller|wii remote|game controller|wii controller|wiimote",
    "keyboard": "keyboard|computer keyboard",
    "cell phone": "cell phone|cellphone|mobile phone|smartphone|smart phone|iphone|phone",
    "microwave": "microwave|microwave oven",
    "oven": "oven|stove|stove top|stovetop",
    "toaster": "toaster",
    "sink": "sink|wash basin|washbasin",
    "refrigerator": "refrigerator|fridge|freezer",
    "book": "book|textbook|novel",
    "clock": "clock|clock tower|alarm clock",
    "vase": "vase",
    "scissors": "scissors|scissor|pair of scissors|shears",
    "teddy bear": "teddy bear|teddy|stuffed bear|stuffed teddy bear|stuffed teddy",
    "hair drier": "hair drier|hair dryer|hairdryer|blow dryer|hairdrier",
    "toothbrush": "toothbrush|tooth brush",
    "": "dvd player|cd player|record player|pitcher of|cake batter|jet ski|"
    "remote area|remote location|mouse pad|toy train|train station|train track|bus stop|bus station|"
    "baseball cap|car park|toilet paper|toilet brush|phone booth|book shelf|book case|flower bed|truck bed|bath tub|"
    "cat food|dog food|dog house|bird house|bird feeder|table cloth|table tennis|pizza box|pizza cutter|cake pan|"
    "orange juice|apple juice|apple computer|wine bottle opener|boat dock|plane ticket|bear claw|duck sauce|bowl cut|"
    "telephone pole|telephone booth|ski lift|ski slope|ski resort|ski lodge|kite festival|tie dye|tie dyed|bed room|"
    "bike rack|bike lane|horse shoe|crow bar|hawk eye|bat man|cell phone tower|sheep dog|bull dog|cow boy|cow girl",
}  # fmt: skip
_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "mice": "mouse", "knives": "knife", "wolves": "wolf",
    "policemen": "policeman", "firemen": "fireman", "gentlemen": "gentleman", "canoes": "canoe", "calves": "calf",
    "neckties": "necktie", "bowties": "bowtie", "frisbies": "frisbie", "minibuses": "minibus",
    "buses": "bus", "busses": "bus", "shoes": "shoe",
}  # fmt: skip
_WHOLE = frozenset({"bus", "minibus", "skis", "scissors", "glass", "shears", "tennis", "sports", "plus", "grass"})


def _singular(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    if word in _WHOLE or len(word) < 4 or word.endswith("ss"):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word


_BY_PHRASE = {
    tuple(phrase.split()): CLASSES.index(name) if name else -1
    for name, phrases in _PHRASES.items()
    for phrase in phrases.split("|")
}
_LONGEST = max(map(len, _BY_PHRASE))


def mentioned_classes(caption: str) -> tuple[int, ...]:
    """Return the classes that an English caption names, as ascending positions in `CLASSES`.

    Examples:
        >>> [CLASSES[number] for number in mentioned_classes("Two dogs next to a dining table")]
        ['dog', 'dining table']
    """
    spoken = re.findall(r"[a-z]+", caption.lower())
    words = [_singular(word) for word in spoken]
    found, place = set(), 0
    while place < len(words):
        for length in range(min(_LONGEST, len(words) - place), 0, -1):
            number = _BY_PHRASE.get(tuple(words[place : place + length]))
            if number is not None:
                found.add(number)
                place += length
                break
        else:
            if spoken[place] == "oranges":  # the plural is always the fruit; the singular may be the color
                found.add(CLASSES.index("orange"))
            place += 1
    return tuple(sorted(found - {-1}))


@dataclass(frozen=True)
class ObjectImage:
    """An image to generate: position of the caption, number among the caption's images, and classes to detect."""

    caption: int
    copy: int
    classes: tuple[int, ...]


def object_captions(
    captions: Sequence[str], copies: int = 3, person_captions: int = 30_000, seed: int = 0
) -> list[ObjectImage]:
    """List the images to generate: `copies` of every caption that names a class.

    Of the many captions that name a person, use a random selection of `person_captions`, with one image each.

    Source: docs/papers/xmc_gan.md [9.3].
    """
    named = [mentioned_classes(caption) for caption in captions]
    people = [number for number, classes in enumerate(named) if 0 in classes]
    drawn = np.random.default_rng(seed).permutation(len(people))[:person_captions]
    counted = {people[number] for number in drawn.tolist()}
    images = []
    for caption, classes in enumerate(named):
        others = tuple(number for number in classes if number)
        for copy in range(copies):
            wanted = (0, *others) if copy == 0 and caption in counted else others
            if wanted:
                images.append(ObjectImage(caption, copy, wanted))
    return images


def object_accuracy(images: Tensor, hits: Tensor) -> tuple[float, float]:
    """Compute SOA-C (mean over classes) and SOA-I (mean over images) in percent, from counts per class [C]."""
    images, hits = images.double(), hits.double()
    known = images > 0
    return float(100 * (hits[known] / images[known]).mean()), float(100 * hits.sum() / images.sum())


class ObjectAccuracy:
    """Semantic object accuracy over all batches and processes. Stores only counts."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
        self._seen = Seen()
        self._counts = torch.zeros(2, classes, dtype=torch.int64)

    def update(self, index: Tensor, named: Tensor, found: Tensor) -> None:
        """Add images [B]. `named` and `found` [B, C]: whether the caption names, and the detector finds, each class."""
        chosen = self._seen.fresh(index)
        named, found = named.cpu()[chosen], found.cpu()[chosen]
        self._counts += torch.stack([named.sum(0), (named & found).sum(0)])

    def compute(self) -> tuple[float, float] | None:
        """Return SOA-C and SOA-I in percent, the same on every process, or None if no caption names a class."""
        self._seen.require_disjoint()
        images, hits = torch.stack(gather_objects([self._counts])).sum(0)
        return object_accuracy(images, hits) if bool(images.any()) else None
