import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import ragged_all_to_all, ragged_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mixtral_jax import sharding
from mixtral_jax.kernels import exchange as exchanges

P = PartitionSpec("expert")


# ---- which body --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, ""])
@pytest.mark.parametrize(
    ("platform", "kind", "shards", "body"),
    [
        ("cpu", "cpu", 1, "local"),
        ("cpu", "cpu", 4, "padded"),
        ("tpu", "TPU v5", 1, "local"),
        ("tpu", "TPU v5", 4, "ragged"),
        ("tpu", "TPU v6 lite", 4, "ragged"),
        ("tpu", "TPU v5 lite", 4, "padded"),
        ("gpu", "NVIDIA H200", 1, "local"),
        ("gpu", "NVIDIA H200", 2, "ragged"),
    ],
)
def test_the_best_body_of_each_chip(monkeypatch, asked, platform, kind, shards, body):
    monkeypatch.setattr(exchanges, "platform", lambda: platform)
    monkeypatch.setattr(exchanges, "device_kind", lambda: kind)
    assert exchanges.resolve(asked, shards) == body


@pytest.mark.parametrize(
    ("platform", "asked", "shards", "body"),
    [
        ("cpu", "padded", 4, "padded"),
        ("tpu", "padded", 2, "padded"),
        ("gpu", "ragged", 3, "ragged"),
        ("cpu", "padded", 1, "local"),
        ("gpu", "ragged", 1, "local"),
        ("cpu", "local", 1, "local"),
    ],
)
def test_the_body_asked_for_is_used_where_something_moves(
    monkeypatch, platform, asked, shards, body
):
    monkeypatch.setattr(exchanges, "platform", lambda: platform)
    assert exchanges.resolve(asked, shards) == body


@pytest.mark.parametrize(
    ("asked", "shards", "words"),
    [
        ("ragged", 4, ["exchange=ragged", "does not run on cpu", "gpu and tpu", "padded"]),
        ("ragged", 1, ["exchange=ragged", "does not run on cpu"]),
        ("local", 2, ["exchange=local", "2 devices", "padded or ragged"]),
        ("magic", 2, ["exchange='magic'", "local", "padded", "ragged"]),
    ],
)
def test_a_body_that_cannot_run_is_refused_in_one_line(asked, shards, words):
    with pytest.raises(ValueError, match=r"^.+$") as error:
        exchanges.resolve(asked, shards)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# ---- the exchange ------------------------------------------------------------------------------

LOCAL, TOKENS, PER_TOKEN, WIDTH = 3, 5, 4, 2  # experts a device, tokens, choices; row width


def chosen(rng, shards, capacity):
    """counts_XE of rows that each device sends to each expert, from random choices."""
    experts = LOCAL * shards
    counts_XE = np.zeros((shards, experts), np.int32)
    for device in range(shards):
        for _ in range(rng.integers(TOKENS + 1)):
            picked = rng.permutation(experts)[:PER_TOKEN]
            counts_XE[device, picked] += 1
    return counts_XE if capacity is None else np.minimum(counts_XE, capacity)


def cases(shards, capacity):
    """Names and counts_XE: random ones, and those that fill a buffer or leave all of it empty."""
    rng = np.random.default_rng(shards)
    experts, most = LOCAL * shards, TOKENS if capacity is None else capacity
    for i in range(4):
        yield f"random {i}", chosen(rng, shards, capacity)
    yield "nothing", np.zeros((shards, experts), np.int32)
    for device in {0, shards - 1}:
        counts = np.zeros((shards, experts), np.int32)
        counts[:, device * LOCAL : (device + 1) * LOCAL] = most
        yield f"all to device {device}", counts
        counts = np.zeros((shards, experts), np.int32)
        counts[:, device * LOCAL + 1] = most
        yield f"all to one expert of device {device}", counts
        counts = chosen(rng, shards, capacity)
        counts[np.arange(shards) != device] = 0
        yield f"all from device {device}", counts


