/* SPDX-License-Identifier: MIT */
/*
 * What host code and kernels of the CUDA backend share: the words ranks
 * exchange, the state of a buffer on the device, and the kernels' arguments.
 *
 * Words that ranks exchange are 64 bits: a value below, the call's epoch above,
 * stored at once. The reader knows by the epoch that the value belongs to this
 * call, so values need neither a flag nor a fence of their own. Epochs are
 * compared as distances modulo 2^32, so they may wrap.
 */
#ifndef EPI_EP_CUDA_SHARED_H
#define EPI_EP_CUDA_SHARED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define EPC_HD static __host__ __device__ inline
#else
#define EPC_HD static inline
#endif

#define EPC_MAX_RANKS 64
#define EPC_MAX_EXPERTS 16384
#define EPC_MAX_PLACES 128 /* memories of one rank that peers can reach: segments, then exports */
#define EPC_MAX_SEGMENTS 16
#define EPC_MAX_UNITS 256      /* groups of tokens that a dispatch counts separately */
#define EPC_THREADS 1024       /* of every block of a normal-mode kernel, but for: */
#define EPC_CODING_THREADS 640 /* a dispatch that quantises by the engine: more registers each */
#define EPC_STREAM_WARPS 16    /* of a combine with a ring of each warp, */
#define EPC_STREAM_PIECE 3584  /* bytes of a row that one of them adds at a time, */
#define EPC_STREAM_SLOT (EPC_STREAM_PIECE + 24) /* and what one takes of shared memory */
#define EPC_MAX_TOPK 256
#define EPC_ALIGN 256 /* of every array in a region of rows */
#define EPC_PIECES 4  /* of free memory that a rank speaks of: the region's and three more */
#define EPC_PIECE_UNIT 65536

/* What a call is, as its header says. */
enum epc_op { EPC_OP_NONE, EPC_OP_DISPATCH, EPC_OP_COMBINE, EPC_OP_CACHED, EPC_OP_REJECT };

/* Words of the header each rank sends to each at the start of a call. Those before
   EPC_AGREED must be the same on every rank; the first that differs is the one reported. */
enum epc_field {
    EPC_F_OP,
    EPC_F_HIDDEN,
    EPC_F_DTYPE,
    EPC_F_WIRE,
    EPC_F_TOPK,
    EPC_F_ID_BYTES,
    EPC_F_EXPERTS,
    EPC_F_TABLE,
    EPC_F_WEIGHTS,
    EPC_F_SCALE,
    EPC_F_LAYOUT,
    EPC_F_ALIGNMENT,
    EPC_F_HANDLE,
    EPC_F_MASK,
    EPC_AGREED,
    EPC_F_REJECT = EPC_AGREED, /* 0, or the word of why this rank refuses the call */
    EPC_F_PLACE,               /* dispatch: of the region rows go to; combine: of y */
    EPC_F_OFFSET_LO,
    EPC_F_OFFSET_HI,
    EPC_F_BYTES_LO, /* dispatch: of the region */
    EPC_F_BYTES_HI,
    EPC_F_WORST,  /* dispatch: num_worst_tokens */
    EPC_F_STRIDE, /* combine: bytes from row to row of y */
    EPC_F_PLACE2, /* combine: of the weights to sum */
    EPC_F_OFFSET2_LO,
    EPC_F_OFFSET2_HI,
    EPC_F_STRIDE2, /* floats from row to row of the weights */
    EPC_F_SUMS,    /* combine in verify mode: place of the checksums of y */
    EPC_F_SUMS_AT, /* offset there in units of EPC_ALIGN */
    EPC_NUM_FIELDS,
    /* dispatch: free pieces beside the region, the largest first, in units of EPC_PIECE_UNIT */
    EPC_F_PIECES = EPC_F_PLACE2
};
#define EPC_HEADER_WORDS 32

