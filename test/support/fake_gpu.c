/* SPDX-License-Identifier: MIT */
/* The test's side of the fake GPU. */
#include "support/fake_gpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

void fake_gpu_use(void)
{
    setenv("EP_CUDA_MODULE", EP_FAKE_GPU, 1);
    setenv("EP_TEST_DEVICE", "cuda", 1);
    unsetenv("EP_CUDA_PATH");
}

struct fake_gpu *fake_gpu(void)
{
    static struct fake_gpu *found;
    if (found)
        return found;
    void *module = dlopen(EP_FAKE_GPU, RTLD_NOW | RTLD_LOCAL); /* the one that the library opens */
    found = module ? dlsym(module, "fake_gpu_state") : NULL;
    if (!found) {
        fprintf(stderr, "the fake GPU: %s\n", dlerror());
        abort();
    }
    return found;
}

void fake_gpu_script(struct fake_outcome outcome)
{
    struct fake_gpu *gpu = fake_gpu();
    if (gpu->num_played == gpu->num_scripted)
        gpu->num_played = gpu->num_scripted = 0;
    if (gpu->num_scripted == FAKE_OUTCOMES)
        abort();
    gpu->script[gpu->num_scripted++] = outcome;
}

bool fake_gpu_script_done(void)
{
    struct fake_gpu *gpu = fake_gpu();
    bool done = gpu->num_played == gpu->num_scripted;
    gpu->num_played = gpu->num_scripted = 0;
    return done;
}

const struct fake_launch *fake_gpu_launch(enum fake_kernel kernel, int n)
{
    const struct fake_gpu *gpu = fake_gpu();
    for (int i = gpu->num_launches - 1; i >= 0 && i >= gpu->num_launches - FAKE_LAUNCHES; i--)
        if (gpu->launch[i % FAKE_LAUNCHES].kernel == kernel && n-- == 0)
            return &gpu->launch[i % FAKE_LAUNCHES];
    return NULL;
}

const uint8_t *fake_gpu_place(const epc_comm *comm, int place, int rank)
{
    return comm->places[place * EPC_MAX_RANKS + rank];
}