@functools.cache
def compiled(body, shards, capacity):
    """send and send_back on X devices.

    Takes counts_XE, the row values_XEND that device x sends to expert e as number n, and the
    gradient of what is received. Gives the rows received, those that came back in the places of
    values_XEND, the group sizes and the gradient of values_XEND.
    """
    mesh = sharding.make_mesh(expert=shards)
    most = TOKENS if capacity is None else capacity
    per_token = min(PER_TOKEN, LOCAL * shards)
    sizes = {"tokens": TOKENS, "experts": LOCAL * shards, "per_token": per_token}
    exchange = exchanges.make(body, "expert", shards, **sizes, capacity=capacity)

    def device(counts_1E, values_1END):
        counts_E, values_END = counts_1E[0], values_1END[0]
        plan = exchanges.plan(exchange, counts_E)
        row_EN = plan.offsets_E[:, None] + jnp.arange(most)[None]
        used_EN = jnp.arange(most)[None] < counts_E[:, None]
        row_EN = jnp.where(used_EN, row_EN, exchange.send_rows)
        unused = 0 if body == "local" else jnp.nan  # local is the identity, others do not read it
        rows_SD = jnp.full((exchange.send_rows, WIDTH), unused, jnp.float32)
        rows_SD = rows_SD.at[row_EN].set(values_END, mode="drop")
        received_RD = exchanges.send(exchange, plan, rows_SD)
        back_SD = exchanges.send_back(exchange, plan, received_RD)
        back_END = back_SD.at[row_EN].get(mode="fill", fill_value=0)
        return received_RD[None], back_END[None], plan.group_sizes_e[None]

    mapped = jax.shard_map(device, in_specs=(P, P), out_specs=(P, P, P))

    @jax.jit
    def run(counts_XE, values_XEND, g_XRD, g_back_XEND):
        def pair(values_XEND):
            received, back, sizes = mapped(counts_XE, values_XEND)
            return (received, back), sizes

        (received, back), pull, sizes = jax.vjp(pair, values_XEND, has_aux=True)
        zeros = jnp.zeros_like(back)
        (sent_only,) = pull((g_XRD, zeros))
        (both,) = pull((jnp.zeros_like(received), g_back_XEND))
        return received, back, sizes, sent_only, both

    def call(*arguments):
        context = ragged_on_cpu() if body == "ragged" else contextlib.nullcontext()
        with jax.set_mesh(mesh), context:
            placed = (jax.device_put(a, jax.NamedSharding(mesh, P)) for a in arguments)
            return jax.tree.map(np.asarray, run(*placed))

    return exchange, call


BODIES = [("local", 1), *itertools.product(["padded", "ragged"], [1, 2, 4, 8])]


@pytest.mark.parametrize("capacity", [None, 2], ids=["dropless", "capacity"])
@pytest.mark.parametrize(("body", "shards"), BODIES)
def test_rows_arrive_sorted_by_expert_and_return(body, shards, capacity):
    exchange, run = compiled(body, shards, capacity)
    rng = np.random.default_rng(7)
    experts, most = LOCAL * shards, TOKENS if capacity is None else capacity
    for name, counts_XE in cases(shards, capacity):
        values = rng.normal(size=(shards, experts, most, WIDTH)).astype(np.float32)
        g_XRD = rng.normal(size=(shards, exchange.receive_rows, WIDTH)).astype(np.float32)
        g_back = rng.normal(size=values.shape).astype(np.float32)
        received = np.zeros_like(g_XRD)
        sizes_Xe = np.zeros((shards, LOCAL), np.int32)
        gradient, used = np.zeros_like(values), np.zeros((*values.shape[:3], 1), bool)
        for owner in range(shards):
            row = 0
            for local, source in itertools.product(range(LOCAL), range(shards)):
                expert = owner * LOCAL + local
                for number in range(counts_XE[source, expert]):
                    received[owner, row] = values[source, expert, number]
                    gradient[source, expert, number] = g_XRD[owner, row]
                    used[source, expert, number] = True
                    sizes_Xe[owner, local] += 1
                    row += 1
        actual = list(run(counts_XE, values, g_XRD, g_back))
        in_use_XR = np.arange(exchange.receive_rows) < sizes_Xe.sum(axis=1)[:, None]
        if body == "ragged":  # the other rows may be anything
            assert np.isnan(actual[0][~in_use_XR]).all()
            actual[0] = np.where(in_use_XR[:, :, None], actual[0], 0)
        expected = (received, values * used, sizes_Xe, gradient, g_back * used)
        what = ("received", "returned", "group sizes", "gradient of send", "of send and back")
        for part, a, b in zip(what, actual, expected):
            np.testing.assert_array_equal(a, b, err_msg=f"{name}: {part}")


