"""What is published of a model with PEFT's adapters: the adapter, in files that ``PeftModel.from_pretrained`` reads."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_plugin.deepspeed_engine.publish import Form
from ds_plugin.weight_averaging.state.fragments import plain_name


def form_of(model: Any, beside: Callable[[Path], None]) -> Form:
    """The form of a published folder: the model's own, or that of its active adapter. ``beside``: writes what else
    belongs into the folder."""
    peft = sys.modules.get("peft")  # who has such a model has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        return Form(beside=beside)
    adapter = model.active_adapter
    tensors = dict(model.named_parameters(remove_duplicate=False))
    # given placeholders, it says what it would write each parameter as
    own = {id(p): name for name, p in tensors.items()}
    written = peft.get_peft_model_state_dict(model, tensors, adapter_name=adapter, save_embedding_layers=False)
    names = {plain_name(own[id(p)]): name for name, p in written.items()}

    def with_adapter(folder: Path) -> None:
        model.peft_config[adapter].save_pretrained(folder)
        beside(folder)

    return Form(names.get, "adapter_model", with_adapter)
