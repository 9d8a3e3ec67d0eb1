/* See reader.h. */
#include "method/reader.h"

#include "base/mem.h"

#include <stdio.h>
#include <string.h>

moec_status moec__read_keys(const moec_reader *r, moec_json *o, const char *where, const char *const *known, size_t n)
{
    void *it = NULL;
    const char *key;
    moec_json *value;
    if (moec_json_type(o) != MOEC_JSON_OBJECT)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not a JSON object", r->what, where);
    while (moec_json_each(o, &it, &key, &value)) {
        size_t i = 0;
        while (i < n && strcmp(key, known[i]) != 0)
            i++;
        if (i == n)
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: unknown key %.60s", r->what, where, key);
    }
    return MOEC_OK;
}

moec_status moec__read_int(int64_t *out, const moec_reader *r, const moec_json *o, const char *where, const char *key,
                           int64_t lo, int64_t hi)
{
    if (!moec_json_int(moec_json_get(o, key), out))
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is not a whole number", r->what, where, key);
    if (*out < lo || *out > hi)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is %lld, expected %lld to %lld", r->what, where, key,
                         (long long)*out, (long long)lo, (long long)hi);
    return MOEC_OK;
}

moec_status moec__read_text(char *out, size_t cap, const moec_reader *r, const moec_json *o, const char *key, bool needed)
{
    const moec_json *v = moec_json_get(o, key);
    const char *text = moec_json_string(v);
    out[0] = '\0';
    if (!v && !needed)
        return MOEC_OK;
    if (!text)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is not a text", r->what, key);
    if (strlen(text) != moec_json_len(v) || strlen(text) >= cap)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s is longer than %zu bytes", r->what, key, cap - 1);
    snprintf(out, cap, "%s", text);
    return MOEC_OK;
}

moec_status moec__read_reals(double **out, int64_t n, const moec_reader *r, const moec_json *o, const char *where,
                             const char *key)
{
    const moec_json *a = moec_json_get(o, key);
    if (moec_json_type(a) != MOEC_JSON_ARRAY || moec_json_len(a) != (size_t)n)
        return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s is not a list of %lld numbers", r->what, where, key,
                         (long long)n);
    moec_status st = MOEC_NEW(*out, (size_t)n, r->err);
    for (int64_t i = 0; st == MOEC_OK && i < n; i++)
        if (!moec_json_real(moec_json_at(a, (size_t)i), &(*out)[i]))
            return moec_fail(r->err, MOEC_EFORMAT, "%s: %s: %s %lld is not a number", r->what, where, key, (long long)i);
    return st;
}
