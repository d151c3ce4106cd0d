/* SPDX-License-Identifier: MIT */
#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_error[EPI_ERROR_MAX];

const char *ep_last_error(void)
{
    return last_error;
}

const char *ep_version(void)
{
    return EP_VERSION_STRING;
}

const char *ep_status_string(ep_status status)
{
    static const char *const names[] = {
        [EP_OK] = "EP_OK",
        [EP_IN_PROGRESS] = "EP_IN_PROGRESS",
        [EP_ERR_ARGUMENT] = "EP_ERR_ARGUMENT",
        [EP_ERR_MEMORY] = "EP_ERR_MEMORY",
        [EP_ERR_SYSTEM] = "EP_ERR_SYSTEM",
        [EP_ERR_TIMEOUT] = "EP_ERR_TIMEOUT",
        [EP_ERR_RANK_DEAD] = "EP_ERR_RANK_DEAD",
        [EP_ERR_ABORTED] = "EP_ERR_ABORTED",
        [EP_ERR_MISMATCH] = "EP_ERR_MISMATCH",
        [EP_ERR_CAPACITY] = "EP_ERR_CAPACITY",
        [EP_ERR_CORRUPT] = "EP_ERR_CORRUPT",
        [EP_ERR_STATE] = "EP_ERR_STATE",
        [EP_ERR_UNSUPPORTED] = "EP_ERR_UNSUPPORTED",
        [EP_ERR_DEVICE] = "EP_ERR_DEVICE",
        [EP_ERR_IO] = "EP_ERR_IO",
        [EP_ERR_FORMAT] = "EP_ERR_FORMAT",
    };
    unsigned index = (unsigned)status;
    return index < sizeof names / sizeof *names ? names[index] : "EP_UNKNOWN";
}

ep_status epi_vfail(ep_status status, const char *format, va_list args)
{
    /* Formatted aside first: an argument may be the last error itself. */
    char message[EPI_ERROR_MAX];
    vsnprintf(message, sizeof message, format, args);
    memcpy(last_error, message, sizeof message);
    return status;
}

ep_status epi_fail(ep_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    epi_vfail(status, format, args);
    va_end(args);
    return status;
}

ep_status epi_fail_errno(ep_status status, const char *format, ...)
{
    int code = errno;
    va_list args;
    va_start(args, format);
    epi_vfail(status, format, args);
    va_end(args);
    size_t used = strlen(last_error);
    snprintf(last_error + used, sizeof last_error - used, ": %s", strerror(code));
    errno = code;
    return status;
}
