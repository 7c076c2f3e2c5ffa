"""Models of transformers as users bring them: built from a config, warmed up, against batches cut by hand."""

import copy

import deepspeed
import pytest
import torch

import ds_plugin
from tests.distributed import plain

VOCAB, LENGTH, WIDTH, HEADS = 40, 24, 16, 2
LENGTHS = [8, 16, 24]  # of the steps
TARGETS = 12  # tokens of an encoder-decoder's targets, shorter than its sources

_HEADS = {"num_hidden_layers": 1, "num_attention_heads": HEADS, "hidden_size": WIDTH}
_BERT = {**_HEADS, "intermediate_size": WIDTH}
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_BART = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", HEADS), ("ffn_dim", WIDTH))
}
#: class of the model -> sizes of its config
FAMILIES = {
    "BertForMaskedLM": _BERT,
    "RobertaForMaskedLM": _BERT,
    "ElectraForMaskedLM": {**_BERT, "embedding_size": WIDTH},
    "DistilBertForMaskedLM": {"dim": WIDTH, "hidden_dim": WIDTH, "n_layers": 1, "n_heads": HEADS},
    "AlbertForMaskedLM": {**_BERT, "embedding_size": WIDTH},
    "DebertaV2ForMaskedLM": _BERT,
    "ModernBertForMaskedLM": {**_BERT, "local_attention": 8},
    "T5ForConditionalGeneration": {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 1, "num_heads": HEADS},
    "BartForConditionalGeneration": {"d_model": WIDTH, **_BART},
    "XLNetLMHeadModel": {"d_model": WIDTH, "n_layer": 1, "n_head": HEADS, "d_inner": WIDTH},
    "GPT2LMHeadModel": {"n_embd": WIDTH, "n_layer": 1, "n_head": HEADS},
    "GPTNeoXForCausalLM": _BERT,
    "OPTForCausalLM": {**_HEADS, "ffn_dim": WIDTH, "word_embed_proj_dim": WIDTH},
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MambaForCausalLM": {"hidden_size": WIDTH, "num_hidden_layers": 1, "state_size": 4, "use_mambapy": False},
}
WITHOUT_MASK = {"MambaForCausalLM"}
UNLIMITED = {"XLNetLMHeadModel", "T5ForConditionalGeneration", "MambaForCausalLM"}  # in their positions
PAIRS = {"T5ForConditionalGeneration", "BartForConditionalGeneration"}


def build(family):
    import transformers

    kind = getattr(transformers, family)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}
    limit = {} if family in UNLIMITED else {"max_position_embeddings": LENGTH + 2}  # RoBERTa's begin at 2
    config = kind.config_class(vocab_size=VOCAB, decoder_start_token_id=0, **limit, **tokens, **FAMILIES[family])
    torch.manual_seed(3)
    return kind(config)


def micro_batch(family, step):
    """Two samples, the second one padded, of ``LENGTH`` tokens; targets of ``TARGETS``."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, VOCAB, (plain.MICRO, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    if family in PAIRS:
        labels = torch.randint(3, VOCAB, (plain.MICRO, TARGETS), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    if family in WITHOUT_MASK:
        del batch["attention_mask"]
    return batch


def _trained(family):
    """Losses of three steps under the warmup, and of plain DeepSpeed on batches that are cut by hand."""
    warmup = {"enabled": True, "start_length": LENGTHS[0], "end_length": LENGTH, "duration": {"steps": len(LENGTHS)}}
    config = plain.deepspeed_config(1)
    model = build(family)
    twin = copy.deepcopy(model)
    engine = ds_plugin.initialize(model=model, config={**config, "sequence_length_warmup": warmup})[0]
    by_hand = deepspeed.initialize(model=twin, config=config)[0]
    found = []
    for one in (engine, by_hand):
        one.train()
        torch.manual_seed(11)  # dropout
        losses = []
        for step, length in enumerate(LENGTHS):
            batch = micro_batch(family, step)
            if one is by_hand:
                batch = {name: value[:, :length].contiguous() for name, value in batch.items()}
            loss = one(**batch).loss
            one.backward(loss)
            one.step()
            losses.append(loss.item())
        found.append(losses)
    return (*found, ds_plugin.get_plugin(engine).ledger)


def _families(families):
    found = {}
    for family in families:
        try:
            found[family] = _trained(family)
        except Exception as error:  # of one family; the others have a test each
            found[family] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def trained(workers):
    """All families in one world: what costs time is the import of transformers."""
    return workers(1).run(_families, list(FAMILIES))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_batches_cut_by_hand(trained, family):
    assert not isinstance(trained[family], str), trained[family]
    losses, by_hand, ledger = trained[family]
    assert losses == by_hand and len(set(losses)) == 3
    assert (ledger.read, ledger.trained) == (3 * LENGTH * plain.MICRO, sum(LENGTHS) * plain.MICRO)
