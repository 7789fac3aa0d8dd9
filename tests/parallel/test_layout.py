"""The layout algebra: properties over random layouts, and every hard case of real models through one oracle.

The oracle: fill the source's buffers from random canonical tensors, run the plan in process, and compare every target
buffer, padding included, with what the canonical tensors say.
"""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytron.parallel.boxes import collide, colliding, disjoint, flat_boxes, intersect, subtract, terms, volume
from raytron.parallel.checksum import _dot_torch, checksum, checksums, combine
from raytron.parallel.layout import (
    CoverageError,
    Layout,
    Piece,
    Spec,
    coarsen,
    cut,
    fragile,
    only,
    owners,
    plan,
    relabel,
    retype,
    seats,
    union,
    without,
)
from raytron.parallel.storage import allocate, view
from raytron.parallel.transport import InProcess, run
from tests.parallel.layout_cases import (
    FAMILIES,
    Builder,
    assert_holds,
    canonical,
    fill,
    floor,
    fused_qkv,
    grids,
    layouts,
    mixtral_experts,
    numel,
    specs,
    stages,
    zero_intervals,
)

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def reshard(source, target, buffers, node=None):
    """Run a plan in process; returns the plan and the target's buffers."""
    made = plan(source, target, node)
    new = allocate(target)
    run(made, InProcess(buffers, new))
    return made, new


def node(place):
    return place[-1] if len(place) == 1 else place.split("/")[0]


# Boxes


@few
@given(st.data())
def test_subtract_leaves_exactly_the_rest(data):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=3))
    box = st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(sorted) for n in shape))
    a, b = (
        tuple((lo, hi if hi > lo else lo + 1) for lo, hi in data.draw(box)),
        tuple((lo, hi if hi > lo else lo + 1) for lo, hi in data.draw(box)),
    )
    rest, common = subtract(a, b), intersect(a, b)
    assert disjoint(rest)
    assert all(intersect(part, b) is None and intersect(part, a) == part for part in rest)
    assert sum(map(volume, rest)) + (0 if common is None else volume(common)) == volume(a)
    assert len(rest) <= max(1, 2 * len(shape))


@few
@given(st.lists(st.integers(1, 5), max_size=3), st.data())
def test_flat_intervals_are_few_boxes(sizes, data):
    n = numel(tuple((0, s) for s in sizes))
    start, stop = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
    boxes = flat_boxes(sizes, start, stop)
    mask = torch.zeros(sizes, dtype=torch.int)
    for box in boxes:
        mask[tuple(slice(lo, hi) for lo, hi in box)] += 1
    expected = torch.zeros(n, dtype=torch.int)
    expected[start:stop] = 1
    assert torch.equal(mask.reshape(-1), expected)
    assert len(boxes) <= max(1, 2 * len(sizes) - 1)


@few
@given(st.data())
def test_storage_overlap_is_exact(data):
    """Against sets of addresses, for nested strides of any kind."""

    def strided():
        sizes = data.draw(st.lists(st.integers(1, 4), max_size=3))
        strides, span = [], 1
        for n in sizes:
            strides.append(span + data.draw(st.integers(0, 3)))
            span += strides[-1] * (n - 1)
        box = tuple((0, n) for n in sizes)
        addresses = {0}
        for n, s in zip(sizes, strides, strict=True):
            addresses = {a + i * s for a in addresses for i in range(n)}
        return terms(box, strides), addresses

    (a, in_a), (b, in_b) = strided(), strided()
    delta = data.draw(st.integers(-20, 20))
    overlap = bool(in_a & {x + delta for x in in_b})
    assert collide(delta, a, b) == overlap
    assert (colliding([(100, a), (100 + delta, b)]) is not None) == overlap


# The oracle over the hard cases


