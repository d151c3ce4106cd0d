/* SPDX-License-Identifier: MIT */
/* entrepot demo: options, and the order of things. */
#include "commands.h"
#include "demo.h"
#include "exit.h"
#include "gpu.h"
#include "options.h"

#include <stdio.h>

#define EXPERTS 256 /* rounded up to a multiple of the ranks */

/* One piece of memory that ranks share, cut into the arrays of the context. */
typedef struct arena {
    char *memory;
    size_t used;
} arena;

/* Without memory it only counts. */
static void *take(arena *a, size_t bytes)
{
    void *taken = a->memory ? a->memory + a->used : NULL;
    a->used += (bytes + 63) & ~(size_t)63;
    return taken;
}

static void lay_out(demo_context *c, arena *a)
{
    size_t ranks = (size_t)c->options->ranks, tokens = (size_t)c->options->tokens;
    c->stage_rows = c->options->tokens * c->options->ranks;
    c->results = take(a, ranks * sizeof *c->results);
    c->spans = take(a, (size_t)DEMO_NUM_PHASES * DEMO_ITERATIONS * ranks * sizeof *c->spans);
    c->copies = take(a, (size_t)demo_copy_rounds(c->options) * ranks * sizeof *c->copies);
    for (int wire = 0; wire < DEMO_NUM_WIRES; wire++)
        c->out[wire] = take(a, ranks * tokens * DEMO_ROW_BF16);
    c->stage = take(a, ranks * (size_t)c->stage_rows * DEMO_ROW_BF16);
    c->stage_counts = take(a, ranks * ranks * sizeof *c->stage_counts);
}

static int run(demo_context *c)
{
    const demo_options *o = c->options;
    const ranks_config config = {"entrepot demo", "layer", (int)o->ranks, false,
                                 DEMO_NUM_WIRES * c->load.num_experts + o->ranks * DEMO_ITERATIONS};
    demo_check check = {{0}, 0};
    int code = ranks_run(&config, demo_rank, c);
    if (code != EXIT_OK)
        return code;
    if (!demo_reference(c, &check)) {
        fprintf(stderr, "entrepot demo: no memory for the reference\n");
        return EXIT_RUNTIME;
    }
    return demo_report(c, &check);
}

const char *const demo_backends[] = {"cpu", "cuda", NULL};

static int run_with_memory(demo_context *c)
{
    arena count = {NULL, 0};
    lay_out(c, &count);
    arena memory = {ranks_shared_alloc(count.used), 0};
    if (!memory.memory) {
        fprintf(stderr, "entrepot demo: no memory for %zu bytes of results\n", count.used);
        return EXIT_RUNTIME;
    }
    lay_out(c, &memory);
    int code = run(c);
    ranks_shared_free(memory.memory, count.used);
    return code;
}

int cmd_demo(int argc, char **argv)
{
    demo_options o = {.ranks = 8, .tokens = 128, .seed = 1};
    const option table[] = {
        OPTION_CHOICE("backend", "NAME", &o.backend, demo_backends, "where tensors live"),
        OPTION_INTEGER("ranks", "R", &o.ranks, 1, 64, "ranks, each a process, default 8"),
        OPTION_INTEGER("tokens", "T", &o.tokens, 1, 4096, "tokens per rank, default 128"),
        OPTION_INTEGER("seed", "S", &o.seed, 0, INT64_MAX, "of tokens and weights, default 1"),
        OPTION_SWITCH("mps", &o.mps,
                      "with --backend cuda: run under an MPS daemon of its own, which ranks that "
                      "share a GPU need"),
        OPTION_SWITCH("json", &o.json, "one JSON object on standard output"),
    };
    const options_spec spec = {
        "entrepot demo",
        "[options]",
        "Runs a mixture-of-experts layer over R ranks on this machine: router, dispatch, expert\n"
        "MLPs, combine. Checks it against the same layer in one process and shows what each idea\n"
        "of the library bought. With --backend cuda rows are dispatched and combined between "
        "GPUs,\n"
        "which ranks share where there are fewer; router and experts still run on the host.",
        table,
        sizeof table / sizeof table[0],
        false};
    int code;
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code;
    if (o.mps && o.backend != DEMO_BACKEND_CUDA)
        return options_misuse(&spec, "--mps is given without --backend cuda");
    demo_context c = {.options = &o};
    int64_t experts = (EXPERTS + o.ranks - 1) / o.ranks * o.ranks;
    c.load = (workload){(uint64_t)o.seed, (int)o.ranks, o.tokens, DEMO_HIDDEN,
                        DEMO_TOPK,        experts,      NULL,     NULL};
    if (o.backend == DEMO_BACKEND_CUDA && !gpu_prepare("entrepot demo", (int)o.ranks, o.mps))
        return EXIT_RUNTIME;
    code = run_with_memory(&c);
    mps_stop();
    return code;
}
