/* SPDX-License-Identifier: MIT */
/*
 * Two micro-batches overlapped by receive hooks: while the tokens of one are on
 * their way, the other computes, and no thread of the library runs.
 *
 *     entrepot run -n 2 -- example_overlap overlap.json
 *
 * Rank 0 prints the timeline it got and writes all ranks' as Chrome trace events,
 * which Perfetto (ui.perfetto.dev) and chrome://tracing open: a process per rank, a
 * track for computing and one for the library's phases.
 */
#include "entrepot/low_latency.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TOKENS = 32, HIDDEN = 2048, TOPK = 4, EXPERTS = 16, LAYERS = 3, MOST_NOTES = 512 };

typedef struct note {
    int64_t begin_ns, end_ns;
    int32_t batch, computing; /* batch -1: not known */
    char text[48];
} note;

/* What a rank did, in order; passed to rank 0 in the end. */
static struct {
    int64_t count;
    note note[MOST_NOTES];
} diary;

typedef struct batch {
    uint16_t x[TOKENS][HIDDEN];
    int32_t ids[TOKENS][TOPK];
    float weights[TOKENS][TOPK];
    ep_ll_recv recv;
    ep_event *hook;
} batch;

static int current = -1; /* batch whose call is under way, for the notes */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void take_note(const char *name, const char *phase, int64_t begin_ns, int64_t end_ns,
                      int computing)
{
    if (diary.count == MOST_NOTES)
        return;
    note *n = &diary.note[diary.count++];
    *n = (note){.begin_ns = begin_ns, .end_ns = end_ns, .batch = current, .computing = computing};
    snprintf(n->text, sizeof n->text, "%s%s%s", name, *phase ? ": " : "", phase);
}

static void on_phase(void *context, const ep_trace_event *event)
{
    (void)context;
    if (event->end_ns - event->begin_ns > 1000) /* shorter ones would only clutter the picture */
        take_note(event->name, event->phase, event->begin_ns, event->end_ns, 0);
}

/* Ends the program with the library's message unless the call succeeded. */
static void must(ep_status status)
{
    if (status == EP_OK)
        return;
    fprintf(stderr, "example_overlap: %s\n", ep_last_error());
    exit(1);
}

/* Stands for attention or an expert: reads and writes `rows` rows for a while. */
static void compute(const char *what, uint16_t *rows, int64_t count)
{
    int64_t begin = now_ns();
    for (int round = 0; round < 8; round++)
        for (int64_t i = 0; i < count * HIDDEN; i++)
            rows[i] = (uint16_t)(rows[i] ^ (round & 1)); /* in pairs, so nothing changes */
    take_note(what, "", begin, now_ns(), 1);
}

static void fill(batch *b, int rank, int salt)
{
    for (int t = 0; t < TOKENS; t++) {
        for (int h = 0; h < HIDDEN; h++)
            b->x[t][h] = 0x3f80; /* 1.0 */
        for (int k = 0; k < TOPK; k++) {
            b->ids[t][k] = (t * 5 + k + rank + salt) % EXPERTS;
            b->weights[t][k] = 1.0f / TOPK;
        }
    }
}

static void attention(batch *b, int index)
{
    current = index;
    compute("attention", b->x[0], TOKENS);
}

static void send_dispatch(ep_buffer *buffer, batch *b, int index)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_ll_recv none = EP_LL_RECV_INIT;
    current = index;
    args.x = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I32, TOKENS, TOPK);
    args.max_tokens = TOKENS;
    args.num_experts = EXPERTS;
    args.completion = EP_COMPLETE_BY_HOOK;
    b->recv = none;
    must(ep_ll_dispatch(buffer, &args, &b->recv, &b->hook));
}

static void run_hook(batch *b, int index)
{
    current = index;
    must(ep_event_wait(b->hook));
    ep_event_release(b->hook);
    b->hook = NULL;
}

static void experts(batch *b, int index)
{
    const int32_t *count = b->recv.count.data;
    current = index;
    for (int64_t l = 0; l < b->recv.x.shape[0]; l++)
        if (count[l] > 0)
            compute("expert", (uint16_t *)b->recv.x.data + l * b->recv.x.stride[0], count[l]);
}

static void send_combine(ep_buffer *buffer, batch *b, int index)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    current = index;
    args.y = b->recv.x;
    args.topk_idx = ep_tensor_2d(b->ids, EP_I32, TOKENS, TOPK);
    args.topk_weights = ep_tensor_2d(b->weights, EP_F32, TOKENS, TOPK);
    args.handle = b->recv.handle;
    args.out = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN); /* the next layer's input */
    args.completion = EP_COMPLETE_BY_HOOK;
    must(ep_ll_combine(buffer, &args, &b->hook));
}