@given(
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 7)),
    st.integers(0, 10**6),
)
def test_buffers_hold_the_worst_case_and_no_more(shards, local, tokens, k, capacity, seed):
    experts = shards * local
    k = min(k, experts)
    sizes = {"tokens": tokens, "experts": experts, "per_token": k, "capacity": capacity}
    rng = np.random.default_rng(seed)

    def sent(ids_TC):
        counts_E = np.bincount(ids_TC.reshape(-1), minlength=experts)
        return counts_E if capacity is None else np.minimum(counts_E, capacity)

    random_E = sent(np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]))
    spread_E = sent(np.arange(tokens * k) % experts)  # as little is over capacity as can be
    to_device_E = sent(np.arange(tokens * min(k, local)) % local)  # as much as device 0 can get
    for body in ("padded", "ragged") + ("local",) * (shards == 1):
        made = exchanges.make(body, "expert", shards, **sizes)
        for counts_E in (random_E, to_device_E, spread_E):
            assert counts_E.reshape(shards, local).sum(axis=1).max() <= made.bucket_rows
            assert counts_E.sum() <= made.send_rows
        assert to_device_E[:local].sum() == made.bucket_rows
        assert shards * made.bucket_rows == made.receive_rows
        if body == "padded":
            assert made.send_rows == made.receive_rows
        else:
            assert spread_E.sum() == made.send_rows


# ---- the emulation itself ----------------------------------------------------------------------


def emulated(operand_XS, output_rows, *offsets_and_sizes_XX):
    mesh = sharding.make_mesh(expert=len(operand_XS))

    def device(operand_1S, *rest):
        output = jax.lax.pcast(jnp.zeros((output_rows, 1)), "expert", to="varying")
        rest = [a[0] for a in rest]
        return ragged_all_to_all(operand_1S[0][:, None], output, *rest, axis_name="expert")[None]

    with jax.set_mesh(mesh):
        arrays = [np.float32(operand_XS)] + [np.int32(a) for a in offsets_and_sizes_XX]
        placed = [jax.device_put(a, jax.NamedSharding(mesh, P)) for a in arrays]
        out = jax.jit(jax.shard_map(device, in_specs=(P,) * 5, out_specs=P))(*placed)
    return np.asarray(out)[:, :, 0]


def test_the_emulation_gives_the_example_of_jax():
    """The example in the documentation of jax.lax.ragged_all_to_all."""
    nan = np.nan  # where nothing is written; there jax keeps what `output` holds
    out = emulated(
        [[1, 2, 2], [3, 4, 0]],
        4,
        [[0, 1], [0, 1]],
        [[1, 2], [1, 1]],
        [[0, 0], [1, 2]],
        [[1, 1], [2, 1]],
    )
    np.testing.assert_array_equal(out, [[1, 3, nan, nan], [2, 2, 4, nan]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"recv_sizes": [[1, 2], [2, 1]]},  # not what the other one sends
        {"output_offsets": [[0, 0], [0, 2]]},  # two slices in one place
        {"output_offsets": [[0, 0], [4, 2]]},  # past the end of the output
        {"input_offsets": [[0, 2], [0, 1]]},  # past the end of the operand
        {"input_offsets": [[-1, 1], [0, 1]]},
        {"input_offsets": [[0, 0], [0, 1]]},  # one row to two devices
    ],
)
def test_the_emulation_rejects_what_jax_leaves_undefined(wrong):
    right = {
        "input_offsets": [[0, 1], [0, 1]],
        "send_sizes": [[1, 2], [1, 1]],
        "output_offsets": [[0, 0], [1, 2]],
        "recv_sizes": [[1, 1], [2, 1]],
    }
    out = emulated([[1, 2, 2], [3, 4, 0]], 4, *{**right, **wrong}.values())
    assert np.isnan(out).all(axis=1).any()
