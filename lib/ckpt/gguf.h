/* GGUF, the container of llama.cpp: magic, version, keys with typed values, a list of tensors, aligned data; one file or a
 * series "NAME-00001-of-00003.gguf". Little-endian throughout. Reading is strict, because files come from the internet:
 * every length is checked before it is used. Nothing here knows what keys and tensors mean.
 * Source: ggml's docs/gguf.md (version 3; 2 is the same, 1 had short lengths and is refused). */
#ifndef MOEC_CKPT_GGUF_H
#define MOEC_CKPT_GGUF_H

#include "base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum moec_gguf_kind {
    MOEC_GGUF_U8, MOEC_GGUF_I8, MOEC_GGUF_U16, MOEC_GGUF_I16, MOEC_GGUF_U32, MOEC_GGUF_I32, MOEC_GGUF_F32, MOEC_GGUF_BOOL,
    MOEC_GGUF_TEXT, MOEC_GGUF_ARRAY, MOEC_GGUF_U64, MOEC_GGUF_I64, MOEC_GGUF_F64,
    MOEC_GGUF_KINDS
} moec_gguf_kind;

/* Number formats of tensors, by ggml's numbers. Only those that programs write; the numbers between are withdrawn. */
enum {
    MOEC_GGML_F32 = 0, MOEC_GGML_F16 = 1, MOEC_GGML_Q4_0 = 2, MOEC_GGML_Q4_1 = 3, MOEC_GGML_Q5_0 = 6, MOEC_GGML_Q5_1 = 7,
    MOEC_GGML_Q8_0 = 8, MOEC_GGML_Q8_1 = 9, MOEC_GGML_Q2_K = 10, MOEC_GGML_Q3_K = 11, MOEC_GGML_Q4_K = 12,
    MOEC_GGML_Q5_K = 13, MOEC_GGML_Q6_K = 14, MOEC_GGML_Q8_K = 15, MOEC_GGML_IQ2_XXS = 16, MOEC_GGML_IQ2_XS = 17,
    MOEC_GGML_IQ3_XXS = 18, MOEC_GGML_IQ1_S = 19, MOEC_GGML_IQ4_NL = 20, MOEC_GGML_IQ3_S = 21, MOEC_GGML_IQ2_S = 22,
    MOEC_GGML_IQ4_XS = 23, MOEC_GGML_I8 = 24, MOEC_GGML_I16 = 25, MOEC_GGML_I32 = 26, MOEC_GGML_I64 = 27,
    MOEC_GGML_F64 = 28, MOEC_GGML_IQ1_M = 29, MOEC_GGML_BF16 = 30, MOEC_GGML_TQ1_0 = 34, MOEC_GGML_TQ2_0 = 35,
    MOEC_GGML_MXFP4 = 39, MOEC_GGML_NVFP4 = 40, MOEC_GGML_Q1_0 = 41, MOEC_GGML_Q2_0 = 42,
    MOEC_GGML_COUNT = 43
};
typedef struct moec_ggml_traits {
    const char *name;     /* "Q4_K" */
    int64_t elements;     /* of a block; a row (dim[0]) is whole blocks */
    size_t bytes;         /* of a block */
} moec_ggml_traits;
/** Traits of ggml's type number; NULL: unknown or withdrawn. */
MOEC_API const moec_ggml_traits *moec_ggml_type(uint32_t type);

enum { MOEC_GGUF_MAX_RANK = 4, MOEC_GGUF_MAX_NAME = 63, MOEC_GGUF_ALIGNMENT = 32 };

typedef struct moec_gguf_value {
    char *key;
    moec_gguf_kind kind;
    moec_gguf_kind item;     /* of an ARRAY */
    uint64_t n;              /* items of an ARRAY, bytes of a TEXT */
    const unsigned char *at; /* the bytes of a number, TEXT or the first item; in the file, may be unaligned */
} moec_gguf_value;

typedef struct moec_gguf_tensor {
    char *name;
    uint32_t type;                   /* moec_ggml_type */
    int rank;                        /* 0 to 4 */
    int64_t dim[MOEC_GGUF_MAX_RANK]; /* INNERMOST first, the reverse of a safetensors shape; 1 behind rank */
    uint64_t begin, bytes;           /* within the data of its file */
    size_t file;                     /* of a series, from 0 */
    const void *data;                /* in the map of moec_gguf_open; NULL from moec_gguf_parse */
} moec_gguf_tensor;

/** Bytes that a tensor of a known type takes in a file whose alignment is MOEC_GGUF_ALIGNMENT, padding counted; of its type and
 *  dimensions alone, which must be in range. */
MOEC_API uint64_t moec_gguf_padded_bytes(const moec_gguf_tensor *t);

