/* Outputs of one source that differ in their experts alone hold every other shard twice. Here they come to hold it once. */
#ifndef MOEC_RUN_SHARE_H
#define MOEC_RUN_SHARE_H

#include "base/err.h"

#include <stdint.h>

typedef struct moec_share_report {
    int64_t shards;         /* of `dir` */
    int64_t linked, copied; /* of these with the bytes of one of the same name in `with`: now (or before) one file; left as they are
                               because the file system makes no hard link */
    uint64_t linked_bytes, copied_bytes;
} moec_share_report;

/** Every file *.safetensors of `dir` whose bytes are those of the file of its name in `with` becomes a hard link to that. Only whole files
 *  are compared and exchanged, one by one: whatever stops it, each folder is complete. What is written into one of the two in place is in
 *  the other, too; this program only ever puts new files in the place of old ones.
 *  MOEC_EINVAL: the folders are one; MOEC_EIO, MOEC_ENOMEM. Cost: one read of each pair of the same size. */
MOEC_API moec_status moec_share_files(moec_share_report *out, const char *dir, const char *with, moec_err *err) MOEC_USE_RESULT;

#endif
