/* SPDX-License-Identifier: MIT */
/*
 * Windows as memory files. A file has no name and goes with its last mapping, so
 * a crash at any moment leaves nothing behind. Peers open it through the owner's
 * /proc/PID/fd, which the kernel allows to the same user only.
 */
#include "transport/shm/internal.h"

#include "base/error.h"
#include "transport/pages.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

#define PRESENT UINT64_C(0x77696e646f772121)

typedef struct shm_window {
    epi_window base;
    int fd; /* kept: growing needs it */
    size_t file_bytes;
} shm_window;

/* Where a peer finds a window and how it knows it has found the right one. */
typedef struct offer {
    uint64_t present; /* PRESENT, or 0 of a masked rank */
    uint64_t device;
    uint64_t inode;
    uint64_t reserve;
    int32_t fd;
} offer;

static shm_window *window_alloc(epi_transport *transport, size_t reserve)
{
    shm_window *window = calloc(1, sizeof *window);
    if (window == NULL)
        return NULL;
    window->fd = -1;
    window->base.transport = transport;
    window->base.reserve = reserve;
    window->base.peer = calloc((size_t)transport->num_ranks, sizeof *window->base.peer);
    if (window->base.peer != NULL)
        return window;
    free(window);
    return NULL;
}

void epi_shm_window_destroy(epi_window *base)
{
    shm_window *window = (shm_window *)base;
    if (window == NULL)
        return;
    for (int rank = 0; rank < base->transport->num_ranks; rank++)
        if (rank != base->transport->rank)
            epi_pages_unmap(base->peer[rank], base->reserve);
    epi_pages_unmap(base->base, base->reserve);
    if (window->fd >= 0)
        close(window->fd);
    free(base->peer);
    free(window);
}

static int memory_file(void)
{
    int fd = memfd_create("entrepot", MFD_CLOEXEC | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create("entrepot", MFD_CLOEXEC);
    if (fd >= 0 && fchmod(fd, S_IRUSR | S_IWUSR) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Growing a file past RLIMIT_FSIZE would end the process with SIGXFSZ. */
static ep_status check_file_limit(size_t bytes)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
        bytes > limit.rlim_cur)
        return epi_fail(EP_ERR_MEMORY, "window of %zu bytes: the file size limit is %llu", bytes,
                        (unsigned long long)limit.rlim_cur);
    return EP_OK;
}

/* posix_fallocate retries by itself and would fall back to writing; this does neither. */
static ep_status file_allocate(int fd, size_t from, size_t to)
{
    while (fallocate(fd, 0, (off_t)from, (off_t)(to - from)) != 0)
        if (errno != EINTR)
            return epi_fail_errno(EP_ERR_MEMORY, "backing %zu bytes of a window", to - from);
    return EP_OK;
}

/* The file is as long as what was ever used of it; it never shrinks under a reader. */
static ep_status file_grow(shm_window *window, size_t bytes)
{
    if (bytes <= window->file_bytes)
        return EP_OK;
    EPI_TRY(check_file_limit(bytes));
    if (ftruncate(window->fd, (off_t)bytes) != 0)
        return epi_fail_errno(EP_ERR_MEMORY, "growing a window to %zu bytes", bytes);
    window->file_bytes = bytes;
    return EP_OK;
}

static void file_punch(shm_window *window, size_t from, size_t to)
{
    (void)fallocate(window->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from,
                    (off_t)(to - from));
}

ep_status epi_shm_window_back(epi_window *base, size_t from, size_t to)
{
    shm_window *window = (shm_window *)base;
    if (to > base->reserve || from > to)
        return epi_fail(EP_ERR_ARGUMENT, "window memory %zu..%zu; %zu bytes are reserved", from, to,
                        base->reserve);
    if (from == to)
        return EP_OK;
    EPI_TRY(epi_pages_check_available(to - from));
    EPI_TRY(file_grow(window, to));
    ep_status status = epi_pages_populate(base->base, from, to);
    if (status == EP_OK) /* also backs what an older kernel did not populate */
        status = file_allocate(window->fd, from, to);
    if (status != EP_OK)
        file_punch(window, from, to);
    return status;
}

void epi_shm_window_drop(epi_window *base, size_t from, size_t to)
{
    if (from < to)
        file_punch((shm_window *)base, from, to);
}

ep_status epi_shm_window_commit(epi_window *base, size_t bytes)
{
    size_t from = base->committed, to = epi_pages_round(bytes);
    if (to > base->reserve)
        return epi_fail(EP_ERR_ARGUMENT, "window commit of %zu bytes; at most %zu are reserved",
                        bytes, base->reserve);
    if (to <= from)
        return EP_OK;
    EPI_TRY(epi_shm_window_back(base, from, to));
    base->committed = to;
    return EP_OK;
}

static ep_status describe(const shm_window *window, offer *mine)
{
    struct stat status;
    if (fstat(window->fd, &status) != 0)
        return epi_fail_errno(EP_ERR_SYSTEM, "looking at a memory file");
    *mine = (offer){PRESENT, status.st_dev, status.st_ino, window->base.reserve, window->fd};
    return EP_OK;
}

/* Makes this rank's own memory and says in `mine` where it is. */
static ep_status window_prepare(shm_transport *transport, size_t reserve, size_t committed,
                                shm_window **prepared, offer *mine)
{
    shm_window *window = window_alloc(&transport->base, reserve);
    if (window == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for a window of %d ranks",
                        transport->base.num_ranks);
    *prepared = window;
    if (reserve > LLONG_MAX)
        return epi_fail(EP_ERR_MEMORY, "window of %zu bytes", reserve);
    window->fd = memory_file();
    if (window->fd < 0)
        return epi_fail_errno(EP_ERR_SYSTEM, "creating a memory file");
    EPI_TRY(epi_pages_map(window->fd, reserve, &window->base.base));
    window->base.peer[transport->base.rank] = window->base.base;
    EPI_TRY(epi_shm_window_commit(&window->base, committed));
    return describe(window, mine);
}

/* Opens a peer's file; a process that has taken the number of one that ended cannot pass its own
   off, because device and inode must agree. */
static ep_status open_peer(const shm_transport *transport, int rank, const offer *theirs, int *fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%lld/fd/%d", (long long)transport->peers[rank].pid,
             theirs->fd);
    *fd = open(path, O_RDWR | O_CLOEXEC);
    if (*fd < 0)
        return epi_fail_errno(EP_ERR_SYSTEM, "opening the window of rank %d at %s", rank, path);
    struct stat status;
    if (fstat(*fd, &status) == 0 && status.st_dev == theirs->device &&
        status.st_ino == theirs->inode)
        return EP_OK;
    close(*fd);
    return epi_fail(EP_ERR_SYSTEM, "%s is not the window of rank %d", path, rank);
}

