/* What was found out about a layer, in a file beside its weights. See lockstep.h. */
#include "base/file.h"
#include "base/mem.h"
#include "run/lockstep.h"

#include <math.h>

/* What was found out about a layer stands beside its weights: errors, what the router did, who was chosen, and a hash
 * by which a later run knows the weights (of `sheet`; NULL: there are none). */
moec_status moec__record_write(const moec_lockstep *u, const moec_plan_layer *pl, const moec_sheet *sheet, moec_err *err)
{
    char name[64];
    moec_json *o = moec_json_new_object();
    if (moec__repair_fits(u->o)) {
        moec_json_set(o, "before", moec_json_new_real(pl->error_before));
        moec_json_set(o, "after", moec_json_new_real(pl->error_after));
    }
    if (!isnan(pl->load_shift)) {
        moec_json_set(o, "load_shift", moec_json_new_real(pl->load_shift));
        moec_json_set(o, "router_refit", moec_json_new_bool(pl->router_refit));
    }
    moec_json_set(o, "keep", moec_json_new_ints(pl->keep, pl->n_keep));
    if (pl->into)
        moec_json_set(o, "into", moec_json_new_ints(pl->into, pl->n_experts));
    if (pl->score)
        moec_json_set(o, "score", moec_json_new_reals(pl->score, pl->n_experts));
    moec_work_file_name(name, pl->layer, ".json");
    return moec_work_record_write(&u->r->work, o, sheet, name, err);
}

/* Kept experts go into themselves (tied ones: all are kept, whatever their group), others into such a one or none (mapped: never). `keep` is
 * read. */
static bool read_into(moec_plan_layer *pl, const moec_json *v, bool wanted, bool tied, bool mapped)
{
    const moec_json *into = moec_json_get(v, "into");
    moec_err none;
    if (!into)
        return !wanted;
    if (moec_json_len(into) != (size_t)pl->n_experts ||
        (!pl->into && MOEC_NEW(pl->into, (size_t)pl->n_experts, &none) != MOEC_OK))
        return false;
    for (int64_t e = 0; e < pl->n_experts; e++) {
        int64_t to;
        if (!moec_json_int(moec_json_at(into, (size_t)e), &to) || to < -1 || to >= pl->n_experts)
            return false;
        pl->into[e] = (int32_t)to;
    }
    for (int64_t e = 0; e < pl->n_experts; e++)
        if (pl->into[e] >= 0 && pl->into[pl->into[e]] != pl->into[e])
            return false;
    for (int64_t k = 0; k < pl->n_keep && !tied; k++)
        if (pl->into[pl->keep[k]] != pl->keep[k])
            return false;
    int64_t alone = 0;
    for (int64_t e = 0; mapped && e < pl->n_experts; e++) {
        alone += pl->into[e] == e;
        if (pl->into[e] < 0)
            return false;
    }
    return !mapped || alone == pl->n_keep;
}

static bool read_keep(moec_plan_layer *pl, const moec_json *v)
{
    const moec_json *keep = moec_json_get(v, "keep"), *score = moec_json_get(v, "score");
    moec_err none;
    if (moec_json_len(keep) != (size_t)pl->n_keep || (score && moec_json_len(score) != (size_t)pl->n_experts))
        return false;
    if (score && !pl->score && MOEC_NEW(pl->score, (size_t)pl->n_experts, &none) != MOEC_OK)
        return false;
    for (int64_t k = 0; k < pl->n_keep; k++) {
        int64_t e;
        if (!moec_json_int(moec_json_at(keep, (size_t)k), &e) || e >= pl->n_experts || e < (k > 0 ? pl->keep[k - 1] + 1 : 0))
            return false;
        pl->keep[k] = (int32_t)e;
    }
    for (int64_t e = 0; score && e < pl->n_experts; e++)
        if (!moec_json_real(moec_json_at(score, (size_t)e), &pl->score[e]))
            return false;
    return true;
}

/* `found`: the layer was done by an earlier run. */
moec_status moec__record_read(bool *found, const moec_lockstep *u, moec_plan_layer *pl, moec_err *err)
{
    moec_status st = MOEC_OK;
    char file[64], name[64], *path = NULL;
    moec_json *v = NULL;
    moec_work_file_name(file, pl->layer, ".safetensors");
    moec_work_file_name(name, pl->layer, ".json");
    *found = !moec__repair_fits(u->o) || moec_override_has(u->r->work.weights, file);
    MOEC_TRY(moec_path_join(&path, u->r->work.folder.dir, name, err));
    const bool there = moec_path_exists(path);
    if (*found && !there && moec__repair_fits(u->o))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: is missing; --no-resume begins anew", path));
    *found = *found && there;
    if (!*found)
        goto done;
    MOEC_TRY(moec_json_read(&v, path, 1 << 24, err));
    const bool errors = !moec__repair_fits(u->o) || (moec_json_real(moec_json_get(v, "before"), &pl->error_before) &&
                                                           moec_json_real(moec_json_get(v, "after"), &pl->error_after));
    const moec_json *shift = moec_json_get(v, "load_shift");
    const bool moved = !shift || (moec_json_real(shift, &pl->load_shift) && pl->load_shift >= 0.0 && pl->load_shift <= 1.0 &&
                                   moec_json_bool(moec_json_get(v, "router_refit"), &pl->router_refit));
    if (!errors || !moved || !read_keep(pl, v) || !read_into(pl, v, u->o->merge != NULL, u->o->tied != NULL, u->p->mapped))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: damaged; --no-resume begins anew", path));
    if (moec__repair_fits(u->o))
        MOEC_TRY(moec_work_record_check(&u->r->work, v, file, err));
done:
    moec_json_free(v);
    moec_free(path);
    return st;
}
