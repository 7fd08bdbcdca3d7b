"""dropout(layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])) in one kernel.

Forward: a program owns ROWS tokens. It reads their three ids, gathers the three table rows, and sums, normalises,
drops and writes them from registers: 4 * T * H elements move (the position and token-type rows mostly from L2). A
token with an id outside of its table becomes a row of NaN; nothing is read there.

Backward, in two steps:

1. A fixed number of programs stride over the tokens, gather again and write grad_z (`[T, H]` float32), the gradient
   of the sum, while the weight and bias gradients grow in registers, as in add_layer_norm. A token-type table of one
   row, RoBERTa's usual one, gets the column sum of grad_z: a third such accumulator, and no step 2.
2. Every table is given the sum of the grad_z rows of each id, without atomics. The ids are sorted (stably), so that
   equal ids form runs. A run is cut where it crosses a multiple of PIECE positions. One program for each position
   (and block of columns) looks whether a piece starts there, and if so adds up its rows, in order. A piece that is a
   whole run is final. The others, at most two for each PIECE positions, go to a buffer, from which the program of the
   position block in which a run starts adds up the run's pieces, in order. So a table row that every token shares
   costs no more time than rows that each token has alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.add_layer_norm import (
    MAX_REGISTER_ACCUMULATORS,
    add_to_partial,
    backward_programs,
    layer_norm_grad_z,
    row_config,
)
from roberta_kernels.triton.column_sum import add_partials, empty_partials
from roberta_kernels.triton.philox import keep_mask, keep_scale, threshold

_PIECE = 64
_ROWS_AT_ONCE = 4
_PIECES_AT_ONCE = 16


@triton.jit
def _gather(table_ptr, ids_ptr, table_rows, token, column, mask, in_tokens, H: tl.constexpr):
    """float32 `[ROWS, BLOCK_H]`: the tokens' rows of a table, NaN for an id outside of it."""
    ids = tl.load(ids_ptr + token, mask=in_tokens, other=0)
    inside = (ids >= 0) & (ids < table_rows)
    row = tl.where(inside, ids, 0)
    values = tl.load(table_ptr + row[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(inside[:, None], values, float("nan"))


_SIZES = ["tokens", "words", "positions", "types", "dropout_threshold"]
_PLAIN_POINTERS = ["input_ids_ptr", "position_ids_ptr", "token_type_ids_ptr", "mean_ptr", "rstd_ptr", "seed_ptr"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def embedding_layer_norm_forward_kernel(
    input_ids_ptr,  # [T] int64
    position_ids_ptr,  # [T] int64
    token_type_ids_ptr,  # [T] int64
    word_ptr,  # [words, H]
    position_ptr,  # [positions, H]
    token_type_ptr,  # [types, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    out_ptr,  # [T, H]
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    seed_ptr,  # [1] int64, or None without dropout
    tokens,
    words,
    positions,
    types,
    eps: tl.float32,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    in_tokens = token < tokens
    in_columns = column < H
    mask = in_tokens[:, None] & in_columns[None, :]
    z = _gather(word_ptr, input_ids_ptr, words, token, column, mask, in_tokens, H)
    z += _gather(token_type_ptr, token_type_ids_ptr, types, token, column, mask, in_tokens, H)
    z += _gather(position_ptr, position_ids_ptr, positions, token, column, mask, in_tokens, H)
    mean = tl.div_rn(tl.sum(z, 1), H * 1.0)
    centred = z - mean[:, None]
    if BLOCK_H != H:
        centred = tl.where(in_columns[None, :], centred, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / H + eps))
    weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), token, 0, 0, dropout_threshold, BLOCK_H)
        out = tl.where(keep, out * dropout_scale, 0.0)
    offset = token.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + token, mean, mask=in_tokens)
    tl.store(rstd_ptr + token, rstd, mask=in_tokens)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def embedding_layer_norm_backward_kernel(
    grad_out_ptr,  # [T, H]
    input_ids_ptr,  # [T] int64
    position_ids_ptr,  # [T] int64
    token_type_ids_ptr,  # [T] int64
    word_ptr,  # [words, H]
    position_ptr,  # [positions, H]
    token_type_ptr,  # [types, H]
    weight_ptr,  # [H]
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    grad_z_ptr,  # [T, H] float32
    partials_ptr,  # [2 or 3, programs, H] float32: weight, bias, the one token type; zeros where not IN_REGISTERS
    seed_ptr,  # [1] int64, or None without dropout
    tokens,
    words,
    positions,
    types,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    SUM_GRAD_Z: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)
    in_columns = column < H
    weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_H], tl.float32)
    grad_bias = tl.zeros([BLOCK_H], tl.float32)
    sum_grad_z = tl.zeros([BLOCK_H], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = first + tl.arange(0, ROWS)
        in_tokens = token < tokens
        mask = in_tokens[:, None] & in_columns[None, :]
        offset = token.to(tl.int64)[:, None] * H + column[None, :]
        grad = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), token, 0, 0, dropout_threshold, BLOCK_H)
            grad = tl.where(keep, grad * dropout_scale, 0.0)
        z = _gather(word_ptr, input_ids_ptr, words, token, column, mask, in_tokens, H)
        z += _gather(token_type_ptr, token_type_ids_ptr, types, token, column, mask, in_tokens, H)
        z += _gather(position_ptr, position_ids_ptr, positions, token, column, mask, in_tokens, H)
        mean = tl.load(mean_ptr + token, mask=in_tokens, other=0.0)
        rstd = tl.load(rstd_ptr + token, mask=in_tokens, other=0.0)
        grad_z, normalised = layer_norm_grad_z(grad, z, weight, mean, rstd, H)
        tl.store(grad_z_ptr + offset, grad_z, mask=mask)
        row_grad_weight = tl.sum(grad * normalised, 0)
        row_grad_bias = tl.sum(grad, 0)
        if IN_REGISTERS:
            grad_weight += row_grad_weight
            grad_bias += row_grad_bias
            if SUM_GRAD_Z:
                sum_grad_z += tl.sum(grad_z, 0)
        else:
            add_to_partial(partials_ptr, 0, row_grad_weight, column, H)
            add_to_partial(partials_ptr, 1, row_grad_bias, column, H)
            if SUM_GRAD_Z:
                add_to_partial(partials_ptr, 2, tl.sum(grad_z, 0), column, H)
            tl.debug_barrier()
    if IN_REGISTERS:
        stride = tl.num_programs(0).to(tl.int64) * H
        partial = partials_ptr + tl.program_id(0).to(tl.int64) * H + column
        tl.store(partial, grad_weight, mask=in_columns)
        tl.store(partial + stride, grad_bias, mask=in_columns)
        if SUM_GRAD_Z:
            tl.store(partial + 2 * stride, sum_grad_z, mask=in_columns)