/* Each source's flags in each window fill a line that only it writes. */
enum epc_flag {
    EPC_FLAG_DONE,      /* epoch of the source's last finished normal call */
    EPC_FLAG_ABORT = 2, /* a word of 64 bits: why it gave up the normal call of that epoch */
    EPC_FLAG_LL = 4,    /* low latency, EPC_LL_FLAGS for each of two results */
    EPC_NUM_FLAGS = 32
};
enum epc_ll_flag {
    EPC_LL_ROWS,
    EPC_LL_PULLED,
    EPC_LL_Y,
    EPC_LL_READ,
    EPC_LL_ABORT,       /* as EPC_FLAG_ABORT, of a dispatch */
    EPC_LL_ABORT_Y = 6, /* of a combine */
    EPC_LL_FLAGS = 8
};

/* Why a call was given up, passed on as it is by those that only hear of it: the rank that failed
   first below, its ep_status above, then what is known besides: of a timeout 1 + the lowest rank
   that was not heard from, else the number of a text (reasons.c), or 0. Never 0 as a whole. */
#define EPC_WHY(rank, status, more) \
    ((uint32_t)(rank) | (uint32_t)(status) << 8 | (uint32_t)(more) << 16)

/* Head of a window: flags, headers, then counts. */
EPC_HD size_t epc_flags_offset(int source)
{
    return (size_t)source * EPC_NUM_FLAGS * sizeof(uint32_t);
}
EPC_HD size_t epc_header_offset(int num_ranks, int source)
{
    return epc_flags_offset(num_ranks) + (size_t)source * EPC_HEADER_WORDS * 8;
}
EPC_HD size_t epc_counts_offset(int num_ranks, int max_experts, int source)
{
    return epc_header_offset(num_ranks, num_ranks) + (size_t)source * (num_ranks + max_experts) * 8;
}
EPC_HD size_t epc_control_bytes(int num_ranks, int max_experts)
{
    return epc_counts_offset(num_ranks, max_experts, num_ranks);
}

/* Why a call failed, as the kernel reports it. */
enum epc_fail {
    EPC_OK,
    EPC_FAIL_TIMEOUT,   /* late: ranks not heard from */
    EPC_FAIL_ABORTED,   /* detail[0]: why */
    EPC_FAIL_MISMATCH,  /* detail[0]: field, [1], [2]: two ranks, [3], [4]: their values */
    EPC_FAIL_CAPACITY,  /* detail[0]: rank, [1], [2]: bytes needed, [3]: 0, EPC_CANT_WAIT or the
                           bound that [1] rows exceed, [4]: rows */
    EPC_FAIL_ID,        /* detail[0]: token, [1]: place, [2], [3]: the id, [4]: experts */
    EPC_FAIL_DUPLICATE, /* detail[0]: token, [1]: place, [2]: the id */
    EPC_FAIL_CORRUPT,   /* detail[0]: row, [1]: its rank, [2]: epc_corrupt, [3], [4]: tokens */
    EPC_FAIL_OVERFLOW,  /* detail[0]: expert, [1]: its rank, [2]: rows, [3]: max_expert_rows */
    EPC_FAIL_REFUSED    /* this rank did not take part; detail[0]: why */
};

/* What verify mode found. */
enum epc_corrupt {
    EPC_CORRUPT_ROW,     /* dispatch: its checksum is not that of what was sent */
    EPC_CORRUPT_ORDER,   /* dispatch: [3] does not come after [4] */
    EPC_CORRUPT_TOKEN,   /* low latency: token [3] of the rank, as it was read */
    EPC_CORRUPT_OUTPUTS, /* combine: a row as token [3]'s owner read it */
    EPC_CORRUPT_SUM      /* combine: the sum of token [3] is not the reference's */
};

#define EPC_CANT_WAIT 0xffffffffu /* some rank can't wait for windows to grow */

