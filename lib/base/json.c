/* jansson behind our own names, and the scanner that finds a value's place in a text that already parsed. */
#include "base/json.h"

#include "base/file.h"
#include "base/mem.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local bool build_failed; /* some builder of this thread ran out of memory since the last dump */

static json_t *raw(const moec_json *v)
{
    return (json_t *)(uintptr_t)v; /* jansson's getters are not const-correct */
}

static moec_json *wrap(json_t *v)
{
    return (moec_json *)(void *)v;
}

static moec_status parse(moec_json **out, const char *text, size_t len, size_t flags, const char *what, moec_err *err)
{
    json_error_t e;
    *out = NULL;
    /* jansson steps over a NUL behind a number, and editing in place works on NUL-terminated text */
    const char *nul = len > 0 ? memchr(text, '\0', len) : NULL;
    if (nul)
        return moec_fail(err, MOEC_EFORMAT, "%s: JSON holds a NUL byte at offset %zu", what, (size_t)(nul - text));
    *out = wrap(json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | flags, &e));
    if (!*out && json_error_code(&e) == json_error_out_of_memory)
        return moec_fail(err, MOEC_ENOMEM, "%s: out of memory while reading JSON", what);
    if (!*out)
        return moec_fail(err, MOEC_EFORMAT, "%s: JSON line %d column %d: %s", what, e.line, e.column, e.text);
    return MOEC_OK;
}

moec_status moec_json_parse(moec_json **out, const char *text, size_t len, const char *what, moec_err *err)
{
    return parse(out, text, len, 0, what, err);
}

static moec_status read_file(moec_json **out, const char *path, size_t max_bytes, size_t flags, moec_err *err)
{
    char *text;
    size_t len;
    *out = NULL;
    moec_status st = moec_file_read(&text, &len, path, max_bytes, err);
    if (st == MOEC_OK) {
        st = parse(out, text, len, flags, path, err);
        moec_free(text);
    }
    return st;
}

moec_status moec_json_read(moec_json **out, const char *path, size_t max_bytes, moec_err *err)
{
    return read_file(out, path, max_bytes, 0, err);
}

moec_status moec_json_read_reals(moec_json **out, const char *path, size_t max_bytes, moec_err *err)
{
    return read_file(out, path, max_bytes, JSON_DECODE_INT_AS_REAL, err);
}

void moec_json_free(moec_json *v)
{
    json_decref(raw(v));
}

moec_json_kind moec_json_type(const moec_json *v)
{
    if (!v)
        return MOEC_JSON_NONE;
    switch (json_typeof(raw(v))) {
    case JSON_NULL:
        return MOEC_JSON_NULL;
    case JSON_TRUE:
    case JSON_FALSE:
        return MOEC_JSON_BOOL;
    case JSON_INTEGER:
        return MOEC_JSON_INT;
    case JSON_REAL:
        return MOEC_JSON_REAL;
    case JSON_STRING:
        return MOEC_JSON_STRING;
    case JSON_ARRAY:
        return MOEC_JSON_ARRAY;
    case JSON_OBJECT:
        return MOEC_JSON_OBJECT;
    }
    return MOEC_JSON_NONE;
}

bool moec_json_absent(const moec_json *v)
{
    return moec_json_type(v) == MOEC_JSON_NONE || moec_json_type(v) == MOEC_JSON_NULL;
}

moec_json *moec_json_get(const moec_json *object, const char *key)
{
    return wrap(json_object_get(raw(object), key));
}

const moec_json *moec_json_path(const moec_json *object, const char *path)
{
    char key[128];
    for (const char *p = path; object && *p;) {
        size_t n = strcspn(p, ".");
        if (n >= sizeof key)
            return NULL;
        memcpy(key, p, n);
        key[n] = '\0';
        object = moec_json_get(object, key);
        p += n + (p[n] == '.');
    }
    return object;
}

moec_json *moec_json_at(const moec_json *array, size_t i)
{
    return wrap(json_array_get(raw(array), i));
}

size_t moec_json_len(const moec_json *v)
{
    json_t *j = raw(v);
    return json_is_array(j) ? json_array_size(j) : json_is_object(j) ? json_object_size(j) : json_string_length(j);
}

bool moec_json_int(const moec_json *v, int64_t *out)
{
    if (!json_is_integer(raw(v)))
        return false;
    *out = json_integer_value(raw(v));
    return true;
}

bool moec_json_real(const moec_json *v, double *out)
{
    if (!json_is_number(raw(v)))
        return false;
    *out = json_number_value(raw(v));
    return true;
}

bool moec_json_bool(const moec_json *v, bool *out)
{
    if (!json_is_boolean(raw(v)))
        return false;
    *out = json_is_true(raw(v));
    return true;
}

const char *moec_json_string(const moec_json *v)
{
    return json_string_value(raw(v));
}

bool moec_json_each(moec_json *object, void **it, const char **key, moec_json **value)
{
    *it = *it ? json_object_iter_next(raw(object), *it) : json_object_iter(raw(object));
    if (!*it)
        return false;
    *key = json_object_iter_key(*it);
    *value = wrap(json_object_iter_value(*it));
    return true;
}

static moec_json *built(json_t *v)
{
    if (!v)
        build_failed = true;
    return wrap(v);
}

