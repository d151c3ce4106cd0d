/* SPDX-License-Identifier: MIT */
/* Monotonic time of this machine, the same for all its processes. */
#ifndef EPI_BASE_CLOCK_H
#define EPI_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define EPI_NS_PER_US INT64_C(1000)
#define EPI_NS_PER_MS INT64_C(1000000)
#define EPI_NS_PER_S INT64_C(1000000000)

static inline int64_t epi_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * EPI_NS_PER_S + now.tv_nsec;
}

static inline struct timespec epi_timespec(int64_t ns)
{
    struct timespec time = {.tv_sec = (time_t)(ns / EPI_NS_PER_S),
                            .tv_nsec = (long)(ns % EPI_NS_PER_S)};
    return time;
}

#endif
