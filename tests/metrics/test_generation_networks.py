"""Test the released networks that score generated images, with random weights in the released layouts."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from common.data.datasets.coco import CLASSES
from common.encoders.checkpoint_files import CheckpointError
from common.metrics.generation.networks import ClipEmbeddings, InceptionV3, ObjectDetector, TensorFlowInception


def frozen(network: nn.Module) -> bool:
    return not any(part.training for part in network.modules()) and not any(
        weight.requires_grad for weight in network.parameters()
    )


def test_inception(tmp_path: Path) -> None:
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=True).eval()
    torch.save({n: v for n, v in network.state_dict().items() if "num_batches" not in n}, tmp_path / "inception.pth")
    inception = InceptionV3(tmp_path / "inception.pth")
    assert frozen(inception)
    images = torch.rand(2, 3, 32, 32)
    features, probabilities = inception(images)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    # Torchvision normalizes with these statistics of ImageNet.
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = network((resized - mean) / std).softmax(1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-6)
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="weights of another network"):
        InceptionV3(tmp_path / "other.pth")


def test_inception_of_2015_takes_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ported, path = MagicMock(), tmp_path / "inception.pth"  # torch-fidelity has the real network but is optional
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", ported)
    with pytest.raises(CheckpointError, match=r"inception\.pth"):
        TensorFlowInception(path)
    torch.save({}, path)
    freeze = ported.return_value.requires_grad_
    images = torch.tensor([-0.1, 0.0, 0.75, 0.999, 1.1])
    assert TensorFlowInception(path)(images) is freeze.return_value.return_value
    ported.assert_called_once_with("inception-v3-compat", ["2048"], str(path))
    freeze.assert_called_once_with(False)
    assert freeze.return_value.call_args.args[0].tolist() == [0, 0, 191, 255, 255]


def test_detector(tmp_path: Path) -> None:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, fasterrcnn_resnet50_fpn_v2

    torch.manual_seed(0)
    network = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    torch.save(network.state_dict(), tmp_path / "detector.pth")
    detector = ObjectDetector(tmp_path / "detector.pth", size=64)
    names = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    assert {names[label]: CLASSES[number] for label, number in enumerate(detector.numbers[:91]) if number >= 0} == {
        name: name for name in CLASSES
    }
    assert frozen(detector)
    assert detector(torch.rand(2, 3, 64, 64)).shape == (2, 80)
    heads, resize = detector.network.roi_heads, detector.network.transform
    assert (heads.score_thresh, heads.nms_thresh, resize.min_size, resize.max_size) == (0.5, 0.4, (64,), 128)

    def detected(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{"labels": torch.tensor([18, 1, 12])}, {"labels": torch.tensor([], dtype=torch.int64)}]

    detector.network.forward = detected  # type: ignore[method-assign]
    found = detector(torch.rand(2, 3, 64, 64))
    assert [CLASSES[number] for number in found[0].nonzero().flatten()] == ["person", "dog"]
    assert not found[1].any()


def test_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = "abcdeghikloprstu"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = {**size, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**size, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    clip = ClipEmbeddings(tmp_path)
    assert frozen(clip)
    pictures = (torch.arange(64 * 64) % 7 % 2 * 255).byte().view(1, 1, 64, 64).expand(2, 3, 64, 64)  # may overshoot
    own = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(list(pictures), return_tensors="pt")
    looked_at: list[torch.Tensor] = []
    clip.model.vision_model.register_forward_pre_hook(
        lambda module, inputs, options: looked_at.append(options["pixel_values"]), with_kwargs=True
    )
    assert clip.images(pictures / 255).shape == (2, 8)
    torch.testing.assert_close(looked_at[0], own["pixel_values"], rtol=0, atol=0.04)  # CLIP's processor rounds to bytes
    texts = clip.texts(["a red dog", "a cat " * 30])
    assert texts.shape == (2, 8)
    torch.testing.assert_close(clip.texts(["a red dog"]), texts[:1])
    with pytest.raises(CheckpointError, match="holds no CLIP model"):
        ClipEmbeddings(tmp_path / "absent")
