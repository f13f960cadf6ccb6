"""Exhaustive scoring with cached regions and tiles of similar lengths, against a padded loop over pairs.

The miniature's encoder and regions, captions of 6 to 30 tokens padded to the limit of 66. Process CPU time on one
thread, with what is compared taken in turns, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.search import Gallery, score_pairs
from tests.benchmarks.speed import compare, in_turns

IMAGES, CAPTIONS, REGIONS, WIDTH, FEATURES = 60, 100, 5, 66, 64
ROUNDS = 3


def _data() -> dict[str, Tensor]:
    lengths = torch.randint(6, 31, (CAPTIONS,), generator=torch.Generator().manual_seed(0))
    return {
        "regions": torch.nn.functional.normalize(torch.randn(IMAGES, REGIONS, FEATURES), dim=-1),
        "boxes": torch.nn.functional.normalize(torch.rand(IMAGES, REGIONS, 5), dim=-1),
        "region_mask": torch.ones(IMAGES, REGIONS, dtype=torch.bool),
        "tokens": torch.randint(4, 999, (CAPTIONS, WIDTH)),
        "token_mask": torch.arange(WIDTH)[None] < lengths[:, None],
    }


@torch.inference_mode()
def _padded_loop(model: M3P, data: dict[str, Tensor], together: int = 64) -> Tensor:
    """Every image with every caption, both embedded anew for each batch of pairs, captions padded to their limit."""
    pairs = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(CAPTIONS))
    scores = []
    for image, caption in (chunk.T for chunk in pairs.split(together)):
        hidden = model.encoder(
            data["tokens"][caption], data["token_mask"][caption], data["regions"][image], data["boxes"][image],
            data["region_mask"][image],
        )  # fmt: skip
        scores.append(model.match_head(hidden[:, 0]))
    return torch.cat(scores).view(IMAGES, CAPTIONS)


@torch.inference_mode()
def _tiles(model: M3P, data: dict[str, Tensor]) -> Tensor:
    gallery = Gallery(
        model.encoder.start_regions(data["regions"], data["boxes"], data["region_mask"]), data["region_mask"],
        data["tokens"], data["token_mask"],
    )  # fmt: skip
    return score_pairs(model, gallery, 16384)


def test_tiles_are_faster() -> None:
    torch.manual_seed(0)
    encoder = M3PEncoder(1000, 64, 2, 4, 128, REGIONS + WIDTH, 6, FEATURES, 0.0, 0.0)
    model, data = M3P(encoder, 10).eval(), _data()
    torch.testing.assert_close(_tiles(model, data), _padded_loop(model, data), rtol=1e-4, atol=1e-5)
    steps = {"ours": lambda: _tiles(model, data), "loop": lambda: _padded_loop(model, data)}
    seconds = in_turns(steps, ROUNDS)
    what = "scores of 60 images with 100 captions"
    compare(what, "a padded loop over pairs", seconds["ours"], seconds["loop"]).stays_below(0.5)
