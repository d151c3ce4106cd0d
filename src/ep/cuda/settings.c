/* SPDX-License-Identifier: MIT */
/* What EP_CUDA_* variables of the environment ask of a buffer. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

/* Its value; NULL where it is not set, or set to nothing. */
static const char *variable(const char *name)
{
    const char *text = getenv(name);
    return text && *text ? text : NULL;
}

/* *second: whether a variable has the second of the two values it can have; as it was where it is
   not set. */
static ep_status read_choice(const char *name, const char *one, const char *other, bool *second)
{
    const char *text = variable(name);
    if (text && strcmp(text, one) != 0 && strcmp(text, other) != 0)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_create: %s is '%.40s'; it must be %s or %s",
                        name, text, one, other);
    if (text)
        *second = strcmp(text, other) == 0;
    return EP_OK;
}

/* ---------------------------------------------------------------- faults */

typedef struct fault {
    int64_t flip_rank, flip_at, flip_row;
} fault;

static const struct {
    const char *name;
    size_t offset;
    int64_t least;
} keys[] = {
    {"flip_rank=", offsetof(fault, flip_rank), 0},
    {"flip_at=", offsetof(fault, flip_at), 1},
    {"flip_row=", offsetof(fault, flip_row), 0},
};

/* How much of a value a message quotes: what is allowed must fit behind it. */
static int shown(const char *value)
{
    size_t length = strcspn(value, ",");
    return length < 40 ? (int)length : 40;
}

/* The number of keys[key] at *text, which is left behind it. */
static ep_status read_number(const char **text, size_t key, int64_t most, fault *out)
{
    const char *start = *text;
    char *end;
    long long value = strtoll(start, &end, 10);
    if (end == start || (*end && *end != ',') || value < keys[key].least || value > most)
        return epi_fail(
            EP_ERR_ARGUMENT, "ep_buffer_create: EP_CUDA_FAULT: %s is '%.*s'; it can be %lld..%lld",
            keys[key].name, shown(start), start, (long long)keys[key].least, (long long)most);
    memcpy((char *)out + keys[key].offset, &(int64_t){value}, sizeof(int64_t));
    *text = end + (*end == ',');
    return EP_OK;
}

/* One KEY=NUMBER; *text is left behind it. */
static ep_status read_key(const epc_buffer *b, const char **text, fault *out)
{
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        size_t length = strlen(keys[i].name);
        if (strncmp(*text, keys[i].name, length) != 0)
            continue;
        *text += length;
        return read_number(text, i, i == 0 ? b->num_ranks - 1 : INT32_MAX, out);
    }
    return epi_fail(EP_ERR_ARGUMENT,
                    "ep_buffer_create: EP_CUDA_FAULT: '%.40s'; there are flip_rank=, flip_at= and "
                    "flip_row=",
                    *text);
}

/* Read whether or not the buffer is in verify mode: what nobody can have meant is always refused.
 */
static ep_status read_fault(epc_buffer *b)
{
    const char *text = variable("EP_CUDA_FAULT");
    fault read = {-1, 0, 0};
    if (!text)
        return EP_OK;
    for (const char *at = text; *at;)
        EPI_TRY(read_key(b, &at, &read));
    if (read.flip_rank < 0 || read.flip_at == 0)
        return epi_fail(
            EP_ERR_ARGUMENT,
            "ep_buffer_create: EP_CUDA_FAULT is '%.64s'; it needs flip_rank= and flip_at=", text);
    if (read.flip_rank == b->rank && b->buffer->config.verify) {
        b->flip_at = read.flip_at;
        b->flip_row = read.flip_row;
    }
    return EP_OK;
}

ep_status epc_settings_read(epc_buffer *b)
{
    b->bulk = b->exporting = true;
    EPI_TRY(read_choice("EP_CUDA_PATH", "sm80", "sm90", &b->bulk));
    EPI_TRY(read_choice("EP_CUDA_EXPORT", "0", "1", &b->exporting));
    return read_fault(b);
}
