/* SPDX-License-Identifier: MIT */
#include "base/error.h"
#include "support/test.h"

#include <errno.h>
#include <string.h>

static void names_every_status(void **state)
{
    (void)state;
    assert_string_equal(ep_status_string(EP_OK), "EP_OK");
    assert_string_equal(ep_status_string(EP_ERR_FORMAT), "EP_ERR_FORMAT");
    assert_string_equal(ep_status_string((ep_status)16), "EP_UNKNOWN");
    assert_string_equal(ep_status_string((ep_status)-1), "EP_UNKNOWN");
    for (int i = 0; i < 16; i++)
        assert_int_equal(strncmp(ep_status_string((ep_status)i), "EP_", 3), 0);
}

static void keeps_the_message(void **state)
{
    (void)state;
    assert_int_equal(epi_fail(EP_ERR_ARGUMENT, "hidden is %d", 7), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "hidden is 7");
    epi_fail(EP_ERR_STATE, "again: %s", ep_last_error());
    assert_string_equal(ep_last_error(), "again: hidden is 7");
    errno = ENOENT;
    epi_fail_errno(EP_ERR_IO, "open %s", "x");
    assert_string_equal(ep_last_error(), "open x: No such file or directory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_every_status),
        cmocka_unit_test(keeps_the_message),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
