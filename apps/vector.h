/* SPDX-License-Identifier: MIT */
/*
 * WIDEST_VECTORS before a function: compiled for several vector widths, the
 * widest that the processor has is called. The choice is made before a
 * sanitizer's run-time is up, so there it is left out.
 */
#ifndef APPS_VECTOR_H
#define APPS_VECTOR_H

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define WIDEST_VECTORS \
    __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define WIDEST_VECTORS
#endif

#endif
