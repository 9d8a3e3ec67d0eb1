/* Strict reading of this program's own JSON files (plans, pattern stores): an edit that is misspelt or a damaged file must not
 * be silently without effect. */
#ifndef MOEC_METHOD_READER_H
#define MOEC_METHOD_READER_H

#include "base/json.h"

enum { MOEC_READ_MAX_LAYERS = 4096, MOEC_READ_MAX_EXPERTS = 65535 };

typedef struct moec_reader {
    const char *what; /* the file, for errors */
    moec_err *err;
} moec_reader;

/** `o` is an object and has no key beside the n known ones. MOEC_EFORMAT names the first that is not known. */
moec_status moec__read_keys(const moec_reader *r, moec_json *o, const char *where, const char *const *known, size_t n)
    MOEC_USE_RESULT;
/** o[key], a whole number from lo to hi. MOEC_EFORMAT. */
moec_status moec__read_int(int64_t *out, const moec_reader *r, const moec_json *o, const char *where, const char *key,
                           int64_t lo, int64_t hi) MOEC_USE_RESULT;
/** o[key], a text of fewer than `cap` bytes without NUL; absent and not needed: "". MOEC_EFORMAT. */
moec_status moec__read_text(char *out, size_t cap, const moec_reader *r, const moec_json *o, const char *key, bool needed)
    MOEC_USE_RESULT;

/** o[key], a list of exactly n numbers (JSON has none that are not finite); free with moec_free, on failure too.
 *  MOEC_EFORMAT, MOEC_ENOMEM. */
moec_status moec__read_reals(double **out, int64_t n, const moec_reader *r, const moec_json *o, const char *where,
                             const char *key) MOEC_USE_RESULT;

#endif
