/* SPDX-License-Identifier: MIT */
/*
 * What each placement policy gives and costs on measured expert loads: the table
 * of docs/planning.md.
 *
 * usage: eplb_bench FILE...   {"logical_count": [[...], ...]}, 256 experts; layers
 * without a load are left out. With six files also: plans for every three of
 * them judged on the other three, and changes of a plan from one file to another.
 */
#include "entrepot/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { EXPERTS = 256, SLOTS = 288, MOST_FILES = 16, MOST_LAYERS = 64 };

static float load[MOST_FILES][MOST_LAYERS * EXPERTS], chosen[3 * MOST_LAYERS * EXPERTS];
static int32_t first[MOST_LAYERS * SLOTS], second[MOST_LAYERS * SLOTS];
static int files, layers;

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void check(ep_status status)
{
    if (status == EP_OK)
        return;
    fprintf(stderr, "eplb_bench: %s\n", ep_last_error());
    exit(1);
}

/* Every number of the file, row by row; rows of zeros are dropped. Returns the rows kept. */
static int read_load(const char *path, float *out)
{
    static char text[1 << 22];
    FILE *file = fopen(path, "r");
    size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
    int rows = 0, column = 0, any = 0;
    text[size] = '\0';
    if (file)
        fclose(file);
    for (char *at = text, *end; *at && rows < MOST_LAYERS; at = end) {
        float value = strtof(at, &end);
        if (end == at) {
            end++;
            continue;
        }
        out[rows * EXPERTS + column++] = value;
        any |= value > 0;
        if (column == EXPERTS) {
            rows += any;
            column = any = 0;
        }
    }
    return rows;
}

static ep_plan_config config_of(const int shape[3], int policy)
{
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    c.layers = layers;
    c.experts = EXPERTS;
    c.replicas = SLOTS;
    c.groups = shape[0];
    c.nodes = shape[1];
    c.gpus = shape[2];
    c.policy = policy;
    return c;
}

static void bench_policies(const int shape[3])
{
    for (int policy = EP_PLAN_REFERENCE; policy <= EP_PLAN_UNIQUE; policy++) {
        ep_plan_config c = config_of(shape, policy);
        double before = 0, after = 0, duplicates = 0, moves = 0, ms = 0;
        for (int f = 0; f < files; f++) {
            ep_plan_report r = {.size = sizeof r};
            double start = now_ms();
            check(ep_plan_eplb(&c, load[f], NULL, first, NULL, NULL));
            ms += now_ms() - start;
            check(ep_plan_judge(&c, load[f], NULL, first, &r));
            before += r.balancedness_before;
            after += r.balancedness;
            duplicates += (double)r.duplicates;
            moves += (double)r.moves;
        }
        printf("  %-10s before %.4f  after %.4f  duplicates %5.1f  moves %.0f  %.2f ms\n",
               ep_plan_policy_name(policy), before / files, after / files, duplicates / files,
               moves / files, ms / files);
    }
}

/* Mean over the files that are not in `set` (or those that are). */
static double mean_over(const ep_plan_config *c, const int32_t *placed, unsigned set, int inside)
{
    double sum = 0;
    int n = 0;
    for (int f = 0; f < files; f++) {
        ep_plan_report r = {.size = sizeof r};
        if ((int)(set >> f & 1) != inside)
            continue;
        check(ep_plan_judge(c, load[f], NULL, placed, &r));
        sum += r.balancedness;
        n++;
    }
    return sum / n;
}

static void bench_windows(const int shape[3])
{
    double sums[4] = {0}, ms = 0, least = 1;
    int splits = 0;
    for (unsigned set = 0; set < 64; set++) {
        if (__builtin_popcount(set) != 3)
            continue;
        size_t row = (size_t)layers * EXPERTS;
        for (int f = 0, w = 0; f < files; f++)
            if (set >> f & 1)
                memcpy(chosen + row * (size_t)w++, load[f], row * sizeof *chosen);
        ep_plan_config c = config_of(shape, EP_PLAN_REFERENCE);
        c.windows = 3;
        check(ep_plan_eplb(&c, chosen, NULL, first, NULL, NULL));
        c.policy = EP_PLAN_WINDOWS;
        double start = now_ms();
        check(ep_plan_eplb(&c, chosen, NULL, second, NULL, NULL));
        ms += now_ms() - start;
        c.windows = 1;
        double others[2] = {mean_over(&c, first, set, 0), mean_over(&c, second, set, 0)};
        sums[0] += mean_over(&c, first, set, 1);
        sums[1] += mean_over(&c, second, set, 1);
        sums[2] += others[0];
        sums[3] += others[1];
        least = others[1] - others[0] < least ? others[1] - others[0] : least;
        splits++;
    }
    printf("  windows of 3: planned for: reference %.4f windows %.4f; others: reference %.4f "
           "windows %.4f (least gain of %d splits %.4f)  %.0f ms\n",
           sums[0] / splits, sums[1] / splits, sums[2] / splits, sums[3] / splits, splits, least,
           ms / splits);
}

static void bench_incremental(const int shape[3], int from, int to)
{
    ep_plan_config c = config_of(shape, EP_PLAN_UNIQUE);
    ep_plan_report r = {.size = sizeof r};
    check(ep_plan_eplb(&c, load[from], NULL, first, NULL, NULL));
    check(ep_plan_eplb(&c, load[to], first, second, NULL, &r));
    printf("  from file %d to %d: kept %.4f, new plan %.4f with %lld moves;", from, to,
           r.balancedness_before, r.balancedness, (long long)r.moves);
    c.policy = EP_PLAN_INCREMENTAL;
    for (int per_layer = 1; per_layer <= 40; per_layer *= per_layer < 5 ? 5 : 2) {
        c.max_moves = per_layer * layers;
        double start = now_ms();
        check(ep_plan_eplb(&c, load[to], first, second, NULL, &r));
        printf(" %lld: %.4f (%.0f ms)", (long long)r.moves, r.balancedness, now_ms() - start);
    }
    printf("\n");
}

int main(int argc, char **argv)
{
    static const int shapes[][3] = {{8, 4, 32}, {1, 1, 32}, {1, 1, 72}, {1, 1, 144}};
    for (files = 0; files + 1 < argc && files < MOST_FILES; files++) {
        int rows = read_load(argv[files + 1], load[files]);
        if (rows == 0 || (files > 0 && rows != layers)) {
            fprintf(stderr, "eplb_bench: %s: %d layers of 256 experts, allowed: %s\n",
                    argv[files + 1], rows, files ? "as many as in the first file" : "1..64");
            return 2;
        }
        layers = rows;
    }
    if (files == 0) {
        fprintf(stderr, "usage: eplb_bench FILE...\n");
        return 2;
    }
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        printf("%d slots, %d layers, %d GPUs, %s\n", SLOTS, layers, shapes[s][2],
               shapes[s][0] > 1 ? "8 groups on 4 nodes" : "no groups");
        bench_policies(shapes[s]);
        if (files != 6)
            continue;
        bench_windows(shapes[s]);
        bench_incremental(shapes[s], 0, 2);
        bench_incremental(shapes[s], 0, 3);
    }
    return 0;
}
