"""The protocol between streams, on a stand-in for a GPU that runs everything as late as it may."""

import collections
import functools
import inspect
import threading
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_plugin.core.errors import StateError
from ds_plugin.weight_averaging import averager as averager_module
from ds_plugin.weight_averaging.averager import WeightAverager
from ds_plugin.weight_averaging.config import WeightAveragingConfig
from ds_plugin.weight_averaging.snapshots.stager import SnapshotStager, Streams, copies_from, has_streams

CPU = torch.device("cpu")


class Device:
    """What `SnapshotStager` uses of an accelerator. A stream is a queue of work, run only when `Stream.run` is called
    or somebody asks whether an event has come, which it has not before `let_go`. ``log`` has what was asked of the
    device, in order, and ``strays`` what was by threads that had no device then: on a GPU they would be on the first.
    """

    def __init__(self):
        self.log, self.strays, self.lock, self.let_go = [], [], threading.RLock(), threading.Event()
        self._of_thread = threading.local()
        self.set_device_index(CPU)  # the training's thread, as the framework starts it
        self.training = Stream(self, "training")

    def asked(self, what):
        if getattr(self._of_thread, "device", None) is None:
            self.strays.append((threading.current_thread().name, what))

    def set_device_index(self, device):
        assert device == CPU
        self._of_thread.device = device

    def Stream(self, device):
        assert device == CPU
        self.asked("Stream")
        return Stream(self, "side")

    def Event(self, device):
        assert device == CPU
        self.asked("Event")
        return Event(self)

    def current_stream(self, device):
        assert device == CPU
        self.asked("current_stream")
        return getattr(self._of_thread, "stream", self.training)

    def make_current(self, stream):
        self.asked("enter")
        self._of_thread.stream = stream


class Stream:
    def __init__(self, device, name):
        self.device, self.name, self.queue = device, name, collections.deque()

    def __enter__(self):
        self.device.make_current(self)
        self.late = Late(self)
        self.late.__enter__()

    def __exit__(self, *exc_info):
        self.late.__exit__(*exc_info)
        self.device.make_current(self.device.training)

    def do(self, what, work):
        self.device.asked(what)
        with self.device.lock:
            self.device.log.append(f"{self.name}: {what}")
            self.queue.append(work)

    def wait_event(self, event):
        recorded = event.recorded
        self.do("wait", lambda: recorded is None or recorded.reach())

    def run(self, until=lambda: False):
        with self.device.lock:
            while self.queue and not until():
                self.queue.popleft()()


class Recorded:
    """A point of a stream."""

    def __init__(self, stream):
        self.stream, self.done = stream, False
        stream.do("record", lambda: setattr(self, "done", True))

    def reach(self):
        self.stream.run(until=lambda: self.done)


class Event:
    recorded = None

    def __init__(self, device):
        self.device = device

    def record(self, stream):
        self.recorded = Recorded(stream)

    def query(self):
        self.device.asked("query")
        if self.device.let_go.is_set():
            self.recorded.reach()
        return self.recorded.done


