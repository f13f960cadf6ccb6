"""AVID-CMA network: one encoder and one projection head per modality."""

from __future__ import annotations

from torch import Tensor, nn


class AVID(nn.Module):
    """Embeds video and audio in one space. Its 21,286,784 parameters [3] have the names of the released checkpoints."""

    def __init__(
        self, video_model: nn.Module, audio_model: nn.Module, video_proj: nn.Module, audio_proj: nn.Module
    ) -> None:
        super().__init__()
        self.video_model = video_model
        self.audio_model = audio_model
        self.video_proj = video_proj
        self.audio_proj = audio_proj

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both modalities, not normalized.

        Shapes:
            video [B, 3, T, H, W]; audio [B, 1, T, F] -> two of [B, d]
        """
        return self.video_proj(self.video_model(video)), self.audio_proj(self.audio_model(audio))
