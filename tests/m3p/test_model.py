"""Compare the encoder, its heads and their sizes with the released code."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from papers.m3p.encoder import M3PEncoder
from tests.m3p.tiny import arrays, joint, tiny_model, tiny_sizes, valid

CLOSE = {"rtol": 0.0, "atol": 5e-6}


def test_joint_forward_is_that_of_the_released_code() -> None:
    golden, model = arrays("joint_forward"), tiny_model()
    tokens, mask = golden["token_ids_LxB"].T, valid(golden["lengths"], 8)
    regions = F.normalize(golden["features"], dim=-1)
    torch.testing.assert_close(model.encoder.region(regions, golden["loc"]), golden["image_embedding"], **CLOSE)
    hidden = joint(model, tokens, mask, regions, golden["loc"])
    torch.testing.assert_close(hidden, golden["joint_hidden_SxBxD"].transpose(0, 1), **CLOSE)
    torch.testing.assert_close(model.match_head(hidden[:, 0]), golden["relation_logit"][:, 0], **CLOSE)


def test_text_alone_is_that_of_the_released_code() -> None:
    golden, model = arrays("joint_forward"), tiny_model()
    tokens, mask = golden["token_ids_LxB"].T, valid(golden["lengths"], 8)
    torch.testing.assert_close(model.encoder(tokens, mask), golden["text_only_hidden_LxBxD"].transpose(0, 1), **CLOSE)
    languages = golden["lang_ids_LxB"][0]  # one language per text
    expected = golden["text_only_with_langs_hidden_LxBxD"].transpose(0, 1)
    torch.testing.assert_close(model.encoder(tokens, mask, languages=languages), expected, **CLOSE)


def test_one_language_has_no_embedding() -> None:
    golden = arrays("joint_forward")
    inputs = golden["token_ids_LxB"].T, valid(golden["lengths"], 8)
    encoder = M3PEncoder(**tiny_sizes(languages=1))
    torch.testing.assert_close(encoder(*inputs, torch.zeros(3, dtype=torch.int64)), encoder(*inputs))


def test_fewer_regions_than_rows_are_masked_where_they_are() -> None:
    """Mask missing regions. The released code instead keeps their rows and drops the last words."""
    golden, quirk, model = arrays("joint_forward"), arrays("joint_forward_ragged_quirk"), tiny_model()
    tokens, mask = golden["token_ids_LxB"].T, valid(golden["lengths"], 8)
    regions, region_mask = F.normalize(golden["features"], dim=-1), valid(quirk["image_lengths"], 5)
    hidden = joint(model, tokens, mask, regions, golden["loc"], region_mask)
    torch.testing.assert_close(hidden[0], quirk["joint_hidden_SxBxD"][:, 0], **CLOSE)  # this image has all five regions
    assert not torch.allclose(hidden[1], quirk["joint_hidden_SxBxD"][:, 1], atol=1e-3)
    other = torch.where(region_mask[..., None], regions, torch.randn_like(regions))
    torch.testing.assert_close(joint(model, tokens, mask, other, golden["loc"], region_mask), hidden)
    assert not hidden[2, 2:5].any()


@settings(max_examples=15)
@given(st.integers(0, 8), st.integers(0, 5), st.integers(0, 10**6))
def test_what_is_padded_changes_nothing_and_nothing_is_never_a_nan(tokens: int, regions: int, seed: int) -> None:
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 39, (1, 8), generator=generator)
    features, boxes = torch.randn(2, 1, 5, 2048, generator=generator), torch.randn(1, 5, 5, generator=generator)
    mask, region_mask = valid(torch.tensor([tokens]), 8), valid(torch.tensor([regions]), 5)
    rows = [
        joint(model, torch.where(mask, ids, fill), mask, torch.where(region_mask[..., None], features[0], other),
              boxes, region_mask)
        for fill, other in ((1, torch.zeros(())), (7, features[1]))
    ]  # fmt: skip
    assert torch.isfinite(rows[0]).all()
    torch.testing.assert_close(rows[0], rows[1])


def test_the_first_position_alone_is_that_of_all() -> None:
    model = tiny_model()
    start, mask = torch.randn(6, 9, 16), valid(torch.tensor([9, 4, 7, 1, 9, 2]), 9)
    whole = model.encoder.encode(start, mask)
    torch.testing.assert_close(model.encoder.encode(start, mask, True), whole[:, :1])
    first, some = model.encoder.encode_pairs(start, mask, torch.tensor([4, 1]))
    torch.testing.assert_close(first, whole[:, 0])
    torch.testing.assert_close(some, whole[[4, 1]])
