"""What runs on accelerators alone, on CPU: a stand-in for jax.lax.ragged_all_to_all, which XLA:CPU
lacks, Pallas kernels in interpret mode, and cuDNN's attention as XLA's."""

import contextlib
import functools
from unittest import mock

import jax.numpy as jnp
from jax import lax

from mixtral_jax import kernels
from mixtral_jax.kernels import attention, cudnn, exchange, few_rows, grouped_matmul


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all documents, and stricter.

    Rows of the result that nobody writes are NaN (there they keep what `output` holds), and the
    whole result is NaN if sizes disagree, slices overlap or one reaches outside its array. A row
    sent twice is an error too: JAX's gradient, the same collective in reverse, would lose a part.
    """
    me = lax.axis_index(axis_name)
    arrays = (operand, input_offsets, send_sizes, output_offsets, recv_sizes)
    operands, inputs, sends, outputs, receives = (lax.all_gather(a, axis_name) for a in arrays)
    # Of what each device sends to this one: from where, to where, how much. A device has an equal
    # number of slices for each; here they are one list.
    shards = sends.shape[0]
    mine = [a.reshape(shards, shards, -1)[:, me].reshape(-1) for a in (inputs, outputs, sends)]
    source_S, target_S, size_S = mine
    sender_S = jnp.repeat(jnp.arange(shards), len(size_S) // shards)

    rows_R = jnp.arange(output.shape[0])
    offset_RS = rows_R[:, None] - target_S[None]
    inside_RS = (offset_RS >= 0) & (offset_RS < size_S[None])
    slice_R = inside_RS.argmax(axis=1)
    row_R = source_S[slice_R] + rows_R - target_S[slice_R]
    written_R = inside_RS.any(axis=1)
    received = operands.at[sender_S[slice_R], row_R].get(mode="fill", fill_value=jnp.nan)

    by_pair = [a.reshape(shards, shards, -1) for a in (sends, receives)]
    legal = (by_pair[0] == by_pair[1].swapaxes(0, 1)).all() & (sends >= 0).all()
    legal &= (inputs >= 0).all() & (inputs + sends <= operand.shape[0]).all()
    legal &= (outputs >= 0).all() & (outputs + sends <= output.shape[0]).all()
    legal &= (inside_RS.sum(axis=1) <= 1).all()
    sent_RXS = jnp.arange(operand.shape[0])[:, None, None] - inputs[None]
    sent_RXS = (sent_RXS >= 0) & (sent_RXS < sends[None])
    legal &= (sent_RXS.sum(axis=2) <= 1).all()
    return jnp.where(legal & written_R[:, None], received, jnp.nan).astype(output.dtype)


@contextlib.contextmanager
def ragged_on_cpu():
    """Trace here, and exchange=ragged is accepted on CPU and runs on the emulation."""
    with (
        mock.patch.object(exchange.lax, "ragged_all_to_all", ragged_all_to_all),
        mock.patch.object(exchange, "platform", return_value="tpu"),
    ):
        yield


@contextlib.contextmanager
def tpu_kernels_on_cpu():
    """Trace here, and attention and the experts' products are those of a TPU, interpreted."""
    with (
        mock.patch.object(attention, "platform", return_value="tpu"),
        mock.patch.object(grouped_matmul, "platform", return_value="tpu"),
        mock.patch.object(kernels, "interpret", return_value=True),
    ):
        yield


@contextlib.contextmanager
def cudnn_on_cpu():
    """Trace here, and attention is cuDNN's call, in any type, given to XLA."""
    anywhere = functools.partial(cudnn.attention, implementation="xla")
    with (
        mock.patch.object(attention, "platform", return_value="gpu"),
        mock.patch.object(cudnn, "installed", return_value=True),
        mock.patch.object(cudnn, "fits", return_value=True),
        mock.patch.object(cudnn, "attention", anywhere),
    ):
        yield


@contextlib.contextmanager
def few_on_cpu():
    """Trace here, and a few tokens get the kernels of a GPU, interpreted, in float32 too."""
    with (
        mock.patch.object(few_rows, "platform", return_value="gpu"),
        mock.patch.object(kernels, "interpret", return_value=True),
        mock.patch.object(few_rows, "TYPES", (*few_rows.TYPES, jnp.float32)),
    ):
        yield
