/* JSON: strict bounded reading, stable-order writing, and in-place editing of one value in a text. The only file that
 * sees jansson is json.c. A moec_json is a value; what moec_json_parse and the builders return is owned by the caller,
 * what the getters return is borrowed from it. */
#ifndef MOEC_BASE_JSON_H
#define MOEC_BASE_JSON_H

#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct moec_json moec_json;
typedef enum moec_json_kind {
    MOEC_JSON_NONE, /* a NULL pointer: absent */
    MOEC_JSON_NULL,
    MOEC_JSON_BOOL,
    MOEC_JSON_INT,
    MOEC_JSON_REAL,
    MOEC_JSON_STRING,
    MOEC_JSON_ARRAY,
    MOEC_JSON_OBJECT
} moec_json_kind;

/** Parses strict JSON: UTF-8 checked, duplicate keys refused, depth bounded (jansson: 2048), numbers in range, nothing
 *  but white space behind the value. Byte order is that of the text: objects keep insertion order.
 *  MOEC_EFORMAT: "what: JSON line L column C: reason". Free with moec_json_free. */
MOEC_API moec_status moec_json_parse(moec_json **out, const char *text, size_t len, const char *what, moec_err *err)
    MOEC_USE_RESULT;
/** Reads and parses a file of at most max_bytes. MOEC_EIO, MOEC_EFORMAT (too large included). */
MOEC_API moec_status moec_json_read(moec_json **out, const char *path, size_t max_bytes, moec_err *err) MOEC_USE_RESULT;
/** The same with every number a real, so that an integer beyond 64 bits is none that stops it: tokenizer_config.json has 10^30
 *  where a model has no longest text. */
MOEC_API moec_status moec_json_read_reals(moec_json **out, const char *path, size_t max_bytes, moec_err *err)
    MOEC_USE_RESULT;
MOEC_API void moec_json_free(moec_json *v);

/* Getters: NULL in, NONE / NULL / false out; never fail otherwise. */
MOEC_API moec_json_kind moec_json_type(const moec_json *v);
MOEC_API bool moec_json_absent(const moec_json *v);              /* NONE or NULL: config files use both for "not given" */
MOEC_API moec_json *moec_json_get(const moec_json *object, const char *key);
MOEC_API const moec_json *moec_json_path(const moec_json *object, const char *path); /* keys joined by '.' */
MOEC_API moec_json *moec_json_at(const moec_json *array, size_t i);
MOEC_API size_t moec_json_len(const moec_json *v); /* elements of an array or object, bytes of a string */
MOEC_API bool moec_json_int(const moec_json *v, int64_t *out);   /* integers only */
MOEC_API bool moec_json_real(const moec_json *v, double *out);   /* integers and reals */
MOEC_API bool moec_json_bool(const moec_json *v, bool *out);
MOEC_API const char *moec_json_string(const moec_json *v);       /* NUL-terminated UTF-8, or NULL */
/** Iterates an object in order: start with *it = NULL; false at the end. */
MOEC_API bool moec_json_each(moec_json *object, void **it, const char **key, moec_json **value);

/* Builders. A failed allocation is remembered and makes moec_json_dump return MOEC_ENOMEM. set and push take the value.
 * A file name may hold any bytes: a value that is not UTF-8 becomes "(not UTF-8)", in such a key every byte above 127
 * a '?'. */
MOEC_API moec_json *moec_json_new_object(void);
MOEC_API moec_json *moec_json_new_array(void);
MOEC_API moec_json *moec_json_new_string(const char *utf8);
MOEC_API moec_json *moec_json_new_int(int64_t v);
MOEC_API moec_json *moec_json_new_real(double v); /* NaN and infinities become null */
MOEC_API moec_json *moec_json_new_bool(bool v);
MOEC_API moec_json *moec_json_new_null(void);
MOEC_API moec_json *moec_json_new_ints(const int32_t *v, int64_t n); /* an array */
MOEC_API moec_json *moec_json_new_long_ints(const int64_t *v, int64_t n);
MOEC_API moec_json *moec_json_new_reals(const double *v, int64_t n);
MOEC_API moec_json *moec_json_clone(const moec_json *v);
MOEC_API void moec_json_set(moec_json *object, const char *key, moec_json *value);
MOEC_API void moec_json_push(moec_json *array, moec_json *value);

/** Text of a value; indent 0 gives one line. Keys in insertion order. Free with moec_free. MOEC_ENOMEM. */
MOEC_API moec_status moec_json_dump(char **out, const moec_json *v, int indent, moec_err *err) MOEC_USE_RESULT;

/** Replaces the value at `path` (keys joined by '.') in a JSON text, leaving every other byte as it is.
 *  `value` is JSON text. `text` must already have passed moec_json_parse. Free *out with moec_free.
 *  MOEC_EINVAL when the path is not there. */
MOEC_API moec_status moec_json_edit(char **out, const char *text, const char *path, const char *value, moec_err *err)
    MOEC_USE_RESULT;

#endif
