/* SPDX-License-Identifier: MIT */
#include "transport/fault/options.h"

#include "base/error.h"

#include <stddef.h>
#include <string.h>

static const struct {
    const char *name;
    size_t offset;
    int64_t least, most; /* most -1: the highest rank */
} keys[] = {
    {"seed", offsetof(epi_fault_options, seed), 0, INT64_MAX},
    {"delay_us", offsetof(epi_fault_options, delay_us), 0, 10000000},
    {"reorder", offsetof(epi_fault_options, reorder), 0, 1},
    {"repeat", offsetof(epi_fault_options, repeat), 0, 100},
    {"stall_rank", offsetof(epi_fault_options, stall_rank), 0, -1},
    {"stall_at", offsetof(epi_fault_options, stall_at), 1, INT64_MAX},
    {"stall_ms", offsetof(epi_fault_options, stall_ms), 1, 86400000},
    {"kill_rank", offsetof(epi_fault_options, kill_rank), 0, -1},
    {"kill_at", offsetof(epi_fault_options, kill_at), 1, INT64_MAX},
};

/* Decimal digits alone; -1 for anything else and for what does not fit. */
static int64_t parse_number(const char *text, size_t length)
{
    int64_t number = 0;
    if (length == 0)
        return -1;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9' || number > (INT64_MAX - 9) / 10)
            return -1;
        number = number * 10 + (text[i] - '0');
    }
    return number;
}

/* One "KEY=VALUE" of `length` characters. */
static ep_status parse_option(const char *text, size_t length, int num_ranks,
                              epi_fault_options *options)
{
    const char *equals = memchr(text, '=', length);
    size_t name_length = equals != NULL ? (size_t)(equals - text) : length;
    for (size_t i = 0; equals != NULL && i < sizeof keys / sizeof *keys; i++) {
        if (strlen(keys[i].name) != name_length || memcmp(keys[i].name, text, name_length) != 0)
            continue;
        size_t value_length = length - name_length - 1;
        int64_t most = keys[i].most >= 0 ? keys[i].most : num_ranks - 1;
        int64_t value = parse_number(equals + 1, value_length);
        if (value < keys[i].least || value > most)
            return epi_fail(EP_ERR_ARGUMENT,
                            "transport option %s is \"%.*s\"; it can be %lld..%lld", keys[i].name,
                            (int)value_length, equals + 1, (long long)keys[i].least,
                            (long long)most);
        memcpy((char *)options + keys[i].offset, &value, sizeof value);
        return EP_OK;
    }
    return epi_fail(EP_ERR_ARGUMENT,
                    "transport option \"%.*s\"; there are seed=, delay_us=, reorder=, repeat=, "
                    "stall_rank=, stall_at=, stall_ms=, kill_rank= and kill_at=",
                    (int)length, text);
}

ep_status epi_fault_options_parse(const char *text, int num_ranks, epi_fault_options *options)
{
    *options = (epi_fault_options){.seed = 1, .stall_rank = -1, .kill_rank = -1};
    while (*text != '\0') {
        size_t length = strcspn(text, ",");
        EPI_TRY(parse_option(text, length, num_ranks, options));
        text += length;
        if (*text == ',' && *++text == '\0')
            return epi_fail(EP_ERR_ARGUMENT, "transport options end with a comma");
    }
    if ((options->stall_rank >= 0) != (options->stall_at > 0) ||
        (options->stall_rank >= 0) != (options->stall_ms > 0))
        return epi_fail(EP_ERR_ARGUMENT,
                        "transport options stall_rank, stall_at and stall_ms go together");
    if ((options->kill_rank >= 0) != (options->kill_at > 0))
        return epi_fail(EP_ERR_ARGUMENT, "transport options kill_rank and kill_at go together");
    return EP_OK;
}
