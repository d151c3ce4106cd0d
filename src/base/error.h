/* SPDX-License-Identifier: MIT */
/* The thread's last error: how every failing function reports. */
#ifndef EPI_BASE_ERROR_H
#define EPI_BASE_ERROR_H

#include "entrepot/status.h"

#include <stdarg.h>

#define EPI_ERROR_MAX 512

/* Sets the thread's last error and returns `status`, so that a check is one line. */
ep_status epi_fail(ep_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
ep_status epi_vfail(ep_status status, const char *format, va_list args);

/* Like epi_fail, with ": <strerror(errno)>" appended. */
ep_status epi_fail_errno(ep_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Leaves early with the status of a failed call; its message stands. */
#define EPI_TRY(call)                      \
    do {                                   \
        ep_status epi_try_status = (call); \
        if (epi_try_status != EP_OK)       \
            return epi_try_status;         \
    } while (0)

#endif
