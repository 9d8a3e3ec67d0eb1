/* A seal: 512 bytes at the front of a file that say what it is and hold a checksum of the rest, so that a damaged or cut
 * file is recognised before any library parses it. Plain text, padded with zeros:
 *
 *     TITLE\nseal 1\nxxh3-128 HEX32\nbytes DECIMAL20\n
 *
 * "bytes" is the whole file's length; the checksum is of everything behind the first 512 bytes. It recognises damage, not
 * forgery: whoever can write a file can seal it. */
#ifndef MOEC_CKPT_SEAL_H
#define MOEC_CKPT_SEAL_H

#include "base/err.h"

#include <stdint.h>

enum { MOEC_SEAL_BYTES = 512 };

/** Seals a file whose first 512 bytes are free, by writing them. Cost: one read. MOEC_EIO, MOEC_ENOFIT, MOEC_ENOMEM. */
MOEC_API moec_status moec_seal_write(const char *path, const char *title, moec_err *err) MOEC_USE_RESULT;
/** MOEC_OK when the file is intact; MOEC_EFORMAT: not a sealed file of this title, cut short or changed; MOEC_EIO. */
MOEC_API moec_status moec_seal_check(const char *path, const char *title, moec_err *err) MOEC_USE_RESULT;
/** The same for a file's bytes; `what` is what errors call it. */
MOEC_API moec_status moec_seal_check_bytes(const void *bytes, size_t len, const char *title, const char *what,
                                           moec_err *err) MOEC_USE_RESULT;

#endif
