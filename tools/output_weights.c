/* See output_weights.h. */
#include "output_weights.h"

static moec_status folder_of(char **out, const char *file, moec_err *err)
{
    return moec_format(out, err, "%s.weights", file);
}

moec_status tool_weights_open(moec_override **out, const moec_plan *p, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *dir = NULL;
    *out = NULL;
    if (!p->weights[0])
        return MOEC_OK;
    MOEC_TRY(folder_of(&dir, file, err));
    if (!moec_path_is_dir(dir))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: the folder of the plan's weights is missing; --plan-only wrote it beside "
                           "the plan, and it goes where the plan goes", dir));
    MOEC_TRY(moec_override_open(out, dir, false, err));
    if (moec_override_count(*out) == 0)
        st = moec_fail(err, MOEC_EFORMAT, "%s: the plan's weights should be in there, and none are", dir);
done:
    moec_free(dir);
    return st;
}

moec_status tool_weights_may_write(const char *file, bool overwrite, moec_err *err)
{
    char *dir;
    moec_status st = folder_of(&dir, file, err);
    if (st == MOEC_OK && moec_path_exists(dir))
        st = overwrite ? moec_work_ours(dir, err)
                       : moec_fail(err, MOEC_EEXIST, "%s: is there already; --overwrite replaces it", dir);
    moec_free(dir);
    return st;
}

static moec_status discard(const char *dir, moec_err *err)
{
    moec_status st = moec_path_exists(dir) ? moec_work_ours(dir, err) : MOEC_OK;
    return st == MOEC_OK && moec_path_exists(dir) ? moec_dir_remove(dir, err) : st;
}

moec_status tool_weights_keep(moec_repair *r, moec_thin *t, moec_factoring *f, moec_quantizing *q, const char *file, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *dir = NULL;
    MOEC_TRY(folder_of(&dir, file, err));
    MOEC_TRY(discard(dir, err)); /* tool_weights_may_write has allowed it */
    MOEC_TRY(r   ? moec_repair_keep(r, dir, err)
             : t ? moec_thin_keep(t, dir, err)
             : f ? moec_factoring_keep(f, dir, err)
                 : moec_quantizing_keep(q, dir, err));
done:
    moec_free(dir);
    return st;
}

void tool_weights_drop(const char *file)
{
    moec_err err = {MOEC_OK, ""};
    char *dir = NULL;
    moec_status st = folder_of(&dir, file, &err);
    if (st == MOEC_OK)
        st = discard(dir, &err);
    if (st != MOEC_OK)
        moec_warn("weights of an older plan were not removed: %s", err.text);
    moec_free(dir);
}
