"""Weights of M3P: out of our own, released and XLM-R checkpoints, and into the layouts of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    differences,
    first_of,
    named_tensors,
    read_checkpoint,
)
from common.files import write_whole
from papers.m3p.model import M3PModel

Layout = Literal["m3p", "xlm_roberta"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: Rows at the start of XLM-R's table of positions that no token uses: its positions begin behind its padding id.
XLM_R_FIRST_POSITION = 2
SUFFIXES = (".pt", ".pth", ".safetensors")

#: Parts of a name of ours and of the released code (specification 3). A block's number comes in between.
_RELEASED = {
    "encoder.token": "embeddings",
    "encoder.position": "position_embeddings",
    "encoder.language": "cross_lang_embeddings",
    "encoder.norm": "layer_norm_emb",
    "encoder.region.feature": "image_embeddings.image_embeddings",
    "encoder.region.box": "image_embeddings.image_location_embeddings",
    "encoder.region.norm": "image_embeddings.LayerNorm",
    "match.dense": "pooled_layer.dense",
    "match.score": "seq_relationship",
    "regions.regression": "mrfr_dense",
    "regions.dense": "transformer_obj.dense",
    "regions.norm": "transformer_obj.LayerNorm",
    "regions.classifier": "pred_obj_layer.proj",
    "vocabulary": "pred_layer.proj",
}
_RELEASED_BLOCK = {
    "query": "attentions.{}.q_lin",
    "key": "attentions.{}.k_lin",
    "value": "attentions.{}.v_lin",
    "output": "attentions.{}.out_lin",
    "attention_norm": "layer_norm1.{}",
    "expand": "ffns.{}.lin1",
    "contract": "ffns.{}.lin2",
    "output_norm": "layer_norm2.{}",
}
_XLM_R = {
    "encoder.token": "embeddings.word_embeddings",
    "encoder.position": "embeddings.position_embeddings",
    "encoder.norm": "embeddings.LayerNorm",
}
_XLM_R_BLOCK = {
    "query": "encoder.layer.{}.attention.self.query",
    "key": "encoder.layer.{}.attention.self.key",
    "value": "encoder.layer.{}.attention.self.value",
    "output": "encoder.layer.{}.attention.output.dense",
    "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "expand": "encoder.layer.{}.intermediate.dense",
    "contract": "encoder.layer.{}.output.dense",
    "output_norm": "encoder.layer.{}.output.LayerNorm",
}


def released_name(name: str) -> str:
    """Name in the released code of a tensor of `M3PModel`.

    Example:
        >>> released_name("encoder.blocks.3.query.weight")
        'attentions.3.q_lin.weight'
    """
    return _renamed(name, _RELEASED, _RELEASED_BLOCK) or name


def load_into_model(
    model: M3PModel, path: str | Path, field: str = "pretrained", position_offset: int = 2
) -> list[str]:
    """Give a model the weights of a checkpoint, recognised by the names of its tensors.

    Args:
        model: changed in place, when all fits. Out of XLM-R come the text encoder and the bias of the vocabulary; what
            belongs to regions and to the match keeps its weights.
        path: a Lightning checkpoint of any stage, a checkpoint of the released code, an export of ours, or XLM-R in the
            layout of transformers: the folder, or its `model.safetensors` or `pytorch_model.bin`.
        field: name of the setting that gave `path`, for the message.
        position_offset: first row that is taken of XLM-R's table of positions: 2, where its positions begin, or 0.

    Returns:
        Names of the file's tensors that were not used, such as the generation layers of the released checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, no such checkpoint, or of other sizes; the model is unchanged.

    Source: specification 3.
    """
    try:
        path = _file(Path(path))
        content = read_checkpoint(path, "'model' or 'state_dict'")
        state = named_tensors(content.get("state_dict", content.get("model", content)))
        found, used, kept = _read(model, state, position_offset, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(kept)}
    problem = differences(own, found)
    if problem:
        raise CheckpointError(
            f"{field}: the weights in {path} are of another architecture than model.model: {problem}. Give its encoder "
            "the sizes, languages and vocabulary that it was trained with."
        )
    model.load_state_dict(found, strict=False)
    return sorted(set(state) - used)


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "m3p") -> Path:
    """Write the weights of a checkpoint for another library: no optimiser.

    A file of the layout `m3p` has the names of the released code under the entry `model`, without the layers that only
    generation uses; the released code fills those from a fresh model. One of `xlm_roberta` is the text encoder as
    `transformers.XLMRobertaModel` reads it: no regions and no language embeddings.

    Args:
        checkpoint: a Lightning checkpoint of a stage, or a checkpoint of the released code.
        output: file to write, ending in one of `SUFFIXES`; it appears whole or not at all.
        layout: whose names.

    Returns:
        `output`.

    Raises:
        ValueError: there is no such layout, or the suffix is another.
        CheckpointError: the file is missing, damaged or holds no such model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if Path(output).suffix not in SUFFIXES:
        raise ValueError(f"output: the file must end in {' or '.join(SUFFIXES)}, got {str(output)!r}")
    content = read_checkpoint(checkpoint, "'model' or 'state_dict'")
    state = named_tensors(content.get("state_dict", content.get("model", content)))
    own = _of_ours(state) or _of_released(state)[0]
    if not own:
        raise CheckpointError(f"{checkpoint}: no model of M3P: found {first_of(list(state) or list(content))}")
    if layout == "m3p":
        written = {released_name(name): value for name, value in own.items()}
        written["pred_layer.proj.weight"] = written["embeddings.weight"].clone()
    else:
        written = _as_xlm_r(own)
    written = {name: value.contiguous() for name, value in written.items()}
    if Path(output).suffix == ".safetensors":
        return write_whole(output, lambda file: save_file(written, file, metadata={"format": "pt"}))
    whole: Any = {"model": written} if layout == "m3p" else written
    return write_whole(output, lambda file: torch.save(whole, file))


