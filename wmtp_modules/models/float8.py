"""Float8 products in the blocks, by torchao (Micikevicius et al. 2022, arXiv 2209.05433)."""

import dataclasses

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from wmtp_modules.models.mtp_transformer import MTPTransformer

MULTIPLE = 16  # of which both widths of a layer must be


def float8_blocks_(model: MTPTransformer, recipe: str, *, device: torch.device) -> None:
    """Have every linear layer of a block multiply in float8, forward and backward.

    Parameters keep their names, dtype and values; norms, attention, embedding and output stay as
    they are. Before blocks are compiled or wrapped. A CPU rounds to float8 and multiplies in the
    compute dtype, which shows the losses and not the speed.

    Args:
        recipe: of torchao: ``tensorwise`` scales a whole matrix, ``rowwise`` each row.

    Raises:
        ValueError: if a GPU has no float8, or a width is no multiple of 16.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"float8: {name} has none (it came with compute capability 8.9)")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not _is_converted(module, name):
            continue
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise ValueError(
                f"float8: {name} has {module.in_features} x {module.out_features} weights, and "
                f"both must be multiples of {MULTIPLE}: set float8 to null"
            )
    config = Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=device.type == "cpu")
    convert_to_float8_training(model, config=config, module_filter_fn=_is_converted)


def _is_converted(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear and name.startswith(("layers.", "heads."))