moec_json *moec_json_new_object(void)
{
    return built(json_object());
}

moec_json *moec_json_new_array(void)
{
    return built(json_array());
}

moec_json *moec_json_new_string(const char *utf8)
{
    json_t *v = json_string(utf8);
    return built(v ? v : json_string("(not UTF-8)")); /* a file name may hold any bytes */
}

moec_json *moec_json_new_int(int64_t v)
{
    return built(json_integer(v));
}

moec_json *moec_json_new_real(double v)
{
    return built(isfinite(v) ? json_real(v) : json_null());
}

moec_json *moec_json_new_bool(bool v)
{
    return built(json_boolean(v));
}

moec_json *moec_json_new_null(void)
{
    return built(json_null());
}

moec_json *moec_json_new_ints(const int32_t *v, int64_t n)
{
    moec_json *a = moec_json_new_array();
    for (int64_t i = 0; i < n; i++)
        moec_json_push(a, moec_json_new_int(v[i]));
    return a;
}

moec_json *moec_json_new_long_ints(const int64_t *v, int64_t n)
{
    moec_json *a = moec_json_new_array();
    for (int64_t i = 0; i < n; i++)
        moec_json_push(a, moec_json_new_int(v[i]));
    return a;
}

moec_json *moec_json_new_reals(const double *v, int64_t n)
{
    moec_json *a = moec_json_new_array();
    for (int64_t i = 0; i < n; i++)
        moec_json_push(a, moec_json_new_real(v[i]));
    return a;
}

moec_json *moec_json_clone(const moec_json *v)
{
    return built(json_deep_copy(raw(v)));
}

void moec_json_set(moec_json *object, const char *key, moec_json *value)
{
    char plain[256];
    json_t *probe = json_string(key); /* jansson only says that it failed: is it the key, or memory? */
    if (!probe) {
        size_t n = 0;
        for (; key[n] && n + 1 < sizeof plain; n++)
            plain[n] = (signed char)key[n] < 0 ? '?' : key[n];
        plain[n] = '\0';
        key = plain;
    }
    json_decref(probe);
    if (json_object_set_new(raw(object), key, raw(value)) != 0)
        build_failed = true;
}

void moec_json_push(moec_json *array, moec_json *value)
{
    if (json_array_append_new(raw(array), raw(value)) != 0)
        build_failed = true;
}

moec_status moec_json_dump(char **out, const moec_json *v, int indent, moec_err *err)
{
    *out = NULL;
    bool failed = build_failed;
    build_failed = false;
    size_t flags = JSON_ENCODE_ANY | JSON_REAL_PRECISION(17) | (indent > 0 ? JSON_INDENT((size_t)indent) : 0);
    char *text = failed ? NULL : json_dumps(raw(v), flags);
    if (!text)
        return moec_fail(err, MOEC_ENOMEM, "out of memory while writing JSON");
    moec_status st = moec_copy(out, text, strlen(text), err);
    free(text); /* jansson's own allocation */
    return st;
}

static const char *skip_space(const char *p)
{
    while (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')
        p++;
    return p;
}

/* p is at an opening quote; returns behind the closing one. */
static const char *skip_string(const char *p)
{
    for (p++; *p && *p != '"'; p++)
        if (*p == '\\' && p[1])
            p++;
    return *p ? p + 1 : p;
}

/* p is at the first byte of a value; returns behind its last. */
static const char *skip_value(const char *p)
{
    if (*p == '"')
        return skip_string(p);
    if (*p == '{' || *p == '[') {
        int depth = 0;
        for (; *p; p++) {
            if (*p == '"') {
                p = skip_string(p) - 1;
            } else if (*p == '{' || *p == '[') {
                depth++;
            } else if (*p == '}' || *p == ']') {
                if (--depth == 0)
                    return p + 1;
            }
        }
        return p;
    }
    while (*p && !strchr(",}] \t\r\n", *p))
        p++;
    return p;
}

/* Value of a key of the object at p, or NULL. Keys are compared as they are written: ours are plain ASCII, and a file
 * that spells one with escapes would have to do so on purpose. */
static const char *find_key(const char *p, const char *key, size_t key_len)
{
    if (*p != '{')
        return NULL;
    for (p = skip_space(p + 1); *p == '"';) {
        const char *end = skip_string(p);
        bool here = (size_t)(end - p) == key_len + 2 && memcmp(p + 1, key, key_len) == 0;
        p = skip_space(end);
        if (*p != ':')
            return NULL;
        p = skip_space(p + 1);
        if (here)
            return p;
        p = skip_space(skip_value(p));
        if (*p != ',')
            return NULL;
        p = skip_space(p + 1);
    }
    return NULL;
}

moec_status moec_json_edit(char **out, const char *text, const char *path, const char *value, moec_err *err)
{
    const char *p = skip_space(text);
    *out = NULL;
    for (const char *key = path; p && *key;) {
        size_t n = strcspn(key, ".");
        p = find_key(p, key, n);
        key += n + (key[n] == '.');
    }
    if (!p)
        return moec_fail(err, MOEC_EINVAL, "JSON key %s is not there to be edited", path);
    const char *end = skip_value(p);
    return moec_format(out, err, "%.*s%s%s", (int)(p - text), text, value, end);
}
