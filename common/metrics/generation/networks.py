"""Released, frozen networks that metrics apply to images [B, 3, S, S] in [0, 1]. Weights come from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.datasets.coco import CLASSES
from common.encoders.checkpoint_files import CheckpointError, load_exactly, named_tensors, read_checkpoint

# COCO ids run to 90, like those of torchvision's detectors; these ids have no class.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


class InceptionV3(nn.Module):
    """ImageNet's Inception V3, from torchvision's `inception_v3_google-0cc3c7bd.pth`.

    The average pools include the padding; Keras's do not. So scores differ from Keras's even with the same weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        # These weights expect images in [-1, 1].
        network = inception_v3(init_weights=False)
        _fill(network, path)
        self.classifier = network.fc
        network.fc = nn.Identity()
        self.network = network
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 2048] and class probabilities [B, 1000], at full precision."""
        with torch.autocast(images.device.type, enabled=False):
            resized = F.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True)
            features = self.network((2 * resized - 1).clamp(-1, 1))
            return features, self.classifier(features).softmax(1)


class TensorFlowInception(nn.Module):
    """The 2015 Inception of most papers' FID, ported by torchmetrics, which needs torch-fidelity.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, or pytorch-fid's copy under another name.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        read_checkpoint(path)  # torchmetrics' errors do not name the file
        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).requires_grad_(False)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: weights of another network: {error}") from None

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, 2048]."""
        return self.network((images.float() * 255).round().clamp(0, 255).to(torch.uint8))


class ClipEmbeddings(nn.Module):
    """CLIP embeddings for R-precision, read from a `save_pretrained` folder. Papers train separate encoders instead."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        try:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers can raise anything
            raise CheckpointError(f"{folder}: holds no CLIP model with a tokenizer ({error})") from error
        self.model = model
        self.size = int(model.config.vision_config.image_size)
        # Mean and standard deviation of the images that CLIP was trained on.
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None])
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None])
        self.eval().requires_grad_(False)

    def images(self, images: Tensor) -> Tensor:
        """Embed images [B, d]."""
        resized = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (resized - self.mean) / self.std
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts [B, d], truncated to CLIP's maximum length."""
        longest = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        outputs = self.model.text_model(**tokens.to(self.mean.device))
        return self.model.text_projection(outputs.pooler_output)


class ObjectDetector(nn.Module):
    """Detects which of COCO's 80 classes an image shows, for SOA.

    Uses a Faster R-CNN instead of the public tool's YOLOv3, so scores differ from published ones.

    Args:
        path: `fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth` of torchvision.
        size: shorter side to resize images to, in pixels.

    Source: confidence 0.5 and non-maximum suppression 0.4, as in the public tool.
    """

    numbers: Tensor

    def __init__(self, path: str | Path, size: int = 256) -> None:
        super().__init__()
        from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

        self.network = fasterrcnn_resnet50_fpn_v2(
            weights_backbone=None, min_size=size, max_size=2 * size, box_score_thresh=0.5, box_nms_thresh=0.4,
        )  # fmt: skip
        _fill(self.network, path)
        numbers = torch.full((92,), -1)
        numbers[[number for number in range(1, 91) if number not in _UNUSED_IDS]] = torch.arange(len(CLASSES))
        self.register_buffer("numbers", numbers)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return whether an image shows each class, bool [B, 80]."""
        present = torch.zeros(len(images), len(CLASSES) + 1, dtype=torch.bool, device=images.device)
        # In parts, because the proposals of an image take 200 MB.
        for part, rows in zip(images.float().split(16), present.split(16)):
            for row, detected in zip(rows, self.network(list(part))):
                row[self.numbers[detected["labels"]]] = True  # -1, for ids without a class, sets the last column
        return present[:, :-1]


def _fill(network: nn.Module, path: str | Path) -> None:
    load_exactly(network, named_tensors(read_checkpoint(path)), f"{path}: weights of another network")
