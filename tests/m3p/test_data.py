"""Test M3P's data modules: steps, negatives, masking, pooled and code-switched captions, and skipped files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from common.data.annotations import LanguageCaptions
from common.data.item_dataset import TooManyBrokenFiles
from common.data.regions import RegionError, RegionFeatures, Regions
from common.data.sequences import Rows, Texts
from papers.m3p.captions import CaptionPool
from papers.m3p.data import check_sizes
from papers.m3p.encoder import M3PEncoder
from tests.m3p.layouts import (
    WIDTH,
    WORDS,
    Layouts,
    pictures_of,
    sentence,
    texts_of,
    write_features,
)
from tests.m3p.tiny import tiny_sizes

PLAIN: dict[str, Any] = {"xmlm_steps": 0, "text": None, "masking": None}


def steps(data: Any, count: int = 1) -> list[dict[str, Any]]:
    """Return the first training steps."""
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def number_of(text: str) -> int:
    """Return the number that a caption of `sentence` encodes."""
    return sum(WORDS["en"].index(word) * 8**place for place, word in enumerate(text.split()))


# -- pre-training ------------------------------------------------------------------------------------------------------


def test_distributions_of_masked_regions(layouts: Layouts) -> None:
    data = layouts.pretraining(xmlm_steps=0, text=None, distributions=True)
    for step in steps(data, 3):
        for group in step["relations"][0].values():
            assert group["region_distributions"].shape == (len(group["region_classes"]), 9)
            assert torch.equal(group["region_distributions"].argmax(1), group["region_classes"])


def test_pairs_in_a_batch(layouts: Layouts) -> None:
    data = layouts.pretraining(**PLAIN, vlm_candidates="in_batch", batch_size=6)
    seen = []
    for step in steps(data, 2):
        (relation,) = step["relations"]
        assert relation.keys() == {"in_batch"}
        group = relation["in_batch"]
        assert group["true"].tolist() == [7 * pair for pair in range(6)]
        pictures = pictures_of(group)
        assert pictures == [number_of(text) for text in texts_of(group, data)]
        assert group["group"].unique().shape == (6,)
        seen += pictures
    # The epoch has twelve images in two batches of six.
    assert sorted(seen) == list(range(12))


def test_rows_of_text_are_of_languages_of_their_own(layouts: Layouts) -> None:
    """With one group per rank, each rank reads one language at a time, which may differ from the other rank's."""
    ranks = [steps(layouts.pretraining(text_groups=2, rank=rank, world_size=2), 5) for rank in range(2)]
    languages = np.array([[[block["languages"].unique().item() for block in s["xmlm"]] for s in own] for own in ranks])
    assert languages.shape == (2, 5, 3)
    assert (languages[0] != languages[1]).any()
    # A single process reads the rows of the two ranks in alternating blocks of equal size.
    for step, own in enumerate(steps(layouts.pretraining(text_groups=2), 5)):
        for draw, block in enumerate(own["xmlm"]):
            assert block["languages"].tolist() == languages[:, step, draw].tolist() * 2
    with pytest.raises(ValueError, match=r"text_batch_size \(4\) .* data.text_groups \(3\)"):
        layouts.pretraining(text_groups=3)


