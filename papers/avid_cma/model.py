"""The two-tower network of AVID-CMA."""

from torch import Tensor, nn


class AudioVisualModel(nn.Module):
    """One encoder and one projection head for each modality.

    The names of the four parts are those of the released checkpoints, so that these load without renaming.

    Args:
        video_model: Encoder from videos to features.
        audio_model: Encoder from spectrograms to features.
        video_proj: Head from video features to embeddings.
        audio_proj: Head from audio features to embeddings.

    Source: specification 3; 21,286,784 parameters with the paper's parts.
    """

    def __init__(
        self, video_model: nn.Module, audio_model: nn.Module, video_proj: nn.Module, audio_proj: nn.Module
    ) -> None:
        super().__init__()
        self.video_model = video_model
        self.audio_model = audio_model
        self.video_proj = video_proj
        self.audio_proj = audio_proj

    def embed_video(self, video: Tensor) -> Tensor:
        """Embeddings [B, d] of videos [B, 3, T, H, W], not normalised."""
        return self.video_proj(self.video_model(video))

    def embed_audio(self, audio: Tensor) -> Tensor:
        """Embeddings [B, d] of spectrograms [B, 1, T, F], not normalised."""
        return self.audio_proj(self.audio_model(audio))

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both modalities.

        Args:
            video: [B, 3, T, H, W].
            audio: [B, 1, T, F].

        Returns:
            Video and audio embeddings [B, d] each, not normalised: the objective does that.
        """
        return self.embed_video(video), self.embed_audio(audio)
