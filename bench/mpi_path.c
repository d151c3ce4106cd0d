/* SPDX-License-Identifier: MIT */
#include "mpi_path.h"

#include "vector.h"

#include <stdlib.h>
#include <string.h>

/* Memory that is written once, so that no timed call meets a fresh page. */
static void *warm_alloc(size_t bytes)
{
    size_t rounded = (bytes + 64) & ~(size_t)63;
    void *memory = aligned_alloc(64, rounded);
    if (memory)
        memset(memory, 1, rounded);
    return memory;
}

static size_t meta_bytes(const mpi_path *p)
{
    return (size_t)p->load->topk * (sizeof(int32_t) + sizeof(float));
}

/* Where the tokens of this rank go: counts, and the packed row of each (token, rank). */
static void find_ranks(mpi_path *p, const int32_t *ids)
{
    const workload *w = p->load;
    int64_t local = w->num_experts / p->num_ranks;
    memset(p->send_count, 0, (size_t)p->num_ranks * sizeof *p->send_count);
    memset(p->slot, 0xff, (size_t)(w->num_tokens * p->num_ranks) * sizeof *p->slot);
    for (int64_t t = 0; t < w->num_tokens; t++) {
        for (int k = 0; k < w->topk; k++) {
            int32_t id = ids[t * w->topk + k];
            if (id < 0)
                continue;
            int32_t *slot = &p->slot[t * p->num_ranks + id / local];
            if (*slot < 0)
                *slot = p->send_count[id / local]++;
        }
    }
}

static int64_t starts_of(const int *count, int n, int skip, int *start)
{
    int sum = 0;
    for (int r = 0; r < n; r++) {
        start[r] = sum;
        sum += r == skip ? 0 : count[r];
    }
    return sum;
}

/* The largest number of rows that any rank receives, found without timing it. */
static int most_rows(mpi_path *p, int *sent)
{
    const workload *w = p->load;
    size_t entries = (size_t)(w->num_tokens * w->topk) + 1;
    int32_t *ids = malloc(entries * sizeof *ids);
    float *weights = malloc(entries * sizeof *weights);
    int rows = -1;
    if (ids && weights && workload_routing(w, p->rank, ids, weights)) {
        find_ranks(p, ids);
        MPI_Alltoall(p->send_count, 1, MPI_INT, p->recv_count, 1, MPI_INT, MPI_COMM_WORLD);
        rows = (int)starts_of(p->recv_count, p->num_ranks, -1, p->recv_start);
        *sent = (int)starts_of(p->send_count, p->num_ranks, p->rank, p->send_start);
    }
    free(ids);
    free(weights);
    return rows;
}

static int alloc_tables(mpi_path *p)
{
    size_t n = (size_t)p->num_ranks;
    p->send_count = malloc(n * sizeof(int));
    p->send_start = malloc(n * sizeof(int));
    p->recv_count = malloc(n * sizeof(int));
    p->recv_start = malloc(n * sizeof(int));
    p->recv_remote = malloc(n * sizeof(int));
    p->requests = malloc(2 * n * sizeof(MPI_Request));
    p->terms = malloc(n * sizeof *p->terms);
    p->slot = warm_alloc((size_t)p->load->num_tokens * n * sizeof *p->slot);
    return p->send_count && p->send_start && p->recv_count && p->recv_start && p->recv_remote &&
           p->requests && p->terms && p->slot;
}

static int alloc_rows(mpi_path *p)
{
    size_t row = (size_t)p->load->hidden * sizeof(uint16_t), topk = (size_t)p->load->topk;
    int sent = 0, received = most_rows(p, &sent);
    if (received < 0)
        return 0;
    p->send = warm_alloc((size_t)sent * row);
    p->back = warm_alloc((size_t)sent * row);
    p->send_meta = warm_alloc((size_t)p->load->num_tokens * (size_t)p->num_ranks * meta_bytes(p));
    p->recv = warm_alloc((size_t)received * row);
    p->recv_meta = warm_alloc((size_t)received * meta_bytes(p));
    p->recv_ids = warm_alloc((size_t)received * topk * sizeof *p->recv_ids);
    p->recv_weights = warm_alloc((size_t)received * topk * sizeof *p->recv_weights);
    return p->send && p->back && p->send_meta && p->recv && p->recv_meta && p->recv_ids &&
           p->recv_weights;
}

int mpi_path_create(const workload *load, int rank, mpi_path *p)
{
    memset(p, 0, sizeof *p);
    p->load = load;
    p->rank = rank;
    p->num_ranks = load->num_ranks;
    MPI_Type_contiguous((int)(load->hidden * 2), MPI_BYTE, &p->row);
    MPI_Type_commit(&p->row);
    MPI_Type_contiguous((int)meta_bytes(p), MPI_BYTE, &p->meta);
    MPI_Type_commit(&p->meta);
    return alloc_tables(p) && alloc_rows(p);
}

void mpi_path_free(mpi_path *p)
{
    MPI_Type_free(&p->row);
    MPI_Type_free(&p->meta);
    free(p->send_count);
    free(p->send_start);
    free(p->recv_count);
    free(p->recv_start);
    free(p->recv_remote);
    free(p->requests);
    free(p->terms);
    free(p->slot);
    free(p->send);
    free(p->back);
    free(p->send_meta);
    free(p->recv);
    free(p->recv_meta);
    free(p->recv_ids);
    free(p->recv_weights);
}

