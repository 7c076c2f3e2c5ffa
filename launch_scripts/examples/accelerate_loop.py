"""A loop of Accelerate's with the three methods, on text that every Python has.

torchrun --nproc-per-node 1 launch_scripts/examples/accelerate_loop.py [--steps 40] [--out runs/accelerate]
"""

import argparse
import inspect
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim

import ds_plugin
import ds_plugin.huggingface

LENGTH, MICRO = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--config", default=str(Path(__file__).with_name("methods.json")))
    given = parser.parse_args()

    ds_plugin.huggingface.enable()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=given.config))
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, torch.nn.functional))
    tokens = torch.tensor(list(text.encode()))[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    config = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=4, n_head=4, n_positions=LENGTH)
    model = transformers.GPT2LMHeadModel(config)
    loader = torch.utils.data.DataLoader(tokens[MICRO:], batch_size=MICRO, shuffle=True, drop_last=True)
    optimizer = DummyOptim(model.parameters(), lr=3e-3, weight_decay=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plugin = ds_plugin.get_plugin(model)

    state = Path(given.out) / "state"
    if state.is_dir():  # a run that was interrupted goes on, the window of the average with it
        accelerator.load_state(str(state))
        accelerator.print(f"resumed at step {model.global_steps}")
    model.train()
    while model.global_steps < given.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss  # cut on the way in
                accelerator.backward(loss)
            if model.global_steps % 10 == 0:
                said = f"step {model.global_steps}, length {plugin.trained_length}, loss {loss.item():.3f}"
                accelerator.print(f"{said}, {plugin.ledger.trained:,} tokens trained")
            if model.global_steps % 20 == 0:
                accelerator.save_state(str(state))
            if model.global_steps >= given.steps:
                break

    held_out = tokens[:MICRO].to(accelerator.device)
    model.eval()
    with torch.no_grad():
        raw = model(input_ids=held_out, labels=held_out).loss.item()
        with plugin.averaged_weights():
            averaged = model(input_ids=held_out, labels=held_out).loss.item()
    accelerator.print(f"held out: {raw:.3f}, of the average {averaged:.3f}")
    plugin.publish(Path(given.out) / "averaged", replace=True)  # from_pretrained reads it


if __name__ == "__main__":
    main()