def _file(path: Path) -> Path:
    """The file of weights in a folder, or the path itself."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: neither model.safetensors nor pytorch_model.bin lies in this folder. Fetch XLM-R once, with "
        f"`hf download FacebookAI/xlm-roberta-base --local-dir {path}`"
    )


def _read(
    model: M3PModel, state: Mapping[str, Tensor], position_offset: int, path: str
) -> tuple[dict[str, Tensor], set[str], tuple[str, ...]]:
    """Tensors under our names, the names in the file that were used, and what the model keeps of its own."""
    own = _of_ours(state)
    if own:
        return own, {name for name in state if name.removeprefix("model.") in own}, ()
    released, used = _of_released(state)
    if released:
        return released, used, ()
    text = below(state, "roberta.") or dict(state)
    if "embeddings.word_embeddings.weight" in text:
        found, used = _of_xlm_r(model, state, text, position_offset)
        return (
            found,
            used,
            ("encoder.region.", "encoder.language.", "match.", "regions.")
            + (() if "vocabulary.bias" in found else ("vocabulary.",)),
        )
    raise CheckpointError(
        f"{path}: no weights of M3P or XLM-R: expected model.encoder.token.weight, embeddings.weight or "
        f"embeddings.word_embeddings.weight, found {first_of(list(state))}"
    )


def _of_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return below(state, "model.") if "model.encoder.token.weight" in state else {}


def _of_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of the released code under our names, and their names there."""
    if "embeddings.weight" not in state or "attentions.0.q_lin.weight" not in state:
        return {}, set()
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("attentions."))
    found: dict[str, Tensor] = {}
    used = {"pred_layer.proj.weight"}  # the table of words again
    for name in _names(_RELEASED, _RELEASED_BLOCK, layers):
        other = released_name(name)
        if other in state and name != "vocabulary.weight":
            found[name] = state[other].clone()
            used.add(other)
    return found, used


def _of_xlm_r(
    model: M3PModel, state: Mapping[str, Tensor], text: Mapping[str, Tensor], position_offset: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of XLM-R under our names, and their names there (specification 3, traps a and b)."""
    layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layer."))
    names = {name: _renamed(name, _XLM_R, _XLM_R_BLOCK) for name in _names(_XLM_R, _XLM_R_BLOCK, layers)}
    found = {name: text[other].clone() for name, other in names.items() if other is not None and other in text}
    used = {f"roberta.{name}" if f"roberta.{name}" in state else name for name in names.values() if name}
    kinds = text.get("embeddings.token_type_embeddings.weight")
    rows = found.get("encoder.position.weight")
    if rows is not None:
        if kinds is not None:
            rows = rows + kinds[0]
        rows = rows[position_offset:]
        # Rows that are left over at the end keep their random start.
        table = model.encoder.position.weight.detach().cpu().clone()
        fits = min(len(rows), len(table))
        table[:fits] = rows[:fits]
        found["encoder.position.weight"] = table
    if "lm_head.bias" in state:
        found["vocabulary.bias"] = state["lm_head.bias"].clone()
    elif "lm_head.decoder.bias" in state:
        found["vocabulary.bias"] = state["lm_head.decoder.bias"].clone()
    prefix = "roberta." if "roberta.embeddings.word_embeddings.weight" in state else ""
    used |= {f"{prefix}embeddings.token_type_embeddings.weight", "lm_head.bias", "lm_head.decoder.bias"}
    used |= {"lm_head.decoder.weight", f"{prefix}embeddings.position_ids"}
    return found, used


def _as_xlm_r(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder under XLM-R's names; its two unused rows of positions and its token type are zero."""
    written = {other: value for name, value in own.items() if (other := _renamed(name, _XLM_R, _XLM_R_BLOCK))}
    positions = written["embeddings.position_embeddings.weight"]
    unused = positions.new_zeros(XLM_R_FIRST_POSITION, positions.shape[1])
    written["embeddings.position_embeddings.weight"] = torch.cat([unused, positions])
    written["embeddings.token_type_embeddings.weight"] = positions.new_zeros(1, positions.shape[1])
    return written


def _names(parts: Mapping[str, str], block: Mapping[str, str], layers: int) -> list[str]:
    """Every name of ours that a layout might hold."""
    places = [*parts, *(f"encoder.blocks.{number}.{part}" for number in range(layers) for part in block)]
    return [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]


def _renamed(name: str, parts: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    place, _, kind = name.rpartition(".")
    within = re.fullmatch(r"encoder\.blocks\.(\d+)\.(\w+)", place)
    if within:
        return f"{block[within[2]].format(within[1])}.{kind}"
    return f"{parts[place]}.{kind}" if place in parts else None