/* State of a buffer in the device's private memory. */
typedef struct epc_state {
    uint32_t epoch;   /* of the last finished normal call */
    uint32_t arrived; /* blocks that reached the grid's barrier */
    uint32_t exited;  /* blocks that finished */
    uint32_t next;    /* token, or item of a combine, that nobody has taken */
    uint32_t fail;    /* epc_fail of the running call; the first one stays */
    uint32_t failed;  /* epoch of the last normal call that failed */
    uint32_t undone;  /* of the last that no rank can have completed */
    uint32_t unused;
    uint32_t detail[6];
    uint64_t late;
    uint32_t ll_epoch[2];   /* of the dispatch that each low-latency result is of */
    uint32_t ll_combine[2]; /* of the combine */
    uint32_t ll_failed[2];  /* epoch of the last dispatch that this rank could not send */
} epc_state;

/* What a kernel tells the host, in pinned memory that both see. */
typedef struct epc_report { /* 8-byte aligned */
    uint32_t done;          /* serial of the call, once it has finished */
    uint32_t fail;          /* epc_fail; written together with `done` */
    uint32_t counted;       /* serial of the call, once the counts below are there */
    uint32_t fits;          /* with it: 1 when every rank has room for its rows */
    uint32_t detail[6];
    uint64_t late;
    int64_t num_rows; /* received rows that hold a token */
    int64_t rows;     /* with padding */
    /* int32_t rows_between[R * R], tokens_per_expert[L], worst wait follow */
} epc_report;
EPC_HD int32_t *epc_report_matrix(epc_report *report)
{
    return (int32_t *)(report + 1);
}
EPC_HD int32_t *epc_report_experts(epc_report *report, int num_ranks)
{
    return epc_report_matrix(report) + num_ranks * num_ranks;
}

/* A buffer as kernels see it; part of every kernel's arguments, so that reading it costs nothing.
 */
typedef struct epc_comm {
    int32_t rank, num_ranks, max_experts;
    uint64_t masked; /* ranks that nobody waits for or sends to */
    epc_state *state;
    uint8_t *const *places;         /* [EPC_MAX_PLACES * EPC_MAX_RANKS] on the device */
    uint8_t *window[EPC_MAX_RANKS]; /* place 0 of each rank: begins with the control words */
} epc_comm;

/* Element kinds of kernels; values of ep_dtype. */
enum { EPC_BF16 = 1, EPC_F16 = 2, EPC_F32 = 3, EPC_E4M3 = 4 };

/* Verify mode: what travels with a row of the normal mode. */
typedef struct epc_seal {
    uint64_t sum; /* codec/checksum.h, of row, scales and token */
    int32_t rank, token;
} epc_seal;

/* Arrays of `rows` received rows, in this order in the receiver's region. Every sender computes
   the same offsets. Source tokens come first: they stay with the handle when the rest is freed. */
typedef struct epc_row_shape {
    int64_t row_bytes;   /* of x on the wire */
    int32_t scale_bytes; /* 0: no scales */
    int32_t id_bytes;    /* of all top-k ids of a row; 0: none */
    int32_t weight_bytes;
    int32_t checksum_bytes; /* of an epc_seal in verify mode, else 0 */
} epc_row_shape;

typedef struct epc_region {
    int64_t x, scales, ids, weights, checksums, end; /* source tokens are at 0 */
} epc_region;

EPC_HD int64_t epc_round(int64_t bytes)
{
    return (bytes + EPC_ALIGN - 1) / EPC_ALIGN * EPC_ALIGN;
}
EPC_HD epc_region epc_region_of(const epc_row_shape *shape, int64_t rows)
{
    epc_region region;
    region.x = epc_round(rows * (int64_t)sizeof(int32_t));
    region.scales = region.x + epc_round(rows * shape->row_bytes);
    region.ids = region.scales + epc_round(rows * shape->scale_bytes);
    region.weights = region.ids + epc_round(rows * shape->id_bytes);
    region.checksums = region.weights + epc_round(rows * shape->weight_bytes);
    region.end = region.checksums + epc_round(rows * shape->checksum_bytes);
    return region;
}

