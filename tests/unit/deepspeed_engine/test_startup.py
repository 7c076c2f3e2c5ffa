"""Which of the frameworks' warnings are left out, and that all others are seen."""

import logging
import warnings

import pytest

from ds_plugin.deepspeed_engine import startup


def said(message, category, module):
    """Whether a warning that `module` gives is shown after `quiet`; every other filter is that of a new process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        startup.quiet()
        warnings.warn_explicit(message, category, f"{module}.py", 1, module=module)
    return bool(caught)


@pytest.fixture(autouse=True)
def log():
    """DeepSpeed's log as it was."""
    logger = logging.getLogger("DeepSpeed")
    before = list(logger.filters)
    yield logger
    logger.filters[:] = before


@pytest.mark.parametrize("message", startup.USUAL_WARNINGS)
def test_usual_warnings_are_left_out(message):
    assert not said(f"{message} and more", UserWarning, "megatron.core.optimizer")


@pytest.mark.parametrize("module", ["torch.nn.modules.lazy", "deepspeed.runtime.engine", "megatron.core.optimizer"])
@pytest.mark.parametrize("category", [UserWarning, FutureWarning])
def test_every_other_warning_is_seen(module, category):
    assert said("this loses your gradients", category, module)


def test_what_is_about_a_gpu_is_left_out_on_a_cpu_only(monkeypatch):
    for accelerator, shown in (("cpu", False), ("cuda", True)):
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
        assert said(startup.USUAL_ON_A_CPU[0], UserWarning, "megatron.core.tensor_parallel.layers") is shown


def test_deepspeeds_log_loses_one_message(log):
    startup.quiet()
    texts = ("Attempting to get learning rate from scheduler before it has started", "overflow in every step")
    records = [log.makeRecord("DeepSpeed", logging.WARNING, "f", 1, text, (), None) for text in texts]
    assert [bool(log.filter(record)) for record in records] == [False, True]
