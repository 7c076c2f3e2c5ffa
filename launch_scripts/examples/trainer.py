"""Hugging Face's Trainer with the three methods, on text that every Python has.

    torchrun --nproc-per-node 1 launch_scripts/examples/trainer.py [--steps 60] [--out runs/trainer]

One line is ours: ``enable()``. With ``ds-plugin run`` in front of a script, none is.
"""

import argparse
import inspect
from pathlib import Path

import tokenizers
import transformers

import ds_plugin.huggingface

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--config", default=str(Path(__file__).with_name("methods.json")))
    given = parser.parse_args()

    ds_plugin.huggingface.enable()
    tokenizer, samples = data()
    arguments = transformers.TrainingArguments(
        output_dir=given.out,
        deepspeed=given.config,
        max_steps=given.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        save_total_limit=2,
        report_to=[],
    )
    # built from a config: CompleteP draws the weights; at four times the base's depth its learning rate still holds
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **shape)
    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=samples[32:],
        eval_dataset=samples[:32],
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
    )
    resume = transformers.trainer_utils.get_last_checkpoint(given.out) if Path(given.out).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()  # and the average, in averaged/
    averaged = transformers.AutoModelForCausalLM.from_pretrained(Path(given.out) / "averaged")
    print(f"averaged model of {averaged.num_parameters():,} parameters in {given.out}/averaged")


def data() -> tuple[transformers.PreTrainedTokenizerFast, list[dict[str, list[int]]]]:
    """A tokenizer, and samples of LENGTH tokens, made from the standard library's own text."""
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, tokenizers, transformers.trainer))
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=1024, show_progress=False, special_tokens=["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    ids = bpe.encode(text).ids
    cut = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    return tokenizer, [{"input_ids": sample, "labels": sample} for sample in cut]


if __name__ == "__main__":
    main()