@triton.jit(do_not_specialize=["tokens", "table_rows", "padding_idx"], do_not_specialize_on_alignment=["ids_ptr"])
def sum_pieces_kernel(
    grad_z_ptr,  # [T, H] float32
    ids_ptr,  # [T] int64, sorted
    order_ptr,  # [T] int64: which token each sorted id is of
    grad_table_ptr,  # [table_rows, H]
    pieces_ptr,  # [ceil(T / PIECE), 2, H] float32: pieces that continue a run, pieces that a later one continues
    tokens,
    table_rows,
    padding_idx,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    position = tl.program_id(0)
    row = tl.load(ids_ptr + position)
    before = tl.load(ids_ptr + tl.maximum(position - 1, 0))
    starts_run = (position == 0) | (before != row)
    if (not starts_run) & (position % PIECE != 0):
        return
    if (row == padding_idx) | (row < 0) | (row >= table_rows):
        return
    end = tl.minimum((position // PIECE + 1) * PIECE, tokens)
    place = position + tl.arange(0, PIECE)
    same = tl.load(ids_ptr + place, mask=place < end, other=-1) == row
    length = tl.sum(same.to(tl.int32), 0)
    after = tl.load(ids_ptr + tl.minimum(position + length, tokens - 1))
    ends_run = (position + length == tokens) | (after != row)

    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = column < H
    total = tl.zeros([AT_ONCE, BLOCK_H], tl.float32)
    for first in range(0, length, AT_ONCE):
        member = first + tl.arange(0, AT_ONCE)
        inside = member < length
        token = tl.load(order_ptr + position + member, mask=inside, other=0)
        mask = inside[:, None] & in_columns[None, :]
        total += tl.load(grad_z_ptr + token[:, None] * H + column[None, :], mask=mask, other=0.0)
    value = tl.sum(total, 0)
    if starts_run & ends_run:
        target = grad_table_ptr + row * H + column
        tl.store(target, value.to(grad_table_ptr.dtype.element_ty), mask=in_columns)
    else:
        slot = (position // PIECE) * 2 + starts_run.to(tl.int32)
        tl.store(pieces_ptr + slot.to(tl.int64) * H + column, value, mask=in_columns)


@triton.jit(do_not_specialize=["tokens", "table_rows", "padding_idx"], do_not_specialize_on_alignment=["ids_ptr"])
def join_pieces_kernel(
    ids_ptr,  # [T] int64, sorted
    pieces_ptr,  # [ceil(T / PIECE), 2, H] float32
    grad_table_ptr,  # [table_rows, H]
    tokens,
    table_rows,
    padding_idx,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    block = tl.program_id(0)
    following = (block + 1) * PIECE
    if following >= tokens:
        return
    row = tl.load(ids_ptr + following - 1)
    if tl.load(ids_ptr + following) != row:
        return  # the last run of this block ends with it
    start = block * PIECE
    before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
    if (start > 0) & (before == row):
        return  # the run began in an earlier block, whose program joins it
    if (row == padding_idx) | (row < 0) | (row >= table_rows):
        return
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = column < H
    value = tl.load(pieces_ptr + (block.to(tl.int64) * 2 + 1) * H + column, mask=in_columns, other=0.0)
    total = tl.zeros([AT_ONCE, BLOCK_H], tl.float32)
    piece = block + 1
    going = True
    while going:
        member = piece + tl.arange(0, AT_ONCE)
        place = member * PIECE
        inside = tl.load(ids_ptr + place, mask=place < tokens, other=-1) == row
        mask = inside[:, None] & in_columns[None, :]
        total += tl.load(pieces_ptr + member.to(tl.int64)[:, None] * 2 * H + column[None, :], mask=mask, other=0.0)
        piece += AT_ONCE
        going = tl.sum(inside.to(tl.int32), 0) == AT_ONCE
    value += tl.sum(total, 0)
    tl.store(grad_table_ptr + row * H + column, value.to(grad_table_ptr.dtype.element_ty), mask=in_columns)


def _table_gradient(grad_z: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """`[rows, H]`: for each row of the table the sum of the grad_z rows of the tokens with that id."""
    tokens, width = grad_z.shape
    gradient = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    if tokens == 0:
        return gradient
    ids, order = torch.sort(ids, stable=True)
    block = min(1024, max(triton.next_power_of_2(width), 16))
    blocks = triton.cdiv(width, block)
    positions = triton.cdiv(tokens, _PIECE)
    pieces = torch.empty((positions, 2, width), dtype=torch.float32, device=table.device)
    sizes = (tokens, table.shape[0], padding_idx)
    sum_pieces_kernel[(tokens, blocks)](
        grad_z, ids, order, gradient, pieces, *sizes, H=width, BLOCK_H=block, PIECE=_PIECE, AT_ONCE=_ROWS_AT_ONCE,
        num_warps=4,
    )  # fmt: skip
    if positions > 1:
        join_pieces_kernel[(positions, blocks)](
            ids, pieces, gradient, *sizes, H=width, BLOCK_H=block, PIECE=_PIECE, AT_ONCE=_PIECES_AT_ONCE, num_warps=8
        )
    return gradient


def embedding_layer_norm_forward(
    input_ids: Tensor,  # [T] int64
    position_ids: Tensor,  # [T] int64
    token_type_ids: Tensor,  # [T] int64
    word_embeddings: Tensor,  # [vocabulary, H]
    position_embeddings: Tensor,  # [positions, H]
    token_type_embeddings: Tensor,  # [types, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    word_padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `[T, H]`, mean `[T]` float32, rstd `[T]` float32). The padding indices only matter to backward."""
    tokens, width = input_ids.shape[0], word_embeddings.shape[1]
    device = word_embeddings.device
    out = torch.empty((tokens, width), dtype=word_embeddings.dtype, device=device)
    mean = torch.empty(tokens, dtype=torch.float32, device=device)
    rstd = torch.empty(tokens, dtype=torch.float32, device=device)
    if tokens == 0:
        return out, mean, rstd
    tables = (word_embeddings, position_embeddings, token_type_embeddings)
    block, rows, warps = row_config(width)
    with device_facts.on_device(out):
        embedding_layer_norm_forward_kernel[(triton.cdiv(tokens, rows),)](
            input_ids.contiguous(), position_ids.contiguous(), token_type_ids.contiguous(),
            *(table.contiguous() for table in tables), weight.contiguous(), bias.contiguous(), out, mean, rstd,
            seed if dropout_p > 0 else None, tokens, *(table.shape[0] for table in tables), eps,
            threshold(dropout_p), keep_scale(dropout_p), H=width, BLOCK_H=block, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return out, mean, rstd


def embedding_layer_norm_backward(
    grad_out: Tensor,  # [T, H]
    input_ids: Tensor,  # [T] int64
    position_ids: Tensor,  # [T] int64
    token_type_ids: Tensor,  # [T] int64
    word_embeddings: Tensor,  # [vocabulary, H]
    position_embeddings: Tensor,  # [positions, H]
    token_type_embeddings: Tensor,  # [types, H]
    weight: Tensor,  # [H]
    mean: Tensor,  # [T] float32
    rstd: Tensor,  # [T] float32
    word_padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the word, position and token-type tables, weight and bias. Padding rows (-1: none) get zeros."""
    tokens, width = grad_out.shape
    device = word_embeddings.device
    tables = (word_embeddings, position_embeddings, token_type_embeddings)
    if tokens == 0:
        word, position, token_type = (torch.zeros_like(table) for table in tables)
        return word, position, token_type, torch.zeros_like(weight), torch.zeros_like(weight)
    grad_out, weight, mean, rstd = (t.contiguous() for t in (grad_out, weight, mean, rstd))
    input_ids, position_ids, token_type_ids = (ids.contiguous() for ids in (input_ids, position_ids, token_type_ids))
    one_type = token_type_embeddings.shape[0] == 1
    grad_z = torch.empty((tokens, width), dtype=torch.float32, device=device)
    grad_weight = torch.empty(width, dtype=weight.dtype, device=device)
    grad_bias = torch.empty(width, dtype=weight.dtype, device=device)
    sums = [grad_weight, grad_bias]
    if one_type:
        grad_token_type = torch.empty((1, width), dtype=token_type_embeddings.dtype, device=device)
        sums.append(grad_token_type)
    block, rows, warps = row_config(width)
    in_registers = block <= MAX_REGISTER_ACCUMULATORS
    programs = backward_programs(tokens, rows, device)
    with device_facts.on_device(grad_z):
        partials = empty_partials(len(sums), programs, width, device)
        if not in_registers:
            partials.zero_()
        embedding_layer_norm_backward_kernel[(programs,)](
            grad_out, input_ids, position_ids, token_type_ids, *(table.contiguous() for table in tables), weight, mean,
            rstd, grad_z, partials, seed if dropout_p > 0 else None, tokens, *(table.shape[0] for table in tables),
            threshold(dropout_p), keep_scale(dropout_p), SUM_GRAD_Z=one_type, H=width, BLOCK_H=block, ROWS=rows,
            IN_REGISTERS=in_registers, num_warps=warps,
        )  # fmt: skip
        add_partials(partials, *sums)
        grad_word = _table_gradient(grad_z, input_ids, word_embeddings, word_padding_idx)
        grad_position = _table_gradient(grad_z, position_ids, position_embeddings, position_padding_idx)
        if not one_type:
            grad_token_type = _table_gradient(grad_z, token_type_ids, token_type_embeddings, -1)
    return grad_word, grad_position, grad_token_type, grad_weight, grad_bias
