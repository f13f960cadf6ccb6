"""VX2TEXT: the model is an object of its own below the module that trains it, and `tokenisation` is `tokenization`."""

from __future__ import annotations

from typing import Any

#: Fields of the module that are the model's.
OF_MODEL = (
    "language_model", "video_classifier", "audio_classifier", "modalities", "video_tokens", "audio_tokens",
    "tokenisation", "temperature", "table", "beams", "max_answer_tokens",
)  # fmt: skip
#: Classes that moved; the hash of a configuration does not notice.
MOVED = {
    "papers.vx2text.module.ModalityClassification": "papers.vx2text.miniature.ModalityClassification",
    "papers.vx2text.module.TextPretraining": "papers.vx2text.miniature.TextPretraining",
    "papers.vx2text.data.CategoryData": "papers.vx2text.miniature.CategoryData",
    "papers.vx2text.model.LanguageModel": "papers.vx2text.language_model.LanguageModel",
    "papers.vx2text.model.OptionClassifier": "papers.vx2text.language_model.OptionClassifier",
    "papers.vx2text.model.ModalityClassifier": "papers.vx2text.tokens.ModalityClassifier",
    "papers.vx2text.model.SigmoidClassifier": "papers.vx2text.tokens.SigmoidClassifier",
}


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a stage as the new code states it; the old one stays as it is.

    Args:
        config: merged configuration of before the move.
    """
    config = _moved(config)
    module = config["model"]
    if module["class_path"] != "papers.vx2text.module.VX2Text":
        return config
    rest = dict(module["init_args"])
    model = {name.replace("tokenis", "tokeniz"): rest.pop(name) for name in OF_MODEL if name in rest}
    nested = {"class_path": "papers.vx2text.model.VX2Text", "init_args": model}
    config["model"] = {"class_path": "papers.vx2text.module.VX2TextModule", "init_args": {"model": nested, **rest}}
    return config


def _moved(value: Any) -> Any:
    """A copy with the new import paths of classes."""
    if isinstance(value, dict):
        return {name: _moved(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner) for inner in value]
    return MOVED.get(value, value) if isinstance(value, str) else value
