/* SPDX-License-Identifier: MIT */
/*
 * Status codes and the last error.
 *
 * Every call that can fail returns an ep_status. On failure the calling
 * thread's last error holds one sentence that names the call, the argument or
 * rank at fault, its value and the allowed range.
 */
#ifndef ENTREPOT_STATUS_H
#define ENTREPOT_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define EP_API __attribute__((visibility("default")))
#else
#define EP_API
#endif

/** The library's version; ep_version() returns that of the linked library. */
#define EP_VERSION_MAJOR 0
#define EP_VERSION_MINOR 1
#define EP_VERSION_PATCH 0
#define EP_VERSION_STRING "0.1.0"

/** Result of a call. Values are part of the ABI and never renumbered. */
typedef enum ep_status {
    EP_OK = 0,
    EP_IN_PROGRESS = 1,      /**< not an error: the work is not finished yet */
    EP_ERR_ARGUMENT = 2,     /**< a bad argument; nothing was written */
    EP_ERR_MEMORY = 3,       /**< an allocation failed; nothing was leaked */
    EP_ERR_SYSTEM = 4,       /**< an operating system call failed */
    EP_ERR_TIMEOUT = 5,      /**< ranks were not heard from in time */
    EP_ERR_RANK_DEAD = 6,    /**< a peer's process or thread has ended */
    EP_ERR_ABORTED = 7,      /**< another rank gave this call up */
    EP_ERR_MISMATCH = 8,     /**< ranks disagree on an argument */
    EP_ERR_CAPACITY = 9,     /**< rows exceed a bound the caller set */
    EP_ERR_CORRUPT = 10,     /**< verify mode found rows that differ */
    EP_ERR_STATE = 11,       /**< the object is not in a state for this call */
    EP_ERR_UNSUPPORTED = 12, /**< this build or machine cannot do it */
    EP_ERR_DEVICE = 13,      /**< an accelerator call failed */
    EP_ERR_IO = 14,          /**< a file could not be read or written */
    EP_ERR_FORMAT = 15       /**< outside data is malformed */
} ep_status;

/**
 * Name of a status, such as "EP_ERR_TIMEOUT"; "EP_UNKNOWN" for any other value.
 * The string is static. Safe from any thread.
 */
EP_API const char *ep_status_string(ep_status status);

/**
 * Message of the last failed call made by the calling thread; "" when none has
 * failed. The string belongs to the thread and stays valid until its next call
 * into the library. Successful calls leave it unchanged.
 */
EP_API const char *ep_last_error(void);

/** Version of the linked library, "major.minor.patch"; a static string. */
EP_API const char *ep_version(void);

#ifdef __cplusplus
}
#endif
#endif