/* Blocks of the window that calls which follow a dispatch can come to need at once and can't wait
   for: the result of a cached dispatch, that of a backward of combine, and a copy of rows where
   peers don't reach them. The largest of them, for a result of `end` bytes and `rows` rows: */
#define EPC_FOLLOWERS 3
/* `spare`, bytes a row of such a copy or result: the row, its weights, its token and checksum. */
EPC_HD int64_t epc_spare_row(int64_t hidden, int dtype, int topk)
{
    return hidden * (dtype == EPC_F32 ? 4 : 2) + 4 * (int64_t)topk + 4 + 8;
}
EPC_HD int64_t epc_follower_bytes(int64_t end, int64_t rows, int64_t spare)
{
    int64_t follow = epc_round(rows * spare) + 3 * EPC_ALIGN; /* arrays, each rounded up */
    return follow > end ? follow : end;
}

/* Whether a region of `end` bytes fits the first of the pieces, and what may follow it what is left
   of them. All are taken as blocks of the largest, so they fit in whatever order they come and go.
 */
EPC_HD int epc_has_room(const int64_t *pieces, int64_t end, int64_t rows, int64_t spare)
{
    int64_t left = pieces[0] - end, largest = epc_follower_bytes(end, rows, spare);
    if (left < 0 || rows == 0 || spare == 0)
        return left >= 0;
    int64_t count = left / largest;
    for (int i = 1; i < EPC_PIECES; i++)
        count += pieces[i] / largest;
    return count >= EPC_FOLLOWERS;
}

/* An entry of a send list: destination rank above, its row below; -1: not sent. */
typedef int64_t epc_entry;

/* Arguments of the dispatch kernel. */
typedef struct epc_dispatch_params {
    epc_comm comm;
    epc_report *report;
    uint32_t serial;            /* 0: reports failures only (captured calls) */
    uint32_t field[EPC_AGREED]; /* what this rank says of the call */
    uint32_t reject;            /* why, when the host refuses the call */
    int64_t timeout_ns;

    const uint8_t *x;
    int64_t x_stride; /* bytes between rows */
    const uint8_t *scales;
    int64_t scale_row, scale_column; /* strides of given scales, in elements */
    const uint8_t *ids;
    int64_t id_stride; /* elements between rows */
    const float *weights;
    int64_t weight_stride;

    int32_t num_tokens, hidden, topk, num_experts, num_local;
    int32_t id_bytes, dtype, quantise, scale_kind; /* quantise: dtype is the input's */
    int32_t by_expert, alignment, cached, bulk, verify;
    int32_t second_half; /* takes no part when the call before was undone */
    int64_t load_bytes;  /* of a row of x */
    int64_t spare; /* bytes a row of each call that may follow: epc_has_room; alike on all ranks */
    int64_t worst;
    const int32_t *expert_rank;  /* [E] */
    const int32_t *expert_local; /* [E] local id at its rank */
    const int32_t *expert_order; /* [E] experts by (rank, local id) */
    epc_row_shape shape;
    int32_t scale_count; /* scale words of a row */

    /* of the handle, in this rank's own memory */
    epc_entry *entries;      /* [T, width] */
    int32_t width;           /* K */
    int32_t *rows_at;        /* [R] rows of the region of each receiver */
    int32_t *matrix;         /* [R * R] rows between ranks */
    const float *row_weight; /* [T, width], or NULL */
    int64_t row_weight_stride;
    int32_t weighted; /* rows are multiplied by row_weight, or 1 */
    /* scratch */
    epc_entry *drafts;         /* [T, width] entries before sums are added */
    int32_t *unit_counts;      /* [columns, units] */
    int32_t *block_experts;    /* [E, blocks]; by token */
    int32_t unit_shift, units; /* a unit has 1 << unit_shift tokens */
    /* how shared memory is used: each mover has a stage of slots, then a slot of codes */
    int32_t layout_warps, movers, sides, row_pieces, piece_bytes, slots, slot_bytes, stage_bytes;
    int32_t early; /* stages lie behind the layout's words: rows can be brought at once */

    /* verify mode */
    uint8_t *seal_scratch; /* [warps] rows as they go on the wire, seal_bytes each */
    int64_t seal_bytes;
    int64_t flip; /* a test's: 1 + the row in which a bit flips */

    /* this rank's region, and small arrays of the result */
    int32_t place;
    int64_t offset, pieces[EPC_PIECES]; /* free memory: of the region, and beside it */
    uint8_t *region;
    int32_t *source_offset; /* [R + 1] */
    int32_t *expert_offset; /* [L + 1], by expert */
    int32_t *expert_tokens; /* [L] rounded up to the alignment */
    int32_t *expert_filled; /* [L] not rounded */
} epc_dispatch_params;

