from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from taskd.obs.metrics import METRICS, Metric, Metrics


def test_prometheus_can_read_every_metric_with_nasty_labels() -> None:
    metrics = Metrics()
    nasty = 'a"b\\c\nd'
    for metric in METRICS:
        metrics.inc(metric.name, *[nasty for _ in metric.labels], by=2)

    # The parser cuts the ending off a counter's name.
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(metrics.render())
    }

    assert sorted(families) == sorted(metric.name for metric in METRICS)
    for metric in METRICS:
        (sample,) = families[metric.name].samples
        assert sample.value == 2
        assert sample.labels == dict.fromkeys(metric.labels, nasty)


def test_a_counter_without_labels_is_there_before_it_counts() -> None:
    assert "\ntaskd_fenced_total 0\n" in Metrics().render()


def test_figures_add_up_by_label() -> None:
    metrics = Metrics()

    metrics.inc("taskd_settled_total", "mail", "completed")
    metrics.inc("taskd_settled_total", "mail", "completed", by=4)
    metrics.inc("taskd_settled_total", "mail", "failed")

    assert metrics.get("taskd_settled_total", "mail", "completed") == 5
    assert 'taskd_settled_total{type="mail",status="failed"} 1\n' in metrics.render()


def test_a_gauge_is_set() -> None:
    metrics = Metrics([Metric("taskd_free", "Free slots.", "gauge")])

    metrics.set("taskd_free", to=3)

    assert metrics.render() == "# HELP taskd_free Free slots.\n# TYPE taskd_free gauge\ntaskd_free 3\n"


def test_a_metric_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(KeyError):
        Metrics().inc("taskd_unknown_total")


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        Metrics().inc("taskd_claimed_total")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_table_follows_the_rules_of_names(metric: Metric) -> None:
    assert re.fullmatch(r"taskd_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".")
