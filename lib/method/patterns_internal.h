/* What patterns.c and patterns_file.c share. */
#ifndef MOEC_METHOD_PATTERNS_INTERNAL_H
#define MOEC_METHOD_PATTERNS_INTERNAL_H

#include "method/patterns.h"

enum { MOEC_TASK_MAX = 4096, MOEC_TASK_MAX_NAME = 200 };

/** The order of a ranking: by descending score, ties to the lower number. */
static inline bool moec__task_before(double score, int32_t expert, double other_score, int32_t other)
{
    return score > other_score || (score == other_score && expert < other); /* scores are finite */
}

void moec__task_release(moec_task *t);
/** Fails with `code`. */
moec_status moec__task_name_check(const char *name, moec_status code, moec_err *err) MOEC_USE_RESULT;
/** Takes the task over; on failure it stays the caller's. MOEC_EEXIST, MOEC_EINVAL: too many. */
moec_status moec__patterns_push(moec_patterns *p, moec_task *t, bool replace, moec_err *err) MOEC_USE_RESULT;

#endif