/* Sends and receives one kind of row between all pairs of different ranks. */
static void exchange(mpi_path *p, enum mpi_exchange how, MPI_Datatype type, const void *from,
                     const int *from_count, const int *from_start, void *to, const int *to_count,
                     const int *to_start)
{
    if (how == MPI_EXCHANGE_ALLTOALLV) {
        MPI_Alltoallv(from, from_count, from_start, type, to, to_count, to_start, type,
                      MPI_COMM_WORLD);
        return;
    }
    int size, n = 0;
    MPI_Type_size(type, &size);
    for (int i = 1; i < p->num_ranks; i++) {
        int r = (p->rank + p->num_ranks - i) % p->num_ranks;
        if (to_count[r] > 0)
            MPI_Irecv((char *)to + (size_t)to_start[r] * (size_t)size, to_count[r], type, r, 0,
                      MPI_COMM_WORLD, &p->requests[n++]);
    }
    for (int i = 1; i < p->num_ranks; i++) {
        int r = (p->rank + i) % p->num_ranks;
        if (from_count[r] > 0)
            MPI_Isend((const char *)from + (size_t)from_start[r] * (size_t)size, from_count[r],
                      type, r, 0, MPI_COMM_WORLD, &p->requests[n++]);
    }
    MPI_Waitall(n, p->requests, MPI_STATUSES_IGNORE);
}

static void pack_meta(const mpi_path *p, const int32_t *ids, const float *weights, int64_t t,
                      unsigned char *to)
{
    size_t topk = (size_t)p->load->topk;
    memcpy(to, ids + (size_t)t * topk, topk * sizeof *ids);
    memcpy(to + topk * sizeof *ids, weights + (size_t)t * topk, topk * sizeof *weights);
}

static void pack(mpi_path *p, const int32_t *ids, const float *weights, const uint16_t *x)
{
    size_t row = (size_t)p->load->hidden, meta = meta_bytes(p);
    for (int64_t t = 0; t < p->load->num_tokens; t++) {
        for (int r = 0; r < p->num_ranks; r++) {
            int32_t slot = p->slot[t * p->num_ranks + r];
            if (slot < 0)
                continue;
            size_t at = (size_t)slot + (size_t)(r == p->rank ? p->recv_start : p->send_start)[r];
            memcpy((r == p->rank ? p->recv : p->send) + at * row, x + (size_t)t * row,
                   row * sizeof *x);
            pack_meta(p, ids, weights, t, (r == p->rank ? p->recv_meta : p->send_meta) + at * meta);
        }
    }
}

/* Ids of this rank's experts become local ones, other entries -1 and 0. */
static void unpack_meta(mpi_path *p)
{
    const workload *w = p->load;
    int32_t local = (int32_t)(w->num_experts / p->num_ranks);
    size_t topk = (size_t)w->topk;
    for (size_t i = 0; i < (size_t)p->num_rows; i++) {
        const unsigned char *meta = p->recv_meta + i * meta_bytes(p);
        int32_t *ids = p->recv_ids + i * topk;
        float *weights = p->recv_weights + i * topk;
        memcpy(ids, meta, topk * sizeof *ids);
        memcpy(weights, meta + topk * sizeof *ids, topk * sizeof *weights);
        for (size_t k = 0; k < topk; k++) {
            int32_t id = ids[k] - p->rank * local;
            int here = id >= 0 && id < local;
            ids[k] = here ? id : -1;
            weights[k] = here ? weights[k] : 0;
        }
    }
}

void mpi_path_dispatch(mpi_path *p, enum mpi_exchange how, const int32_t *ids, const float *weights,
                       const uint16_t *x)
{
    find_ranks(p, ids);
    MPI_Alltoall(p->send_count, 1, MPI_INT, p->recv_count, 1, MPI_INT, MPI_COMM_WORLD);
    p->num_rows = starts_of(p->recv_count, p->num_ranks, -1, p->recv_start);
    starts_of(p->send_count, p->num_ranks, p->rank, p->send_start);
    memcpy(p->recv_remote, p->recv_count, (size_t)p->num_ranks * sizeof *p->recv_count);
    p->recv_remote[p->rank] = 0;
    p->send_count[p->rank] = 0;
    pack(p, ids, weights, x);
    exchange(p, how, p->meta, p->send_meta, p->send_count, p->send_start, p->recv_meta,
             p->recv_remote, p->recv_start);
    exchange(p, how, p->row, p->send, p->send_count, p->send_start, p->recv, p->recv_remote,
             p->recv_start);
    unpack_meta(p);
}

#define SUM_CHUNK 512

/* out[h] = sum of n rows in their order, in float32, rounded once. */
WIDEST_VECTORS
static void sum_rows(const void *const *terms, int n, int64_t hidden, uint16_t *out)
{
    for (int64_t start = 0; start < hidden; start += SUM_CHUNK) {
        int64_t size = hidden - start < SUM_CHUNK ? hidden - start : SUM_CHUNK;
        float sum[SUM_CHUNK] = {0};
        for (int i = 0; i < n; i++) {
            const uint16_t *row = (const uint16_t *)terms[i] + start;
            for (int64_t h = 0; h < size; h++)
                sum[h] += float_from_bf16(row[h]);
        }
        for (int64_t h = 0; h < size; h++)
            out[start + h] = bf16_from_float(sum[h]);
    }
}

void mpi_path_combine(mpi_path *p, enum mpi_exchange how, const uint16_t *y, uint16_t *out)
{
    int64_t hidden = p->load->hidden;
    exchange(p, how, p->row, y, p->recv_remote, p->recv_start, p->back, p->send_count,
             p->send_start);
    for (int64_t t = 0; t < p->load->num_tokens; t++) {
        int n = 0;
        for (int r = 0; r < p->num_ranks; r++) {
            int32_t slot = p->slot[t * p->num_ranks + r];
            if (slot >= 0)
                p->terms[n++] = r == p->rank ? y + (p->recv_start[r] + slot) * hidden
                                             : p->back + (p->send_start[r] + slot) * hidden;
        }
        sum_rows(p->terms, n, hidden, out + t * hidden);
    }
}