@pytest.mark.parametrize("candidates", [1, 13])
def test_candidates_must_be_in_the_set(layouts: Layouts, candidates: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.candidates is {candidates}, but must be from 2 to "):
        layouts.pretraining(**PLAIN, candidates=candidates)


def test_small_sets_are_gone_through_again(layouts: Layouts) -> None:
    data = layouts.pretraining(**PLAIN, batch_size=4, steps_per_epoch=9)
    batches = [
        tuple(sorted(number_of(text) for text in texts_of(step["relations"][0]["t2i"], data)[::4]))
        for step in steps(data, 9)
    ]
    for first in (0, 3, 6):
        assert sorted(n for batch in batches[first : first + 3] for n in batch) == list(range(12))
    assert len(set(batches)) > 3  # each pass has another order


def test_captions_are_switched_as_fed(layouts: Layouts) -> None:
    switcher = layouts.switcher(sentence_ratio=1.0, word_ratio=1.0)
    data = layouts.pretraining(**PLAIN, code_switching=switcher)
    known = {*WORDS["de"], *WORDS["fr"]}
    group = steps(data)[0]["relations"][0]["i2t"]
    for text in texts_of(group, data):
        assert set(text.split()) <= known
    # Tokens joined from single words equal the tokens of the whole caption.
    for row, text in zip(group["tokens"].tolist(), texts_of(group, data)):
        assert data.tokenizer.encode(text) == [token for token in row if token != 1]
    # The captions of the group `i2t` are switched separately. The group `t2i` repeats one caption, switched once.
    once = texts_of(steps(data)[0]["relations"][0]["t2i"], data)
    assert len(set(once[:4])) == 1
    assert data.describe()["code-switching (dictionaries)"]["covered"] == 1.0


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_sets", "own"),
    [(["multi30k_en"], 5), (["multi30k_fr"], 1), ([f"multi30k_{one}" for one in WORDS], 12)],
)
def test_five_captions_an_image_and_epoch(layouts: Layouts, train_sets: list[str], own: int) -> None:
    data = layouts.retrieval(train_sets=train_sets)
    pairs = data.training_pairs[0]
    assert len(pairs) == 5 * 12
    assert pairs.pool.counts.tolist() == [own] * 12
    languages = [name.rpartition("_")[2] for name in train_sets]
    seen: dict[int, list[list[str]]] = {}
    for epoch in range(2):
        for image in range(12):
            tokens = [pairs[epoch, image + 12 * slot]["t2i"].captions[0] for slot in range(5)]
            texts = [data.tokenizer.decode(own) for own in tokens]
            assert len(set(texts)) == min(own, 5)
            for text in texts:
                assert text in {sentence(one, 8 * image + place) for one in languages for place in range(5)}
            seen.setdefault(image, []).append(texts)
    if own > 1:  # each epoch draws other captions
        assert any(first != second for first, second in seen.values())


def test_pooled_captions_are_drawn_by_their_number(layouts: Layouts) -> None:
    """[9]: one of 5 + 5 + 1 + 1 captions is French and one is Czech, so 1/12 of the drawn captions are each."""
    data = layouts.retrieval(train_sets=[f"multi30k_{one}" for one in WORDS])
    pairs = data.training_pairs[0]
    counts = dict.fromkeys(WORDS, 0)
    for epoch in range(6):
        for item in range(60):
            words = data.tokenizer.decode(pairs[epoch, item]["t2i"].captions[0]).split()
            (language,) = [one for one in WORDS if set(words) <= set(WORDS[one])]
            counts[language] += 1
    assert chisquare(list(counts.values()), np.array([5, 5, 1, 1]) / 12 * 360).pvalue > 1e-3


