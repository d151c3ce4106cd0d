/* SPDX-License-Identifier: MIT */
/* Generators: orders known in full, the rules of each method, legality of all small shapes. */
#include "plan/schedule.h"

#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static ep_schedule *make(int32_t method, int32_t ranks, int32_t chunks, int32_t model_chunks)
{
    ep_schedule_config config = EP_SCHEDULE_CONFIG_INIT;
    ep_schedule *s = NULL;
    config.method = method;
    config.ranks = ranks;
    config.chunks = chunks;
    config.model_chunks = model_chunks;
    if (ep_schedule_create(&config, &s) != EP_OK)
        fail_msg("%s", ep_last_error());
    return s;
}

static void assert_line(const ep_schedule *s, int32_t rank, const char *expected)
{
    size_t needed = 0;
    assert_int_equal(ep_schedule_format(s, rank, NULL, 0, &needed), EP_OK);
    char *text = malloc(needed);
    assert_non_null(text);
    assert_int_equal(ep_schedule_format(s, rank, text, needed, NULL), EP_OK);
    assert_string_equal(text, expected);
    assert_int_equal(strlen(text) + 1, needed);
    assert_int_equal(ep_schedule_format(s, rank, text, needed - 1, NULL), EP_ERR_CAPACITY);
    free(text);
}

/* Worked out by hand from each method's rules. */
static void small_orders_are_known(void **state)
{
    (void)state;
    static const struct {
        int32_t method, ranks, chunks, model_chunks;
        const char *lines[4];
    } known[] = {
        {EP_SCHEDULE_1F1B,
         3,
         4,
         0,
         {"F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3", "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3",
          "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3"}},
        {EP_SCHEDULE_1F1B, 3, 1, 0, {"F0.0 B0.0", "F0.0 B0.0", "F0.0 B0.0"}},
        {EP_SCHEDULE_INTERLEAVED,
         2,
         4,
         2,
         {"F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3",
          "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"}},
        {EP_SCHEDULE_ZB1P,
         2,
         4,
         0,
         {"F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 F0.3 I0.2 W0.2 I0.3 W0.3",
          "F0.0 I0.0 F0.1 I0.1 W0.0 F0.2 I0.2 W0.1 F0.3 I0.3 W0.2 W0.3"}},
        {EP_SCHEDULE_ZBV,
         2,
         3,
         0,
         {"F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 I1.1 W1.1 I0.0 W0.0 F1.2 I1.2 W1.2 I0.1 W0.1 I0.2 "
          "W0.2",
          "F0.0 F1.0 F0.1 F1.1 I1.0 W1.0 F0.2 I0.0 W0.0 F1.2 I1.1 W1.1 I0.1 I1.2 I0.2 W0.1 W1.2 "
          "W0.2"}},
        {EP_SCHEDULE_ZBV,
         2,
         1,
         0,
         {"F0.0 F1.0 I1.0 W1.0 I0.0 W0.0", "F0.0 F1.0 I1.0 W1.0 I0.0 W0.0"}},
        {EP_SCHEDULE_DUALPIPE,
         2,
         4,
         0,
         {"F0.0 F1.0 F0.1 B1.0 (F1.1+B0.0) B1.1 I0.1 W0.1",
          "F0.0 F1.0 F0.1 B1.0 (F1.1+B0.0) B1.1 I0.1 W0.1"}},
        {EP_SCHEDULE_DUALPIPEV,
         2,
         5,
         0,
         {"F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 (F0.3+B1.1) (F1.2+B0.0) (F0.4+B1.2) (F1.3+B0.1) "
          "B1.3 (F1.4+B0.2) B1.4 I0.3 W0.3 I0.4 W0.4",
          "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 (F1.2+B0.0) (F0.3+B1.1) (F1.3+B0.1) (F0.4+B1.2) "
          "(F1.4+B0.2) B1.3 B0.3 I1.4 I0.4 W1.4 W0.4"}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        ep_schedule *s =
            make(known[i].method, known[i].ranks, known[i].chunks, known[i].model_chunks);
        for (int32_t rank = 0; rank < known[i].ranks; rank++)
            assert_line(s, rank, known[i].lines[rank]);
        ep_schedule_destroy(s);
    }
}

/* Lines "# METHOD ranks=R chunks=C" followed by "rank: order" for each rank. */
static void golden_orders_match(void **state)
{
    (void)state;
    FILE *file = fopen(EP_TEST_DATA "/golden/dualpipe_order.txt", "r");
    if (!file)
        skip();
    char *line = NULL, name[32];
    size_t capacity = 0;
    ep_schedule *s = NULL;
    int ranks, chunks, rank, at, compared = 0;
    int32_t method;
    while (getline(&line, &capacity, file) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "# %31s ranks=%d chunks=%d", name, &ranks, &chunks) == 3) {
            ep_schedule_destroy(s);
            assert_int_equal(ep_schedule_method_parse(name, &method), EP_OK);
            s = make(method, ranks, chunks, 0);
        } else if (sscanf(line, "%d: %n", &rank, &at) == 1) {
            assert_line(s, rank, line + at);
            compared++;
        }
    }
    assert_true(compared >= 37);
    ep_schedule_destroy(s);
    free(line);
    fclose(file);
}

