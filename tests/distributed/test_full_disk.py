"""The example script on a disk that is full for a while: training goes on, and nothing that was there is lost."""

import resource

from ds_plugin.core.errors import CheckpointError
from tests.distributed.test_pretrain import STEPS, config, folder, metrics, run_script, summary  # noqa: F401


def _run(place, first, last):
    """The script, while no file of this rank can grow beyond 100 bytes after the steps ``first`` to ``last``."""
    from launch_scripts.gpt.recorder import Recorder

    after_step, limit = Recorder.after_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self):
        after_step(self)
        size = 100 if first <= self.engine.global_steps <= last else limit[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))

    Recorder.after_step = full
    settings = config(training__eval_interval=20)
    try:
        run_script(place, f"from{first}", settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_training_goes_on_to_the_next_save(workers, folder):  # noqa: F811
    workers(2).run(_run, str(folder), 7, 11)
    run = folder / "runs" / "from7"
    assert metrics(folder, "from7")["step"] == list(range(1, STEPS + 1)) and summary(folder, "from7")["steps"] == STEPS
    assert (run / "checkpoints" / "latest").read_text() == "step00000020"
    assert not (run / "checkpoints" / "step00000010" / "run.json").exists()
    assert [path for path in run.rglob(".*") if path.name != ".lock"] == []


def test_the_last_save_is_one_error_on_every_rank(workers, folder):  # noqa: F811
    errors = workers(2).run(_run, str(folder), 12, 20, expect="errors", timeout=60)
    assert errors[0] == errors[1] and errors[0].type.endswith(CheckpointError.__name__), errors
    assert "step00000020' cannot be written" in errors[0].message and "--resume" in errors[0].message
    checkpoints = folder / "runs" / "from12" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step00000010"
    assert (checkpoints / "step00000010" / "run.json").exists()
