"""Draw each paper's method: `python docs/images/diagrams.py` writes `<paper>.svg` beside this file. Needs Python alone.

The pictures have a ground of their own in a light and in a dark form, so they are readable on any page.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 900
#: Width of a character of a title and of another line, on average, in a wide font.
TITLE, LINE = 9.3, 6.8
STYLE = """
text{font:12px system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:#3d444d}
.title{font-weight:600;font-size:13px;fill:#1f2328}
.ground{fill:#ffffff}
.image{fill:#dce9fb;stroke:#3266ad}.sound{fill:#fde7d6;stroke:#c2571a}.text{fill:#dbf3e5;stroke:#2f8f5b}
.loss{fill:#efe4fa;stroke:#8a4fae}.both{fill:#f1f2f4;stroke:#6e7781}
.frozen{stroke-dasharray:6 3}
.arrow{fill:none;stroke:#57606a;stroke-width:1.5}.head{fill:#57606a}
.later{stroke-dasharray:5 4}
@media (prefers-color-scheme:dark){
text{fill:#c5ccd4}.title{fill:#f0f3f6}
.ground{fill:#161b22}
.image{fill:#17304f;stroke:#6ba4ee}.sound{fill:#46260f;stroke:#ef9a63}.text{fill:#12382a;stroke:#5fc48e}
.loss{fill:#382449;stroke:#bd8ce6}.both{fill:#2b323b;stroke:#9aa4ae}
.arrow{stroke:#a3adb8}.head{fill:#a3adb8}
}
"""


@dataclass(frozen=True)
class Box:
    """A part: where it lies, of which kind it is (a class of `STYLE`), what it is called and what is said of it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str
    lines: tuple[str, ...] = ()

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    def left(self, down: float = 0.5) -> tuple[float, float]:
        return self.x, self.y + self.height * down

    def right(self, down: float = 0.5) -> tuple[float, float]:
        return self.x + self.width, self.y + self.height * down

    def top(self, along: float = 0.5) -> tuple[float, float]:
        return self.x + self.width * along, self.y

    def bottom(self, along: float = 0.5) -> tuple[float, float]:
        return self.x + self.width * along, self.y + self.height


@dataclass
class Drawing:
    """A picture in the making.

    Attributes:
        title: what it shows, for those who do not see it.
        height: in pixels.
        boxes: its parts.
        notes: texts outside of boxes: place, words, anchor.
    """

    title: str
    height: int
    boxes: list[Box] = field(default_factory=list)
    notes: list[tuple[float, float, str, str]] = field(default_factory=list)
    _arrows: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str, *lines: str) -> Box:
        """Add a part."""
        made = Box(x, y, width, height, kind, title, lines)
        self.boxes.append(made)
        return made

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Add a text outside of boxes; `anchor` is start, middle or end."""
        self.notes.append((x, y, text, anchor))

    def arrow(self, *points: tuple[float, float], later: bool = False) -> None:
        """Add an arrow through some points; dashed where it is no part of the forward pass."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        base = (x1 - 8 * dx, y1 - 8 * dy)
        corners = [(x1, y1), (base[0] - 4 * dy, base[1] + 4 * dx), (base[0] + 4 * dy, base[1] - 4 * dx)]
        name = "arrow later" if later else "arrow"
        self._arrows.append(f'<polyline class="{name}" points="{_points([*points[:-1], base])}"/>')
        self._arrows.append(f'<polygon class="head" points="{_points(corners)}"/>')

    def line(self, *points: tuple[float, float]) -> None:
        """Add a line without a head, to which or from which arrows go."""
        self._arrows.append(f'<polyline class="arrow" points="{_points(list(points))}"/>')

    def svg(self) -> str:
        """The picture."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img">',
            f"<title>{html.escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="ground" width="{WIDTH}" height="{self.height}" rx="8"/>',
            *self._arrows,
        ]
        for box in self.boxes:
            parts.append(
                f'<rect class="{box.kind}" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" '
                'rx="6" stroke-width="1.5"/>'
            )
            x, y = box.middle
            y += 4.5 - 8 * len(box.lines)
            parts.append(_text(x, y, box.title, "middle", "title"))
            parts += [_text(x, y + 16 * number, line, "middle") for number, line in enumerate(box.lines, start=1)]
        parts += [_text(x, y, text, anchor) for x, y, text, anchor in self.notes]
        return "\n".join([*parts, "</svg>"]) + "\n"


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>'


# -- the five methods --------------------------------------------------------------------------------------------------


def avid_cma() -> Drawing:
    """Clips against banks; then positives from their agreement."""
    d = Drawing("AVID-CMA: each modality is compared with the bank of the other; then positives are mined", 400)
    d.note(20, 28, "AVID: which row of the other modality's bank is mine?")
    video = d.box(20, 50, 120, 56, "image", "video clip i", "0.5 s, 8 frames")
    sound = d.box(20, 170, 120, 56, "sound", "its sound", "2 s, spectrogram")
    see = d.box(176, 50, 150, 56, "image", "video encoder", "R(2+1)D, 3-layer head")
    hear = d.box(176, 170, 150, 56, "sound", "audio encoder", "2D convolutions, head")
    v = d.box(362, 58, 40, 40, "image", "v")
    a = d.box(362, 178, 40, 40, "sound", "a")
    bank_v = d.box(560, 50, 150, 56, "image", "video bank V", "a row for every clip")
    bank_a = d.box(560, 170, 150, 56, "sound", "audio bank A", "a row for every clip")
    nce = d.box(744, 92, 136, 92, "loss", "NCE", "own row against", "1,024 random rows,", "v with A, a with V")
    for one, two, three in ((video, see, v), (sound, hear, a)):
        d.arrow(one.right(), two.left())
        d.arrow(two.right(), three.left())
    d.arrow((402, 68), (560, 68), later=True)
    d.arrow((402, 208), (560, 208), later=True)
    d.arrow(v.right(0.8), bank_a.left(0.25))
    d.arrow(a.right(0.2), bank_v.left(0.75))
    d.note(480, 60, "running average, 0.5", "middle")
    d.note(480, 226, "running average, 0.5", "middle")
    d.arrow(bank_v.right(), nce.left(0.25))
    d.arrow(bank_a.right(), nce.left(0.75))
    d.note(20, 272, "CMA: from a trained AVID, what resembles a clip in both modalities is a positive, too")
    rows = d.box(20, 294, 190, 76, "both", "rows of both banks", "V and A of clip i", "and of all other clips j")
    agree = d.box(250, 294, 200, 76, "both", "agreement of i and j", "consensus:", "min(Vi · Vj, Ai · Aj)")
    found = d.box(490, 294, 180, 76, "both", "32 positives of i", "exact search, repeated", "every few epochs")
    within = d.box(710, 294, 170, 76, "loss", "NCE within", "v with Vj, a with Aj;", "beside AVID's own loss")
    for one, two in ((rows, agree), (agree, found), (found, within)):
        d.arrow(one.right(), two.left())
    return d


def mct() -> Drawing:
    """Two towers with momentum averages, and five losses inside and across."""
    d = Drawing("MCT: contrast inside images, inside captions and across both, against queues of keys", 470)
    y = {"query image": 24, "key image": 128, "key caption": 256, "query caption": 360}
    views, towers = {}, {}
    for name, top in y.items():
        kind = "image" if "image" in name else "text"
        which, thing = name.split()
        views[name] = d.box(20, top + 14, 130, 52, kind, thing, f"{which} view")
        network = "ResNet-50" if kind == "image" else "BERT"
        title = f"{thing} encoder" if which == "query" else "momentum average"
        towers[name] = d.box(
            190, top + 14, 160, 52, kind, title, network if which == "query" else f"of the {thing} encoder"
        )
        d.arrow(views[name].right(), towers[name].left())
    d.arrow(towers["query image"].bottom(), towers["key image"].top(), later=True)
    d.arrow(towers["query caption"].top(), towers["key caption"].bottom(), later=True)

    def heads(name: str, first: tuple[str, str], second: tuple[str, str]) -> tuple[Box, Box]:
        kind = "image" if "image" in name else "text"
        one = d.box(400, y[name], 150, 36, kind, *first[:1], *first[1:])
        two = d.box(400, y[name] + 44, 150, 36, kind, *second[:1], *second[1:])
        for box in (one, two):
            d.arrow(towers[name].right(), box.left())
        return one, two

    qi_intra, qi_inter = heads("query image", ("intra head", "128"), ("inter head", "1024"))
    ki_intra, ki_inter = heads("key image", ("queue of keys", "128"), ("queue of keys", "1024"))
    kc_inter, kc_intra = heads("key caption", ("queue of keys", "1024"), ("queue of keys", "128"))
    qc_inter, qc_intra = heads("query caption", ("inter head", "1024"), ("intra head", "128"))
    j_ii = d.box(690, 30, 190, 74, "loss", "J_ii, J_tag", "own key against the queue;", "J_tag: and keys with a tag")
    j_ic = d.box(690, 130, 190, 74, "loss", "J_ic", "image against captions:", "margin over the queue")
    j_ci = d.box(690, 260, 190, 74, "loss", "J_ci", "caption against images:", "margin over the queue")
    j_cc = d.box(690, 360, 190, 74, "loss", "J_cc", "own key against the queue", "of captions")
    for query, keys, loss, upper in (
        (qi_intra, ki_intra, j_ii, True),
        (qi_inter, kc_inter, j_ic, True),
        (qc_inter, ki_inter, j_ci, False),
        (qc_intra, kc_intra, j_cc, False),
    ):
        d.arrow(query.right(), loss.left(0.3 if upper else 0.7))
        d.arrow(keys.right(), loss.left(0.7 if upper else 0.3))
    d.note(
        20,
        458,
        "Dashed: the momentum average follows the encoder. Every tower has both heads; a queue holds 65,536.",
    )
    return d


def xmc_gan() -> Drawing:
    """Generator, discriminator and what is contrasted."""
    d = Drawing("XMC-GAN: a generator modulated by sentence and words; contrast of images, sentences, words", 470)
    caption = d.box(20, 30, 120, 44, "text", "caption")
    bert = d.box(20, 104, 120, 52, "text frozen", "BERT", "frozen")
    sentence = d.box(176, 62, 96, 44, "text", "sentence")
    words = d.box(176, 154, 96, 44, "text", "words")
    noise = d.box(176, 246, 96, 44, "both", "noise z")
    generator = d.box(
        316,
        54,
        212,
        236,
        "image",
        "generator",
        "noise makes a 4 × 4 map",
        "up to 16 × 16: blocks are",
        "modulated by noise, sentence",
        "16 × 16: each place attends",
        "to the words",
        "up to 256 × 256: modulated at",
        "each place by its words, too:",
        "attentional self-modulation",
    )
    fake = d.box(566, 74, 120, 52, "image", "generated", "image")
    real = d.box(566, 214, 120, 52, "image", "real image", "of the caption")
    critic = d.box(724, 54, 156, 112, "image", "discriminator", "score", "pooled features", "16 × 16 map")
    network = d.box(724, 212, 156, 56, "image frozen", "frozen network", "of ImageNet: logits")
    d.arrow(caption.bottom(), bert.top())
    d.arrow(bert.right(0.3), sentence.left(0.7))
    d.arrow(bert.right(0.7), words.left(0.3))
    d.arrow(sentence.right(), (generator.x, sentence.right()[1]))
    d.arrow(words.right(), (generator.x, words.right()[1]))
    d.arrow(noise.right(), (generator.x, noise.right()[1]))
    d.arrow((generator.x + generator.width, fake.left()[1]), fake.left())
    d.arrow(fake.right(0.4), critic.left(0.31))
    d.arrow(real.right(0.25), critic.left(0.85))
    d.arrow(real.right(0.6), network.left(0.59))
    d.arrow(fake.right(0.85), network.left(0.2))
    tops = 344
    hinge = d.box(
        20, tops, 170, 86, "loss", "hinge", "score of real and", "of generated images;", "⟨image, sentence⟩ in it"
    )
    s = d.box(250, tops, 170, 86, "loss", "S", "pooled features", "and sentence,", "τ = 0.1")
    w = d.box(480, tops, 170, 86, "loss", "W", "words and the regions", "that they attend to", "in the 16 × 16 map")
    i = d.box(
        710, tops, 170, 86, "loss", "I", "generated and real image", "of one caption, by both", "networks, τ = 0.1"
    )
    bus = 318
    source = critic.right(0.8)
    for loss in (hinge, s, w, i):
        d.arrow((loss.middle[0], bus), loss.top())
    d.line((source[0], source[1]), (890, source[1]), (890, bus), (hinge.middle[0], bus))
    d.line(network.bottom(), (network.middle[0], bus))
    d.note(
        20,
        456,
        "The discriminator learns S, W of real images, the generator S, W, I of generated ones; groups of 8 pairs.",
    )
    return d


def m3p() -> Drawing:
    """Three streams, one encoder, the tasks."""
    d = Drawing("M3P: text of many languages, captions and code-switched captions with regions in one encoder", 424)
    text = d.box(20, 40, 220, 62, "text", "text of 100 languages", "Wikipedia, no images")
    english = d.box(20, 150, 220, 52, "text", "English caption", "“a dog on a sofa”")
    switched = d.box(20, 300, 220, 52, "text", "code-switched caption", "“a Hund on a canapé”")
    books = d.box(20, 228, 220, 46, "both frozen", "dictionaries", "some words are replaced")
    d.arrow(english.bottom(), books.top())
    d.arrow(books.bottom(), switched.top())
    image = d.box(282, 218, 100, 64, "image", "image")
    regions = d.box(420, 218, 130, 64, "image frozen", "detector", "regions: feature", "and place")
    d.arrow(image.right(), regions.left())
    encoder = d.box(590, 40, 90, 312, "both", "encoder", "XLM-R base", "in shape", "one for all")
    d.arrow(text.right(), (encoder.x, text.right()[1]))
    d.arrow(english.right(), (encoder.x, english.right()[1]))
    d.arrow(switched.right(), (encoder.x, switched.right()[1]))
    d.arrow(regions.right(), (encoder.x, regions.right()[1]))
    words = d.box(720, 40, 160, 82, "loss", "masked words", "15 %, in text alone", "(xMLM) and beside", "regions")
    masked = d.box(720, 155, 160, 82, "loss", "masked regions", "15 %: class and", "feature of what", "was zeroed")
    match = d.box(
        720, 270, 160, 82, "loss", "match", "the true pair among", "N candidates, image", "by text, text by image"
    )
    for loss in (words, masked, match):
        d.arrow((encoder.x + encoder.width, loss.middle[1]), loss.left())
    d.note(300, 62, "read alone")
    d.note(260, 168, "[regions ; text], one sequence")
    d.note(260, 318, "[regions ; text], one sequence")
    d.note(
        20,
        386,
        "Dashed frames are not trained. Of a pair either words or regions are masked, never both. Every step reads",
    )
    d.note(20, 404, "all streams; search scores every image with every caption, in languages without captioned images.")
    return d


def vx2text() -> Drawing:
    """Modalities as words, and one language model."""
    d = Drawing("VX2TEXT: video and sound become words, which one language model reads with all other text", 420)
    video = d.box(20, 40, 110, 52, "image", "video", "clips of frames")
    sound = d.box(20, 142, 110, 52, "sound", "sound", "a window")
    speech = d.box(20, 244, 110, 68, "text", "text", "speech, history,", "question")
    see = d.box(166, 40, 140, 52, "image", "R(2+1)D-34", "400 actions")
    hear = d.box(166, 142, 140, 52, "sound", "CNN14", "527 classes")
    pick_v = d.box(344, 40, 150, 52, "image", "K actions", "Gumbel noise, top K")
    pick_a = d.box(344, 142, 150, 52, "sound", "K classes", "Gumbel noise, top K")
    pieces = d.box(344, 252, 150, 52, "text", "word pieces")
    prompt = d.box(
        534,
        40,
        130,
        272,
        "both",
        "prompt",
        "<task> :",
        "video : V1 .. VK",
        "audio : A1 .. AK",
        "speech : ..",
        "caption : ..",
        "history : ..",
        "question : ..",
        "options : ..",
    )
    model = d.box(702, 120, 178, 70, "text", "T5", "encoder and decoder")
    answer = d.box(702, 242, 178, 70, "loss", "answer", "cross-entropy", "of its words")
    for row in ((video, see, pick_v), (sound, hear, pick_a)):
        d.arrow(row[0].right(), row[1].left())
        d.arrow(row[1].right(), row[2].left())
    d.arrow(speech.right(), pieces.left())
    for box in (pick_v, pick_a, pieces):
        d.arrow(box.right(), (prompt.x, box.right()[1]))
    d.arrow((prompt.x + prompt.width, model.left()[1]), model.left())
    d.arrow(model.bottom(), answer.top())
    d.arrow(
        answer.bottom(), (answer.middle[0], 352), (325, 352), (325, see.right(0.85)[1]), see.right(0.85), later=True
    )
    d.arrow((325, hear.right(0.85)[1]), hear.right(0.85), later=True)
    d.note(338, 344, "gradient, straight through the chosen words: that of softmax(z)")
    d.note(20, 386, "A category's token starts as the mean embedding of its name's word pieces and is trained.")
    d.note(20, 404, "In evaluation there is no noise, and the K most probable categories are chosen.")
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {drawn.__name__: drawn for drawn in (avid_cma, mct, xmc_gan, m3p, vx2text)}


if __name__ == "__main__":
    for name, drawn in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(drawn().svg(), encoding="utf-8")
