/* See work.h. */
#include "run/work.h"

#include "base/file.h"
#include "base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static bool is_layer(const char *name)
{
    return strncmp(name, "layer-", 6) == 0 || strncmp(name, "set-", 4) == 0;
}

/* Hours of another run's work are not thrown away because an option differs, nor is what somebody else has put there. */
static moec_status clear(moec_work *w, bool resume, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **name = NULL;
    size_t n = 0, layers = 0;
    MOEC_TRY(moec_dir_list(&name, &n, w->folder.dir, err));
    for (size_t i = 0; i < n; i++) {
        layers += is_layer(name[i]);
        if (!is_layer(name[i]) && strncmp(name[i], "state.json", 10) != 0)
            MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: holds %s, which was not made by moecompress; move it away", w->folder.dir,
                               name[i]));
    }
    if (resume && w->folder.other && layers > 0)
        MOEC_TRY(moec_fail(err, MOEC_EEXIST, "%s: holds finished layers of another model, text or options; --no-resume discards "
                           "them", w->folder.dir));
    MOEC_TRY(moec_checkpoint_clear(&w->folder, err));
done:
    moec_names_free(name, n);
    return st;
}

moec_status moec_work_open(moec_work *w, const char *path, const char *identity, bool resume, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_digest id = moec_hash_bytes(identity, strlen(identity));
    *w = (moec_work){.folder.lock = -1};
    MOEC_TRY(moec_checkpoint_open(&w->folder, path, id.hex, resume, err));
    if (!w->folder.same)
        MOEC_TRY(clear(w, resume, err));
    MOEC_TRY(moec_override_open(&w->weights, w->folder.dir, false, err));
    if (moec_override_count(w->weights) > 0)
        moec_say("%s: continuing", w->folder.dir);
done:
    return st;
}

moec_status moec_work_keep(const moec_work *w, const char *dir, moec_err *err)
{
    return rename(w->folder.dir, dir) == 0 ? MOEC_OK : moec_fail_errno(err, errno, dir);
}

void moec_work_close(moec_work *w, bool remove)
{
    moec_err err = {MOEC_OK, ""};
    moec_override_close(w->weights);
    if (remove && moec_checkpoint_remove(&w->folder, &err) != MOEC_OK)
        moec_warn("%s", err.text);
    moec_checkpoint_release(&w->folder);
}
