"""What is read of DeepSpeed's engines that no small run on a CPU can be made to have."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils import groups

from ds_plugin.core.errors import StateError
from ds_plugin.deepspeed_engine import compat

MEGATRON = SimpleNamespace(get_tensor_model_parallel_rank=lambda: 2, get_pipeline_model_parallel_rank=lambda: 1)
OLDER = SimpleNamespace(get_slice_parallel_rank=lambda: 3, get_pipe_parallel_rank=lambda: 4)
TENSOR_ONLY = SimpleNamespace(get_model_parallel_rank=lambda: 5)


@pytest.mark.parametrize(
    ("mpu", "coordinate"), [(None, (0, 0)), (MEGATRON, (2, 1)), (OLDER, (3, 4)), (TENSOR_ONLY, (5, 0))]
)
def test_where_a_rank_stands_in_the_model(monkeypatch, mpu, coordinate):
    assert compat.model_coordinate(SimpleNamespace(mpu=mpu, has_moe_layers=False)) == coordinate
    monkeypatch.setattr(groups, "_get_max_expert_size_name", lambda: "ep_size_8")
    monkeypatch.setattr(groups, "_get_expert_parallel_rank", {"ep_size_8": 6}.__getitem__)
    assert compat.model_coordinate(SimpleNamespace(mpu=mpu, has_moe_layers=True)) == (*coordinate, 6)
    monkeypatch.delattr(groups, "_get_expert_parallel_rank")
    with pytest.raises(StateError, match="_get_expert_parallel_rank"):
        compat.model_coordinate(SimpleNamespace(mpu=mpu, has_moe_layers=True))


def test_what_an_optimizer_will_keep_is_known_of_those_that_keep_whole_moments():
    """Per master weight, against what torch's own keep once they have stepped; others are not guessed at."""
    Adam8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    weight = torch.nn.Parameter(torch.ones(7))
    for optimizer in (
        torch.optim.AdamW([weight], 0.1),
        torch.optim.Adam([weight], 0.1, amsgrad=True),
        torch.optim.SGD([weight], 0.1),
        torch.optim.SGD([weight], 0.1, momentum=0.9),
    ):
        weight.grad = torch.ones(7)
        kept = compat.kept_by(optimizer)
        optimizer.step()
        assert kept == sum(torch.is_tensor(v) and v.numel() == 7 for v in optimizer.state[weight].values())
    assert compat.kept_by(Adam8bit([weight], 0.1)) is None and compat.kept_by(torch.optim.Adagrad([weight])) is None


@pytest.mark.parametrize(("given", "expected"), [(100, 100), (1e5, 100_000), (0, None), ("auto", None), (None, None)])
def test_the_run_s_steps_are_whole_however_json_has_them(given, expected):
    engine = SimpleNamespace(scheduler_params=lambda: {"total_num_steps": given})
    assert compat.run_steps(engine) == expected
