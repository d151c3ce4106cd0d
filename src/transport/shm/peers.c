/* SPDX-License-Identifier: MIT */
/* The ranks as processes: who they are, whether they still run, reading their memory. */
#include "transport/shm/internal.h"

#include "base/error.h"
#include "base/process.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define IOV_BATCH 512 /* at most IOV_MAX, 1024 on Linux */

typedef struct introduction {
    int64_t pid; /* 0 of a masked rank */
    uint64_t start_time;
    uint64_t pid_namespace;
    char boot_id[40]; /* differs between hosts */
} introduction;

static ep_status introduce_self(introduction *self)
{
    memset(self, 0, sizeof *self);
    struct stat namespace;
    self->pid = getpid();
    if (!epi_process_start_time(getpid(), &self->start_time))
        return epi_fail(EP_ERR_SYSTEM, "/proc/%d/stat cannot be read: is /proc mounted?",
                        (int)getpid());
    if (stat("/proc/self/ns/pid", &namespace) == 0)
        self->pid_namespace = namespace.st_ino;
    if (!epi_read_text("/proc/sys/kernel/random/boot_id", self->boot_id, sizeof self->boot_id))
        self->boot_id[0] = '\0';
    return EP_OK;
}

static ep_status check_same_host(const introduction *all, int num_ranks)
{
    int first = 0;
    while (first < num_ranks && all[first].pid == 0)
        first++;
    for (int rank = first + 1; rank < num_ranks; rank++) {
        if (all[rank].pid == 0)
            continue;
        if (memcmp(all[rank].boot_id, all[first].boot_id, sizeof all[first].boot_id) != 0)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "transport \"shm\" needs all ranks on one host: ranks %d and %d are on "
                            "different ones",
                            first, rank);
        if (all[rank].pid_namespace != all[first].pid_namespace)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "transport \"shm\" needs all ranks in one PID namespace: ranks %d and "
                            "%d are in different ones",
                            first, rank);
    }
    return EP_OK;
}

static bool same_process(const shm_peer *peer)
{
    uint64_t start_time;
    return epi_process_start_time(peer->pid, &start_time) && start_time == peer->start_time;
}

static void forget(shm_peer *peer)
{
    if (peer->pidfd >= 0)
        close(peer->pidfd);
    peer->pidfd = -1;
}

static void meet(shm_transport *transport, int rank, const introduction *said)
{
    shm_peer *peer = &transport->peers[rank];
    forget(peer);
    peer->pid = (pid_t)said->pid;
    peer->start_time = said->start_time;
    if (rank != transport->base.rank && peer->pid != 0)
        peer->pidfd = (int)syscall(SYS_pidfd_open, peer->pid, 0); /* CLOEXEC by itself */
    /* A pidfd opened after the peer ended may be that of another process. */
    atomic_store(&peer->dead, peer->pid == 0 || !same_process(peer));
}

static ep_status check_successor(shm_transport *transport, int rank, const introduction *said)
{
    const shm_peer *before = &transport->peers[rank];
    if (said->pid == before->pid || !epi_shm_peer_alive(&transport->base, rank))
        return EP_OK;
    return epi_fail(EP_ERR_STATE, "the former process of rank %d, %lld, still runs", rank,
                    (long long)before->pid);
}

ep_status epi_shm_peers_meet(shm_transport *transport, epi_bootstrap *bootstrap, int only)
{
    introduction mine;
    EPI_TRY(epi_agree(bootstrap, introduce_self(&mine)));
    const void *gathered = NULL;
    EPI_TRY(epi_gather(bootstrap, &mine, sizeof mine, &gathered));
    const introduction *all = gathered;
    ep_status status = check_same_host(all, transport->base.num_ranks);
    if (status == EP_OK && only >= 0)
        status = check_successor(transport, only, &all[only]);
    for (int rank = 0; status == EP_OK && rank < transport->base.num_ranks; rank++)
        if (only < 0 || rank == only)
            meet(transport, rank, &all[rank]);
    return epi_agree(bootstrap, status);
}

void epi_shm_peers_part(shm_transport *transport)
{
    for (int rank = 0; rank < transport->base.num_ranks; rank++)
        forget(&transport->peers[rank]);
    free(transport->peers);
}

