"""Convert weights of M3P: our, released and XLM-R checkpoints as input, third-party layouts as output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    differences,
    first_of,
    read_checkpoint,
    tensors_in,
    write_torch,
)
from common.files import write_whole
from papers.m3p.encoder import M3P

Layout = Literal["m3p", "xlm_roberta"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: Unused first rows of XLM-R's position table: its positions start after its padding id.
XLM_R_FIRST_POSITION = 2
SUFFIXES = (".pt", ".pth", ".safetensors")

#: Parts of our names and of those in the released code ([3]), before and after a block's number.
_RELEASED = {
    "encoder.token": "embeddings",
    "encoder.position": "position_embeddings",
    "encoder.language": "cross_lang_embeddings",
    "encoder.norm": "layer_norm_emb",
    "encoder.region.feature": "image_embeddings.image_embeddings",
    "encoder.region.box": "image_embeddings.image_location_embeddings",
    "encoder.region.norm": "image_embeddings.LayerNorm",
    "match_head.dense": "pooled_layer.dense",
    "match_head.score": "seq_relationship",
    "region_heads.regression": "mrfr_dense",
    "region_heads.dense": "transformer_obj.dense",
    "region_heads.norm": "transformer_obj.LayerNorm",
    "region_heads.classifier": "pred_obj_layer.proj",
    "vocabulary_head": "pred_layer.proj",
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
    """Name in the released code of a tensor of `M3P`.

    Examples:
        >>> released_name("encoder.blocks.3.query.weight")
        'attentions.3.q_lin.weight'
    """
    return _renamed(name, _RELEASED, _RELEASED_BLOCK) or name


def load_into_model(model: M3P, path: str | Path, field: str = "pretrained", position_offset: int = 2) -> list[str]:
    """Load a checkpoint into a model in place; the tensor names tell its layout. Returns the names of unused tensors.

    On error the model is unchanged. XLM-R provides the text encoder and the vocabulary bias; regions and the match head
    keep their weights. The generation layers of the released checkpoint are unused. `position_offset` is the first row
    to use of XLM-R's position table: 2, where its positions start, or 0.

    Args:
        path: Lightning checkpoint of any stage, released checkpoint, output of `export` or `assemble export`, or XLM-R
            in the layout of transformers (the folder, `model.safetensors` or `pytorch_model.bin`).

    Source: [3].
    """
    try:
        path = _file(Path(path))
        state = _tensors(path)
        wanted = model.state_dict()
        if weights := _of_ours(state):
            used = {name for name in state if name.removeprefix("model.") in weights}
        elif weights := _of_released(state):
            used = {released_name(name) for name in weights} | {"pred_layer.proj.weight"}  # the table of words again
        elif weights := _of_xlm_r(state, wanted["encoder.position.weight"], position_offset):
            used = {name for name in state if name.removeprefix("roberta.") in _used_of_xlm_r(weights)}
            # XLM-R has no other tensors of ours.
            wanted = {name: value for name, value in wanted.items() if _renamed(name, _XLM_R, _XLM_R_BLOCK)}
            wanted |= {name: model.vocabulary_head.bias for name in weights if name == "vocabulary_head.bias"}
        else:
            raise CheckpointError(
                f"{path}: no weights of M3P or XLM-R: expected model.encoder.token.weight, embeddings.weight or "
                f"embeddings.word_embeddings.weight, found {first_of(list(state))}"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    problem = differences(wanted, weights)
    if problem:
        raise CheckpointError(
            f"{field}: the weights in {path} are of another architecture than model.model: {problem}. Give its encoder "
            "the sizes, languages and vocabulary that it was trained with."
        )
    model.load_state_dict(weights, strict=False)
    return sorted(set(state) - used)


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "m3p") -> Path:
    """Write the weights of a Lightning or released checkpoint for another library, without the optimizer, atomically.

    Layout `m3p` has the released code's names under the entry `model`, without the generation layers, which the
    released code fills from a fresh model. Layout `xlm_roberta` is the text encoder for `transformers.XLMRobertaModel`,
    without regions and language embeddings. The output's suffix is one of `SUFFIXES`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if Path(output).suffix not in SUFFIXES:
        raise ValueError(f"output: the file must end in {' or '.join(SUFFIXES)}, got {str(output)!r}")
    state = _tensors(checkpoint)
    weights = _of_ours(state) or _of_released(state)
    if not weights:
        raise CheckpointError(f"{checkpoint}: no model of M3P: found {first_of(list(state))}")
    if layout == "m3p":
        written = {released_name(name): value for name, value in weights.items()}
        written["pred_layer.proj.weight"] = written["embeddings.weight"].clone()
    else:
        # XLM-R's two unused position rows and its token type are zero.
        written = {other: value for name, value in weights.items() if (other := _renamed(name, _XLM_R, _XLM_R_BLOCK))}
        positions = written["embeddings.position_embeddings.weight"]
        unused = positions.new_zeros(XLM_R_FIRST_POSITION, positions.shape[1])
        written["embeddings.position_embeddings.weight"] = torch.cat([unused, positions])
        written["embeddings.token_type_embeddings.weight"] = positions.new_zeros(1, positions.shape[1])
    written = {name: value.contiguous() for name, value in written.items()}
    if Path(output).suffix == ".safetensors":
        return write_whole(output, lambda file: save_file(written, file, metadata={"format": "pt"}))
    return write_torch(output, {"model": written} if layout == "m3p" else written)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: neither model.safetensors nor pytorch_model.bin lies in this folder. Fetch XLM-R once, with "
        f"`hf download FacebookAI/xlm-roberta-base --local-dir {path}`"
    )