/* Arguments of the combine kernel. */
typedef struct epc_combine_params {
    epc_comm comm;
    epc_report *report;
    uint32_t serial;
    uint32_t field[EPC_AGREED];
    uint32_t reject;
    int64_t timeout_ns;

    int32_t place, place2; /* where this rank's y and weights are */
    int64_t offset, offset2;
    uint32_t stride, stride2; /* of y in bytes, of the weights in floats */
    int32_t dtype, hidden, num_tokens, topk;
    const epc_entry *entries; /* [T, width] */
    int32_t width, by_expert, bulk;
    const float *weights; /* [T, width] applied to rows, or NULL: 1 */
    int64_t weight_stride;
    const uint8_t *bias[2];
    int64_t bias_stride[2]; /* bytes */
    uint8_t *out;
    int64_t out_stride; /* bytes */
    float *out_weights; /* [T, K], or NULL */
    int64_t out_weight_stride;
    int32_t pieces, piece_bytes, slots;
    int32_t streams;            /* bulk: a ring of each warp instead of one of the block */
    int32_t verify, sums_place; /* checksums of this rank's y */
    int64_t sums_offset;
    /* by expert: dot products of rows with `dot` [T, H], to out_weights */
    const uint8_t *dot;
    int64_t dot_stride;
} epc_combine_params;

/* Arguments of the kernel that makes checksums of rows before a combine. */
typedef struct epc_seal_params {
    uint8_t *y;
    int64_t stride, rows, row_bytes;
    uint64_t *sums; /* [rows] */
    int64_t flip;   /* as in dispatch; after the row's sum was made */
} epc_seal_params;

/* ---------------------------------------------------------------- low latency */

/* What a rank tells the others when it lets them read expert outputs. */
enum epc_y_field {
    EPC_Y_PLACE,
    EPC_Y_OFFSET_LO,
    EPC_Y_OFFSET_HI,
    EPC_Y_STRIDE,
    EPC_Y_ENCODED,
    EPC_Y_FIELDS
};
#define EPC_Y_FAILED 2u /* in EPC_Y_ENCODED of a rank that gave the call up; in the rest: why */

/* One result's area, the same layout on every rank; 64-bit words carry their epoch. */
typedef struct epc_ll_area {
    int64_t bits;   /* words [R, experts of the rank, W]: bit t%32 of word t/32: that token of the
                       source   goes to the expert; written by the source */
    int64_t begin;  /* words [E]: first row of this rank's tokens within each expert's; by the
                       expert's rank */
    int64_t fields; /* words [R, EPC_Y_FIELDS] */
    int64_t counts; /* words [R, E] of a source's rows for each expert, where one may overflow */
    int64_t rows;   /* [M, H] of the wire */
    int64_t scales; /* [M, scale words] */
    int64_t sums;   /* uint64 [M] of the tokens, verify mode */
    int64_t y;      /* [L, S, H] BF16, the send buffer; encoded outputs too */
    int64_t heads;  /* [L, S, head_bytes] of encoded outputs */
    int64_t y_sums; /* uint64 [L, S], verify mode */
    int64_t bytes;
} epc_ll_area;

