"""The width follows each text's acceptance and the cost, and trials are few where they change nothing."""

import math

import numpy as np
import pytest

from dflash_jax.decoding.width import STALE, TRIAL_AGAIN, TRIAL_SHARE, TRIALS_KEPT, TRIALS_SHARE, Group, WidthController

FLAT = {1: 1.0, 2: 1.02, 4: 1.05, 8: 1.1}  # rows are nearly free
STEEP = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
CPU = {1: 1.0, 4: 1.9, 8: 2.3}  # a small model on two cores


def controller_of(costs):
    controller = WidthController(costs)
    controller.assume_costs("load", costs)
    return controller


def one_load(count):
    return "load"


def accepted(rng, width, acceptance, rounds):
    return (1 + np.cumprod(rng.random((rounds, width - 1)) < acceptance, axis=1).sum(1)).tolist()


class Request:
    """A text of a length and an acceptance, and the seconds that its rounds have taken."""

    def __init__(self, controller, acceptance, seed=0):
        self.controller, self.text, self.acceptance = controller, controller.text(), acceptance
        self.rng, self.tokens, self.seconds, self.widths = np.random.default_rng(seed), 0, 0.0, []

    def round(self, costs):
        (group,) = self.controller.arrange([self.text], one_load)
        counts = accepted(self.rng, group.width, self.acceptance, 1)
        self.controller.observe_counts("load", group.width, [self.text], [counts])
        self.controller.observe_cost("load", group.width, costs[group.width])
        self.tokens, self.seconds = self.tokens + counts[0], self.seconds + costs[group.width]
        self.widths.append(group.width)


def decode(controller, acceptance, costs, tokens=128, seed=0):
    request = Request(controller, acceptance, seed)
    while request.tokens < tokens:
        request.round(costs)
    return request


def rate(requests):
    return sum(r.tokens for r in requests) / sum(r.seconds for r in requests)


