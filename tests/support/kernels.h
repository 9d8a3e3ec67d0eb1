/* Runs a test program once for every kernel that MOEC_KERNEL can ask for: it is read once per process. */
#ifndef MOEC_TESTS_KERNELS_H
#define MOEC_TESTS_KERNELS_H

/** In a program that MOEC_KERNEL was set for: run(). Else this program again for every kernel; 0 when all of them passed. */
int every_kernel(char **argv, int (*run)(void));

#endif