static void assert_refused(int32_t method, int32_t ranks, int32_t chunks, int32_t model_chunks,
                           const char *message)
{
    ep_schedule_config config = {sizeof config, method, ranks, chunks, model_chunks};
    ep_schedule *s = NULL;
    assert_int_equal(ep_schedule_create(&config, &s), EP_ERR_ARGUMENT);
    assert_null(s);
    assert_string_equal(ep_last_error(), message);
}

static void rules_are_named(void **state)
{
    (void)state;
    assert_refused(6, 2, 4, 0, "ep_schedule_create: method is 6; allowed 0 to 5");
    assert_refused(-1, 2, 4, 0, "ep_schedule_create: method is -1; allowed 0 to 5");
    assert_refused(0, 0, 4, 0, "ep_schedule_create: ranks is 0; allowed 1 to 4096");
    assert_refused(0, 1, 65537, 0, "ep_schedule_create: chunks is 65537; allowed 1 to 65536");
    assert_refused(0, 1, 1, 2, "ep_schedule_create: model_chunks is 2; 1f1b allows only 0");
    assert_refused(1, 4, 8, 65, "ep_schedule_create: model_chunks is 65; allowed 0 to 64");
    assert_refused(1, 4, 6, 0,
                   "ep_schedule_create: chunks is 6; interleaved allows multiples of ranks (4)");
    assert_refused(4, 3, 6, 0,
                   "ep_schedule_create: ranks is 3; dualpipe allows even numbers from 2");
    assert_refused(4, 4, 9, 0,
                   "ep_schedule_create: chunks is 9; dualpipe allows even numbers from 8");
    assert_refused(4, 4, 6, 0,
                   "ep_schedule_create: chunks is 6; dualpipe with 4 ranks allows 8 to 65536");
    assert_refused(5, 4, 7, 0,
                   "ep_schedule_create: chunks is 7; dualpipev with 4 ranks allows 8 to 65536");
    ep_schedule *s = NULL;
    ep_schedule_config config = EP_SCHEDULE_CONFIG_INIT;
    assert_int_equal(ep_schedule_create(NULL, &s), EP_ERR_ARGUMENT);
    assert_int_equal(ep_schedule_create(&config, NULL), EP_ERR_ARGUMENT);
    config.size = 0;
    assert_int_equal(ep_schedule_create(&config, &s), EP_ERR_ARGUMENT);
    config.size = sizeof config + 1;
    assert_int_equal(ep_schedule_create(&config, &s), EP_ERR_ARGUMENT);
}

