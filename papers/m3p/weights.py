"""Converts M3P's weights: loads our, released and XLM-R checkpoints, and exports third-party layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.encoders.checkpoint_files import (
    CheckpointError,
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
_MOST_BLOCKS = 99


def _tensors(parts: Mapping[str, str]) -> dict[str, str]:
    """Turn a mapping between module names into a mapping between tensor names. `{}` is the number of a block."""
    modules = {
        ours.format(number): theirs.format(number)
        for ours, theirs in parts.items()
        for number in range(_MOST_BLOCKS if "{}" in ours else 1)
    }
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}


#: Source: [3].
RELEASED = _tensors(
    {
        "encoder.token": "embeddings",
        "encoder.position": "position_embeddings",
        "encoder.language": "cross_lang_embeddings",
        "encoder.norm": "layer_norm_emb",
        "encoder.region.feature": "image_embeddings.image_embeddings",
        "encoder.region.box": "image_embeddings.image_location_embeddings",
        "encoder.region.norm": "image_embeddings.LayerNorm",
        "encoder.blocks.{}.query": "attentions.{}.q_lin",
        "encoder.blocks.{}.key": "attentions.{}.k_lin",
        "encoder.blocks.{}.value": "attentions.{}.v_lin",
        "encoder.blocks.{}.output": "attentions.{}.out_lin",
        "encoder.blocks.{}.attention_norm": "layer_norm1.{}",
        "encoder.blocks.{}.expand": "ffns.{}.lin1",
        "encoder.blocks.{}.contract": "ffns.{}.lin2",
        "encoder.blocks.{}.output_norm": "layer_norm2.{}",
        "match_head.dense": "pooled_layer.dense",
        "match_head.score": "seq_relationship",
        "region_heads.regression": "mrfr_dense",
        "region_heads.dense": "transformer_obj.dense",
        "region_heads.norm": "transformer_obj.LayerNorm",
        "region_heads.classifier": "pred_obj_layer.proj",
    }
) | {"vocabulary_head.bias": "pred_layer.proj.bias"}
_XLM_R = _tensors(
    {
        "encoder.token": "embeddings.word_embeddings",
        "encoder.position": "embeddings.position_embeddings",
        "encoder.norm": "embeddings.LayerNorm",
        "encoder.blocks.{}.query": "encoder.layer.{}.attention.self.query",
        "encoder.blocks.{}.key": "encoder.layer.{}.attention.self.key",
        "encoder.blocks.{}.value": "encoder.layer.{}.attention.self.value",
        "encoder.blocks.{}.output": "encoder.layer.{}.attention.output.dense",
        "encoder.blocks.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "encoder.blocks.{}.expand": "encoder.layer.{}.intermediate.dense",
        "encoder.blocks.{}.contract": "encoder.layer.{}.output.dense",
        "encoder.blocks.{}.output_norm": "encoder.layer.{}.output.LayerNorm",
    }
)
#: Tensors outside the tables above: copies of the word table, the token type (part of our positions), the word bias.
_TABLE, _XLM_R_KIND, _XLM_R_BIAS = "pred_layer.proj.weight", "embeddings.token_type_embeddings.weight", "lm_head.bias"
_XLM_R_USED = (_XLM_R_KIND, "embeddings.position_ids", _XLM_R_BIAS, "lm_head.decoder.bias", "lm_head.decoder.weight")


def load_into_model(model: M3P, path: str | Path, field: str = "pretrained", position_offset: int = 2) -> list[str]:
    """Load a checkpoint into a model in place, and return the names of unused tensors. Detect the layout by the names.

    An error leaves the model unchanged. XLM-R only sets the text encoder and the vocabulary bias; regions and match
    head keep their weights. The released checkpoint's generation layers are unused. `position_offset` is the first row
    of XLM-R's position table to use: 2, which is XLM-R's first position, or 0.

    Args:
        path: Lightning checkpoint of any stage, released checkpoint, output of `export` or `assemble export`, or XLM-R
            in the layout of transformers (the folder, `model.safetensors` or `pytorch_model.bin`).

    Source: [3].
    """
    try:
        path = _file(Path(path))
        state = tensors_in(read_checkpoint(path, "'model' or 'state_dict'"))
        wanted = model.state_dict()
        names = _our_names(state)
        weights = {ours: state[theirs].clone() for ours, theirs in names.items()}
        used = {*names.values(), _TABLE}
        if not weights:
            state = {name.removeprefix("roberta."): value for name, value in state.items()}
            weights = _of_xlm_r(state, wanted["encoder.position.weight"], position_offset)
            used = {*_XLM_R.values(), *_XLM_R_USED}
            wanted = {name: value for name, value in wanted.items() if name in _XLM_R or name in weights}
        if not weights:
            raise CheckpointError(
                f"{path}: no weights of M3P or XLM-R: expected model.encoder.token.weight, embeddings.weight or "
                f"embeddings.word_embeddings.weight, found {first_of(list(state))}"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    problem = differences(wanted, weights)
    if problem:
        raise CheckpointError(
            f"{field}: the weights in {path} do not fit model.model: {problem}. Give its encoder the sizes, languages "
            "and vocabulary that the weights were trained with."
        )
    model.load_state_dict(weights, strict=False)
    return sorted(set(state) - used)


def check(path: Path, module: Any, data: object) -> None:
    """Check that a checkpoint has all weights of the pre-training model, under our names or the released ones."""
    state = tensors_in(read_checkpoint(path, "'model' or 'state_dict'"))
    names = _our_names(state)
    if not names:
        raise CheckpointError(f"{path}: no weights of M3P: found {first_of(list(state))}")
    if problem := differences(module.model.state_dict(), {ours: state[theirs] for ours, theirs in names.items()}):
        raise CheckpointError(f"{path}: the weights do not fit the model: {problem}")


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "m3p") -> Path:
    """Write the weights of a Lightning or released checkpoint for another library, atomically, without the optimizer.

    Layout `m3p` uses the released code's names under the entry `model`. It omits the generation layers, for which the
    released code uses fresh weights. Layout `xlm_roberta` writes the text encoder for `transformers.XLMRobertaModel`,
    without regions and language embeddings. An output that ends in `.safetensors` has that format.
    """
    state = tensors_in(read_checkpoint(checkpoint, "'model' or 'state_dict'"))
    names = _our_names(state)
    if not names:
        raise CheckpointError(f"{checkpoint}: no model of M3P: found {first_of(list(state))}")
    table = RELEASED if layout == "m3p" else _XLM_R
    written = {table[ours]: state[theirs].contiguous() for ours, theirs in names.items() if ours in table}
    if layout == "m3p":
        written[_TABLE] = written["embeddings.weight"].clone()
    else:
        # XLM-R's positions start after two unused rows; write zeros there and for its token type.
        positions = written["embeddings.position_embeddings.weight"]
        unused = positions.new_zeros(2, positions.shape[1])
        written["embeddings.position_embeddings.weight"] = torch.cat([unused, positions])
        written[_XLM_R_KIND] = positions.new_zeros(1, positions.shape[1])
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
        f"{path}: holds neither model.safetensors nor pytorch_model.bin. Download XLM-R once with "
        f"`hf download FacebookAI/xlm-roberta-base --local-dir {path}`"
    )


def _our_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map our tensor names to the names in one of our checkpoints or a released one. Empty for other checkpoints."""
    if "attentions.0.q_lin.weight" in state:
        return {ours: theirs for ours, theirs in RELEASED.items() if theirs in state}
    prefix = "model." if "model.encoder.token.weight" in state else ""  # an exported model has no prefix
    if f"{prefix}encoder.token.weight" not in state:
        return {}
    other = "detector."  # part of the miniature's exported models
    return {n.removeprefix(prefix): n for n in state if n.startswith(prefix) and not n.startswith(other)}


def _of_xlm_r(state: Mapping[str, Tensor], table: Tensor, position_offset: int) -> dict[str, Tensor]:
    """Return XLM-R's tensors with our names ([3], traps a and b). Take missing rows of positions from `table`."""
    weights = {ours: state[theirs].clone() for ours, theirs in _XLM_R.items() if theirs in state}
    rows = weights.get("encoder.position.weight")
    if rows is not None:
        rows = (rows + state[_XLM_R_KIND][0] if _XLM_R_KIND in state else rows)[position_offset:][: len(table)]
        weights["encoder.position.weight"] = torch.cat([rows, table[len(rows) :].detach().cpu()])
    if weights and _XLM_R_BIAS in state:
        weights["vocabulary_head.bias"] = state[_XLM_R_BIAS].clone()
    return weights
