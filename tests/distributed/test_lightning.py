"""The methods under Lightning's DeepSpeedStrategy, which gives its engine batches by position."""

import pytest
import torch

from ds_plugin import huggingface
from ds_plugin.deepspeed_engine import attach
from tests.hugging_face import LENGTH, LENGTHS, MICRO, SECTIONS, build, collate, samples

STEPS = 6


def _fit(sections, collator):
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DeepSpeedStrategy, deepspeed

    class OnCpu(DeepSpeedStrategy):
        """Lightning refuses DeepSpeed on a CPU."""

        root_device = property(lambda self: torch.device("cpu", 0))

        def setup_environment(self):
            super(DeepSpeedStrategy, self).setup_environment()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = build(), []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    deepspeed._validate_device_index_selection = lambda devices: None
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        **sections,
    }
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ranks = torch.distributed.get_world_size()  # started as torchrun does
    given = {"cluster_environment": TorchElasticEnvironment()} if ranks > 1 else {}
    strategy = OnCpu(config=config, process_group_backend="gloo", **given)
    trainer = lightning.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, max_steps=STEPS, **quiet)
    module = Module()
    data = torch.utils.data.DataLoader(samples(2 * STEPS * MICRO * ranks), batch_size=MICRO, collate_fn=collator)
    trainer.fit(module, data)
    return module.losses, trainer.strategy.model


def _both():
    lengths = iter([*LENGTHS, *[LENGTH] * STEPS])

    def cut(batch):
        length = next(lengths)
        return {name: value[:, :length].contiguous() for name, value in collate(batch).items()}

    by_hand, _ = _fit({}, cut)
    huggingface.enable()
    warmup = {**SECTIONS["sequence_length_warmup"], "end_length": LENGTH}
    losses, engine = _fit({**SECTIONS, "sequence_length_warmup": warmup}, collate)
    plugin = attach.get_plugin(engine)
    return by_hand, losses, plugin.ledger, list(plugin.averager.steps)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_batches_cut_by_hand(workers, ranks):
    pytest.importorskip("lightning", reason="lightning is not installed")
    found = workers(ranks).run(_both)
    for by_hand, losses, ledger, snapshots in found:
        assert losses[1:] == by_hand and len(by_hand) == STEPS  # the first is of the full-length pass
        assert snapshots == [2, 4, 6] and ledger.trained < ledger.read
    assert ranks == 1 or found[0][0] != found[1][0]  # each reads its own
