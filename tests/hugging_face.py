"""Tiny models, data and Trainers of Hugging Face's, on gloo ranks."""

import itertools

import torch

VOCAB, LENGTH, WIDTH = 64, 32, 32
MICRO, ACCUMULATION, STEPS, SAMPLES = 2, 2, 9, 60
#: 15 micro-batches a rank in an epoch: its last step, the eighth, has one
MICRO_BATCHES = [ACCUMULATION] * 7 + [1] + [ACCUMULATION]
LENGTHS = [8, 16, 24, 32, 32, 32, 32, 32, 32]  # of the steps
SECTIONS = {
    "sequence_length_warmup": {
        "enabled": True,
        "start_length": 8,
        "end_length": "auto",
        "duration": {"steps": 4},
        "report_interval": 3,
    },
    "weight_averaging": {"enabled": True, "window": 3, "interval": 2},
}
MODELS = ("LlamaForCausalLM", "GPT2LMHeadModel")


def samples(count=SAMPLES, seed=0):
    """Token ids of lengths from 12 to 32."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(12, LENGTH + 1, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, VOCAB, (length,), generator=generator)} for length in lengths]


def collate(batch):
    """Padded to the longest of the batch."""
    longest = max(len(sample["input_ids"]) for sample in batch)
    shape = (len(batch), longest)
    ids, labels, mask = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100), torch.zeros(shape).long()
    for row, sample in enumerate(batch):
        count = len(sample["input_ids"])
        ids[row, :count] = labels[row, :count] = sample["input_ids"]
        mask[row, :count] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class CollateByHand:
    """The batches of a run, each cut to its step's length; counted as they are read, which is in order."""

    def __init__(self):
        self.lengths = itertools.chain.from_iterable([n] * m for n, m in zip(LENGTHS, MICRO_BATCHES, strict=True))

    def __call__(self, batch):
        length = next(self.lengths, LENGTH)  # one batch is read ahead
        return {name: value[:, :length].contiguous() for name, value in collate(batch).items()}


def build(kind="LlamaForCausalLM"):
    import transformers

    sizes = {
        "LlamaForCausalLM": {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": LENGTH,
        },
        "GPT2LMHeadModel": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH},
    }[kind]
    torch.manual_seed(3)
    kind = getattr(transformers, kind)
    return kind(kind.config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **sizes))


def config_of(stage, **more):
    auto = dict.fromkeys(("lr", "weight_decay", "betas", "eps"), "auto")
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {
        **dict.fromkeys(sizes, "auto"),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {**auto, "torch_adam": True}},
        **more,
    }


def trainer_of(folder, config, collator=collate, model=None, kind="LlamaForCausalLM", **arguments):
    """A Trainer as a script makes one."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    let_through()
    given = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **arguments,
    }
    args = TrainingArguments(output_dir=str(folder), deepspeed=config, **given)
    model = build(kind) if model is None else model
    return InOrder(
        model=model,
        args=args,
        train_dataset=samples(),
        eval_dataset=samples(8, 1),
        data_collator=collator,
    )


def let_through() -> None:
    """Accelerate knows of no backend for DeepSpeed on a CPU, and takes each rank for a run alone: give it gloo, and a
    state of its own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    AcceleratorState._reset_state(reset_partial_state=True)
