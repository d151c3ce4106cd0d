/* SPDX-License-Identifier: MIT */
/*
 * The traditional path of expert parallelism over MPI: find each token's ranks,
 * pack rows by rank, exchange counts, exchange rows and their routing; and for
 * combine exchange the expert outputs back and sum them.
 *
 * Written to be hard to beat by its own means: a token goes to a rank once, the
 * rank's own rows skip packing and MPI, rows arrive in their final place (no
 * unpacking), buffers are allocated and warm before the first call, expert
 * outputs are sent from where they are, and sums use the widest vectors.
 */
#ifndef BENCH_MPI_PATH_H
#define BENCH_MPI_PATH_H

#include "workload.h"

#include <mpi.h>
#include <stddef.h>

/* How rows are exchanged; both are timed, the faster counts. */
enum mpi_exchange { MPI_EXCHANGE_ALLTOALLV, MPI_EXCHANGE_SENDRECV, MPI_EXCHANGE_COUNT };

typedef struct mpi_path {
    const workload *load;
    int rank, num_ranks;
    MPI_Datatype row;                     /* hidden BF16 elements */
    MPI_Datatype meta;                    /* topk ids and topk weights */
    int *send_count, *send_start;         /* [num_ranks] rows; own rows are not packed */
    int *recv_count, *recv_start;         /* [num_ranks] rows, own ones included */
    int *recv_remote;                     /* recv_count with 0 for this rank */
    int32_t *slot;                        /* [tokens, num_ranks] packed row, own: row at
                                             recv_start; -1: the token does not go there */
    uint16_t *send, *recv, *back;         /* packed rows, received rows, returned outputs */
    unsigned char *send_meta, *recv_meta; /* ids, then weights, of each row */
    int32_t *recv_ids;                    /* [rows, topk] local ids */
    float *recv_weights;                  /* [rows, topk] */
    MPI_Request *requests;                /* [2 * num_ranks] */
    const void **terms;                   /* [num_ranks] rows of one sum */
    int64_t num_rows;                     /* received */
} mpi_path;

/* False when out of memory. */
int mpi_path_create(const workload *load, int rank, mpi_path *p);
void mpi_path_free(mpi_path *p);

void mpi_path_dispatch(mpi_path *p, enum mpi_exchange how, const int32_t *ids, const float *weights,
                       const uint16_t *x);

/* `y` [num_rows, hidden], `out` [tokens, hidden] */
void mpi_path_combine(mpi_path *p, enum mpi_exchange how, const uint16_t *y, uint16_t *out);

#endif