class Late(TorchFunctionMode):
    """SnapshotStager become work of the stream, which holds no tensor alive."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ != "copy_":
            return func(*args, **(kwargs or {}))
        assert kwargs == {"non_blocking": True}
        self.stream.do("copy", functools.partial(copy, *map(weakref.ref, args)))
        return args[0]


def copy(target, source):
    assert target() is not None and source() is not None, "freed while it was copied"
    target().copy_(source())


@pytest.fixture
def device():
    device = Device()
    yield device
    device.let_go.set()  # or the worker's thread would hold up the end of the process
    assert device.strays == []


def test_the_order_of_the_protocol(device):
    copies = SnapshotStager(CPU, device)
    copies.begin([torch.empty(2), torch.empty(0)], [torch.ones(2), torch.ones(0)], lambda: None)
    copies.wait_before_step()
    copies.wait_before_step()  # the next steps have nothing to wait for
    copied = ["training: record", "side: wait", "side: copy", "side: copy", "side: record"]
    assert device.log == [*copied, "training: wait"]


@pytest.mark.parametrize("ahead", ["device", "worker"])
def test_what_arrives_is_of_its_step(device, ahead):
    """Step 1 writes 1, step 2 writes 2. Either the training stream is as far ahead as it may, or the copy is."""
    copies, master, arrived = SnapshotStager(CPU, device), torch.zeros(4), torch.full((4,), -1.0)
    device.training.do("step 1", lambda: master.fill_(1))
    ended = threading.Event()
    copies.begin([arrived], [master], ended.set)
    if ahead == "worker":
        device.let_go.set()
        assert ended.wait(60)
    copies.wait_before_step()
    device.training.do("step 2", lambda: master.fill_(2))
    device.training.run()
    device.let_go.set()
    copies.drain()
    assert master.tolist() == [2] * 4 and arrived.tolist() == [1] * 4


def settled(averager):
    """Wait for the snapshot under way, as whoever reads does."""
    return averager.steps


def test_the_training_thread_waits_for_nothing(device):
    """Nothing has run on the device, and nobody has let go, when the training thread gets on."""
    copies, master, arrived, threads = SnapshotStager(CPU, device), torch.ones(1), torch.zeros(1), []
    copies.begin([arrived], [master], lambda: threads.append(threading.current_thread()))
    copies.wait_before_step()
    assert arrived.item() == 0 and threads == []
    device.let_go.set()
    copies.drain()
    assert arrived.item() == 1 and threads[0] is not threading.current_thread()


def test_sources_live_until_they_are_copied(device):
    """An engine that moves its masters elsewhere frees what is being read."""
    copies, arrived = SnapshotStager(CPU, device), torch.zeros(3)
    copies.begin([arrived], [torch.ones(3)], lambda: None)
    device.let_go.set()
    copies.drain()
    assert arrived.tolist() == [1] * 3


@pytest.mark.parametrize("call", ["drain", "wait_before_step", "begin"])
def test_what_fails_in_the_worker_is_raised_by_the_next_call(device, call):
    copies = SnapshotStager(CPU, device)
    kept = [torch.zeros(1)], [torch.ones(1)]  # as masters and memory are, whatever becomes of the job
    copies.begin(*kept, lambda: 1 / 0)
    copies.wait_before_step()  # of a step that began before it had ended
    device.let_go.set()
    arguments = ([], [], lambda: None) if call == "begin" else ()
    with pytest.raises(ZeroDivisionError):
        for _ in range(1000):  # only a step does not wait for the worker
            getattr(copies, call)(*arguments)
            threading.Event().wait(0.001)
    copies.drain()  # told once


def test_the_worker_says_which_device_is_its_own(device):
    """The stand-in, too, knows a thread that has not: its first question is one of no device."""
    copies, asked, target = SnapshotStager(CPU, device), [], [torch.zeros(1)]
    device.let_go.set()
    copies.begin(target, [torch.ones(1)], lambda: asked.append(device.current_stream(CPU)))
    copies.drain()
    assert asked == [device.training] and device.strays == []
    stray = threading.Thread(target=device.current_stream, args=[CPU], name="stray")
    stray.start()
    stray.join()
    assert device.strays.pop() == ("stray", "current_stream")


def test_the_stand_in_is_asked_as_torch_is():
    """What is called here by these names and arguments is there, of any accelerator's."""
    stream, event = Streams.Stream(device=CPU), Streams.Event(device=CPU)
    with stream:
        assert event.query()
    stream.wait_event(event)
    with pytest.raises(RuntimeError, match="cpu backend doesn't support events"):
        event.record(stream)
    for function in (Streams.current_stream, Streams.set_device_index):
        inspect.signature(function).bind(CPU)
    assert {name for name in vars(Streams) if not name.startswith("__")} <= set(dir(Device))


def test_masters_in_cpu_memory_need_none_of_it(caplog):
    assert copies_from([torch.zeros(2)]) is None and copies_from([]) is None and caplog.text == ""


@pytest.mark.parametrize("accelerator", [None, "xpu", "mps"])
def test_an_accelerator_without_streams_has_blocking_copies(monkeypatch, caplog, accelerator):
    """torch knows none, knows another, or has no streams for it (as without a driver): said once."""
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    has_streams.cache_clear()
    engine = Engine()
    engine.masters = [Elsewhere(master) for master in engine.masters]
    with caplog.at_level("WARNING", "ds_plugin"):
        averager = make(engine)
        make(engine)
    has_streams.cache_clear()
    assert len(caplog.records) == 1 and "no streams on xpu" in caplog.text and "training waits" in caplog.text
    averager.before_step()
    averager.snapshot(2, finite=torch.tensor(1.5))
    averager.snapshot(4, finite=torch.tensor(torch.nan))
    assert averager.steps == [2] and all(not t.is_pinned() for t in averager.read())
    assert equal(averager.read(), Engine().masters)


# -- the averager on it ----------------------------------------------------------------------------------------------