/* `only` -1: all of them. */
static ep_status map_peers(shm_transport *transport, shm_window *window, const offer *offers,
                           int only)
{
    for (int rank = 0; rank < transport->base.num_ranks; rank++) {
        if (rank == transport->base.rank || offers[rank].present != PRESENT ||
            (only >= 0 && rank != only))
            continue;
        if (offers[rank].reserve != window->base.reserve)
            return epi_fail(EP_ERR_MISMATCH,
                            "window of %zu bytes on rank %d but of %llu on rank %d",
                            window->base.reserve, transport->base.rank,
                            (unsigned long long)offers[rank].reserve, rank);
        int fd;
        EPI_TRY(open_peer(transport, rank, &offers[rank], &fd));
        epi_pages_unmap(window->base.peer[rank], window->base.reserve); /* of a former process */
        window->base.peer[rank] = NULL;
        ep_status status = epi_pages_map(fd, window->base.reserve, &window->base.peer[rank]);
        close(fd);
        EPI_TRY(status);
    }
    return EP_OK;
}

ep_status epi_shm_window_create(epi_transport *base, size_t reserve, size_t committed,
                                epi_window **created)
{
    shm_transport *transport = shm_self(base);
    shm_window *window = NULL;
    offer mine = {0};
    ep_status status =
        window_prepare(transport, epi_pages_round(reserve), committed, &window, &mine);
    status = epi_agree(transport->bootstrap, status);
    const void *offers = NULL;
    if (status == EP_OK)
        status = epi_gather(transport->bootstrap, &mine, sizeof mine, &offers);
    if (status == EP_OK) /* also keeps every file open until all have mapped it */
        status = epi_agree(transport->bootstrap, map_peers(transport, window, offers, -1));
    if (status != EP_OK) {
        epi_shm_window_destroy((epi_window *)window);
        return status;
    }
    *created = &window->base;
    return EP_OK;
}

/* Round for round what creating the window does on the rank that comes back. */
ep_status epi_shm_window_admit(epi_window *base, int rank, epi_bootstrap *bootstrap)
{
    shm_window *window = (shm_window *)base;
    offer mine = {0};
    EPI_TRY(epi_agree(bootstrap, describe(window, &mine)));
    const void *offers = NULL;
    EPI_TRY(epi_gather(bootstrap, &mine, sizeof mine, &offers));
    return epi_agree(bootstrap, map_peers(shm_self(base->transport), window, offers, rank));
}
