"""What runs on accelerators alone, on CPU: a stand-in for jax.lax.ragged_all_to_all, which XLA:CPU
lacks, Pallas kernels in interpret mode, and cuDNN's attention as XLA's."""

import contextlib
import functools
from unittest import mock

import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import attention, cudnn, exchange, grouped_matmul, megablox, splash


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all documents, one slice a device, and stricter.

    Rows of the result that nobody writes are NaN (there they keep what `output` holds), and the
    whole result is NaN if sizes disagree, slices overlap or one reaches outside its array. A row
    sent twice is an error too: JAX's gradient, the same collective in reverse, would lose a part.
    """
    me = lax.axis_index(axis_name)
    arrays = (operand, input_offsets, send_sizes, output_offsets, recv_sizes)
    operands, inputs, sends, outputs, receives = (lax.all_gather(a, axis_name) for a in arrays)
    # What each device sends to this one: from where, to where, how much.
    source_X, target_X, size_X = inputs[:, me], outputs[:, me], sends[:, me]

    rows_R = jnp.arange(output.shape[0])
    offset_RX = rows_R[:, None] - target_X[None]
    inside_RX = (offset_RX >= 0) & (offset_RX < size_X[None])
    sender_R = inside_RX.argmax(axis=1)
    row_R = source_X[sender_R] + rows_R - target_X[sender_R]
    written_R = inside_RX.any(axis=1)
    received = operands.at[sender_R, row_R].get(mode="fill", fill_value=jnp.nan)

    legal = (sends == receives.T).all() & (sends >= 0).all()
    legal &= (inputs >= 0).all() & (inputs + sends <= operand.shape[0]).all()
    legal &= (outputs >= 0).all() & (outputs + sends <= output.shape[0]).all()
    legal &= (inside_RX.sum(axis=1) <= 1).all()
    sent_SXX = jnp.arange(operand.shape[0])[:, None, None] - inputs[None]
    sent_SXX = (sent_SXX >= 0) & (sent_SXX < sends[None])
    legal &= (sent_SXX.sum(axis=2) <= 1).all()
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
    interpreted = functools.partial(splash.attention, interpret=True)
    with (
        mock.patch.object(attention, "platform", return_value="tpu"),
        mock.patch.object(grouped_matmul, "platform", return_value="tpu"),
        mock.patch.object(splash, "attention", interpreted),
        mock.patch.object(megablox, "_interpret", return_value=True),
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