bool epi_shm_peer_alive(epi_transport *base, int rank)
{
    shm_peer *peer = &shm_self(base)->peers[rank];
    if (rank == base->rank)
        return true;
    if (atomic_load_explicit(&peer->dead, memory_order_relaxed))
        return false;
    bool dead;
    if (peer->pidfd >= 0) {
        struct pollfd ended = {.fd = peer->pidfd, .events = POLLIN};
        dead = poll(&ended, 1, 0) == 1 && (ended.revents & POLLIN) != 0;
    } else {
        dead = !same_process(peer);
    }
    if (dead)
        atomic_store_explicit(&peer->dead, true, memory_order_relaxed);
    return !dead;
}

void epi_shm_kill_self(epi_transport *transport)
{
    (void)transport;
    raise(SIGKILL);
}

bool epi_shm_can_peer_read(epi_transport *transport)
{
    return shm_self(transport)->can_read;
}

static ep_status fail_read(epi_transport *transport, int rank, int code)
{
    if (code == ESRCH || !epi_shm_peer_alive(transport, rank))
        return epi_fail(EP_ERR_RANK_DEAD, "reading memory of rank %d: it has ended", rank);
    errno = code;
    return epi_fail_errno(EP_ERR_SYSTEM, "reading memory of rank %d", rank);
}

/* Reads up to IOV_BATCH pieces whole; a short read goes on where it stopped. */
static ep_status read_batch(epi_transport *transport, int rank, struct iovec *local,
                            struct iovec *remote, size_t count)
{
    size_t first = 0;
    while (first < count) {
        ssize_t got = process_vm_readv(shm_self(transport)->peers[rank].pid, local + first,
                                       count - first, remote + first, count - first, 0);
        if (got <= 0)
            return fail_read(transport, rank, got < 0 ? errno : EFAULT);
        size_t left = (size_t)got;
        while (first < count && left >= local[first].iov_len)
            left -= local[first++].iov_len;
        if (first < count && left > 0) {
            local[first].iov_base = (char *)local[first].iov_base + left;
            remote[first].iov_base = (char *)remote[first].iov_base + left;
            local[first].iov_len -= left;
            remote[first].iov_len -= left;
        }
    }
    return EP_OK;
}

ep_status epi_shm_peer_read(epi_transport *transport, int rank, const epi_remote_read *reads,
                            size_t count)
{
    struct iovec local[IOV_BATCH], remote[IOV_BATCH];
    size_t filled = 0;
    for (size_t i = 0; i < count; i++) {
        if (reads[i].bytes > 0) {
            local[filled] = (struct iovec){reads[i].local, reads[i].bytes};
            remote[filled] = (struct iovec){(void *)(uintptr_t)reads[i].remote, reads[i].bytes};
            filled++;
        }
        if (filled == IOV_BATCH || (i + 1 == count && filled > 0)) {
            EPI_TRY(read_batch(transport, rank, local, remote, filled));
            filled = 0;
        }
    }
    /* Had the process ended, its number might now be another's whose memory we read. */
    if (!epi_shm_peer_alive(transport, rank))
        return fail_read(transport, rank, ESRCH);
    return EP_OK;
}

typedef struct probe {
    uint64_t address;
    uint64_t nonce;
} probe;

static const uint64_t probe_word = UINT64_C(0x656e747265706f74); /* read by peers */

ep_status epi_shm_peers_try_read(shm_transport *transport, epi_bootstrap *bootstrap)
{
#ifdef PR_SET_PTRACER
    /* Where the Yama security module restricts it, peers of the same user are let in. */
    if (access("/proc/sys/kernel/yama/ptrace_scope", F_OK) == 0)
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
#endif
    probe mine = {(uint64_t)(uintptr_t)&probe_word, probe_word};
    const void *gathered = NULL;
    EPI_TRY(epi_gather(bootstrap, &mine, sizeof mine, &gathered));
    const probe *probes = gathered;
    int32_t works = 1;
    for (int rank = 0; rank < transport->base.num_ranks && works; rank++) {
        uint64_t seen = 0;
        if (probes[rank].nonce == 0) /* masked */
            continue;
        epi_remote_read read = {probes[rank].address, &seen, sizeof seen};
        works = epi_shm_peer_read(&transport->base, rank, &read, 1) == EP_OK &&
                seen == probes[rank].nonce;
    }
    works = works ? 1 : -1; /* 0: masked */
    EPI_TRY(epi_gather(bootstrap, &works, sizeof works, &gathered));
    const int32_t *all_work = gathered;
    transport->can_read = true;
    for (int rank = 0; rank < transport->base.num_ranks; rank++)
        transport->can_read = transport->can_read && all_work[rank] >= 0;
    return EP_OK;
}