/* Marks of a bitmap: bits that are set in each EPC_MARK words of it. */
#define EPC_MARK 32
#define EPC_MARKS(words) (((words) + EPC_MARK - 1) / EPC_MARK)

/* How a receive moves rows in bulk. */
#define EPC_LL_LIST 256       /* rows that a block lists at a time */
#define EPC_LL_PIECE 3584     /* at most, of a row: two for each moving warp */
#define EPC_LL_MOST_MOVERS 29 /* of a block's warps; the others see to scales */
#define EPC_LL_LEAST_MOVERS 8 /* with fewer, rows go through registers */

/* A row to fetch. */
typedef struct epc_ll_row {
    int source, token, expert; /* expert: local */
    int64_t row;               /* of the result */
} epc_ll_row;

/* Arguments of the four low-latency kernels; each uses what it needs. */
typedef struct epc_ll_params {
    epc_comm comm;
    epc_report *report;
    uint32_t serial;
    int64_t timeout_ns;
    uint32_t refused; /* why, when this rank only tells the others that it does not take part */
    int32_t overlap;  /* the kernel's launch may overlap the end of the kernel ahead of it */
    int32_t slot, hidden, topk, num_experts, num_local, num_tokens;
    int32_t max_tokens, words; /* M, and 32-bit words of a bitmap of M bits */
    int32_t expert_rows;       /* S */
    int32_t overflow_fails;    /* an expert may get more, which is an error */
    int32_t quantise, scale_kind, scale_count, scales_by_column;
    int64_t row_bytes;
    epc_ll_area area;
    uint8_t *area_of[EPC_MAX_RANKS]; /* the slot's area at each rank */
    int32_t max_local;               /* the most experts of any rank: stride of bits */

    /* what shared memory has no room for: then bitmaps received are read where they are, and the
       bitmaps that blocks tell [blocks, experts of each, W], or each block's tables of a receive,
       lie on the device; NULL: in shared memory */
    int32_t many;
    uint32_t *far_bits;
    int32_t *far_tables;
    int64_t far_table_bytes; /* of a block */
    const int32_t *expert_rank, *expert_local, *expert_order;
    int32_t first_expert; /* of this rank's in expert_order */

    /* send */
    const uint8_t *x;
    int64_t x_stride;
    const uint8_t *ids;
    int64_t id_stride;
    int32_t id_bytes, verify;
    int64_t flip;       /* as in dispatch: 1 + the token, or output, in which a bit flips */
    int32_t *saved_ids; /* [T, K] of the handle */
    int32_t *position;  /* [T, K] among this rank's tokens of the expert */

    /* receive */
    uint8_t *recv_x; /* [L, S, H] */
    uint32_t *recv_scales;
    int32_t *count, *dropped, *source_token;
    int64_t *range; /* [L, R] */
    int32_t *expert_tokens;
    int64_t expert_tokens_stride;
    int64_t *wait_cost;
    int64_t wait_cost_stride;

    /* combine */
    uint32_t field[EPC_Y_FIELDS];
    const uint8_t *y; /* to be copied or encoded to the area; NULL: read in place */
    int64_t y_expert_stride, y_row_stride; /* bytes */
    int32_t encode, outside;               /* outside: y is read in place, and not in the area */
    int32_t head_bytes;
    const float *weights;
    int64_t weight_stride;
    uint8_t *out;
    int64_t out_stride;
    epc_entry *entries; /* scratch [T, K], or NULL: in shared memory, before the ring */
    int32_t bulk, pieces, piece_bytes, slots;
} epc_ll_params;

#endif
