"""The planner finds the cheapest plan, keeps to its limit, and says what the limit cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairline.compiler import MEASURES, Regions, Terms
from fairline.compiler.planner import Priced, cheapest, plan, priced_blocks, table
from fairline.compiler.regions import Block, weights_of
from fairline.errors import FairlineError
from fairline.private import NETWORKS, Cost, estimate, to_graph
from tests.compiler.networks import graphs, student
from tests.reference.compiler import all_chains

EXAMPLE = torch.zeros(1, 3, 8, 8)

TERMS = st.builds(
    Terms,
    protocol=st.sampled_from(["cheetah", "semi2k"]),
    network=st.sampled_from([NETWORKS["lan"], NETWORKS["wan"]]),
    batch_size=st.sampled_from([1, 3]),
    minimise=st.sampled_from(MEASURES),
    max_weights=st.sampled_from([1, 200, 2000, 10**8]),
)


def measure(graph, terms):
    told = estimate(graph, protocol=terms.protocol, network=terms.network, batch_size=terms.batch_size)
    return {"seconds": told.seconds, "bytes": told.bytes + told.offline_bytes, "rounds": told.rounds}[terms.minimise]


@settings(max_examples=40)
@given(graphs(steps=8), TERMS)
def test_no_plan_is_cheaper(graph, terms):
    regions = Regions(graph)
    blocks = list(priced_blocks(regions, terms))
    limit = max(terms.max_weights, weights_of(regions.graph))
    edges = [(each.block.start, each.block.stop) for each in blocks]
    best = min(
        sum(blocks[place].price[0] for place in way)
        for way in all_chains(edges, len(regions.frontiers) - 1)
        if sum(blocks[place].weights for place in way) <= limit
    )
    found = plan(regions, terms)
    outline = regions.outline(found.plan)
    opening = measure(regions.graph, terms) - sum(blocks_cost(regions, terms))
    assert measure(outline, terms) == pytest.approx(best + opening, rel=1e-9, abs=1e-9)
    assert measure(outline, terms) <= measure(graph, terms) * (1 + 1e-12)
    assert weights_of(outline) <= limit


def blocks_cost(regions, terms):
    """What the network's own nodes cost, from one frontier to the next."""
    return [
        each.price[0]
        for each in priced_blocks(regions, terms)
        if each.block.form == "as it stands" and each.block.stop == each.block.start + 1
    ]


PRICED = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)), max_size=12)


@settings(max_examples=200)
@given(PRICED, st.integers(0, 40))
def test_the_cheapest_chain_within_a_limit(drawn, limit):
    blocks = [Priced(Block(i, i + 1), Cost(), 2, (9.0, 0.0, 0.0, 2.0)) for i in range(5)]
    for start, length, price, weights in drawn:
        if start + length <= 5:
            block = Block(start, start + length, "dense")
            blocks.append(Priced(block, Cost(), weights, (float(price), 0.0, 0.0, float(weights))))
    edges = [(each.block.start, each.block.stop) for each in blocks]
    ways = [[blocks[place] for place in way] for way in all_chains(edges, 5)]
    sums = [(sum(each.price[0] for each in way), sum(each.weights for each in way)) for way in ways]
    fitting = [price for price, weights in sums if weights <= limit]
    found = cheapest(blocks, 5, limit)
    if fitting:
        assert sum(each.price[0] for each in found) == min(fitting)
        assert sum(each.weights for each in found) <= limit
    else:
        assert sum(each.weights for each in found) == min(weights for _, weights in sums)
    assert sum(each.price[0] for each in cheapest(blocks, 5, None)) == min(price for price, _ in sums)


def test_the_limit_is_kept_and_where_it_was_the_reason_is_told():
    model = student("resnet18", 0.02, "pixel", width=4)
    regions = Regions(to_graph(model, EXAMPLE))
    own = weights_of(regions.graph)
    free = plan(regions, Terms(minimise="bytes"))
    assert not free.left_out
    wanted = weights_of(regions.outline(free.plan))
    assert wanted < own
    # A network of few weights, whose dense form has more.
    model = student("cnn", 0.2, "pixel", width=2)
    regions = Regions(to_graph(model, EXAMPLE))
    free = plan(regions, Terms(minimise="rounds"))
    wanted = weights_of(regions.outline(free.plan))
    assert wanted > weights_of(regions.graph)
    bound = plan(regions, Terms(minimise="rounds", max_weights=wanted - 1))
    assert weights_of(regions.outline(bound.plan)) < wanted
    told = [str(each) for each in bound.left_out]
    assert told
    assert all(f"go beyond the limit of {wanted - 1:,} for all" in each and "0 … 11" in each for each in told)
    assert plan(regions, Terms(minimise="rounds", max_weights=wanted)) == free


def test_what_does_not_fit_into_memory_stays_as_it_stands(monkeypatch):
    regions = Regions(to_graph(student("cnn", 0.05, "pixel"), EXAMPLE))
    terms = Terms(minimise="rounds")
    largest = max(block.weights for block in priced_blocks(regions, terms))
    monkeypatch.setattr("fairline.compiler.planner._memory_weights", lambda: 10)
    found = plan(regions, terms)
    assert largest > 10
    assert {block.form for block in found.plan} == {"as it stands"}
    assert all("go beyond this machine's memory" in str(each) for each in found.left_out)
    assert found.left_out


def test_a_network_without_relus_is_one_matrix():
    regions = Regions(to_graph(student("resnet18", 0.0, "pixel"), EXAMPLE))
    found = plan(regions, Terms())
    assert [(block.start, block.stop, block.form) for block in found.plan] == [(0, 1, "dense")]
    outline = regions.outline(found.plan)
    assert [node.op for node in outline.nodes] == ["reshape", "linear"]
    assert outline.shapes == {outline.nodes[1].weights[0]: (3, 192), outline.nodes[1].weights[1]: (3,)}


@pytest.mark.parametrize("protocol", ["cheetah", "semi2k", "delphi", "cryptflow2"])
def test_the_table_adds_up_to_the_estimates(protocol):
    graph = to_graph(student("resnet18", 0.05, "pixel", width=4), EXAMPLE)
    regions = Regions(graph)
    terms = Terms(protocol, NETWORKS["wan"], 2, "bytes")
    found = plan(regions, terms)
    told = table(regions, found.plan, terms)
    for suffix, own in (("", regions.outline(found.plan)), ("_before", graph)):
        expected = estimate(own, protocol=protocol, network="wan", batch_size=2)
        # Opening the result is no block's.
        opening = expected.layers.iloc[-1]
        for key in ("bytes", "offline_bytes", "rounds"):
            assert told[f"{key}{suffix}"].sum() == pytest.approx(getattr(expected, key) - opening[key])
        assert told[f"relus{suffix}"].sum() == own.relus
        assert told[f"weights{suffix}"].sum() == weights_of(own)
        assert told[f"seconds{suffix}"].isna().all() == math.isnan(expected.seconds)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Terms(protocol="magic"), "no cost model of 'magic'"),
        (Terms(minimise="euros"), "one of seconds, bytes, rounds, not 'euros'"),
        (Terms(batch_size=0), "at least one image"),
        (Terms(max_weights=0), "max_weights cannot be 0"),
        (Terms(protocol="delphi"), "how long delphi takes; minimise bytes or rounds"),
    ],
)
def test_terms_that_cannot_be_met_are_one_sentence(terms, message):
    with pytest.raises(FairlineError, match=message):
        terms.check()