/* One batch communicates while the other computes, all the way through. */
static void run_layers(ep_buffer *buffer, batch *b)
{
    attention(&b[0], 0);
    send_dispatch(buffer, &b[0], 0);
    for (int layer = 0; layer < LAYERS; layer++) {
        attention(&b[1], 1);
        run_hook(&b[0], 0);
        send_dispatch(buffer, &b[1], 1);
        experts(&b[0], 0);
        run_hook(&b[1], 1);
        send_combine(buffer, &b[0], 0);
        experts(&b[1], 1);
        run_hook(&b[0], 0);
        ep_ll_recv_release(&b[0].recv);
        send_combine(buffer, &b[1], 1);
        if (layer + 1 < LAYERS) {
            attention(&b[0], 0);
            send_dispatch(buffer, &b[0], 0);
        }
        run_hook(&b[1], 1); /* its result is needed only now, by its next attention */
        ep_ll_recv_release(&b[1].recv);
    }
}

static void print_timeline(int64_t origin)
{
    printf("%10s %10s  batch  what\n", "begin us", "us");
    for (int64_t i = 0; i < diary.count; i++) {
        const note *n = &diary.note[i];
        printf("%10.1f %10.1f  %5d  %s\n", (double)(n->begin_ns - origin) / 1e3,
               (double)(n->end_ns - n->begin_ns) / 1e3, (int)n->batch, n->text);
    }
}

static void write_name(FILE *file, int rank, int track, const char *name)
{
    fprintf(file,
            "{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":%d,\"tid\":%d,\"args\":{\"name\":\"%"
            "s\"}},\n",
            rank, track, name);
}

static int write_trace(const char *path, const char *all, int ranks, int64_t origin)
{
    FILE *file = fopen(path, "w");
    if (!file)
        return 1;
    fprintf(file, "{\"traceEvents\":[\n");
    for (int r = 0; r < ranks; r++) {
        write_name(file, r, 0, "library");
        write_name(file, r, 1, "compute");
    }
    for (int r = 0; r < ranks; r++) {
        int64_t count;
        const char *of_rank = all + (size_t)r * sizeof diary;
        memcpy(&count, of_rank, sizeof count);
        for (int64_t i = 0; i < count; i++) {
            note n;
            memcpy(&n, of_rank + sizeof count + (size_t)i * sizeof n, sizeof n);
            fprintf(file,
                    "{\"ph\":\"X\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,"
                    "\"args\":{\"batch\":%d}},\n",
                    n.text, r, (int)n.computing, (double)(n.begin_ns - origin) / 1e3,
                    (double)(n.end_ns - n.begin_ns) / 1e3, (int)n.batch);
        }
    }
    fprintf(
        file,
        "{\"ph\":\"M\",\"name\":\"process_labels\",\"pid\":0,\"args\":{\"labels\":\"\"}}\n]}\n");
    return fclose(file) != 0;
}

/* Every token's weights sum to 1 and nothing changes a row: what comes back is what went. */
static int check(const batch *b)
{
    for (int i = 0; i < 2; i++)
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < HIDDEN; h++)
                if (b[i].x[t][h] != 0x3f80)
                    return 1;
    return 0;
}

int main(int argc, char **argv)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group;
    ep_buffer *buffer;
    must(ep_group_create(&config, &group));
    must(ep_buffer_create(group, NULL, &buffer));
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group), failed = 0;
    batch *b = calloc(2, sizeof *b);
    char *all = malloc((size_t)ranks * sizeof diary);
    if (!b || !all)
        return 1;
    fill(&b[0], rank, 0);
    fill(&b[1], rank, 3);
    run_layers(buffer, b); /* warm */
    must(ep_buffer_set_trace(buffer, on_phase, NULL));
    diary.count = 0;
    must(ep_group_barrier(group));
    int64_t origin = now_ns();
    run_layers(buffer, b);
    must(ep_group_allgather(group, &diary, all, sizeof diary));
    failed = check(b);
    if (rank == 0)
        print_timeline(origin);
    if (rank == 0 && argc > 1 && write_trace(argv[1], all, ranks, origin)) {
        fprintf(stderr, "example_overlap: %s cannot be written\n", argv[1]);
        failed = 1;
    }
    if (failed)
        fprintf(stderr, "example_overlap: rank %d failed\n", rank);
    free(all);
    free(b);
    ep_buffer_destroy(buffer);
    ep_group_destroy(group);
    return failed;
}
