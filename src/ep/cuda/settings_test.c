/* SPDX-License-Identifier: MIT */
/* Variables of the environment that CUDA buffers heed; no device is needed. */
#include "ep/cuda/settings.c"

#include "support/test.h"

static const char *const names[] = {"EP_CUDA_PATH", "EP_CUDA_EXPORT", "EP_CUDA_FAULT"};

/* Rank 1 of 2 reads `value` as that variable, and nothing else; verify mode or not. */
static epc_buffer *read_one(const char *name, const char *value, int verify, ep_status *status)
{
    static ep_buffer buffer;
    epc_buffer *b = calloc(1, sizeof *b);
    assert_non_null(b);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
    if (value)
        setenv(name, value, 1);
    buffer.config.verify = verify;
    b->buffer = &buffer;
    b->rank = 1;
    b->num_ranks = 2;
    *status = epc_settings_read(b);
    unsetenv(name);
    return b;
}

static void values_are_heeded(void **state)
{
    static const struct {
        const char *name, *value;
        bool bulk, exporting;
        int64_t at, row;
    } cases[] = {
        {"EP_CUDA_PATH", NULL, true, true, 0, 0},
        {"EP_CUDA_PATH", "", true, true, 0, 0},
        {"EP_CUDA_PATH", "sm80", false, true, 0, 0},
        {"EP_CUDA_PATH", "sm90", true, true, 0, 0},
        {"EP_CUDA_EXPORT", "0", true, false, 0, 0},
        {"EP_CUDA_EXPORT", "1", true, true, 0, 0},
        {"EP_CUDA_EXPORT", "", true, true, 0, 0},
        {"EP_CUDA_FAULT", "", true, true, 0, 0},
        {"EP_CUDA_FAULT", "flip_rank=1,flip_at=3,flip_row=7", true, true, 3, 7},
        {"EP_CUDA_FAULT", "flip_at=2,flip_rank=1", true, true, 2, 0},
        {"EP_CUDA_FAULT", "flip_rank=0,flip_at=3,flip_row=7", true, true, 0, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ep_status status;
        epc_buffer *b = read_one(cases[i].name, cases[i].value, 1, &status);
        assert_int_equal(status, EP_OK);
        assert_int_equal(b->bulk, cases[i].bulk);
        assert_int_equal(b->exporting, cases[i].exporting);
        assert_int_equal(b->flip_at, cases[i].at);
        assert_int_equal(b->flip_row, cases[i].row);
        free(b);
    }
}

static void faults_are_for_verify_mode(void **state)
{
    ep_status status;
    (void)state;
    epc_buffer *b = read_one("EP_CUDA_FAULT", "flip_rank=1,flip_at=3", 0, &status);
    assert_int_equal(status, EP_OK);
    assert_int_equal(b->flip_at, 0);
    free(b);
}

static void other_values_are_refused(void **state)
{
    static const char *const cases[][3] = {
        {"EP_CUDA_PATH", "sm70", "EP_CUDA_PATH is 'sm70'; it must be sm80 or sm90"},
        {"EP_CUDA_EXPORT", "foo", "EP_CUDA_EXPORT is 'foo'; it must be 0 or 1"},
        {"EP_CUDA_EXPORT", "off", "EP_CUDA_EXPORT is 'off'; it must be 0 or 1"},
        {"EP_CUDA_EXPORT", "00", "EP_CUDA_EXPORT is '00'; it must be 0 or 1"},
        {"EP_CUDA_FAULT", "foo", "EP_CUDA_FAULT: 'foo'; there are flip_rank=, flip_at= and"},
        {"EP_CUDA_FAULT", "flip_rank=2,flip_at=1",
         "EP_CUDA_FAULT: flip_rank= is '2'; it can be 0..1"},
        {"EP_CUDA_FAULT", "flip_rank=-1,flip_at=1", "flip_rank= is '-1'; it can be 0..1"},
        {"EP_CUDA_FAULT", "flip_rank=0,flip_at=0", "flip_at= is '0'; it can be 1..2147483647"},
        {"EP_CUDA_FAULT", "flip_rank=,flip_at=1", "flip_rank= is ''; it can be 0..1"},
        {"EP_CUDA_FAULT", "flip_at=3x,flip_rank=1", "flip_at= is '3x'; it can be 1.."},
        {"EP_CUDA_FAULT", "flip_row=99999999999999999999", "flip_row= is '99999999999999999999';"},
        {"EP_CUDA_FAULT", "flip_rank=1,flip_row=2", "it needs flip_rank= and flip_at="},
        {"EP_CUDA_FAULT", "flip_at=1", "it needs flip_rank= and flip_at="},
    };
    (void)state;
    for (size_t i = 0; i < 2 * (sizeof cases / sizeof *cases); i++) {
        const char *const *c = cases[i / 2];
        ep_status status;
        free(read_one(c[0], c[1], i % 2, &status)); /* without verify mode too */
        assert_int_equal(status, EP_ERR_ARGUMENT);
        assert_memory_equal(ep_last_error(), "ep_buffer_create: EP_CUDA_", 26);
        assert_non_null(strstr(ep_last_error(), c[2]));
    }
}

/* Ranks pass each other at most 160 bytes of a reason. */
static void long_values_leave_room_for_what_is_allowed(void **state)
{
    char text[400] = "flip_rank=";
    ep_status status;
    (void)state;
    memset(text + strlen(text), '9', 300);
    free(read_one("EP_CUDA_FAULT", text, 0, &status));
    assert_int_equal(status, EP_ERR_ARGUMENT);
    const char *allowed = strstr(ep_last_error(), "it can be 0..1");
    assert_non_null(allowed);
    assert_true(allowed - ep_last_error() + 14 < 160);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_are_heeded),
        cmocka_unit_test(faults_are_for_verify_mode),
        cmocka_unit_test(other_values_are_refused),
        cmocka_unit_test(long_values_leave_room_for_what_is_allowed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