class Engine:
    """Three shards, one of them empty. A step is work for the training stream, or done at once."""

    layout = "sharded"

    def __init__(self, stream=None):
        self.stream, self.steps = stream, 0
        self.masters = [torch.arange(7.0), torch.empty(0), torch.linspace(-1, 1, 15).view(3, 5)]

    def tensors(self):
        return [m.data for m in self.masters]

    def refresh(self):
        pass

    def step(self):
        self.steps += 1
        work = functools.partial(self.move, self.steps)
        work() if self.stream is None else self.stream.do("step", work)

    def move(self, step):
        for master in self.masters:
            master.mul_(0.9).add_(torch.tensor(float(step)).sin())


class Elsewhere(torch.Tensor):
    """A tensor that says it is on an accelerator, which this torch cannot reach."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_subclass(cls, tensor)

    device = torch.device("xpu", 0)


def make(engine, **changes):
    size = {} if changes.get("mode") == "ema" else {"window": 3}
    section = {"enabled": True, "interval": 2, **size, **changes}
    return WeightAverager(WeightAveragingConfig.model_validate(section), engine)


@pytest.fixture
def on_device(device, monkeypatch):
    """An engine on the stand-in, and how to make averagers of it."""
    engine = Engine(device.training)

    def build(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(averager_module.stager, "copies_from", lambda tensors: SnapshotStager(CPU, device))
            return make(engine, **changes)

    return engine, build


def read(averager, engine, horizon=None):
    with averager.averaged_weights(horizon):
        return [m.clone() for m in engine.masters]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("ahead", ["device", "worker"])
@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"mode": "block"}, {"mode": "ema", "horizons": [2, 4]}, {"deltas": "bf16"}),
        *({"storage": "files"}, {"storage": "files", "deltas": "bf16"}),
    ],
    ids=str,
)
def test_averages_equal_those_of_synchronous_snapshots(device, on_device, tmp_path, changes, ahead):
    """Step 6 is not finite by a verdict that is still on the device; 8 is known not to be."""
    changes = {**changes, **({"storage_path": str(tmp_path)} if "storage" in changes else {})}
    twin = Engine()
    expected = make(twin, **changes)
    engine, build = on_device
    averager, spares = build(**changes), []
    for step in range(1, 15):
        averager.before_step()
        expected.before_step()
        engine.step()
        twin.step()
        if ahead == "device":  # before the copy of the last snapshot, unless the fence is there
            device.training.run()
        device.let_go.set()
        if averager.due(step):
            settled(averager)
            device.let_go.clear()
            verdict = torch.tensor(True)
            device.training.do("verdict", functools.partial(verdict.fill_, step != 6))
            averager.snapshot(step, finite=False if step == 8 else verdict)
            expected.snapshot(step, finite=step not in (6, 8))
            if ahead == "worker":
                device.let_go.set()
        if step in (7, 14):
            device.let_go.set()
            device.training.run()
            assert averager.steps == expected.steps and 6 not in averager.steps
            for horizon in changes.get("horizons", [None]):
                assert equal(read(averager, engine, horizon), read(expected, twin, horizon))
            spares.append(averager.read())
    assert averager.steps == expected.steps and equal(engine.masters, twin.masters)
    keeps = averager.config.mode == "sliding" and averager.config.storage == "pinned"
    assert (spares[0] is spares[1]) != keeps  # a file is never what a GPU copies to


@pytest.mark.parametrize("changes", [{}, {"mode": "block"}, {"deltas": "bf16"}], ids=str)
def test_a_snapshot_that_comes_too_soon_waits_for_the_one_before(device, on_device, changes):
    engine, build = on_device
    averager = build(**changes)
    averager.snapshot(2, finite=True)
    averager.before_step()
    engine.stream.do("step", lambda: [m.add_(1) for m in engine.masters])  # exact in bf16, too
    threading.Timer(0.05, device.let_go.set).start()
    averager.snapshot(4, finite=True)
    assert averager.steps == [2, 4]
    twin = Engine().masters
    assert equal(read(averager, engine), [(m + (m + 1)) / 2 for m in twin])


def test_masters_that_are_looked_at_when_they_have_arrived(device, on_device):
    """An engine without a norm. The window stays whole when a snapshot is left out."""
    engine, build = on_device
    averager = build()
    device.let_go.set()
    for step in (2, 4, 6):
        averager.snapshot(step)
        averager.before_step()
    assert averager.steps == [2, 4, 6]
    engine.masters[0][3] = torch.inf
    averager.snapshot(8)
    assert averager.steps == [2, 4, 6]
    assert all(torch.isfinite(t).all() for snapshot in averager.snapshots() for t in snapshot)


def test_an_engine_that_does_not_say_before_step_is_refused(device, on_device):
    _, build = on_device
    averager = build()
    device.let_go.set()
    averager.snapshot(2)
    with pytest.raises(StateError, match="before_step.. was not called"):
        averager.snapshot(4)
    averager.before_step()
    averager.snapshot(6)
    assert averager.steps == [2, 6]


READS = {
    "steps": lambda a, h: a.steps,
    "mode": lambda a, h: a.mode.state()["steps"],
    "save": lambda a, h: [2] if a.mode.tensors() else [],
    "snapshots": lambda a, h: [2] * len(a.snapshots()),
    "averaged_weights": lambda a, h: read(a, h) and a.steps,
    "restart": lambda a, h: a.restart() or [2],
    "reset": lambda a, h: a.reset() or [2],
}


@pytest.mark.parametrize("name", READS)
def test_whoever_reads_waits_for_what_is_under_way(device, on_device, name):
    engine, build = on_device
    averager = build()
    averager.snapshot(2, finite=True)
    threading.Timer(0.05, device.let_go.set).start()
    assert READS[name](averager, engine) == [2]
    settled(averager)
    assert averager.steps == ([] if name in ("restart", "reset") else [2])  # nothing comes after a reset


def test_a_snapshot_does_not_keep_the_training_thread(device, on_device, monkeypatch):
    """Neither the copy nor the verdict: nothing has run on the device when the next step is under way."""
    engine, build = on_device
    averager, folded = build(mode="block"), []
    monkeypatch.setattr(averager.mode, "add", lambda step, _: folded.append(step))
    engine.step()
    averager.snapshot(2, finite=torch.tensor(True))
    averager.before_step()
    engine.step()
    assert engine.steps == 2 and folded == [] and engine.masters[0].tolist() == list(range(7))
    device.let_go.set()
    assert averager.mode and folded == [2]


class Watch(TorchDispatchMode):
    """Which operations have allocated a tensor, and which were given one of ``on_device``."""

    def __init__(self, on_device):
        super().__init__()
        self.on_device = self.places(on_device)
        self.count, self.allocating, self.reading = 0, [], []

    @staticmethod
    def places(tree):
        found = {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if torch.is_tensor(t)}
        return found - {0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given, found = self.places([args, kwargs]), func(*args, **(kwargs or {}))
        self.count += 1
        self.allocating += [func] if self.places(found) - given else []
        self.reading += [func] if given & self.on_device else []
        return found


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("verdict", [torch.tensor(True), torch.tensor(1.5), torch.tensor(0.0, dtype=torch.float64)])
def test_a_snapshot_allocates_nothing_on_the_device(device, monkeypatch, mode, verdict):
    """On the training's thread nothing at all; on the worker's nothing is made of what is on the device."""
    engine = Engine(device.training)
    training, worker = Watch([engine.masters, verdict]), Watch([engine.masters, verdict])

    class Watched(SnapshotStager):
        def begin(self, dst, src, then):
            super().begin(dst, src, lambda: watched(then))

    def watched(then):
        with worker:
            then()

    monkeypatch.setattr(averager_module.stager, "copies_from", lambda tensors: Watched(CPU, device))
    averager = make(engine, mode=mode)
    device.let_go.set()
    for step in range(2, 12, 2):
        with training:
            averager.snapshot(step, finite=verdict)
            averager.before_step()
    settled(averager)
    assert training.count and worker.count and averager.steps
    assert training.allocating == [] and worker.reading == []
    with training:
        assert torch.isfinite(verdict) and training.allocating  # it would show


@pytest.mark.parametrize(
    ("number", "fit"), [(0.0, True), (3.5, True), (-1.0, False), (torch.inf, False), (torch.nan, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_is_read_when_the_masters_have_arrived(device, on_device, number, fit, dtype):
    _, build = on_device
    averager, norm = build(), torch.tensor(7.0, dtype=dtype)
    device.training.do("norm", lambda: norm.fill_(number))
    averager.snapshot(2, finite=norm)
    device.let_go.set()
    assert averager.steps == ([2] if fit else [])


def test_a_failure_of_the_arithmetic_reaches_the_training_thread(device, on_device, monkeypatch):
    engine, build = on_device
    averager = build()
    monkeypatch.setattr(averager.mode, "take", lambda *a: 1 / 0)
    device.let_go.set()
    averager.snapshot(2, finite=True)
    with pytest.raises(ZeroDivisionError):
        for _ in range(1000):
            averager.before_step()
            threading.Event().wait(0.001)