def test_a_step_of_fine_tuning(layouts: Layouts) -> None:
    data = layouts.retrieval()
    for step in steps(data, 3):
        assert step["xmlm"] == []
        (relation,) = step["relations"]
        for group in relation.values():
            assert group.keys() == {
                "tokens", "token_mask", "regions", "boxes", "region_mask", "true", "false"
            }  # fmt: skip
            texts = [number_of(text) // 8 for text in texts_of(group, data)]
            same = torch.tensor([text == picture for text, picture in zip(texts, pictures_of(group))]).view(4, 4)
            # Other captions of the same image never serve as negatives.
            assert torch.equal(same.flatten().nonzero()[:, 0], group["true"])
            assert torch.equal(group["true"] // 4, group["false"] // 4)


def test_negatives_are_distinct_and_uniform_without_siblings(layouts: Layouts) -> None:
    pairs: Any = layouts.retrieval().training_pairs[0]
    rng = np.random.default_rng(0)
    drawn = [dict(islice(pairs.candidates.negatives(pairs, 3, rng), 3)) for _ in range(1000)]
    assert all(len(negatives) == 3 for negatives in drawn)
    counts = np.bincount([image for negatives in drawn for image in negatives], minlength=12)
    assert counts[3] == 0
    assert chisquare(np.delete(counts, 3)).pvalue > 1e-3


def test_images_of_several_sets_are_pooled_by_key(layouts: Layouts, tmp_path: Path) -> None:
    """Pool the images of two data sets by key. The second set adds images and brings their region features.

    If the second set has its own splits (COCO-CN), it adds no images to the pool of its source (COCO), because its
    training images may be test images of COCO.
    """
    other = Layouts.write(tmp_path / "other", images=15)
    sets = {"one": layouts.sets()["multi30k_en"], "other": other.sets()["multi30k_fr"]}
    data = layouts.retrieval(sets=sets, train_sets=["one", "other"], test_sets=[])
    pairs = data.training_pairs[0]
    assert pairs.pool.counts.tolist() == [6] * 12 + [1] * 3
    assert pairs[0, 13]["index"] == 13
    assert pictures_of(steps(data)[0]["relations"][0]["t2i"])
    sets["other"].dataset.own_splits = True
    pooled = layouts.retrieval(sets=sets, train_sets=["one", "other"], test_sets=[]).training_pairs[0]
    assert pooled.pool.counts.tolist() == [6] * 12
    alone = layouts.retrieval(sets=sets, train_sets=["other"], test_sets=[]).training_pairs[0]
    assert len(alone.keys) == 15
    sets["other"].dataset.coco = SimpleNamespace(name="another source")
    apart = layouts.retrieval(sets=sets, train_sets=["one", "other"], test_sets=[]).training_pairs[0]
    assert len(apart.keys) == 15


def test_groups_of_several_sets_do_not_mix() -> None:
    one = LanguageCaptions("en", Texts("abc"), Rows.texts([("x",), ("y", "z"), ("w",)]), np.array([1, 1, 0]))
    two = LanguageCaptions("zh", Texts("cd"), Rows.texts([("u",), ("v",)]), np.arange(2))
    sets: list[Any] = [SimpleNamespace(captions=captions, texts=captions.captions.column) for captions in (one, two)]
    pool = CaptionPool(sets, ["a", "b", "c", "d"])
    assert pool.counts.tolist() == [1, 2, 2, 1]
    assert [pool.of(image).tolist() for image in range(4)] == [[0], [1, 2], [3, 4], [5]]
    assert pool.caption(4)[1] == 0
    a, b, c, d = pool.groups.tolist()
    assert a == b
    assert len({a, c, d}) == 3  # d's group has number 1 in its own data set


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_sets_to_search_in(layouts: Layouts) -> None:
    data = layouts.retrieval("test")
    loaders = data.test_dataloader()
    assert [one.name for one in data.evaluation_sets] == list(data.sets)
    assert len({one.images for one in data.evaluation_sets}) == 1
    images = list(loaders[0])
    assert [len(batch["index"]) for batch in images] == [3, 2]
    assert all(batch["regions"].shape[1:] == (4, WIDTH) for batch in images)
    assert [n for batch in images for n in pictures_of(batch)] == list(range(5))
    for one in data.evaluation_sets:
        repeats = 5 if one.language in ("en", "de") else 1
        assert one.numbers.tolist() == list(range(5 * repeats))
        assert one.owner.tolist() == np.repeat(range(5), repeats).tolist()
        expected = [sentence(one.language, 8 * image + place) for image in range(5) for place in range(repeats)]
        assert texts_of({"tokens": one.tokens}, data) == list(one.texts) == expected
    assert data.evaluation_sets[0].picture(0) is None


def test_fewer_images_and_captions(layouts: Layouts) -> None:
    data = layouts.retrieval("test", test_images=3, test_captions=2)
    (images,) = data.test_dataloader()
    assert [len(images.dataset), *(len(one.tokens) for one in data.evaluation_sets)] == [3, 6, 6, 3, 3]
    texts = texts_of({"tokens": data.evaluation_sets[0].tokens}, data)
    assert texts == [sentence("en", 8 * image + place) for image in range(3) for place in range(2)]


def test_captions_of_the_test_are_as_long_as_they_are(layouts: Layouts) -> None:
    """By default, don't cut test captions, like the released code. The encoder must have enough positions."""
    tokenizer = layouts.tokenizer
    tokenizer.max_tokens = 4
    whole, cut = (
        layouts.retrieval(tokenizer=tokenizer, test_sets=["multi30k_en"], cut_test_captions=own)
        for own in (False, True)
    )
    (one,), (other,) = cut.evaluation_sets, whole.evaluation_sets
    assert one.token_mask.sum(1).max() == 4 == one.tokens.shape[1]
    assert other.token_mask.sum(1).max() == other.tokens.shape[1] > 4
    encoder = M3PEncoder(**tiny_sizes(vocabulary_size=160, feature_dim=WIDTH, positions=8, languages=4))
    check_sizes(encoder, cut)
    with pytest.raises(ValueError, match=r"model\.model\.encoder\.positions is 8"):
        check_sizes(encoder, whole)


# -- records and faults ------------------------------------------------------------------------------------------------


def test_the_record(layouts: Layouts) -> None:
    data = layouts.pretraining(code_switching=layouts.switcher())
    steps(data)
    data.test_dataloader()
    described = data.describe()
    assert described.keys() == {
        "training 0 (conceptual_captions)",
        "training text (wikipedia)",
        "code-switching (dictionaries)",
        "test multi30k_en (multi30k)",
    }
    assert described["training text (wikipedia)"]["samples"] == 10 + 20 + 30 + 40
    assert described["training 0 (conceptual_captions)"]["samples"] == 12
    switched = described["code-switching (dictionaries)"]
    assert (switched["samples"], switched["covered_by_language"]) == (36, {"de": 1.0, "fr": 1.0})


def test_damaged_regions_are_skipped_and_counted(layouts: Layouts, monkeypatch: pytest.MonkeyPatch) -> None:
    read = RegionFeatures.__getitem__

    def damaged(self: RegionFeatures, key: str) -> Regions:
        if key in ("train_3", "train_4"):
            raise RegionError(f"{key}: damaged")
        return read(self, key)

    monkeypatch.setattr(RegionFeatures, "__getitem__", damaged)
    data = layouts.retrieval(max_skipped_fraction=0.2)
    loader = data.train_dataloader()
    for step in loader:
        for group in step["relations"][0].values():
            assert not {3, 4} & set(pictures_of(group))
    described = data.describe()["training (multi30k)"]
    assert (described["skipped"], sorted(described["skipped_names"])) == (2, ["train_3", "train_4"])
    assert data.training_pairs[0][0, 3]["index"] == 5
    pairs = layouts.retrieval(max_skipped_fraction=0.1).training_pairs[0]
    with pytest.raises(TooManyBrokenFiles, match="2 of 12 files cannot be used"):
        _ = [pairs[0, item] for item in range(60)]


def test_images_without_regions_are_left_out_and_counted(tmp_path: Path) -> None:
    own = Layouts.write(tmp_path / "data")
    folder = own.root / "multi30k"
    (folder / "regions/train.npz").unlink()
    write_features(folder, "train", [f"train_{number}" for number in range(10)])
    data = own.retrieval(max_skipped_fraction=0.2, batch_size=10)
    shown = {n for step in data.train_dataloader() for n in pictures_of(step["relations"][0]["t2i"])}
    assert shown == set(range(10))
    described = data.describe()["training (multi30k)"]
    assert (described["samples"], described["missing"]) == (10, 2)
    with pytest.raises(TooManyBrokenFiles, match=r"2 of 12 images have no region features in .*train\.npz.*train_10"):
        own.retrieval(max_skipped_fraction=0.1)


@pytest.mark.parametrize("vlm_candidates", ["groups", "in_batch"])
def test_text_stands_behind_the_same_number_of_rows_everywhere(
    layouts: Layouts, tmp_path: Path, vlm_candidates: str
) -> None:
    """Check that a caption's encoding doesn't depend on the number of regions of other pictures in the batch."""
    few = Layouts.write(tmp_path / "few", images=12, test_images=1)  # only one test picture, with one region
    for own, most in ((layouts, 4), (layouts, 7), (few, 4)):
        options: dict[str, Any] = {"max_regions": most, "vlm_candidates": vlm_candidates, "batch_size": 2}
        for data in (own.pretraining(**PLAIN, **options), own.retrieval(**options)):
            found = {group["regions"].shape[1] for step in steps(data, 4) for group in step["relations"][0].values()}
            assert found == {most}
            assert {batch["regions"].shape[1] for batch in data.test_dataloader()[0]} == {most}