/* --- the front of one file ------------------------------------------------------------------------------------------- */

typedef struct moec_gguf_index {
    moec_gguf_value *value;   /* in the file's order */
    moec_gguf_tensor *tensor; /* in the file's order, which is that of their offsets */
    size_t n_values, n;
    uint64_t alignment, data_at;
    uint32_t version;
} moec_gguf_index;

/** Parses the front of a file. Values point into `bytes`, which must outlive the index.
 *  @param size       bytes there are: at least up to the data.
 *  @param file_size  length of the file that tensors must lie in.
 *  @return MOEC_OK; MOEC_EFORMAT: not GGUF, big-endian, version not 2 or 3; anything that reaches past `size`; a key or name
 *          twice, empty, too long (65535, 63) or with a NUL; unknown kind or type; an array of arrays; a bool that is not 0
 *          or 1; alignment no power of two up to 65536; more than 4 dimensions, a row that is not whole blocks, a size that
 *          overflows; tensors that do not follow each other at aligned offsets, as every reader expects, or reach past the
 *          file; more than padding behind the last. MOEC_ENOMEM.
 *  Release with moec_gguf_index_release, also after failure. Cost: one pass, and sorting the names. */
MOEC_API moec_status moec_gguf_parse(moec_gguf_index *out, const void *bytes, size_t size, uint64_t file_size,
                                     const char *what, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_index_release(moec_gguf_index *ix);

/** The value of a key, or NULL. */
MOEC_API const moec_gguf_value *moec_gguf_find(const moec_gguf_index *ix, const char *key);
/* Getters; NULL in, false out. Integers of every width, if they fit; floats of both. */
MOEC_API bool moec_gguf_int(const moec_gguf_value *v, int64_t *out);
MOEC_API bool moec_gguf_real(const moec_gguf_value *v, double *out);
MOEC_API bool moec_gguf_bool(const moec_gguf_value *v, bool *out);
/** Copy with a NUL behind; free with moec_free. MOEC_EFORMAT: no text, or with a NUL in it. MOEC_ENOMEM. */
MOEC_API moec_status moec_gguf_text(char **out, const moec_gguf_value *v, moec_err *err) MOEC_USE_RESULT;
/** Item i of an array of numbers or bools, as by the getters. */
MOEC_API bool moec_gguf_item_int(const moec_gguf_value *v, uint64_t i, int64_t *out);
MOEC_API bool moec_gguf_item_real(const moec_gguf_value *v, uint64_t i, double *out);
/** Next text of an array of texts, which lie one behind the other: start with a zeroed `it`; false at the end. *text is
 *  borrowed from the file and has no NUL behind it. */
typedef struct moec_gguf_texts {
    const unsigned char *next;
    uint64_t seen;
} moec_gguf_texts;
MOEC_API bool moec_gguf_each_text(const moec_gguf_value *v, moec_gguf_texts *it, const char **text, size_t *len);

/* --- files ----------------------------------------------------------------------------------------------------------- */

typedef struct moec_gguf moec_gguf;

/** Opens and maps a file, and the others of its series when it is the first of one (split.count above 1).
 *  @return MOEC_OK; MOEC_EIO; MOEC_EFORMAT: what moec_gguf_parse refuses; a file of a series that is not the first, is not
 *          named NAME-00001-of-0000N.gguf, whose others are missing or are of another series; a tensor in two of them;
 *          not as many tensors as split.tensors.count says. MOEC_ENOMEM. Close with moec_gguf_close. */
MOEC_API moec_status moec_gguf_open(moec_gguf **out, const char *path, moec_err *err) MOEC_USE_RESULT;
MOEC_API void moec_gguf_close(moec_gguf *g);
MOEC_API const moec_gguf_index *moec_gguf_front(const moec_gguf *g); /* of the first file: the keys */
MOEC_API size_t moec_gguf_files(const moec_gguf *g);
MOEC_API const char *moec_gguf_path(const moec_gguf *g, size_t file); /* borrowed */
/** MOEC_EFORMAT when a file's size or time of change is no longer what it was when it was opened; MOEC_EIO. */
MOEC_API moec_status moec_gguf_unchanged(const moec_gguf *g, moec_err *err) MOEC_USE_RESULT;
/** Gives the mapped pages of a file back. */
MOEC_API void moec_gguf_drop(const moec_gguf *g, size_t file);
MOEC_API size_t moec_gguf_count(const moec_gguf *g);                 /* tensors of all files */
MOEC_API const moec_gguf_tensor *moec_gguf_at(const moec_gguf *g, size_t i);
MOEC_API const moec_gguf_tensor *moec_gguf_named(const moec_gguf *g, const char *name); /* NULL: absent */

#endif
