"""TRL's SFTTrainer with sequence length warmup and weight averaging; nothing in it is ours:

torchrun --nproc-per-node 1 -m ds_plugin run launch_scripts/examples/sft.py [--steps 20] [--out runs/sft]
"""

import argparse
import json
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
import trl

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/sft")
    given = parser.parse_args()

    config = json.loads(Path(__file__).with_name("methods.json").read_text())
    del config["completep"]  # for weights that are drawn anew, and these stand for pretrained ones
    config["sequence_length_warmup"]["end_length"] = "auto"  # max_length below
    sums = [f"Question: what is {a} plus {b}? Answer: {a} and {b} make {a + b}." for a in range(40) for b in range(40)]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(sums, vocab_size=512, show_progress=False, special_tokens=["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    tokenizer.pad_token = "<end>"
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape))
    arguments = trl.SFTConfig(
        output_dir=given.out,
        deepspeed=config,
        max_length=LENGTH,
        packing=True,
        packing_strategy="wrapped",  # full rows; rows of several documents apart are refused, a cut would drop them
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=10,
        report_to=[],
        bf16=torch.cuda.is_available(),  # TRL's default wants a GPU
    )
    text = datasets.Dataset.from_list([{"text": line} for line in sums])
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=text.select(range(100, len(text))),
        eval_dataset=text.select(range(100)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
