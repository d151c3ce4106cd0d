/* SPDX-License-Identifier: MIT */
/*
 * Times the traditional path (mpi_path.h) on the workload of `entrepot bench
 * ep`, which starts this program through mpirun with its own options. Rank 0
 * prints one "KEY VALUE [TEXT]" line for each result.
 */
#include "check.h"
#include "exit.h"
#include "mpi_path.h"
#include "options.h"
#include "span.h"

#include <stdio.h>
#include <stdlib.h>

static const char *const exchange_names[] = {"alltoallv", "isend/irecv"};

typedef struct baseline {
    workload load;
    int64_t iters, warmup;
    bool check;
    mpi_path path;
    int rank;
    int32_t *ids;
    float *weights;
    uint16_t *x, *y, *out;
    double *us[2][MPI_EXCHANGE_COUNT]; /* dispatch, combine: [iters] of this rank */
} baseline;

static bool alloc_inputs(baseline *b)
{
    const workload *w = &b->load;
    size_t entries = (size_t)(w->num_tokens * w->topk) + 1;
    size_t elements = (size_t)(w->num_tokens * w->hidden);
    b->ids = malloc(entries * sizeof *b->ids);
    b->weights = malloc(entries * sizeof *b->weights);
    b->x = aligned_alloc(64, (elements * sizeof *b->x + 64) & ~(size_t)63);
    b->out = aligned_alloc(64, (elements * sizeof *b->out + 64) & ~(size_t)63);
    if (!b->ids || !b->weights || !b->x || !b->out ||
        !workload_routing(w, b->rank, b->ids, b->weights))
        return false;
    for (int64_t t = 0; t < w->num_tokens; t++)
        workload_row(w, b->rank, t, b->x + t * w->hidden);
    memset(b->out, 0xff, elements * sizeof *b->out);
    for (int i = 0; i < 2 * MPI_EXCHANGE_COUNT; i++) {
        b->us[i % 2][i / 2] = calloc((size_t)b->iters, sizeof(double));
        if (!b->us[i % 2][i / 2])
            return false;
    }
    return true;
}

/* The experts of check.h, on the rows received. */
static bool run_experts(baseline *b)
{
    const workload *w = &b->load;
    size_t elements = (size_t)(b->path.num_rows * w->hidden);
    b->y = aligned_alloc(64, (elements * sizeof *b->y + 64) & ~(size_t)63);
    for (int64_t i = 0; b->y && i < b->path.num_rows; i++) {
        float weight = 0;
        for (int k = 0; k < w->topk; k++)
            weight += b->path.recv_weights[i * w->topk + k];
        for (int64_t h = 0; h < w->hidden; h++)
            b->y[i * w->hidden + h] =
                bf16_from_float(weight * float_from_bf16(b->path.recv[i * w->hidden + h]));
    }
    return b->y != NULL;
}

static void iterate(baseline *b, int64_t iteration, enum mpi_exchange how)
{
    double start[2], end[2];
    MPI_Barrier(MPI_COMM_WORLD);
    start[0] = MPI_Wtime();
    mpi_path_dispatch(&b->path, how, b->ids, b->weights, b->x);
    end[0] = MPI_Wtime();
    MPI_Barrier(MPI_COMM_WORLD);
    start[1] = MPI_Wtime();
    mpi_path_combine(&b->path, how, b->y, b->out);
    end[1] = MPI_Wtime();
    for (int phase = 0; phase < 2 && iteration >= 0; phase++)
        b->us[phase][how][iteration] = (end[phase] - start[phase]) * 1e6;
}