def _tensors(path: str | Path) -> dict[str, Tensor]:
    content = read_checkpoint(path, "'model' or 'state_dict'")
    return tensors_in(content)


def _of_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "encoder.token.weight" in state:  # a model that is passed on, with its detector where it has one
        return {name: value.clone() for name, value in state.items() if not name.startswith("detector.")}
    return below(state, "model.") if "model.encoder.token.weight" in state else {}


def _of_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "embeddings.weight" not in state or "attentions.0.q_lin.weight" not in state:
        return {}
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("attentions."))
    names = _names(_RELEASED, _RELEASED_BLOCK, layers)
    del names["vocabulary_head.weight"]  # the table of words
    return {name: state[other].clone() for name, other in names.items() if other in state}


def _of_xlm_r(state: Mapping[str, Tensor], table: Tensor, position_offset: int) -> dict[str, Tensor]:
    """Tensors of XLM-R under our names ([3], traps a and b); `table` provides the position rows that XLM-R lacks."""
    text = below(state, "roberta.") or dict(state)
    if "embeddings.word_embeddings.weight" not in text:
        return {}
    layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layer."))
    names = _names(_XLM_R, _XLM_R_BLOCK, layers)
    weights = {name: text[other].clone() for name, other in names.items() if other in text}
    rows = weights.get("encoder.position.weight")
    if rows is not None:
        kinds = text.get("embeddings.token_type_embeddings.weight")
        rows = (rows if kinds is None else rows + kinds[0])[position_offset:][: len(table)]
        weights["encoder.position.weight"] = torch.cat([rows, table[len(rows) :].detach().cpu()])
    for name in ("lm_head.decoder.bias", "lm_head.bias"):
        if name in state:
            weights["vocabulary_head.bias"] = state[name].clone()
    return weights


def _used_of_xlm_r(weights: Mapping[str, Tensor]) -> set[str]:
    used = {other for name in weights if (other := _renamed(name, _XLM_R, _XLM_R_BLOCK))}
    return used | {
        "embeddings.token_type_embeddings.weight", "embeddings.position_ids",
        "lm_head.bias", "lm_head.decoder.bias", "lm_head.decoder.weight",
    }  # fmt: skip


def _names(parts: Mapping[str, str], block: Mapping[str, str], layers: int) -> dict[str, str]:
    ours = [*parts, *(f"encoder.blocks.{number}.{part}" for number in range(layers) for part in block)]
    names = [f"{part}.{kind}" for part in ours for kind in ("weight", "bias")]
    return {name: other for name in names if (other := _renamed(name, parts, block))}


def _renamed(name: str, parts: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    part, _, kind = name.rpartition(".")
    within = re.fullmatch(r"encoder\.blocks\.(\d+)\.(\w+)", part)
    if within:
        return f"{block[within[2]].format(within[1])}.{kind}"
    return f"{parts[part]}.{kind}" if part in parts else None
