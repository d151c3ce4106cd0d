/* SPDX-License-Identifier: MIT */
/* What the fake's files share: its state, which tests find by name. */
#ifndef EP_TEST_FAKE_GPU_STATE_H
#define EP_TEST_FAKE_GPU_STATE_H

#include "support/fake_gpu.h"

extern __attribute__((visibility("default"))) struct fake_gpu fake_gpu_state;

#endif
