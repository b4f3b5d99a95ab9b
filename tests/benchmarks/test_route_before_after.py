"""The comparison of two checkouts weighs each round alike."""

from benchmarks.route_before_after import STAGES, summarize


def stages(total: float) -> dict[str, float]:
    return dict(zip(STAGES, (0.5 * total, 0.1 * total, 0.4 * total, total), strict=True))


def test_the_ratio_is_taken_round_by_round() -> None:
    rounds = [
        {"before": stages(2.0), "now": stages(1.0)},
        {"before": stages(20.0), "now": stages(10.0)},  # the machine was busy
        {"before": stages(2.0), "now": stages(1.2)},
    ]
    summary = summarize(rounds)
    assert summary["ratio"] == 0.5
    assert summary["seconds"]["now"]["total"] == 1.2
    assert abs(summary["lua_share"] - 0.1) < 1e-12
