/* Checked allocation: sizes are multiplied with overflow checks, memory is zeroed, failures are recorded in a moec_err.
 * Also the process's peak memory and the limit that --max-memory sets. */
#ifndef MOEC_BASE_MEM_H
#define MOEC_BASE_MEM_H

#include "base/err.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>

/** Zeroed array of n elements, 64-byte aligned; *out is NULL when n or size is 0.
 *  MOEC_ENOMEM when n*size overflows or the allocation fails. Free with moec_free. */
MOEC_API moec_status moec_alloc(void **out, size_t n, size_t size, moec_err *err) MOEC_USE_RESULT;

/** Grows *array to hold at least n elements (capacity doubles; new elements are not zeroed). *array comes from this
 *  function or is NULL; *cap is the capacity in elements. MOEC_ENOMEM leaves both unchanged. */
MOEC_API moec_status moec_grow(void **array, size_t *cap, size_t n, size_t size, moec_err *err) MOEC_USE_RESULT;

/** Copy of n bytes with a NUL behind. MOEC_ENOMEM. */
MOEC_API moec_status moec_copy(char **out, const char *bytes, size_t n, moec_err *err) MOEC_USE_RESULT;

/** printf into a fresh string; moec_vformat as vprintf. MOEC_ENOMEM. */
MOEC_API moec_status moec_format(char **out, moec_err *err, const char *fmt, ...) MOEC_PRINTF(3, 4) MOEC_USE_RESULT;
MOEC_API moec_status moec_vformat(char **out, moec_err *err, const char *fmt, va_list ap) MOEC_PRINTF(3, 0) MOEC_USE_RESULT;

/** NULL-safe. */
MOEC_API void moec_free(void *p);

/* MOEC_NEW(pointer, count, err): the element size is that of *pointer. MOEC_GROW(array, cap, count, err) likewise. */
#define MOEC_NEW(p, n, err) moec_alloc((void **)&(p), (n), sizeof *(p), (err))
#define MOEC_GROW(p, cap, n, err) moec_grow((void **)&(p), &(cap), (n), sizeof *(p), (err))

/** out = a*b; false on overflow. */
MOEC_API bool moec_mul_size(size_t *out, size_t a, size_t b) MOEC_USE_RESULT;
/** out = a+b; false on overflow. */
MOEC_API bool moec_add_size(size_t *out, size_t a, size_t b) MOEC_USE_RESULT;

/** Gives the pages of a file mapping (read-only, or of moec_file_scratch) back to the system; the next touch reads them again. Neighbouring bytes on
 *  the first and last page come along, which no reader can notice. */
MOEC_API void moec_pages_drop(const void *at, size_t n);
/** Starts reading them without waiting and without adding to resident memory. */
MOEC_API void moec_pages_prefetch(const void *at, size_t n);

/** Resident memory of this process now, and memory that could still be had without swapping, of the machine or of what the
 *  container's limit leaves; 0 when the system does not say. */
MOEC_API uint64_t moec_resident_memory(void);
MOEC_API uint64_t moec_available_memory(void);
/** Highest resident set size of this process so far, in bytes. */
MOEC_API uint64_t moec_peak_memory(void);

/* Tests set this to k: allocation k+1 and all later ones fail. LONG_MAX: no limit. */
extern MOEC_API long moec_test_allocs_left;

#endif