static void a_shorter_configuration_is_accepted(void **state)
{
    (void)state;
    ep_schedule_config config = {offsetof(ep_schedule_config, model_chunks), EP_SCHEDULE_1F1B, 2, 3,
                                 77};
    ep_schedule *s = NULL;
    assert_int_equal(ep_schedule_create(&config, &s), EP_OK);
    ep_schedule_destroy(s);
}

static void names_are_round(void **state)
{
    (void)state;
    int32_t method = -1;
    for (int32_t i = 0; i < EP_SCHEDULE_METHODS; i++) {
        assert_int_equal(ep_schedule_method_parse(ep_schedule_method_name(i), &method), EP_OK);
        assert_int_equal(method, i);
    }
    assert_int_equal(ep_schedule_method_parse("ZB-V", &method), EP_OK);
    assert_int_equal(method, EP_SCHEDULE_ZBV);
    assert_int_equal(ep_schedule_method_parse("gpipe", &method), EP_ERR_ARGUMENT);
    assert_int_equal(ep_schedule_method_parse("dualpipe2", &method), EP_ERR_ARGUMENT);
    assert_int_equal(ep_schedule_method_parse("dual", &method), EP_ERR_ARGUMENT);
    assert_string_equal(ep_schedule_method_name(EP_SCHEDULE_CUSTOM), "custom");
    assert_string_equal(ep_schedule_method_name(99), "unknown");
}

/* Whether a method's rules allow (R, C); written down apart from the generator. */
static bool allowed(int32_t method, int32_t ranks, int32_t chunks)
{
    switch (method) {
    case EP_SCHEDULE_INTERLEAVED:
        return chunks % ranks == 0;
    case EP_SCHEDULE_DUALPIPE:
        return ranks % 2 == 0 && chunks % 2 == 0 && chunks >= 2 * ranks;
    case EP_SCHEDULE_DUALPIPEV:
        return chunks >= 2 * ranks;
    default:
        return true;
    }
}

static void assert_legal(int32_t method, int32_t ranks, int32_t chunks, int32_t model_chunks)
{
    ep_schedule_config config = {sizeof config, method, ranks, chunks, model_chunks};
    int32_t peak[16], slots = 0;
    ep_schedule *s = NULL;
    ep_status status = ep_schedule_create(&config, &s);
    assert_int_equal(status, allowed(method, ranks, chunks) ? EP_OK : EP_ERR_ARGUMENT);
    if (status != EP_OK)
        return;
    if (ep_schedule_check(s, peak, &slots) != EP_OK)
        fail_msg("%s R=%d C=%d: %s", ep_schedule_method_name(method), (int)ranks, (int)chunks,
                 ep_last_error());
    assert_int_equal(slots, 1); /* no generated order needs more than one message in flight */
    /* The published bound on live activations of each method (plan table of the papers). */
    int32_t bound = method == EP_SCHEDULE_1F1B || method == EP_SCHEDULE_ZB1P ? ranks
                    : method == EP_SCHEDULE_ZBV                              ? 2 * ranks
                    : method == EP_SCHEDULE_DUALPIPE                         ? ranks + 1
                    : method == EP_SCHEDULE_DUALPIPEV                        ? 2 * ranks + 1
                                                      : (model_chunks + 1) * ranks - 1;
    for (int32_t rank = 0; rank < ranks; rank++)
        assert_in_range(peak[rank], 1, bound);
    ep_schedule_destroy(s);
}

static void every_small_shape_is_legal(void **state)
{
    (void)state;
    for (int32_t ranks = 1; ranks <= 16; ranks++) {
        for (int32_t chunks = 1; chunks <= 64; chunks++) {
            for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++) {
                if (method != EP_SCHEDULE_INTERLEAVED)
                    assert_legal(method, ranks, chunks, 0);
            }
            for (int32_t v = 1; v <= 4; v++)
                assert_legal(EP_SCHEDULE_INTERLEAVED, ranks, chunks, v);
        }
    }
}

