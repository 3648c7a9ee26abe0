"""What Prometheus reads is what the engine has counted, and it can be read by Prometheus' own parser."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.requests import Request
from tests.serve.servers import MODEL


def read(served) -> dict[tuple, float]:
    response = httpx.get(f"{served.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_are_the_engines(served):
    answer = served.engine.submit(Request("import os", max_new_tokens=60)).result()
    assert max(answer.acceptance_lengths) == 6  # for each place to have a count
    served.wait_idle()
    before = read(served)
    body = {"model": MODEL, "prompt": [[7] * 40] * 2, "max_tokens": 50, "temperature": 0}
    for _ in range(2):
        assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 200
    served.wait_idle()
    after, stats = read(served), served.engine.stats
    for name in ("submitted", "finished", "tokens", "prompt_tokens", "cached_tokens", "prefill_tokens", "rounds",
                 "host_syncs", "drafted", "accepted", "cancelled", "preempted", "prefix_hits"):  # fmt: skip
        assert after[f"dflash_{name}_total",] == getattr(stats, name)

    def new(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert new("dflash_tokens_total") == 200
    assert new("dflash_prompt_tokens_total") == 160
    assert new("dflash_prefix_hits_total") >= 2
    assert 0 < new("dflash_host_syncs_total") < 200
    for name in ("time_to_first_token", "time_per_token", "request"):
        assert new(f"dflash_{name}_seconds_count") == 4
        assert 0 < new(f"dflash_{name}_seconds_sum") < 60
    assert new("dflash_request_seconds_sum") > new("dflash_time_to_first_token_seconds_sum")
    places = [after["dflash_accepted_at_total", str(place)] for place in range(1, 6)]
    assert places == sorted(places, reverse=True) and sum(places) == stats.accepted
    assert after["dflash_acceptance", "1"] == pytest.approx(places[0] / stats.drafted_at[1])
    rounds = stats.drafted_at[1]
    assert after["dflash_acceptance_length",] == pytest.approx((stats.accepted + rounds) / rounds)
    assert sum(after["dflash_dispatches_total", str(width)] for width in stats.widths) == stats.dispatches
    pages = [after["dflash_pages", state] for state in ("free", "kept", "used")]
    assert sum(pages) == served.engine.scheduler.pages.count
    assert pages[1] > 0 and pages[2] == 0
    assert (after["dflash_running",], after["dflash_waiting",]) == (0, 0)
    assert after["process_resident_memory_bytes",] > 1e6
