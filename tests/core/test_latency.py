import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.core.latency import LatencyHistogram

IN_RANGE = st.floats(1e-5, 1e3)
ANY = st.floats(0, 1e6)


def of(durations: list[float]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for seconds in durations:
        histogram.add(seconds)
    return histogram


def test_without_a_duration_there_is_no_quantile() -> None:
    empty = LatencyHistogram()
    assert empty.quantile(0.5) is None
    assert (empty.count, empty.total_s, empty.last_s) == (0, 0.0, None)
    assert all(below == 0 for _, below in empty.buckets())


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-5, 0.0123, 1e3, 1e5])
def test_one_duration_is_every_quantile(seconds: float) -> None:
    assert [of([seconds]).quantile(q) for q in (0.0, 0.5, 0.99, 1.0)] == [seconds] * 4


def test_it_knows_count_sum_and_the_last() -> None:
    histogram = of([0.5, 0.25, 2.0])
    assert (histogram.count, histogram.total_s, histogram.last_s) == (3, 2.75, 2.0)


@given(durations=st.lists(IN_RANGE, min_size=1, max_size=300), data=st.data())
def test_a_quantile_is_within_a_tenth_of_the_exact_order_statistic(
    durations: list[float], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, len(durations)))
    exact = sorted(durations)[rank - 1]
    # Half a rank lower: no rounding of the product can then reach the next rank.
    assert of(durations).quantile((rank - 0.5) / len(durations)) == pytest.approx(exact, rel=0.1)


@given(durations=st.lists(ANY, min_size=1, max_size=50), q=st.floats(0, 1))
def test_a_quantile_is_never_outside_of_what_was_seen(durations: list[float], q: float) -> None:
    histogram = of(durations)
    value = histogram.quantile(q)
    assert value is not None
    assert min(durations) <= value <= max(durations) == histogram.quantile(1.0)


@given(durations=st.lists(ANY, min_size=1, max_size=50), shares=st.tuples(*[st.floats(0, 1)] * 2))
def test_a_higher_quantile_is_no_shorter(
    durations: list[float], shares: tuple[float, float]
) -> None:
    low, high = (of(durations).quantile(q) for q in sorted(shares))
    assert low is not None
    assert high is not None
    assert low <= high


@given(durations=st.lists(st.one_of(ANY, st.sampled_from([1e-5, 2e-5, 0.01024])), max_size=50))
def test_a_bucket_counts_what_does_not_exceed_its_bound(durations: list[float]) -> None:
    buckets = of(durations).buckets()
    assert [below for _, below in buckets] == [
        sum(seconds <= bound for seconds in durations) for bound, _ in buckets
    ]


def test_the_bounds_of_the_buckets_double_from_ten_microseconds_on() -> None:
    bounds = [bound for bound, _ in LatencyHistogram().buckets()]
    assert bounds[-1] == math.inf
    assert bounds[:-1] == [1e-5 * 2**octave for octave in range(28)]
    assert bounds[-2] > 1000


@given(first=st.lists(ANY, max_size=30), second=st.lists(ANY, max_size=30), q=st.floats(0, 1))
def test_merging_is_adding_everything_to_one(
    first: list[float], second: list[float], q: float
) -> None:
    merged, one = of(first), of(first + second)
    merged.merge(of(second))
    assert merged.buckets() == one.buckets()
    assert merged.quantile(q) == one.quantile(q)
    assert (merged.count, merged.last_s) == (one.count, one.last_s)
    assert merged.total_s == pytest.approx(one.total_s)


def test_a_copy_counts_on_by_itself() -> None:
    histogram = of([0.1, 0.2])
    copied = histogram.copy()
    histogram.add(5.0)
    assert (copied.count, copied.last_s, copied.quantile(1.0)) == (2, 0.2, 0.2)
    copied.add(1e-4)
    assert (histogram.count, histogram.last_s, histogram.quantile(0.0)) != (
        copied.count,
        copied.last_s,
        copied.quantile(0.0),
    )
    assert histogram.count == 3


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf, -math.inf])
def test_what_is_no_duration_is_refused_and_not_counted(seconds: float) -> None:
    histogram = LatencyHistogram()
    with pytest.raises(ValueError, match=f"{seconds} s was added; give a finite duration"):
        histogram.add(seconds)
    assert (histogram.count, histogram.last_s) == (0, None)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, 95.0])
def test_a_quantile_out_of_range_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=f"quantile {q} was asked for; give a share"):
        LatencyHistogram().quantile(q)
