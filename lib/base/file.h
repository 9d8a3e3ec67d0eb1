/* Files: whole-file reads with a bound, writes that appear under their final name only when complete, paths, folders,
 * free disk space. */
#ifndef MOEC_BASE_FILE_H
#define MOEC_BASE_FILE_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

/** Reads a regular file whole; *out has a NUL behind its *len bytes. MOEC_EIO; MOEC_EFORMAT when larger than
 *  max_bytes or not a regular file (a pipe is not waited for); MOEC_ENOMEM. Free with moec_free. */
MOEC_API moec_status moec_file_read(char **out, size_t *len, const char *path, size_t max_bytes, moec_err *err)
    MOEC_USE_RESULT;
/** Writes PATH.tmp, syncs it, renames it to PATH and syncs the folder. MOEC_EIO; MOEC_ENOFIT when the disk is full. */
MOEC_API moec_status moec_file_write(const char *path, const void *bytes, size_t len, moec_err *err) MOEC_USE_RESULT;
/** fsync of a file, renamed from `tmp` to `path`, and of the folder it is in. */
MOEC_API moec_status moec_file_publish(const char *tmp, const char *path, moec_err *err) MOEC_USE_RESULT;
/** MOEC_ENOFIT for ENOSPC and EDQUOT, else MOEC_EIO; text "what: strerror". */
MOEC_API moec_status moec_fail_errno(moec_err *err, int errnum, const char *what);

/** Where temporary files go: $TMPDIR, else /tmp. */
MOEC_API const char *moec_scratch_dir(void);
/** n >= 1 bytes of zeros in a file there that has no name, mapped to be read and written: pages are given back when memory is
 *  short or moec_pages_drop is called, and what was written stays. Its space is taken at once. Release with moec_file_scratch_free.
 *  MOEC_ENOFIT, MOEC_EIO: "DIR: a temporary file for WHAT: ...". */
MOEC_API moec_status moec_file_scratch(void **out, size_t n, const char *what, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_file_scratch_free(void *at, size_t n); /* NULL-safe */

/** "dir/name" (name alone when dir is NULL or empty). MOEC_ENOMEM. Free with moec_free. */
MOEC_API moec_status moec_path_join(char **out, const char *dir, const char *name, moec_err *err) MOEC_USE_RESULT;
/** Last component of a path; borrowed. */
MOEC_API const char *moec_path_base(const char *path);
/** True when `name` is one plain component that stays in its folder: not empty, no '/', no NUL, not "." or "..". */
MOEC_API bool moec_path_is_plain(const char *name);
MOEC_API bool moec_path_exists(const char *path);
MOEC_API bool moec_path_is_dir(const char *path);
MOEC_API moec_status moec_dir_make(const char *path, moec_err *err) MOEC_USE_RESULT; /* parents too; there already is fine */
MOEC_API moec_status moec_dir_sync(const char *path, moec_err *err) MOEC_USE_RESULT;
/** Removes a folder this program made and everything in it. Symbolic links are removed, not followed. */
MOEC_API moec_status moec_dir_remove(const char *path, moec_err *err) MOEC_USE_RESULT;
/** Names of the entries of a folder except "." and "..", sorted bytewise. Free each and the array with
 *  moec_names_free. MOEC_EIO. */
MOEC_API moec_status moec_dir_list(char ***out, size_t *n, const char *path, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_names_free(char **names, size_t n);
/** Bytes that an unprivileged process may still write to the file system of `path` (or of its nearest parent). */
MOEC_API moec_status moec_disk_free(uint64_t *out, const char *path, moec_err *err) MOEC_USE_RESULT;

#endif
