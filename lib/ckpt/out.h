/* Inside of moec_out, shared by out.c (builds it) and writer.c (carries it out). */
#ifndef MOEC_CKPT_OUT_H
#define MOEC_CKPT_OUT_H

#include "ckpt/writer.h"

typedef struct moec_segment {
    uint64_t at;           /* in the data of the shard */
    int fd;                /* or -1: made */
    uint64_t from, length; /* in the source file, or of what is made */
    moec_make_fn *make;    /* NULL with fd -1: `fill`, over and over */
    void *ctx;
    unsigned char fill[8];
    size_t fill_size;
} moec_segment;

typedef struct moec_shard_plan {
    char *name, *metadata;
    moec_st_entry *entry;
    size_t n, cap;
    moec_segment *segment;
    size_t n_segments, segments_cap;
    uint64_t bytes; /* of data */
    bool raw;       /* of another container: large, and taken up in its middle */
    char *header;
    size_t header_len;
} moec_shard_plan;

typedef struct moec_file_plan {
    char *name;
    char *path;  /* copy of this file, or */
    char *bytes; /* these bytes */
    uint64_t len;
} moec_file_plan;

struct moec_out {
    moec_shard_plan *shard;
    size_t n_shards, shards_cap;
    moec_file_plan *file;
    size_t n_files, files_cap;
    bool closed;
};

#endif
