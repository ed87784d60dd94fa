"""What is of C alone: the threads of a call, the library, addresses under torch.compile.

The numbers are in test_whole.py, test_units.py and test_step.py.
"""

from __future__ import annotations

import faulthandler
import itertools
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

import pytest
import torch

from hf_gradclip import Clipper, clip_grad_norm_
from hf_gradclip.kernels.operations import Language, WrittenError
from hf_gradclip.kernels.rule import Memory
from tests.kernels.failing import FUNCTIONS, READS, WRITES, Failing, call
from tests.kernels.languages import by, language, serving, using
from tests.kernels.tensors import CPU, randn
from tests.kernels.test_step import AFTER, BF16, F32, PLACES, PLAN, rule, segments


@pytest.fixture(params=["C"])
def c(request) -> Language:
    return language(request.param)


@pytest.fixture
def library(c):
    from hf_gradclip.kernels.c import library

    return library


@pytest.fixture
def threads(library, monkeypatch):
    """Set the number of threads; one program is worth one."""
    monkeypatch.setattr(library, "SHARE", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestSameBits:
    """Any number of threads."""

    def test_gradients_and_units(self, c, threads):
        grads = [randn(size, dtype) for dtype in (F32, BF16) for size in (200_000, 1_000_001, 5)]
        block = randn(900 * 1100).view(900, 1100)
        found = []
        for count in (1, 2, 5):
            threads(count)
            lengths = [(axis, block.shape[axis]) for axis in (0, 1)]
            sums = [c.units.unit_sums([block], [(axis,)], [n], torch.float64, CPU) for axis, n in lengths]
            found.append([*c.whole.statistics(grads, torch.float64, CPU, True), *sums])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))

    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_steps(self, c, dtype, threads, monkeypatch):
        monkeypatch.setattr(c.step, "CHUNK", 1000)
        found = []
        for count in (1, 2, 5):
            threads(count)
            columns = [segments(dtype, 1, seed, [7, 9001, 2500])[1] for seed in range(4)]
            memory = Memory(*columns, [None] * 3)
            found.append([*c.step.measure_update(rule(), memory, PLACES, PLAN)])
            c.step.step_(rule(), memory, PLACES, PLAN, AFTER)
            found[-1] += [*memory.weights, *memory.first, *memory.second]
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_threads_of_python_do_not_meet(c):
    """Two that clip tensors of the same sizes at the same time."""

    def clip(value: float, wrong: list[float]) -> None:
        grads = [torch.full((size,), value) for size in (3, 40, 500)]
        for _ in range(1000):
            sumsq_S, _ = c.whole.statistics(grads, torch.float64, CPU, True)
            wrong += [x for x in (sumsq_S / value**2).tolist() if x not in (3.0, 40.0, 500.0)]

    wrong: list[float] = []
    both = [threading.Thread(target=clip, args=(value, wrong)) for value in (1.0, 2.0)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert wrong == []


def test_where_no_thread_can_be_had_everything_is_done_once(c, threads, monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    threads(3)
    grad = torch.ones(1_000_000)
    c.whole.apply_([grad], torch.tensor(0.5), None)
    assert torch.equal(grad, torch.full_like(grad, 0.5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@by("C", "C in threads")
def test_a_child_has_threads_of_its_own(language):
    """Those of its parent are not there, and a call that waits for them would not end."""
    grad = torch.ones(300_000)  # torch's own threads do not survive a fork, so the child makes nothing large
    kernels = language.whole
    kernels.statistics([grad], torch.float64, CPU, True)
    child = os.fork()
    if child == 0:
        os._exit(0 if kernels.statistics([grad], torch.float64, CPU, True)[0].tolist() == [300_000.0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_child_that_is_forked_while_threads_clip_ends(c):
    """Whatever those threads held: forty children, each of which clips by unit and whole."""

    def clip() -> None:
        clip_grad_norm_([tensor_with_grad()], 1.0)
        Clipper.for_model(torch.nn.Linear(3, 2), "adaptive").step()

    def tensor_with_grad() -> torch.nn.Parameter:
        p = torch.nn.Parameter(torch.ones(next(sizes)))
        p.grad = torch.ones_like(p)
        return p

    def go_on() -> None:
        while not stop.is_set():
            clip()

    sizes, stop = itertools.count(2), threading.Event()
    with serving("C"):
        clip()
        threads = [threading.Thread(target=go_on) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            ended = [ends_in_time(clip) for _ in range(40)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert ended == [True] * 40


def ends_in_time(work: Callable[[], None], seconds: float = 20) -> bool:
    """Whether a forked child comes to the end of its work."""
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(seconds, exit=True)  # says where it hangs
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever it is, no second pytest goes on
    deadline = time.monotonic() + 2 * seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_uses_the_addresses_of_its_own_gradients(backend):
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.ones(5000))
    step = torch.compile(lambda: clip_grad_norm_([p], 1.0), backend=backend)
    kept = []
    with serving("C"):
        for factor in (1.0, 3.0, 0.001):
            kept.append(p.grad)
            p.grad = torch.full((5000,), factor)
            norm = factor * math.sqrt(5000)
            assert step().item() == pytest.approx(norm, rel=1e-6)
            assert p.grad.norm().item() == pytest.approx(min(norm, 1.0), rel=1e-5)


class TestAThreadThatFails:
    """Its error rises in the caller; what was written says so, lest anybody write again."""

    @pytest.mark.parametrize("name", READS)
    def test_where_nothing_is_written(self, c, library, threads, name, monkeypatch):
        threads(3)
        failing = Failing(monkeypatch, library, FUNCTIONS[name], ValueError("of the thread"))
        with pytest.raises(ValueError, match=r"^of the thread$"):
            call(name, c)
        assert len(set(failing.threads)) == 2
        assert threading.current_thread().name not in failing.threads

    @pytest.mark.parametrize("name", WRITES)
    def test_where_something_may_be_written(self, c, library, threads, name, monkeypatch):
        threads(3)
        failing = Failing(monkeypatch, library, FUNCTIONS[name], ValueError("of the thread"))
        says = f"{FUNCTIONS[name]} failed, and a part of the memory may be written: of the thread"
        with pytest.raises(WrittenError, match=says):
            call(name, c)
        assert len(set(failing.threads)) == 2

    @pytest.mark.parametrize("name", [*READS, *WRITES])
    def test_an_interrupt_is_an_interrupt(self, c, library, threads, name, monkeypatch):
        threads(3)
        Failing(monkeypatch, library, FUNCTIONS[name], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            call(name, c)

    def test_without_threads_too(self, c, library, monkeypatch):
        monkeypatch.setattr(library, "library", lambda: None)
        for names, error in ((READS, AttributeError), (WRITES, WrittenError)):
            for name in names:
                with pytest.raises(error):
                    call(name, c, 3000)


def test_memory_of_another_device_is_refused(c, library):
    """The addresses of a table on a GPU are not of this process; `meta` stands for one."""
    table = library.Table(*[torch.zeros(1, device="meta")] * 6, kinds=(), known=[])
    with pytest.raises(ValueError, match="meta: the kernels in C take memory of a CPU"):
        library.arguments(table)


def test_using_threads_uses_them():
    """What the tests of every language rely on: three threads are in a call at once, each waits for the others."""
    with using("C in threads") as found:
        from hf_gradclip.kernels.c import library

        met, call, seen = threading.Barrier(3, timeout=30), library.call, []

        def meet(*given: object) -> None:
            seen.append(met.wait())
            call(*given)

        grad = torch.ones(300_000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "call", meet)
            found.whole.apply_([grad], torch.tensor(0.5), None)
    assert sorted(seen) == [0, 1, 2]
    assert torch.equal(grad, torch.full_like(grad, 0.5))
