/* See kernels.h. */
#include "kernels.h"

#include <stddef.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int every_kernel(char **argv, int (*run)(void))
{
    static const char *const limits[] = {"generic", "avx2", "avx512", "avx512bf16"};
    int failed = 0;
    if (getenv("MOEC_KERNEL"))
        return run();
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        int status = 1;
        pid_t child = fork();
        if (child == 0) {
            setenv("MOEC_KERNEL", limits[i], 1);
            execv("/proc/self/exe", argv);
            _exit(127);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
            failed = 1;
    }
    return failed;
}