@pytest.mark.parametrize("family", FAMILIES)
def test_any_two_layouts_of_a_family_reshard_into_each_other(family):
    members = FAMILIES[family]
    tensors = canonical(members[0].tensors)
    sums = None
    for source, target in permutations(members, 2):
        buffers = fill(source, tensors)
        made, new = reshard(source, target, buffers)
        assert_holds(target, new, tensors)
        assert made.bytes_moved == floor(source, target)
        seated = relabel(target, seats(source, target, [p for p in target.places if p not in source.places]))
        assert plan(source, seated).bytes_moved <= made.bytes_moved
        mine = checksums(owners(target), new)
        assert sums is None or mine == sums
        sums = mine
    assert sums == {name: checksum(value) for name, value in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_zero_intervals_of_a_family(family, ranks):
    """Masters of one layout's shards become those of another's, and whole weights again."""
    for source, target in zip(FAMILIES[family], FAMILIES[family][1:], strict=False):
        tensors = canonical(source.tensors)
        everywhere, intervals = zero_intervals(source, ranks)
        shards = cut(everywhere, intervals, buffer="masters").check()
        weights, masters = fill(everywhere, tensors), fill(shards, tensors)
        for place, ((start, stop),) in intervals.items():
            if start < stop:
                assert torch.equal(masters[place, "masters"], weights[place, "weights"][start:stop])
        other, there = zero_intervals(target, 5 - ranks)
        other = cut(other, there, buffer="masters").check()
        made, new = reshard(shards, other, masters)
        assert_holds(other, new, tensors)
        assert made.bytes_moved == floor(shards, other)
        back, whole_again = reshard(other, target, new)
        assert_holds(target, whole_again, tensors)
        assert back.bytes_moved == floor(other, target)


# Properties over random layouts


@few
@given(st.data())
def test_coverage_floor_identity_composition_and_checksums(data):
    tensors = data.draw(specs())
    a, b, c = (data.draw(layouts(tensors)) for _ in range(3))
    values = canonical(tensors)
    at_a = fill(a, values)
    ab, at_b = reshard(a, b, at_a, node)
    assert_holds(b, at_b, values)
    assert ab.bytes_moved == floor(a, b)
    assert ab.bytes_moved + ab.bytes_local == sum(
        volume(p.box) * len(p.places) * tensors[name].itemsize for name, p in b
    )
    _, at_c = reshard(b, c, at_b)
    _, direct = reshard(a, c, at_a)
    assert all(torch.equal(at_c[key].view(torch.uint8), direct[key].view(torch.uint8)) for key in direct)
    assert checksums(owners(a), at_a) == checksums(owners(b), at_b) == {n: checksum(t) for n, t in values.items()}
    per_place = [checksums(owners(c), {key: flat}) for key, flat in at_c.items()]
    assert combine(per_place) == checksums(owners(a), at_a)


@few
@given(st.data())
def test_identity_is_free(data):
    tensors = data.draw(specs())
    layout = data.draw(layouts(tensors))
    assert seats(layout, layout) == {place: place for place in layout.places}
    same = plan(layout, layout)
    assert same.bytes_moved == 0
    assert all(move.src == move.dst and move.at == move.to for move in same.moves)
    seated = relabel(layout, {place: f"seat {place}" for place in layout.places})
    assert plan(layout, relabel(seated, seats(layout, seated))).bytes_moved == 0


@few
@given(st.data())
def test_each_target_element_has_exactly_one_source(data):
    tensors = data.draw(specs())
    source, target = data.draw(layouts(tensors)), data.draw(layouts(tensors))
    written = {key: torch.zeros(n, dtype=torch.int) for key, n in target.sizes.items()}
    for move in plan(source, target, node).moves:
        for src, dst in move.pairs():
            view(written[dst, move.to.buffer], move.box, move.to).add_(1)
            assert any(
                src in p.places and intersect(p.box, move.box) == move.box and p.spot(move.box) == move.at
                for p in source.pieces[move.name]
            )
    for name, piece in target:
        for place in piece.places:
            assert view(written[place, piece.buffer], piece.box, piece.spot()).eq(1).all(), name


@few
@given(st.data())
def test_a_killed_reshape_is_a_layout_to_plan_from(data):
    """Old buffers without the dead place, new buffers of the finished tensors: their union is the source of the next
    plan, and the bytes are right."""
    tensors = data.draw(specs())
    old = data.draw(layouts(tensors))
    new = data.draw(layouts(tensors, buffer="next"))
    values = canonical(tensors)
    buffers = fill(old, values)
    made, fresh = plan(old, new), allocate(new)
    done = []
    for bucket in list(made.buckets(data.draw(st.integers(1, 200))))[: data.draw(st.integers(0, 3))]:
        run(bucket, InProcess(buffers, fresh))
        done += {move.name for move in bucket.moves}
    dead = data.draw(st.sampled_from(("a", "b", "c", "d")))
    left = union(without(old, [dead]), without(only(new, done), [dead])).check()
    survivors = {key: flat for key, flat in {**buffers, **fresh}.items() if key[0] != dead}
    target = data.draw(layouts(tensors, places=("a", "b", "c", "e"), buffer="again"))
    lost = {name for name, boxes in fragile(union(old, only(new, done))).get(dead, {}).items() if boxes}
    if lost:
        with pytest.raises(CoverageError) as error:
            plan(left, target)
        assert error.value.name in lost
    else:
        made, result = reshard(left, target, survivors)
        assert_holds(target, result, values)
        assert made.bytes_moved == floor(left, target)


@few
@given(st.data())
def test_owners_hold_every_element_once(data):
    tensors = data.draw(specs())
    both = union(data.draw(layouts(tensors)), data.draw(layouts(tensors, buffer="next")))
    owned = owners(both).check()
    for name, spec in tensors.items():
        count = torch.zeros(spec.shape, dtype=torch.int)
        for piece in owned.pieces[name]:
            assert len(piece.places) == 1
            count[tuple(slice(lo, hi) for lo, hi in piece.box)] += 1
        assert count.eq(1).all()


@few
@given(st.data())
def test_fragile_is_what_a_loss_would_lose(data):
    tensors = data.draw(specs())
    layout = data.draw(layouts(tensors))
    nodes = {"a": "x", "b": "x", "c": "y", "d": "z"}
    lost = fragile(layout, nodes.__getitem__)
    for name in {*nodes.values()}:
        rest = without(layout, [p for p, n in nodes.items() if n == name])
        for tensor, spec in tensors.items():
            held = torch.zeros(spec.shape, dtype=torch.int)
            for piece in rest.pieces.get(tensor, ()):
                held[tuple(slice(lo, hi) for lo, hi in piece.box)] = 1
            for box in lost.get(name, {}).get(tensor, ()):
                held[tuple(slice(lo, hi) for lo, hi in box)] += 1
            assert held.eq(1).all()


@few
@given(st.data())
def test_cut_intervals_in_any_order(data):
    """Several intervals per place, concatenated as listed."""
    tensors = data.draw(specs())
    layout = data.draw(layouts(tensors))
    intervals = {}
    for (place, _), n in layout.sizes.items():
        ends = sorted(data.draw(st.sets(st.integers(0, n), max_size=6)))
        some = list(zip(ends[::2], ends[1::2], strict=False))
        intervals[place] = data.draw(st.permutations(some))
    values = canonical(tensors)
    whole, part = fill(layout, values), cut(layout, intervals, buffer="shard").check()
    assert_holds(
        part,
        {
            (place, "shard"): torch.cat([whole[place, "weights"][a:b] for a, b in [(0, 0), *some]])
            for place, some in intervals.items()
        },
        values,
    )
    assert all(part.sizes[place, "shard"] == sum(b - a for a, b in some) for place, some in intervals.items())


# Choice of sources


def replicated(places, buffer="weights"):
    b = Builder({"w": (4, 4)}, buffer)
    for place in places:
        b.add("w", ((0, 4), (0, 4)), place)
    return b.build()


def test_same_node_first_then_the_least_loaded():
    source = replicated(["n0/a", "n1/a", "n2/a"])
    target = replicated(["n1/b", "n3/a", "n4/a", "n5/a", "n0/a"])
    pairs = {dst: src for move in plan(source, target, node).moves for src, dst in move.pairs()}
    assert pairs["n0/a"] == "n0/a"
    assert pairs["n1/b"] == "n1/a"
    assert sorted(pairs[f"n{i}/a"] for i in (3, 4, 5)) == ["n0/a", "n0/a", "n2/a"]


def test_load_is_spread_over_replicas():
    tensors = {f"w{i}": (4,) for i in range(12)}
    source, target = Builder(tensors), Builder(tensors)
    for name in tensors:
        for i in range(4):
            source.add(name, ((0, 4),), f"old-{i}")
        target.add(name, ((0, 4),), "new")
    sent = [src for move in plan(source.build(), target.build()).moves for src in move.src]
    assert all(sent.count(f"old-{i}") == 3 for i in range(4))


def test_overlapping_sources_prefer_the_node():
    """A source cut in half on the target's node beats the whole one elsewhere, element by element."""
    b = Builder({"w": (4, 4)})
    b.add("w", ((0, 4), (0, 4)), "far/a")
    b.add("w", ((1, 3), (0, 4)), "near/a")
    moves = plan(b.build(), replicated(["near/b"]), node).moves
    assert {(src, move.box) for move in moves for src in move.src} == {
        ("near/a", ((1, 3), (0, 4))), ("far/a", ((0, 1), (0, 4))), ("far/a", ((3, 4), (0, 4))),
    }  # fmt: skip


def test_survivors_keep_their_seats():
    """Four replicas of two shards; one actor dies: only the newcomer's shard moves."""
    old = fused_qkv(2, dp=4)
    left = without(old, ["actor-3"])
    target = relabel(fused_qkv(2, dp=4), {f"actor-{i}": f"seat-{i}" for i in range(8)})
    chosen = seats(left, target, ["actor-9"])
    assert sorted(chosen.values()) == sorted([f"actor-{i}" for i in range(8) if i != 3] + ["actor-9"])
    made = plan(left, relabel(target, chosen))
    assert made.bytes_moved == sum(volume(p.box) * 4 for _, p in old.at("actor-3"))
    with pytest.raises(ValueError, match="1 seats more than there are places"):
        seats(left, target)


def test_buckets_hold_whole_tensors_within_the_bound():
    source, target = mixtral_experts(8), mixtral_experts(3)
    made = plan(source, target)
    buckets = list(made.buckets(400))
    assert tuple(move for bucket in buckets for move in bucket.moves) == made.moves
    names = [{move.name for move in bucket.moves} for bucket in buckets]
    assert all(a.isdisjoint(b) for i, a in enumerate(names) for b in names[:i])
    for bucket in buckets:
        load = {}
        for move in bucket.moves:
            for src, dst in move.pairs():
                for place in {src, dst}:
                    load[place] = load.get(place, 0) + bucket.nbytes(move)
        assert max(load.values()) <= 400 or len({move.name for move in bucket.moves}) == 1
    assert len(list(made.buckets(1 << 30))) == 1


def test_plan_is_deterministic():
    source, target = fused_qkv(8), fused_qkv(2, dp=3)
    assert plan(source, target, node) == plan(source, target, node)


def test_masters_and_moments_share_one_plan():
    source, target = retype(fused_qkv(4), "bfloat16"), retype(fused_qkv(2), "bfloat16")
    made = plan(source, target).retyped("float32", "float64")
    values = canonical(retype(source, "float32").tensors)
    new = allocate(retype(target, "float64"))
    run(made, InProcess(fill(retype(source, "float32"), values), new))
    assert_holds(retype(target, "float64"), new, {n: v.double() for n, v in values.items()})
    assert made.bytes_moved == 2 * plan(source, target).bytes_moved


# Errors


def test_a_lost_holder_is_named():
    layout = stages([0, 0, 1, 1], 2)
    with pytest.raises(
        CoverageError, match=r"layers\.2: no source holds \(\(0, 4\), \(0, 4\)\).*'actor-1'.*union"
    ) as e:
        plan(without(layout, ["actor-1"]), layout)
    assert e.value.name == "layers.2"
    assert e.value.boxes == (((0, 4), (0, 4)),)
    twin = relabel(layout, {"actor-1": "host-0", "actor-0": "host-1"})
    assert plan(union(without(layout, ["actor-1"]), twin), layout).bytes_moved > 0


def test_what_does_not_fit_is_refused():
    layout = fused_qkv(2)
    with pytest.raises(ValueError, match="version 7 and the target of version 8"):
        plan(layout, replace(layout, version=8))
    with pytest.raises(ValueError, match=r"versions \[7, 8\]"):
        union(layout, replace(layout, version=8))
    with pytest.raises(ValueError, match=r"no tensor of that name \(it has q"):
        plan(layout, stages_of_name("q2"))
    with pytest.raises(ValueError, match=r"k: canonical shape \(4, 6\) in the source and \(8, 6\)"):
        plan(layout, fused_qkv(2, kv=4))
    with pytest.raises(ValueError, match="bfloat16"):
        union(layout, retype(layout, "bfloat16"))
    with pytest.raises(ValueError, match="relabel"):
        union(layout, fused_qkv(4))
    with pytest.raises(ValueError, match="overlap"):
        cut(layout, {"actor-0": [(0, 5), (4, 6)]})
    with pytest.raises(ValueError, match="leaves buffer"):
        cut(layout, {"actor-0": [(0, 500)]})
    with pytest.raises(ValueError, match="no buffer 'other'"):
        cut(layout, {"actor-0": [(0, 5)]}, of="other")
    with pytest.raises(ValueError, match="unknown dtype 'fp32'"):
        Spec((1,), "fp32")


def stages_of_name(name):
    b = Builder({name: (16, 6)})
    b.add(name, ((0, 16), (0, 6)), "actor-0")
    return b.build()


def test_invariants_are_held():
    specs = {"a": Spec((4, 4)), "b": Spec((2, 4))}

    def check(*pieces, size=24):
        held = {}
        for name, box, offset, strides in pieces:
            held.setdefault(name, []).append(Piece(box, "w", offset, strides, ("x",)))
        return Layout(0, specs, {n: tuple(p) for n, p in held.items()}, {("x", "w"): size}).check()

    all_a, all_b = ((0, 4), (0, 4)), ((0, 2), (0, 4))
    check(("a", all_a, 0, (4, 1)), ("b", all_b, 16, (4, 1)))
    check(("a", all_a, 0, (1, 4)), ("b", all_b, 16, (1, 2)))
    check(("a", ((0, 4), (0, 2)), 0, (4, 1)), ("b", ((0, 2), (0, 2)), 2, (4, 1)))  # columns of one matrix
    with pytest.raises(ValueError, match=r"a .* and b .* overlap in buffer 'w' of 'x'"):
        check(("a", all_a, 0, (4, 1)), ("b", all_b, 15, (4, 1)))
    with pytest.raises(ValueError, match="overlap"):
        check(("a", ((0, 4), (0, 3)), 0, (4, 1)), ("b", ((0, 2), (0, 2)), 2, (4, 1)))
    with pytest.raises(ValueError, match="empty"):
        check(("a", ((0, 4), (2, 2)), 0, (4, 1)))
    with pytest.raises(ValueError, match="outside the canonical shape"):
        check(("a", ((0, 5), (0, 4)), 0, (4, 1)))
    with pytest.raises(ValueError, match="nested"):
        check(("a", all_a, 0, (3, 1)))
    with pytest.raises(ValueError, match="nested"):
        check(("a", all_a, 0, (0, 1)))
    with pytest.raises(ValueError, match=r"spans \[9, 25\) .* 24 elements"):
        check(("a", all_a, 9, (4, 1)))
    with pytest.raises(ValueError, match="one range and one stride"):
        check(("a", all_a, 0, (1,)))
    with pytest.raises(ValueError, match="no size"):
        Layout(0, specs, {"a": (Piece(all_a, "w", 0, (4, 1), ("x",)),)}, {}).check()
    with pytest.raises(ValueError, match="no Spec"):
        Layout(0, {}, {"a": (Piece(all_a, "w", 0, (4, 1), ("x",)),)}, {}).check()


def test_grain_blocks_are_read_across_but_not_split_on_write():
    assert coarsen(((3, 9), (0, 5)), (4, 2), exact=False) == ((0, 3), (0, 3))
    assert coarsen(((4, 10), (0, 4)), (4, 2), exact=True, shape=(10, 8)) == ((1, 3), (0, 2))
    with pytest.raises(ValueError, match="block of 4 along dimension 0"):
        coarsen(((3, 8), (0, 4)), (4, 2), exact=True)
    spec = Spec((10, 6), "uint8", (4, 1))

    def by_rows(*cuts):
        b = Builder({"packed": spec})
        for i, rows in enumerate(zip((0, *cuts), (*cuts, 10), strict=True)):
            b.add("packed", (rows, (0, 6)), f"actor-{i}")
        return b.build()

    assert plan(by_rows(3), by_rows(4)).bytes_moved == 6
    with pytest.raises(ValueError, match=r"packed: box .* splits a block of 4"):
        plan(by_rows(4), by_rows(3))


def test_union_merges_replicas_and_keeps_both_spots():
    a, b = replicated(["x"]), replicated(["y"])
    assert union(a, b).pieces["w"] == replicated(["x", "y"]).pieces["w"]
    both = union(a, relabel(a, buffers={"weights": "copy"}))
    assert len(both.pieces["w"]) == 2
    assert set(both.sizes) == {("x", "weights"), ("x", "copy")}


def test_only_and_without():
    layout = fused_qkv(2, dp=2)
    mine = only(layout, ["q"], ["actor-1", "actor-3"])
    assert set(mine.places) == {"actor-1", "actor-3"}
    assert set(mine.tensors) == {"q"}
    assert [p.places for p in mine.pieces["q"]] == [("actor-1", "actor-3")]
    rest = without(layout, ["actor-0", "actor-2"])
    assert set(rest.places) == {"actor-1", "actor-3"}
    assert set(rest.tensors) == set(layout.tensors)
    assert len(rest.pieces["q"]) == 1


# Checksums


@few
@given(st.data())
def test_checksum_is_independent_of_cuts_and_strides(data):
    spec = data.draw(specs())["t0"]
    value = canonical({"w": spec})["w"]
    total = 0
    for box in data.draw(grids(spec.shape)):
        part = value[tuple(slice(lo, hi) for lo, hi in box)]
        order = data.draw(st.permutations(range(part.dim())))
        part = part.permute(order).contiguous().permute([order.index(d) for d in range(part.dim())])
        total += checksum(part, box, spec.shape)
    assert total % (1 << 64) == checksum(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "uint8", "float8_e5m2", "bool"])