/* Median over iterations of the slowest rank; on rank 0. */
static void print_phase(baseline *b, int phase, const char *key)
{
    double best = 0;
    int how = 0;
    for (int e = 0; e < MPI_EXCHANGE_COUNT; e++) {
        void *from = b->rank == 0 ? MPI_IN_PLACE : (void *)b->us[phase][e];
        MPI_Reduce(from, b->us[phase][e], (int)b->iters, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        double us = median(b->us[phase][e], (size_t)b->iters);
        if (e == 0 || us < best) {
            best = us;
            how = e;
        }
    }
    if (b->rank == 0)
        printf("%s %.3f %s\n", key, best, exchange_names[how]);
}

static bool check(baseline *b)
{
    const workload *w = &b->load;
    char message[CHECK_MESSAGE_MAX];
    ep_recv recv = EP_RECV_INIT;
    recv.num_rows = b->path.num_rows;
    recv.x = ep_tensor_2d(b->path.recv, EP_BF16, recv.num_rows, w->hidden);
    recv.topk_idx = ep_tensor_2d(b->path.recv_ids, EP_I32, recv.num_rows, w->topk);
    recv.topk_weights = ep_tensor_2d(b->path.recv_weights, EP_F32, recv.num_rows, w->topk);
    int good = check_dispatch(w, b->rank, false, &recv, message) &&
               check_combine(w, b->rank, false, b->out, message);
    if (!good)
        fprintf(stderr, "MPI baseline: rank %d: %s\n", b->rank, message);
    MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    return good;
}

static void print_library(void)
{
    char version[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(version, &length);
    version[strcspn(version, ",\n")] = 0;
    printf("library 0 %s\n", version);
}

static int run(baseline *b)
{
    if (!mpi_path_create(&b->load, b->rank, &b->path) || !alloc_inputs(b)) {
        fprintf(stderr, "MPI baseline: rank %d: out of memory\n", b->rank);
        return EXIT_RUNTIME;
    }
    mpi_path_dispatch(&b->path, MPI_EXCHANGE_ALLTOALLV, b->ids, b->weights, b->x);
    if (!run_experts(b)) {
        fprintf(stderr, "MPI baseline: rank %d: out of memory\n", b->rank);
        return EXIT_RUNTIME;
    }
    for (int64_t i = -b->warmup; i < b->iters; i++) {
        for (int how = 0; how < MPI_EXCHANGE_COUNT; how++)
            iterate(b, i, (enum mpi_exchange)how);
    }
    print_phase(b, 0, "dispatch");
    print_phase(b, 1, "combine");
    if (b->rank == 0)
        print_library();
    return !b->check || check(b) ? EXIT_OK : EXIT_CHECK_FAILED;
}

static void release(baseline *b)
{
    mpi_path_free(&b->path);
    free(b->ids);
    free(b->weights);
    free(b->x);
    free(b->y);
    free(b->out);
    for (int i = 0; i < 2 * MPI_EXCHANGE_COUNT; i++)
        free(b->us[i % 2][i / 2]);
}

static int misuse(const char *name, const char *path, const char *message)
{
    fprintf(stderr, "MPI baseline: %s %s: %s\n", name, path, message);
    return EXIT_USAGE;
}

static int parse(int argc, char **argv, baseline *b, trace *routing, placement *plan)
{
    int64_t seed = 1, topk = 8, layer = 0;
    const char *path = NULL, *plan_path = NULL;
    char message[PLACEMENT_MESSAGE_MAX];
    const option table[] = {
        OPTION_INTEGER("tokens", "T", &b->load.num_tokens, 0, 1 << 20, "tokens per rank"),
        OPTION_INTEGER("hidden", "H", &b->load.hidden, 8, 1 << 20, "elements per row"),
        OPTION_INTEGER("topk", "K", &topk, 1, 1024, "experts per token"),
        OPTION_INTEGER("experts", "E", &b->load.num_experts, 1, 1 << 20, "experts"),
        OPTION_INTEGER("iters", "N", &b->iters, 1, 1000000, "timed iterations"),
        OPTION_INTEGER("warmup", "N", &b->warmup, 0, 1000000, "untimed ones before"),
        OPTION_INTEGER("seed", "S", &seed, 0, INT64_MAX, "of rows and routing"),
        OPTION_TEXT("trace", "FILE", &path, "routing"),
        OPTION_TEXT("plan", "FILE", &plan_path, "placement"),
        OPTION_INTEGER("plan-layer", "N", &layer, 0, 1 << 20, "its layer"),
        OPTION_SWITCH("check", &b->check, "compare with the reference"),
    };
    const options_spec spec = {"entrepot-mpi-baseline",
                               "[options], started by mpirun",
                               "The baseline of `entrepot bench ep --baseline mpi`.",
                               table,
                               sizeof table / sizeof table[0],
                               false};
    int code;
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code == EXIT_OK ? -1 : code;
    b->load.topk = (int)topk;
    b->load.seed = (uint64_t)seed;
    if (path && !trace_load(path, (int)topk, b->load.num_experts, routing, message))
        return misuse("--trace", path, message);
    b->load.trace = path ? routing : NULL;
    if (!plan_path)
        return EXIT_OK;
    if (!placement_load(plan_path, layer, b->load.num_experts, b->load.num_ranks, plan, message))
        return misuse("--plan", plan_path, message);
    b->load.placement = plan;
    b->load.num_experts = plan->slots;
    return EXIT_OK;
}

int main(int argc, char **argv)
{
    baseline b = {
        .load = {.num_tokens = 1024, .hidden = 7168, .num_experts = 256}, .iters = 20, .warmup = 3};
    trace routing = {0};
    placement plan = {0};
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &b.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &b.load.num_ranks);
    int code = parse(argc, argv, &b, &routing, &plan);
    if (code == EXIT_OK)
        code = run(&b);
    if (code == EXIT_OK || code == EXIT_CHECK_FAILED) {
        release(&b);
        MPI_Finalize();
    } else if (code > 0) {
        MPI_Abort(MPI_COMM_WORLD, code);
    } else {
        MPI_Finalize();
        code = EXIT_OK;
    }
    trace_free(&routing);
    placement_free(&plan);
    return code;
}
