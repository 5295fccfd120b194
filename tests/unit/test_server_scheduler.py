"""The scheduler's guarantees, on numbers alone."""

import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.server.scheduler import SHORTEST, STEP, Scheduler

BUDGET = 1600


def class_of(tokens, budget=BUDGET):
    limit, found = budget // SHORTEST, 0
    while tokens > limit:
        limit, found = limit * STEP, found + 1
    return found


def drain(scheduler, most=10_000):
    batches = []
    while scheduler.rows:
        batches.append(scheduler.next_batch())
        assert len(batches) < most
    return batches


def test_a_short_request_is_in_the_next_micro_batch_whatever_waits():
    scheduler = Scheduler(BUDGET)
    for number in range(50):
        scheduler.add([400] * 100, f"long {number}")
    scheduler.next_batch()  # runs while the short one arrives
    scheduler.add([7], "short")
    assert ("short", [0]) in scheduler.next_batch()


def test_a_middling_request_does_not_wait_behind_many_large_ones():
    scheduler = Scheduler(BUDGET)
    for number in range(50):
        scheduler.add([400] * 100, f"large {number}")
    scheduler.add([300], "middling")
    assert ("middling", [0]) in scheduler.next_batch()


def test_a_row_longer_than_the_budget_does_not_hold_up_a_short_request():
    scheduler = Scheduler(BUDGET)
    scheduler.add([5000] * 10, "huge")
    scheduler.add([20], "short")
    batch = dict(scheduler.next_batch())
    assert batch["short"] == [0]
    assert len(batch["huge"]) == 1


def test_the_oldest_request_is_served_under_a_flood_of_short_ones():
    scheduler = Scheduler(BUDGET)
    scheduler.add([500] * 20, "old")
    for step in range(20):
        for number in range(200):
            scheduler.add([50], (step, number))
        assert dict(scheduler.next_batch())["old"]
    assert not any(owner == "old" for batch in drain(scheduler) for owner, _ in batch)


def test_single_texts_of_a_class_keep_their_order():
    scheduler = Scheduler(BUDGET)
    clock = random.Random(1)
    lengths = [clock.randint(101, 400) for _ in range(100)]
    for number, length in enumerate(lengths):
        scheduler.add([length], number)
    served = {owner: number for number, batch in enumerate(drain(scheduler)) for owner, _ in batch}
    in_order = {owner: int(total / BUDGET) for owner, total in enumerate(accumulate(lengths))}
    assert all(served[owner] - number <= 2 for owner, number in in_order.items())


def test_removed_requests_are_not_handed_out():
    scheduler = Scheduler(100)
    gone = scheduler.add([60, 60, 60], "gone")
    scheduler.add([60], "kept")
    scheduler.next_batch()
    scheduler.remove(gone)
    scheduler.remove(gone)
    handed = [owner for batch in drain(scheduler) for owner, _ in batch]
    assert "gone" not in handed
    assert (scheduler.tokens, scheduler.rows, len(scheduler)) == (0, 0, 0)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Scheduler(0)


requests = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(arrivals=st.lists(requests, min_size=1, max_size=6), budget=st.sampled_from([1, 64, 512, 1600]))
def test_every_row_once_within_bounds_and_both_guarantees(arrivals, budget):
    """Requests come in bursts with a micro-batch between; every promise of the module's docstring is checked each time."""
    scheduler, waiting, given_out, name = Scheduler(budget), {}, {}, 0
    bursts = iter(arrivals)
    while True:
        burst = next(bursts, None)
        for lengths in burst or []:
            scheduler.add(lengths, name)
            waiting[name] = dict(enumerate(lengths))
            given_out[name] = set()
            name += 1
        if burst is None and not waiting:
            break
        assert scheduler.tokens == sum(sum(rows.values()) for rows in waiting.values())
        promised, filled = [], 0
        left = {owner: sum(rows.values()) for owner, rows in waiting.items()}
        for owner in sorted(left, key=lambda owner: class_of(left[owner], max(budget, SHORTEST))):
            filled += left[owner]
            if filled <= budget // 2:
                promised.append(owner)
        batch = dict(scheduler.next_batch())
        if budget >= SHORTEST:
            assert all(set(batch[owner]) == set(waiting[owner]) for owner in promised)
        assert not waiting or batch[min(waiting)]
        tokens = sum(waiting[owner][row] for owner, rows in batch.items() for row in rows)
        longest = max((length for rows in waiting.values() for length in rows.values()), default=0)
        assert tokens <= max(budget, budget // 2 + longest)
        for owner, rows in batch.items():
            for row in rows:
                del waiting[owner][row]
                given_out[owner].add(row)
            if not waiting[owner]:
                del waiting[owner]
    assert scheduler.rows == 0
    assert sum(map(len, given_out.values())) == sum(len(lengths) for burst in arrivals for lengths in burst)