static void places_follow_the_method(void **state)
{
    (void)state;
    ep_schedule_shape shape;
    int32_t stream, stage;
    ep_schedule *s = make(EP_SCHEDULE_DUALPIPE, 4, 8, 0);
    assert_int_equal(ep_schedule_get_shape(s, &shape), EP_OK);
    assert_int_equal(shape.streams, 2);
    assert_int_equal(shape.stages, 4);
    assert_int_equal(shape.chunks, 4);
    assert_int_equal(ep_schedule_place(s, 1, 1, &stream, &stage), EP_OK);
    assert_int_equal(stream, 1);
    assert_int_equal(stage, 2);
    assert_int_equal(ep_schedule_place(s, 3, 0, &stream, &stage), EP_OK);
    assert_int_equal(stream, 1);
    assert_int_equal(stage, 0);
    assert_int_equal(ep_schedule_place(s, 4, 0, &stream, &stage), EP_ERR_ARGUMENT);
    assert_int_equal(ep_schedule_place(s, 0, 2, &stream, &stage), EP_ERR_ARGUMENT);
    ep_schedule_destroy(s);
    s = make(EP_SCHEDULE_ZBV, 3, 2, 0);
    assert_int_equal(ep_schedule_place(s, 1, 1, &stream, &stage), EP_OK);
    assert_int_equal(stage, 4);
    ep_schedule_destroy(s);
    s = make(EP_SCHEDULE_INTERLEAVED, 3, 3, 3);
    assert_int_equal(ep_schedule_place(s, 1, 2, &stream, &stage), EP_OK);
    assert_int_equal(stage, 7);
    ep_schedule_destroy(s);
}

static void transfers_surround_the_operation(void **state)
{
    (void)state;
    const ep_schedule_op *ops;
    size_t count, first;
    char text[EPI_OP_TEXT_MAX];
    static const char *const expected[] = {"receive of activation 0.0 from rank 0", "F0.0", "B0.0",
                                           "send of gradient 0.0 to rank 0"};
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 2, 1, 0);
    assert_int_equal(ep_schedule_ops(s, 1, &ops, &count, &first), EP_OK);
    assert_int_equal(count, 4);
    assert_int_equal(first, 4);
    for (size_t i = 0; i < count; i++) {
        epi_op_text(&ops[i], text);
        assert_string_equal(text, expected[i]);
    }
    ep_schedule_destroy(s);
}

static double cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* R=64, C=1024 generated, checked and simulated under 100 ms of one core. */
static void large_shapes_are_fast(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* a sanitizer's time says nothing */
#endif
    ep_schedule_costs costs = EP_SCHEDULE_COSTS_INIT;
    double makespan, best[EP_SCHEDULE_METHODS];
    int32_t peak[64];
    for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++) {
        best[method] = 1e9;
        for (int i = 0; i < 3; i++) {
            double begin = cpu_ms();
            ep_schedule *s = make(method, 64, 1024, 0);
            assert_int_equal(ep_schedule_check(s, peak, NULL), EP_OK);
            assert_int_equal(ep_schedule_simulate(s, &costs, 1, &makespan, NULL, NULL, NULL),
                             EP_OK);
            ep_schedule_destroy(s);
            double took = cpu_ms() - begin;
            best[method] = took < best[method] ? took : best[method];
        }
        print_message("%s: %.1f ms\n", ep_schedule_method_name(method), best[method]);
        assert_true(best[method] < 100.0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_orders_are_known),
        cmocka_unit_test(golden_orders_match),
        cmocka_unit_test(rules_are_named),
        cmocka_unit_test(a_shorter_configuration_is_accepted),
        cmocka_unit_test(names_are_round),
        cmocka_unit_test(every_small_shape_is_legal),
        cmocka_unit_test(places_follow_the_method),
        cmocka_unit_test(transfers_surround_the_operation),
        cmocka_unit_test(large_shapes_are_fast),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
