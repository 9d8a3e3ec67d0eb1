/* The only calls of malloc, realloc and free; everything else in the library allocates through here. */
#include "base/mem.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

long moec_test_allocs_left = LONG_MAX;

static bool test_refuses(void)
{
    if (moec_test_allocs_left == LONG_MAX)
        return false;
    if (moec_test_allocs_left <= 0)
        return true;
    moec_test_allocs_left--;
    return false;
}

bool moec_mul_size(size_t *out, size_t a, size_t b)
{
    return !__builtin_mul_overflow(a, b, out);
}

bool moec_add_size(size_t *out, size_t a, size_t b)
{
    return !__builtin_add_overflow(a, b, out);
}

moec_status moec_alloc(void **out, size_t n, size_t size, moec_err *err)
{
    size_t bytes, rounded;
    *out = NULL;
    if (n == 0 || size == 0)
        return MOEC_OK;
    if (!moec_mul_size(&bytes, n, size) || !moec_add_size(&rounded, bytes, 63))
        return moec_fail(err, MOEC_ENOMEM, "%zu elements of %zu bytes are more than this machine can address", n, size);
    rounded &= ~(size_t)63;
    void *p = test_refuses() ? NULL : aligned_alloc(64, rounded);
    if (!p)
        return moec_fail(err, MOEC_ENOMEM, "out of memory: %zu bytes refused", bytes);
    memset(p, 0, rounded);
    *out = p;
    return MOEC_OK;
}

moec_status moec_grow(void **array, size_t *cap, size_t n, size_t size, moec_err *err)
{
    if (n <= *cap)
        return MOEC_OK;
    size_t want = *cap < 8 ? 8 : *cap, bytes;
    while (want < n)
        if (!moec_add_size(&want, want, want / 2 + 8))
            want = n;
    if (!moec_mul_size(&bytes, want, size))
        return moec_fail(err, MOEC_ENOMEM, "%zu elements of %zu bytes are more than this machine can address", n, size);
    void *p = test_refuses() ? NULL : realloc(*array, bytes);
    if (!p)
        return moec_fail(err, MOEC_ENOMEM, "out of memory: %zu bytes refused", bytes);
    *array = p;
    *cap = want;
    return MOEC_OK;
}

moec_status moec_copy(char **out, const char *bytes, size_t n, moec_err *err)
{
    size_t size;
    *out = NULL;
    if (!moec_add_size(&size, n, 1))
        return moec_fail(err, MOEC_ENOMEM, "a text of %zu bytes is more than this machine can address", n);
    moec_status st = moec_alloc((void **)out, size, 1, err);
    if (st == MOEC_OK && n > 0)
        memcpy(*out, bytes, n);
    return st;
}

moec_status moec_vformat(char **out, moec_err *err, const char *fmt, va_list ap)
{
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    moec_status st = n < 0 ? moec_fail(err, MOEC_EINVAL, "text format") : moec_alloc((void **)out, (size_t)n + 1, 1, err);
    if (st == MOEC_OK)
        vsnprintf(*out, (size_t)n + 1, fmt, again);
    va_end(again);
    return st;
}

moec_status moec_format(char **out, moec_err *err, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const moec_status st = moec_vformat(out, err, fmt, ap);
    va_end(ap);
    return st;
}

void moec_free(void *p)
{
    free(p);
}

static void advise(const void *at, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), lo = (uintptr_t)at & ~(page - 1);
    if (n > 0)
        (void)madvise((void *)lo, (uintptr_t)at + n - lo, advice);
}

void moec_pages_drop(const void *at, size_t n)
{
    advise(at, n, MADV_DONTNEED);
}

void moec_pages_prefetch(const void *at, size_t n)
{
    advise(at, n, MADV_WILLNEED);
}

/* A number in kilobytes from a file of /proc, in bytes. */
static uint64_t proc_bytes(const char *path, const char *key)
{
    char line[256];
    uint64_t v = 0;
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0) {
            v = strtoull(line + strlen(key), NULL, 10) * 1024u;
            break;
        }
    if (f)
        fclose(f);
    return v;
}

uint64_t moec_resident_memory(void)
{
    return proc_bytes("/proc/self/status", "VmRSS:");
}

/* What a memory limit of this container leaves; UINT64_MAX without one. */
static uint64_t cgroup_spare(void)
{
    unsigned long long limit = 0;
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r");
    bool limited = f && fscanf(f, "%llu", &limit) == 1; /* "max" is no number */
    if (f)
        fclose(f);
    uint64_t used = limited ? moec_resident_memory() : 0;
    return !limited ? UINT64_MAX : limit > used ? limit - used : 0;
}

uint64_t moec_available_memory(void)
{
    uint64_t machine = proc_bytes("/proc/meminfo", "MemAvailable:"), group = cgroup_spare();
    return machine < group ? machine : group;
}

uint64_t moec_peak_memory(void)
{
    /* Not ru_maxrss first: it survives exec, so a small program started by a large one would report the large one. */
    uint64_t own = proc_bytes("/proc/self/status", "VmHWM:");
    struct rusage u;
    if (own > 0)
        return own;
    if (getrusage(RUSAGE_SELF, &u) != 0)
        return 0;
    return (uint64_t)u.ru_maxrss * 1024u; /* Linux counts in kilobytes */
}
