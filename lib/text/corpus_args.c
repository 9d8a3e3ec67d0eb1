/* Taking `--text` arguments apart: name=path:weight, where each part gives way to a path that is there. */
#include "text/corpus_args.h"

#include "base/file.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void moec__sources_release(moec__sources *s)
{
    for (size_t i = 0; i < s->n; i++) {
        moec_free(s->at[i].path);
        moec_free(s->at[i].name);
    }
    moec_free(s->at);
    *s = (moec__sources){0};
}

static bool ends_in(const char *path, const char *ending)
{
    size_t n = strlen(path), k = strlen(ending);
    return n > k && strcmp(path + n - k, ending) == 0;
}

/* Index of the ':' of a ":weight" at the end, or the length of the text. */
static size_t find_weight(const char *text)
{
    size_t n = strlen(text), at = n;
    while (at > 0 && strchr("0123456789.eE+-", text[at - 1]))
        at--;
    return at > 0 && at < n && text[at - 1] == ':' ? at - 1 : n;
}

static moec_status read_weight(double *out, const char *text, const char *arg, moec_err *err)
{
    char *end;
    *out = strtod(text, &end);
    if (*end || end == text || !isfinite(*out) || *out <= 0)
        return moec_fail(err, MOEC_EINVAL, "--text %s: weight \"%s\" is not a number above 0", arg, text);
    return MOEC_OK;
}

/* Adds one file; a NULL name means that of the file without its extension. */
static moec_status add_file(moec__sources *s, const char *name, const char *path, double weight, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec__source f = {.weight = weight, .is_ids = ends_in(path, ".ids")};
    const char *base = moec_path_base(path), *dot = strrchr(base, '.');
    size_t n = name ? strlen(name) : dot && dot > base ? (size_t)(dot - base) : strlen(base);
    MOEC_TRY(moec_copy(&f.name, name ? name : base, n, err));
    MOEC_TRY(moec_copy(&f.path, path, strlen(path), err));
    if (n == 0) {
        st = moec_fail(err, MOEC_EINVAL, "--text %s: a file name was expected", path);
        goto done;
    }
    for (size_t i = 0; i < s->n; i++) {
        if (strcmp(s->at[i].name, f.name) == 0) {
            st = moec_fail(err, MOEC_EINVAL,
                           "--text: %s and %s are both domain \"%s\"; give one a name of its own, name=path",
                           s->at[i].path, path, f.name);
            goto done;
        }
    }
    MOEC_TRY(MOEC_GROW(s->at, s->cap, s->n + 1, err));
    s->at[s->n++] = f;
    return MOEC_OK;
done:
    moec_free(f.path);
    moec_free(f.name);
    return st;
}

static moec_status add_folder(moec__sources *s, const char *path, double weight, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **names = NULL, *file = NULL;
    size_t n = 0, before = s->n;
    MOEC_TRY(moec_dir_list(&names, &n, path, err));
    for (size_t i = 0; i < n; i++) {
        if (names[i][0] == '.' || (!ends_in(names[i], ".txt") && !ends_in(names[i], ".ids")))
            continue;
        MOEC_TRY(moec_path_join(&file, path, names[i], err));
        if (!moec_path_is_dir(file))
            MOEC_TRY(add_file(s, NULL, file, weight, err));
        moec_free(file);
        file = NULL;
    }
    if (s->n == before)
        st = moec_fail(err, MOEC_EINVAL, "--text %s: no file in this folder ends in .txt or .ids", path);
done:
    moec_free(file);
    moec_names_free(names, n);
    return st;
}

static moec_status add_arg(moec__sources *s, const char *arg, moec_err *err)
{
    moec_status st = MOEC_OK;
    double weight = 1;
    char *text = NULL, *name = NULL;
    MOEC_TRY(moec_copy(&text, arg, strlen(arg), err));
    char *path = text, *equals = strchr(text, '=');
    if (!moec_path_exists(text)) {
        size_t colon = find_weight(text);
        bool weighted = text[colon] == ':';
        if (weighted)
            text[colon] = '\0';
        if (!moec_path_exists(text) && equals && equals < text + colon) {
            *equals = '\0';
            if (moec_path_is_plain(text)) {
                name = text;
                path = equals + 1;
            } else {
                *equals = '='; /* a path after all, one that is not there */
            }
        }
        if (weighted && path != text) {
            /* the file may itself be called "x:2" */
            text[colon] = ':';
            weighted = !moec_path_exists(path);
            if (weighted)
                text[colon] = '\0';
        }
        if (weighted)
            MOEC_TRY(read_weight(&weight, text + colon + 1, arg, err));
    }
    if (equals == text || *path == '\0')
        st = moec_fail(err, MOEC_EINVAL, "--text %s: name=path[:weight], a path or a folder was expected", arg);
    else if (!moec_path_is_dir(path))
        st = add_file(s, name, path, weight, err);
    else if (name)
        st = moec_fail(err, MOEC_EINVAL, "--text %s: a folder has no name; its files are domains of their own names",
                       arg);
    else
        st = add_folder(s, path, weight, err);
done:
    moec_free(text);
    return st;
}

moec_status moec__sources_list(moec__sources *out, const char *const *args, int n_args, moec_err *err)
{
    moec_status st = MOEC_OK;
    *out = (moec__sources){0};
    if (n_args <= 0)
        return moec_fail(err, MOEC_EINVAL, "--text: at least one text was expected");
    for (int i = 0; i < n_args && st == MOEC_OK; i++)
        st = add_arg(out, args[i], err);
    return st;
}
