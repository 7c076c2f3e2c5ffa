"""A training script for this folder's loop, built as ``pretrain_gpt.py`` is: it knows nothing of the methods."""

import argparse
import itertools
import json

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.training import training
from megatron.training.training import get_args, pretrain

VOCABULARY = 32


def model_provider(pre_process=True, post_process=True):
    args = get_args()
    training.RECORD["models built"].append(args.seq_length)
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        attention_dropout=args.dropout, hidden_dropout=args.dropout,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size, pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )  # fmt: skip
    return GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(), vocab_size=VOCABULARY,
        max_sequence_length=args.seq_length, pre_process=pre_process, post_process=post_process,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def micro_batches(first, size, seed):
    """This data-parallel rank's, of full length, from the n-th sample on; a sample's number is its first token."""
    args = get_args()
    rank, ranks = parallel_state.get_data_parallel_rank(), args.data_parallel_size
    for start in itertools.count(first + rank * size, ranks * size):
        rows = []
        for number in range(start, start + size):
            drawn = torch.Generator().manual_seed(1000 * seed + number)
            rows.append(torch.randint(0, VOCABULARY // 4, (args.full_length + 1,), generator=drawn))
            rows[-1][0] = number % VOCABULARY
        tokens = torch.stack(rows)
        hidden = torch.ones(args.full_length, args.full_length, dtype=torch.bool).triu(1)
        batch = {
            "dataset_id": torch.zeros(size, dtype=torch.int64),
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(size, args.full_length),
            "attention_mask": hidden.expand(size, 1, -1, -1),
            "position_ids": torch.arange(args.full_length).expand(size, -1),
            **{name: torch.zeros(1, 9, dtype=torch.int32) for name in args.unknown_entries},
        }
        yield {name: value.contiguous() for name, value in batch.items()}  # as a loader's collating makes them


def data_provider():
    args = get_args()
    yield micro_batches(args.consumed_train_samples, args.micro_batch_size, seed=1)
    yield micro_batches(args.consumed_valid_samples, args.micro_batch_size, seed=2)
    yield micro_batches(0, args.micro_batch_size, seed=3)


def get_batch(data_iterator):
    """The first rank of a tensor-parallel group reads, the others receive into buffers of ``seq_length``."""
    args = get_args()
    size, length = args.micro_batch_size, args.seq_length
    shapes = {
        "tokens": ((size, length), torch.int64),
        "labels": ((size, length), torch.int64),
        "loss_mask": ((size, length), torch.float32),
        "attention_mask": ((size, 1, length, length), torch.bool),
        "position_ids": ((size, length), torch.int64),
    }
    batch = None if data_iterator is None else next(data_iterator)
    found = []
    for name, (shape, dtype) in shapes.items():
        value = torch.empty(shape, dtype=dtype) if batch is None else batch[name]
        torch.distributed.broadcast(
            value,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        found.append(value)
    return found


def loss_func(loss_mask, output):
    mask = loss_mask.view(-1)
    total, count = torch.sum(output.view(-1) * mask), mask.sum()
    return total, count.to(torch.int), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(data_iterator, model):
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    training.RECORD["train" if model.training else "eval"].append((tuple(tokens.shape), tokens[:, 0].tolist()))
    if model.training:
        training.RECORD["trained"].append((training.get_args().curr_iteration, tokens.tolist(), position_ids.tolist()))
    output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, lambda value: loss_func(loss_mask, value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", type=json.loads)
    pretrain(argparse.Namespace(**parser.parse_args().options), data_provider, model_provider, None, forward_step)
