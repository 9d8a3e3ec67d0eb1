/* The files that `--text` arguments name. */
#ifndef MOEC_TEXT_CORPUS_ARGS_H
#define MOEC_TEXT_CORPUS_ARGS_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct moec__source {
    char *name, *path;
    double weight;
    bool is_ids; /* the path ends in .ids */
} moec__source;

typedef struct moec__sources {
    moec__source *at;
    size_t n, cap;
} moec__sources;

/** Takes the arguments apart as moec_corpus_read says. Files are not opened. MOEC_EINVAL, MOEC_EIO (folders),
 * MOEC_ENOMEM. Release with moec__sources_release, after a failure too. */
moec_status moec__sources_list(moec__sources *out, const char *const *args, int n_args,
                               moec_err *err) MOEC_USE_RESULT;
void moec__sources_release(moec__sources *s);

#endif
