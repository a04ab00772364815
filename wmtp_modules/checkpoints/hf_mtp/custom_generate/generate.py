# SPDX-License-Identifier: MIT
"""What ``transformers`` calls for a model that it loads from this folder, or that is given
``custom_generate=FOLDER``: the model's own ``generate``."""


def generate(inputs=None, *args, model, **kwargs):
    """``LlamaMTPForCausalLM.generate``; ValueError for a model without its heads."""
    if not hasattr(model, "extra_heads"):
        raise ValueError(
            f"{type(model).__name__} has no extra heads: load this folder with "
            "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
        )
    return type(model).generate(model, inputs, *args, **kwargs)
