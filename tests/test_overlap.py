"""Two kinds of work at once, with stand-ins that sleep; a real GPU is not needed for the order of things."""

import threading
import time

import pytest
import torch
from torch import Tensor

from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.overlap import DEPTH, Beside
from dxmi.evaluation.sampling import Sampling, generate, measure

CPU = torch.device("cpu")
TICK = 0.03


def item(number: int) -> Tensor:
    return torch.tensor([number])


def test_an_item_is_made_while_the_one_before_is_worked_on():
    """Work on each item ends only when the next one has been made: in turn, this would never end."""
    made = [threading.Event() for _ in range(9)]

    def work(x: Tensor) -> int:
        assert made[int(x) + 1].wait(60.0)
        return int(x) * 10

    with Beside(work, CPU, threaded=True) as beside:
        for number in range(8):
            made[number].set()
            beside.put(item(number))
        made[8].set()
        assert beside.results() == [number * 10 for number in range(8)]


def test_it_takes_the_time_of_the_slower_when_both_only_wait():
    """16 sleeps in turn, 9 of them one after the other when overlapped; sleeping longer than asked falls on both."""

    def slow(x: Tensor) -> None:
        time.sleep(TICK)

    def spent(threaded: bool) -> float:
        began = time.perf_counter()
        with Beside(slow, CPU, threaded=threaded) as beside:
            for number in range(8):
                slow(item(number))
                beside.put(item(number))
        return time.perf_counter() - began

    assert min(spent(threaded=True) for _ in range(3)) < max(spent(threaded=False) for _ in range(3))


def test_on_a_cpu_there_is_no_second_thread():
    seen = []
    with Beside(lambda x: seen.append(threading.current_thread()), CPU) as beside:
        beside.put(item(0))
        assert seen == [threading.current_thread()]
        assert beside.results() == [None]


def test_only_so_many_items_wait():
    release, started = threading.Event(), []

    def work(x: Tensor) -> None:
        started.append(int(x))
        release.wait(10.0)

    with Beside(work, CPU, threaded=True) as beside:
        for number in range(DEPTH + 1):
            beside.put(item(number))
        late = threading.Thread(target=beside.put, args=(item(9),))
        late.start()
        late.join(0.05)
        assert late.is_alive()
        release.set()
        late.join(10.0)
        assert not late.is_alive()
    assert started == [*range(DEPTH + 1), 9]


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_of_the_work_is_raised_where_the_items_are_made(threaded):
    def work(x: Tensor) -> None:
        raise ZeroDivisionError

    made = []

    def make() -> None:
        with Beside(work, CPU, threaded=threaded) as beside:
            for number in range(100):
                made.append(number)
                beside.put(item(number))

    with pytest.raises(ZeroDivisionError):
        make()
    assert len(made) <= DEPTH + 2


def test_a_stop_leaves_no_work_behind():
    done = []

    def work(x: Tensor) -> None:
        time.sleep(TICK)
        done.append(int(x))

    def stopped() -> None:
        with Beside(work, CPU, threaded=True) as beside:
            for number in range(3):
                beside.put(item(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(done) < 3
    time.sleep(3 * TICK)
    assert len(done) < 3


# ----------------------------------------------------------------------------
# Samples that are looked at as they are drawn.


def sums(pixels: Tensor) -> Tensor:
    """Two features of an image."""
    return torch.stack([pixels.flatten(1).sum(1), pixels.flatten(1).amax(1)], 1).float()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("num", [1, 8, 30])
def test_features_are_those_of_the_samples_in_order(make_policy, num, threaded):
    config, seen = EvaluateConfig(batch_size=8, num_samples=30), []
    sampling = Sampling(make_policy(event=(1, 2, 2)), "report", on_batch=seen.append)
    measured = measure(sampling, num, config, sums, threaded=threaded)
    assert torch.equal(measured.features, sums(generate(sampling, num, config)))
    assert measured.seconds_per_1000 > 0.0
    assert seen[: -(-num // 8)] == [min(8 * (turn + 1), num) for turn in range(-(-num // 8))]


def test_a_stop_while_samples_are_drawn_is_passed_on(make_policy):
    def stop(count: int) -> None:
        if count > 8:
            raise KeyboardInterrupt

    sampling = Sampling(make_policy(event=(1, 2, 2)), "report", on_batch=stop)
    with pytest.raises(KeyboardInterrupt):
        measure(sampling, 30, EvaluateConfig(batch_size=8), sums, threaded=True)
