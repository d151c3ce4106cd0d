/* SPDX-License-Identifier: MIT */
#include "transport/cuda_ipc/process.h"

#include <pthread.h>
#include <sys/random.h>
#include <unistd.h>

static uint64_t number;

/* Process numbers alone are no identity: ranks may live in different PID namespaces. */
static void draw(void)
{
    if (getrandom(&number, sizeof number, 0) != sizeof number || number == 0)
        number = (uint64_t)getpid();
}

/* A child has one thread when it draws its own. */
static void begin(void)
{
    draw();
    pthread_atfork(NULL, NULL, draw);
}

uint64_t epi_process_number(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, begin);
    return number;
}
