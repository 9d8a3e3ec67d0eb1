/* The residual stream of all tokens between layers, and beside it what else goes from layer to layer (router logits in
 * families that carry them): in memory, or on disk when memory is short. On disk two files take turns, so that the state
 * before a layer survives until the layer is done. Both are [n, width] and behind it [n, beside], in memory as in files. */
#ifndef MOEC_CALIB_HIDDEN_H
#define MOEC_CALIB_HIDDEN_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct moec_hidden moec_hidden;

/** Room for n tokens of `width` floats and `beside` more.
 *  @param dir        NULL: in memory. Else the folder for the two files.
 *  @param keep       the files keep their names (hidden.0, hidden.1), so that a later run can open them; else they
 *                    vanish with the process.
 *  @param workers, max_tokens  read buffers on disk: one of max_tokens for each worker.
 *  MOEC_ENOMEM, MOEC_EIO, MOEC_ENOFIT (disk). Free with moec_hidden_free. */
MOEC_API moec_status moec_hidden_new(moec_hidden **out, int64_t n, int64_t width, int64_t beside, const char *dir, bool keep,
                                     int workers, int64_t max_tokens, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_hidden_free(moec_hidden *s);
MOEC_API size_t moec_hidden_bytes(int64_t n, int64_t width, int64_t beside, bool on_disk, int workers, int64_t max_tokens);
MOEC_API bool moec_hidden_on_disk(const moec_hidden *s);

/** Rows [at, at+n) of the current state; in the worker's buffer when on disk. `fresh`: contents do not matter. */
MOEC_API moec_status moec_hidden_get(float **out, moec_hidden *s, int worker, int64_t at, int64_t n, bool fresh,
                                     moec_err *err) MOEC_USE_RESULT;
/** What stands beside rows `at` and following, as the worker's last moec_hidden_get left it; NULL when there is none. */
MOEC_API float *moec_hidden_beside(moec_hidden *s, int worker, int64_t at);
/** Makes what the worker has at rows [at, at+n), and beside them, part of the next state. */
MOEC_API moec_status moec_hidden_put(moec_hidden *s, int worker, int64_t at, int64_t n, moec_err *err) MOEC_USE_RESULT;
/** All chunks are put: the next state becomes the current one. */
MOEC_API void moec_hidden_turn(moec_hidden *s);
/** Which of the two files is current, for a checkpoint of an on-disk store. */
MOEC_API int moec_hidden_side(const moec_hidden *s);
MOEC_API void moec_hidden_set_side(moec_hidden *s, int side);

/** Copies rows [at, at+n) of the current state; from any thread. */
MOEC_API moec_status moec_hidden_read(float *out, const moec_hidden *s, int64_t at, int64_t n, moec_err *err)
    MOEC_USE_RESULT;

/** Current state to an open file at its position, for checkpoints; on disk it is there already and is only synced.
 *  MOEC_EIO, MOEC_ENOFIT. */
MOEC_API moec_status moec_hidden_save(const moec_hidden *s, int fd, const char *what, moec_err *err) MOEC_USE_RESULT;
/** Current state from an open file at its position, in memory or on disk as the store is now. MOEC_EIO; MOEC_ENOFIT;
 *  MOEC_EFORMAT: the file ends early. */
MOEC_API moec_status moec_hidden_load(moec_hidden *s, int fd, const char *what, moec_err *err) MOEC_USE_RESULT;
/** On disk: the current side's file, kept by an earlier run, is the current state. MOEC_EFORMAT: it ends early. */
MOEC_API moec_status moec_hidden_resume(const moec_hidden *s, moec_err *err) MOEC_USE_RESULT;
/** Name of the file that a store with `keep` has in `dir` for a side. MOEC_ENOMEM. Free with moec_free. */
MOEC_API moec_status moec_hidden_path(char **out, const char *dir, int side, moec_err *err) MOEC_USE_RESULT;

/** read / write of exactly n bytes at the file's position. MOEC_EIO, MOEC_ENOFIT, MOEC_EFORMAT (file too short). */
MOEC_API moec_status moec_read_all(int fd, void *bytes, size_t n, const char *what, moec_err *err) MOEC_USE_RESULT;
MOEC_API moec_status moec_write_all(int fd, const void *bytes, size_t n, const char *what, moec_err *err) MOEC_USE_RESULT;

#endif
