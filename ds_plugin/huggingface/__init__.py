"""The three methods in Hugging Face's Trainer and Accelerate, in Lightning, and in what is built on them.

    import ds_plugin.huggingface
    ds_plugin.huggingface.enable()
    Trainer(model=model, args=TrainingArguments(..., deepspeed="config.json"), ...).train()

A script that cannot be changed: ``ds-plugin run SCRIPT.py ...``, under any launcher. See this package's README.
"""

from ds_plugin.huggingface.hooks import disable, enable

__all__ = ["disable", "enable"]
