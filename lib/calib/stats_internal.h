/* What the files of calib/stats share among themselves and with their tests. */
#ifndef MOEC_CALIB_STATS_INTERNAL_H
#define MOEC_CALIB_STATS_INTERNAL_H

#include "calib/stats.h"
#include "ckpt/h5.h"
#include "num/tensor.h"

enum {
    MOEC_STATS_FORMAT = 1,       /* format_version in the file */
    MOEC_STATS_MAX_NAME = 200,   /* bytes of a domain's name */
    MOEC_STATS_MAX_DOMAINS = 4096,
    MOEC_STATS_MAX_TEXT = 1 << 20, /* bytes of router_rule and of options */
    MOEC_STATS_MAX_RANK = 4,
    MOEC_STATS_MAX_TIER = 1      /* that a run collects in one pass; kinds above it are added by who measures them */
};
#define MOEC_STATS_TITLE "moecompress statistics" /* first line of the file's seal */

typedef struct moec_size_row {
    const char *name; /* attribute of /meta */
    size_t offset;    /* of the int64_t in moec_stats_meta */
    int64_t high;     /* the least is 1 */
} moec_size_row;
enum { MOEC_SIZE_ROWS = 6 };
extern MOEC_API const moec_size_row moec__size_rows[MOEC_SIZE_ROWS];
/** The size of a row in a meta. */
int64_t *moec__size_of(const moec_size_row *row, moec_stats_meta *m);

/** Sizes in range and consistent, texts bounded and JSON; fails with `code`. */
MOEC_API moec_status moec__stats_meta_check(const moec_stats_meta *m, moec_status code, moec_err *err) MOEC_USE_RESULT;
/** A domain's name: 1 to 200 bytes; fails with `code`. */
moec_status moec__stats_name_check(const char *name, moec_status code, moec_err *err) MOEC_USE_RESULT;
/** Deep copy. MOEC_ENOMEM leaves *out released. */
moec_status moec__stats_meta_copy(moec_stats_meta *out, const moec_stats_meta *m, moec_err *err) MOEC_USE_RESULT;

/** Axes of a kind's whole array, layer axis first; returns the rank (0: a scalar). */
MOEC_API int moec__stat_dims(const moec_stats_meta *m, moec_stat kind, int64_t dim[MOEC_STATS_MAX_RANK]);
moec_dtype moec__cell_dtype(moec_cell c);
/** True when the statistics hold this kind (in every domain; without domains: when the tier covers it). */
bool moec__stats_has(const moec_stats *s, moec_stat kind);
/** Allocates a kind's whole array with every cell at `start`. */
moec_status moec__stat_new(void **out, const moec_stats_meta *m, moec_stat kind, moec_err *err) MOEC_USE_RESULT;
/** Sets cells to the kind's start value. */
void moec__stat_reset(moec_stat kind, void *cells, int64_t n);

/** Every cell finite and not below its bound; fails with `code`, naming domain, kind, layer and expert. */
MOEC_API moec_status moec__stats_values_check(const moec_stats *s, moec_status code, moec_err *err) MOEC_USE_RESULT;

/** The same of n cells of a kind in domain d, the first of which is cell `from` of its whole array. */
moec_status moec__stats_cells_check(const moec_stats *s, int d, moec_stat kind, const void *cells, int64_t from, int64_t n,
                                    moec_status code, moec_err *err) MOEC_USE_RESULT;

/* Kinds that stay in the file. Everything is owned. */
struct moec_stats_lean {
    moec_h5 *file;
    char **group; /* [n_groups] path of each domain */
    size_t n_groups;
    bool there[MOEC_STAT_COUNT];
};
void moec__stats_lean_free(struct moec_stats_lean *v); /* NULL-safe */
/** MOEC_EINVAL: for who needs whole statistics. */
moec_status moec__stats_lean_refuse(moec_err *err) MOEC_USE_RESULT;
/** Path of a kind in the file, below that of its domain. Free with moec_free. */
moec_status moec__stat_path(char **out, const char *group, moec_stat kind, moec_err *err) MOEC_USE_RESULT;

/** /gguf of a file; s->sensitivity is there. */
moec_status moec__stats_gguf_put(moec_h5 *h, const moec_stats *s, moec_err *err) MOEC_USE_RESULT;
moec_status moec__stats_gguf_get(moec_sensitivity **out, moec_h5 *h, moec_err *err) MOEC_USE_RESULT;
/** Names and sizes there, numbers finite and none negative, or where they may be NAN; fails with `code`. */
moec_status moec__stats_gguf_check(const moec_sensitivity *v, moec_status code, moec_err *err) MOEC_USE_RESULT;
/** "gguf" of moec_stats_describe. */
moec_json *moec__stats_gguf_json(const moec_sensitivity *v);
#define MOEC_STATS_GGUF "gguf" /* what kinds and merging call it */

/** Reads statistics from an open file, whose seal has been checked or is of no interest (fuzzing). */
MOEC_API moec_status moec__stats_read(moec_stats **out, moec_h5 *file, moec_err *err) MOEC_USE_RESULT;
/** "errors" of moec_stats_describe. NULL: not measured. */
moec_json *moec__stats_errors_json(const moec_stats *s);
/** Sum of two digests as 128-bit numbers; "merged" where one is not 32 hex digits. An empty one counts as 0. */
MOEC_API void moec__digest_add(char sum[33], const char *part);

/** A domain's name as a link name in the file, and back. Free with moec_free. */
moec_status moec__stats_name_encode(char **out, const char *name, moec_err *err) MOEC_USE_RESULT;
moec_status moec__stats_name_decode(char **out, const char *link, moec_err *err) MOEC_USE_RESULT;

#endif
