/* See work.h. */
#include "run/work.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "run/preview.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* "layer-00012.json", "layer-00012-factors.json", "layer-00012-others.json", "set-00003.safetensors", and what writing them is called
 * before it is done. */
static bool is_layer(const char *name)
{
    static const char *const ends[] = {".safetensors", ".safetensors.tmp", ".json", ".json.tmp"};
    const size_t head = strncmp(name, "layer-", 6) == 0 ? 6 : strncmp(name, "set-", 4) == 0 ? 4 : 0;
    const size_t digits = strspn(name + head, "0123456789");
    const char *end = name + head + digits;
    if (strncmp(end, "-factors", 8) == 0)
        end += 8;
    else if (strncmp(end, "-others", 7) == 0)
        end += 7;
    for (size_t i = 0; head > 0 && digits >= 5 && i < MOEC_COUNT(ends); i++)
        if (strcmp(end, ends[i]) == 0)
            return true;
    return false;
}

/* `layers`: files of layers. */
static moec_status only_ours(size_t *layers, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **name = NULL;
    size_t n = 0;
    *layers = 0;
    MOEC_TRY(moec_dir_list(&name, &n, dir, err));
    for (size_t i = 0; i < n; i++) {
        *layers += is_layer(name[i]);
        if (!is_layer(name[i]) && strcmp(name[i], "state.json") != 0 && strcmp(name[i], "state.json.tmp") != 0)
            MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: holds %s, which was not made by moecompress; move it away", dir, name[i]));
    }
done:
    moec_names_free(name, n);
    return st;
}

moec_status moec_work_ours(const char *dir, moec_err *err)
{
    size_t layers;
    return only_ours(&layers, dir, err);
}

/* Hours of another run's work are not thrown away because an option differs, nor is what somebody else has put there. */
static moec_status clear(moec_work *w, bool guard, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t layers;
    MOEC_TRY(only_ours(&layers, w->folder.dir, err));
    if (guard && w->folder.other && layers > 0)
        MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: holds finished layers of another model, text or options; --no-resume discards "
                           "them", w->folder.dir));
    MOEC_TRY(moec_checkpoint_clear(&w->folder, err));
done:
    return st;
}

moec_status moec_work_open(moec_work *w, const char *path, bool resume, bool guard, moec_err *err, const char *identity, ...)
{
    moec_err why = {MOEC_OK, ""};
    char *text = NULL;
    va_list ap;
    *w = (moec_work){.folder.lock = -1};
    va_start(ap, identity);
    moec_status st = moec_vformat(&text, err, identity, ap);
    va_end(ap);
    if (st != MOEC_OK)
        return st;
    const moec_digest id = moec_hash_bytes(text, strlen(text));
    MOEC_TRY(moec_checkpoint_open(&w->folder, path, id.hex, resume, err));
    if (!w->folder.same)
        MOEC_TRY(clear(w, resume && guard, err));
    st = moec_override_open(&w->weights, w->folder.dir, false, &why);
    if (st == MOEC_EFORMAT)
        MOEC_TRY(moec_fail(err, st, "%s; --no-resume begins anew", why.text));
    if (st != MOEC_OK)
        MOEC_TRY(moec_fail(err, st, "%s", why.text));
    if (moec_override_count(w->weights) > 0)
        moec_say("%s: continuing", w->folder.dir);
    w->opened = true;
done:
    moec_free(text);
    return st;
}

moec_status moec_work_forget(const char *path, const moec_plan *done, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_work w = {.folder.lock = -1};
    char *dir = NULL;
    moec_err other = {MOEC_OK, ""};
    bool same = false;
    MOEC_TRY(moec_format(&dir, err, "%s.partial", path));
    if (!done->weights[0] || !moec_path_is_dir(dir) || moec_work_ours(dir, &other) != MOEC_OK)
        goto done;
    if (moec_checkpoint_open(&w.folder, path, "", false, &other) == MOEC_OK) /* locks it */
        same = moec_override_open(&w.weights, dir, false, &other) == MOEC_OK &&
               moec_preview_check(done, w.weights, &other) == MOEC_OK;
    if (same)
        moec_say("%s: is what a finished run left; removed", dir);
done:
    moec_work_close(&w, same);
    moec_free(dir);
    return st;
}

moec_status moec_work_keep(const moec_work *w, const char *dir, moec_err *err)
{
    return rename(w->folder.dir, dir) == 0 ? MOEC_OK : moec_fail_errno(err, errno, dir);
}

void moec_work_abandon(moec_work *w)
{
    size_t layers = 0;
    moec_err none;
    moec_work_close(w, w->opened && only_ours(&layers, w->folder.dir, &none) == MOEC_OK && layers == 0);
}

void moec_work_close(moec_work *w, bool remove)
{
    moec_err err = {MOEC_OK, ""};
    moec_override_close(w->weights);
    if (remove && moec_checkpoint_remove(&w->folder, &err) != MOEC_OK)
        moec_warn("%s", err.text);
    moec_checkpoint_release(&w->folder);
}

/* --- records ----------------------------------------------------------------------------------------------------------- */

void moec_work_file_name(char out[64], int64_t layer, const char *end)
{
    snprintf(out, 64, "layer-%05lld%s", (long long)layer, end);
}

moec_status moec_work_record_write(const moec_work *w, moec_json *record, const moec_sheet *sheet, const char *name, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *text = NULL;
    if (sheet) {
        moec_digest hash;
        MOEC_TRY(moec_sheet_digest(&hash, sheet, err));
        moec_json_set(record, "weights", moec_json_new_string(hash.hex));
    }
    MOEC_TRY(moec_path_join(&path, w->folder.dir, name, err));
    MOEC_TRY(moec_json_dump(&text, record, 0, err));
    MOEC_TRY(moec_file_write(path, text, strlen(text), err));
done:
    moec_json_free(record);
    moec_free(path);
    moec_free(text);
    return st;
}

moec_status moec_work_record_check(const moec_work *w, const moec_json *record, const char *file, moec_err *err)
{
    moec_digest have;
    const char *said = moec_json_string(moec_json_get(record, "weights"));
    moec_status st = moec_override_file_digest(&have, w->weights, file, err);
    if (st == MOEC_OK && (!said || strcmp(said, have.hex) != 0))
        st = moec_fail(err, MOEC_EFORMAT, "%s/%s: is not what was written there (its hash differs); --no-resume begins anew",
                       w->folder.dir, file);
    return st;
}

moec_status moec_work_record_read(moec_json **out, const moec_work *w, const char *name, size_t most, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    *out = NULL;
    MOEC_TRY(moec_path_join(&path, w->folder.dir, name, err));
    if (!moec_path_exists(path))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: is missing; --no-resume begins anew", path));
    MOEC_TRY(moec_json_read(out, path, most, err));
    MOEC_TRY(moec_work_record_check(w, *out, file, err));
done:
    moec_free(path);
    return st;
}

moec_status moec_work_interrupted(moec_status st, const char *measuring, int64_t done, int64_t layers, moec_err *err)
{
    if (st != MOEC_EINTR)
        return st;
    return moec_fail(err, st, "interrupted%s%s%s after %lld of %lld layers; the same command continues there",
                     measuring ? " while measuring " : "", measuring ? measuring : "", measuring ? "," : "", (long long)done,
                     (long long)layers);
}
