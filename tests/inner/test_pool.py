"""`labkit.inner.pool`: threads that compute together, and wait for each other."""

import gc
import threading

import pytest
import torch

from labkit.errors import ProblemError
from labkit.inner.pool import Abandoned, Exchange, ThreadPool


@pytest.fixture
def pool():
    pool = ThreadPool(3)
    yield pool
    pool.close()


def test_threads_end_with_their_pool():
    before = set(threading.enumerate())
    pool = ThreadPool(2)
    own = set(threading.enumerate()) - before
    assert len(own) == 2 and pool.run([int, int]) == [0, 0]
    del pool
    gc.collect()
    for thread in own:
        thread.join(30)
        assert not thread.is_alive()


def test_functions_run_at_once_each_with_one_thread_of_torch():
    torch.set_num_threads(2)
    pool, own, here = ThreadPool(3), torch.get_num_threads(), threading.Barrier(3)

    def function(at):
        here.wait(30)  # all three are under way
        torch.ones(300, 300) @ torch.ones(300, 300)
        return at, torch.get_num_threads(), threading.get_ident()

    made = pool.run([lambda at=at: function(at) for at in range(3)])
    assert [at for at, _, _ in made] == [0, 1, 2] and {n for _, n, _ in made} == {1} and len({i for *_, i in made}) == 3
    assert torch.get_num_threads() == own == 2
    with pytest.raises(ValueError, match="4 functions"):
        pool.run([int] * 4)
    pool.close()


def test_what_each_gives_comes_to_all_in_their_order(pool):
    exchange = Exchange(3)
    made = pool.run([lambda at=at: [exchange.gather(key, at, (key, at)) for key in "ab"] for at in range(3)])
    assert made == [[[(key, at) for at in range(3)] for key in "ab"]] * 3


def test_the_error_of_one_is_raised_and_nobody_waits_for_it(pool):
    exchange = Exchange(3)

    def function(at):
        if at == 2:
            exchange.end(failed=True)
            raise ZeroDivisionError("its own")
        return exchange.gather("a", at, at)

    with pytest.raises(ZeroDivisionError, match="its own"):
        pool.run([lambda at=at: function(at) for at in range(3)])
    with pytest.raises(Abandoned):
        exchange.gather("b", 0, 0)


def test_nobody_waits_for_ever_where_threads_do_not_come_to_the_same_place(pool):
    exchange = Exchange(3)

    def function(at):
        exchange.gather("first", at, at)
        if at < 2:
            exchange.gather("ab"[at], at, at)
        exchange.end()

    with pytest.raises(ProblemError, match="calls layers that it does not call for another"):
        pool.run([lambda at=at: function(at) for at in range(3)])


def test_after_an_interrupt_the_next_answers_are_the_next_ones(pool, monkeypatch):
    from labkit.inner import pool as module

    class Interrupted(module.SimpleQueue):
        first = True

        def get(self):
            if Interrupted.first:
                Interrupted.first = False
                raise KeyboardInterrupt
            return super().get()

    with monkeypatch.context() as patch:
        patch.setattr(module, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.run([lambda: "old"] * 3)
    assert pool.run([lambda: "new"] * 3) == ["new"] * 3


def test_a_key_may_come_again(pool):
    exchange = Exchange(3)
    made = pool.run([lambda at=at: [exchange.gather("same", at, (at, turn)) for turn in range(50)] for at in range(3)])
    assert made == [[[(at, turn) for at in range(3)] for turn in range(50)]] * 3 and not exchange._slots