@pytest.mark.parametrize(("costs", "acceptance", "best"), [(FLAT, 0.9, 8), (FLAT, 0.0, 1), (STEEP, 0.9, 1)])
def test_it_finds_the_best_width(costs, acceptance, best):
    widths = decode(controller_of(costs), acceptance, costs, tokens=3000).widths
    assert np.mean(np.array(widths[len(widths) // 4 :]) == best) > 0.85


@pytest.mark.parametrize(("costs", "all_of_them", "each"), [(FLAT, 0.97, 0.97), (CPU, 0.93, 0.92), (STEEP, 0.91, 0.85)])
def test_texts_whose_drafts_are_worth_nothing_lose_little(costs, all_of_them, each):
    controller = controller_of(costs)
    texts = [decode(controller, 0.0, costs, seed=seed) for seed in range(40)]
    assert rate(texts) > all_of_them
    assert min(rate([text]) for text in texts) > each


def test_texts_whose_drafts_are_right_gain():
    controller = controller_of(FLAT)
    assert rate([decode(controller, 0.9, FLAT, seed=seed) for seed in range(20)]) > 4


@pytest.mark.parametrize("hard", [3, 30, 300])
def test_an_easy_text_is_as_quick_after_any_number_of_hard_ones(hard):
    fresh, later = controller_of(CPU), controller_of(CPU)
    for seed in range(hard):
        decode(later, 0.1, CPU, seed=seed)
    easy = [decode(fresh, 0.85, CPU, seed=seed) for seed in range(30)]
    again = []
    for seed in range(30):
        again.append(decode(later, 0.85, CPU, seed=seed))
        decode(later, 0.1, CPU, seed=seed)
    assert rate(again) > 0.9 * rate(easy) > 1.5


def test_a_text_that_gets_easy_is_drafted_again():
    controller = controller_of(CPU)
    request = Request(controller, 0.0)
    while request.tokens < 200:
        request.round(CPU)
    request.acceptance, before = 0.95, len(request.widths)
    while request.tokens < 1200:
        request.round(CPU)
    assert np.mean(np.array(request.widths[before:][-60:]) == 8) > 0.8


def test_one_text_says_nothing_of_another():
    controller = controller_of(CPU)
    easy, hard = controller.text(), controller.text()
    for _ in range(20):
        controller.observe_counts("load", 8, [easy], [[8]])
        controller.observe_counts("load", 8, [hard], [[1]])
    assert controller.best("load", [easy]) == 8 and controller.best("load", [hard]) == 1
    assert easy.expected(8) > 7 and hard.expected(8) < 1.1
    assert 1.5 < controller.text().expected(8) < 6  # all requests' together


def test_requests_with_a_grammar_have_a_prior_of_their_own():
    controller = controller_of(CPU)
    bound = controller.text(grammar=True)
    controller.observe_counts("load", 8, [bound], [[1] * 50])
    assert controller.text(grammar=True).expected(8) < 1.1
    assert controller.text().expected(8) > 3


def test_a_request_does_not_pay_for_another():
    """Of a batch the harmonic mean of the rates decides, not their sum."""
    controller = controller_of({1: 1.0, 8: 1.8})
    texts = [controller.text() for _ in range(4)]
    controller.observe_counts("load", 8, texts, [[8] * 20, [1] * 20, [1] * 20, [1] * 20])
    assert sum(t.expected(8) for t in texts) / 1.8 > 4
    assert controller.best("load", texts) == 1
    assert controller.rate("load", 8, texts) == pytest.approx(4 / sum(1 / t.expected(8) for t in texts) / 1.8, rel=1e-6)


def test_a_new_text_tries_beside_the_others_where_that_costs_less():
    controller = WidthController([1, 8])
    loads = {1: {1: 1.0, 8: 2.0}, 3: {1: 2.0, 8: 20.0}, 4: {1: 2.2, 8: 21.0}}
    for count, costs in loads.items():
        controller.assume_costs(count, costs)
    controller.free.acceptance = [0.1] * 7
    texts = [controller.text() for _ in range(4)]
    for text in texts[:3]:
        text.drafts()
    groups = controller.arrange(texts, lambda count: count)
    assert groups == [Group((3,), 8, most=1), Group((0, 1, 2), 1)]
    assert controller.arrange(texts, lambda count: count) == [Group((0, 1, 2, 3), 1)]  # the trial is on its way
    controller.assume_costs(4, {1: 2.2, 8: 2.4})
    texts[3] = controller.text()
    assert controller.arrange(texts, lambda count: count) == [Group((0, 1, 2, 3), 8, most=1)]


@pytest.mark.parametrize("costs", [FLAT, CPU, STEEP])
def test_a_text_waits_for_trials_by_what_they_cost(costs):
    """In its own tokens: its trials, but for the first two, take a small share of its time."""
    costs = {width: costs[width] for width in (1, 8)}
    controller, tried = controller_of(costs), []
    controller.free.acceptance = [0.0] * 7
    text = controller.text()
    for token in range(900):
        (group,) = controller.arrange([text], one_load)
        if group.width > 1:
            tried.append(token)
        controller.observe_counts("load", group.width, [text], [[1]])
        controller.observe_cost("load", group.width, costs[group.width])
    gaps, expected = np.diff(tried), min(STALE, math.ceil(max(TRIAL_AGAIN, (costs[8] - 1) / TRIAL_SHARE)))
    assert tried[:2] == [0, TRIAL_AGAIN] and set(gaps[1:]) == {expected}


def test_what_all_trials_take_is_bounded():
    """However short the requests are: not each of them can have a trial."""
    controller = controller_of(STEEP)
    controller.free.acceptance = [0.0] * 7
    requests = [decode(controller, 0.0, STEEP, tokens=10, seed=seed) for seed in range(300)]
    seconds, trials = sum(r.seconds for r in requests), sum(r.widths.count(8) for r in requests)
    assert trials > 10 and 7 * trials <= TRIALS_SHARE * seconds + 7 * TRIALS_KEPT


def test_a_width_that_is_not_in_use_is_timed_again():
    controller, text = controller_of({1: 1.0, 8: 1.5}), None
    taken = []
    for _ in range(3 * STALE):
        text = controller.text() if text is None else text
        (group,) = controller.arrange([text], one_load)
        controller.observe_counts("load", group.width, [text], [[group.width]])
        controller.observe_cost("load", group.width, 1.0 if group.width == 1 else 1.5)
        taken.append(group.width)
    assert 1 < taken.count(1) < 5


def test_a_fixed_width_is_kept_and_teaches_nothing_of_drafts():
    controller = controller_of(CPU)
    controller.fixed = 4
    text = controller.text()
    before = text.expected(8)
    controller.observe_counts("load", 4, [text], [[4] * 9])
    assert controller.arrange([text], one_load) == [Group((0,), 4)]
    assert text.expected(8) == before
    assert controller.arrange([None], one_load) == [Group((0,), 1)]  # past the drafter's positions


def test_sequences_side_by_side_make_what_is_known_steadier():
    def known(sequences):
        rng, controller, seen = np.random.default_rng(0), WidthController([1, 8]), []
        for _ in range(300):
            counts = [accepted(rng, 8, 0.7, 1) for _ in range(sequences)]
            controller.observe_counts("load", 8, [controller.text() for _ in counts], counts)
            seen.append(controller.text().expected(8))
        return np.std(seen[50:])

    assert known(16) < 0.4 * known(1)


def test_expected_tokens():
    controller = WidthController([1, 3])
    controller.free.acceptance = [0.5, 0.5]
    text = controller.text()
    assert text.expected(1) == 1
    assert text.expected(3) == 1.75
    controller.observe_counts("load", 3, [text], [[2]])  # the first draft was right, the second was not
    prior = controller.free.acceptance
    first, second = (0.5 * prior[0] + 1) / 1.5, 0.5 * prior[1] / 1.5
    assert text.expected(3) == pytest.approx(1 + first + first * second)
