"""Test weights from released checkpoints, from XLM-R and from our stages, and the errors for other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.encoders.checkpoint_files import CheckpointError
from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.weights import RELEASED, export, load_into_model
from tests.encoders.test_checkpoint_files import require_equal
from tests.m3p.tiny import tiny_model, tiny_sizes, values

IGNORED = (
    "refine_embeddings", "cross_alignment", "layer_norm15", "encoder_attn", "latent_transforms", "original_transforms",
    "pooled_layer2", "seq_relationship2", "image_embeddings.image_distbution_embeddings",
)  # fmt: skip


def fresh(**changes: Any) -> M3P:
    torch.manual_seed(3)
    return M3P(M3PEncoder(**tiny_sizes(**changes)))


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """Write a checkpoint of our stage with the weights of the golden model."""
    state = {f"model.{name}": value for name, value in tiny_model().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_names_and_shapes_are_those_of_the_released_checkpoint() -> None:
    official = values("official_state_dict")["tensors"]
    assert len(official) == 475
    with torch.device("meta"):
        state = M3P(M3PEncoder()).state_dict()
    for name, value in state.items():
        assert official[RELEASED[name]] == list(value.shape), name
    used = {RELEASED[name] for name in state} | {"pred_layer.proj.weight"}
    assert all(name.startswith(IGNORED) for name in official.keys() - used)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_loads_and_names_what_it_leaves(prefix: str, tmp_path: Path) -> None:
    source, path = tiny_model(), tmp_path / "checkpoint.pth"
    state = {prefix + RELEASED[name]: value for name, value in source.state_dict().items()}
    state |= {
        f"{prefix}refine_embeddings.norm.weight": torch.ones(3),
        f"{prefix}pooled_layer2.dense.bias": torch.ones(2),
    }
    state[f"{prefix}pred_layer.proj.weight"] = state[f"{prefix}embeddings.weight"]
    torch.save({"model": state, "epoch": 22}, path)
    model = fresh()
    left = load_into_model(model, path)
    assert left == ["pooled_layer2.dense.bias", "refine_embeddings.norm.weight"]
    require_equal(model, source)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_exported_checkpoint_comes_back(suffix: str, last: Path, tmp_path: Path) -> None:
    for path in (last, export(last, tmp_path / f"m3p{suffix}", "m3p")):
        model = fresh()
        assert load_into_model(model, path) == []
        require_equal(model, tiny_model())


def test_a_model_that_is_passed_on_can_be_started_from(tmp_path: Path) -> None:
    source = tiny_model()
    state = {**source.state_dict(), "detector.weight": torch.ones(2)}
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    model = fresh()
    assert load_into_model(model, tmp_path) == ["detector.weight"]
    require_equal(model, source)


SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-12, "pad_token_id": 1,
}  # fmt: skip


def xlm_r(**changes: Any) -> Any:
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    torch.manual_seed(1)
    network = XLMRobertaForMaskedLM(XLMRobertaConfig(**(SIZES | changes))).eval()
    for parameter in network.parameters():  # so that norms and biases differ from 1 and 0
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def test_xlm_r_reads_text_as_it_did(tmp_path: Path) -> None:
    network = xlm_r()
    network.save_pretrained(tmp_path / "xlm-roberta-base")
    model = fresh(languages=1).eval()
    match, regions = model.match_head.dense.weight.clone(), model.encoder.region.feature.weight.clone()
    left = load_into_model(model, tmp_path / "xlm-roberta-base")
    assert all(name.startswith("lm_head.") for name in left)
    assert any("dense" in name for name in left)
    tokens = torch.tensor([[0, 7, 9, 2, 1], [0, 30, 2, 1, 1]])
    mask = tokens != 1
    expected = network.roberta(tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(model.encoder(tokens, mask)[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.vocabulary_head.bias, network.lm_head.bias)
    assert torch.equal(model.match_head.dense.weight, match)
    assert torch.equal(model.encoder.region.feature.weight, regions)
    other = fresh(languages=1)
    load_into_model(other, tmp_path / "xlm-roberta-base", position_offset=0)
    assert torch.equal(other.encoder.position.weight[2:], model.encoder.position.weight[:30])


def test_rows_of_positions_that_xlm_r_lacks_keep_their_start(tmp_path: Path) -> None:
    network = xlm_r(max_position_embeddings=32)
    network.save_pretrained(tmp_path)
    model = fresh()
    before = model.encoder.position.weight.clone()
    load_into_model(model, tmp_path)
    assert torch.equal(model.encoder.position.weight[30:], before[30:])


def test_the_text_encoder_goes_back_to_transformers(last: Path, tmp_path: Path) -> None:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    path = export(last, tmp_path / "text.pt", "xlm_roberta")
    network = XLMRobertaModel(XLMRobertaConfig(**SIZES), add_pooling_layer=False).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    tokens = torch.tensor([[0, 7, 9, 2]])
    found = network(tokens).last_hidden_state
    torch.testing.assert_close(found, tiny_model().encoder(tokens, tokens != 1), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named(last: Path, tmp_path: Path) -> None:
    model = fresh(languages=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"model.pretrained: .*encoder.language.weight \[6, 16\] instead of \[3, 16"
    ):
        load_into_model(model, last, "model.pretrained")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="hf download"):
        load_into_model(model, tmp_path)
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no weights of M3P or XLM-R.*found conv1.weight"):
        load_into_model(model, tmp_path / "other.pth")