def test_checksum_of_large_tensors(dtype, monkeypatch):
    """Views that need no copy, blocks that do, transposes and odd columns agree; one changed bit and a swap show."""
    monkeypatch.setattr("raytron.parallel.checksum._BLOCK", 4096)
    value = canonical({"w": Spec((6, 40, 64), dtype)})["w"]
    want = checksum(value)
    assert checksum(value.transpose(0, 2).contiguous().transpose(0, 2)) == want
    halves = [checksum(value[..., a:b], ((0, 6), (0, 40), (a, b)), (6, 40, 64)) for a, b in ((0, 13), (13, 64))]
    assert sum(halves) % (1 << 64) == want
    changed = value.clone()
    changed.view(torch.uint8).reshape(-1)[1234] ^= 1
    assert checksum(changed) != want
    rows = value.clone()
    rows[0, 1], rows[0, 2] = value[0, 2], value[0, 1]
    assert (checksum(rows) != want) == (not torch.equal(rows[0, 1], rows[0, 2]))


def test_checksum_of_any_device_is_that_of_the_cpu(monkeypatch):
    value = torch.randn(37, 24)
    want = checksum(value)
    monkeypatch.setattr("raytron.parallel.checksum._dot", _dot_torch)
    monkeypatch.setattr("raytron.parallel.checksum._BLOCK", 256)
    assert checksum(value) == want


def test_checksum_is_linear_in_the_bits():
    a, b = torch.randint(0, 1 << 14, (7, 9), dtype=torch.int16), torch.randint(0, 1 << 14, (7, 9), dtype=torch.int16)
    assert checksum(a + b) == (checksum(a) + checksum(b)) % (1 << 64)
    assert checksum(torch.zeros(3, 5)) == 0
    with pytest.raises(ValueError, match="is not the box"):
        checksum(a, ((0, 7), (0, 8)), (7, 9))
