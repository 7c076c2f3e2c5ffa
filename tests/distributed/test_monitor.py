"""`Plugin.log` in a user's own script: the methods' state and the script's values in the engine's own monitor."""

import ds_plugin
from tests.distributed import plain

REPORTED = {**plain.WARMUP, "report_interval": 2}


def _logged(folder):
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    engine = plain.make(plain.deepspeed_config(1, sequence_length_warmup=REPORTED, **monitor))
    plugin = ds_plugin.get_plugin(engine)
    plugin.log(eval_loss=plain.evaluate(engine))  # before the first step there is nothing else to say

    def after_step(engine):
        plugin.log(eval_loss_averaged=2.5 if engine.global_steps == 4 else None)

    plain.train(engine, 4, after_step)
    return plugin.warmup.report.loss_ratio, plugin.ledger.trained


def _silent():
    engine = plain.make(plain.deepspeed_config(1, sequence_length_warmup=REPORTED))
    ds_plugin.get_plugin(engine).log(loss=float("nan"))


def test_a_scripts_own_log(workers, tmp_path):
    ratio, trained = workers(2).run(_logged, str(tmp_path))[0]
    found = {
        path.stem: [tuple(map(float, line.split(","))) for line in path.read_text().splitlines()[1:]]
        for path in (tmp_path / "job").glob("Run_*.csv")
    }
    # 2 ranks x 2 samples a step; lengths 4, 4, 8, 8 of 16
    assert found["Run_length"] == [(4, 4), (8, 4), (12, 8), (16, 8)]
    assert found["Run_tokens_trained"] == [(0, 0), (4, 16), (8, 32), (12, 64), (16, 96)] and trained == 96
    assert found["Run_tokens_read"][-1] == (16, 256)
    assert [step for step, _ in found["Run_loss_ratio"]] == [8, 16]  # reports come every two steps
    assert found["Run_loss_ratio"][-1] == (16, ratio)
    assert found["Run_eval_loss_averaged"] == [(16, 2.5)] and len(found["Run_eval_loss"]) == 1
    own = (tmp_path / "job" / "Train_Samples_lr.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in own] == [4, 8, 12, 16]


def test_without_a_monitor_nothing_happens(workers):
    workers(1).run(_silent)
