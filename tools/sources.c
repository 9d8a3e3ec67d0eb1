/* See sources.h. */
#include "sources.h"

moec_status tool_sources_open(tool_sources *o, const tool_source_names *n, moec_err *err)
{
    moec_status st = MOEC_OK;
    uint64_t bytes;
    MOEC_TRY(moec_model_open(&o->model, n->model, err));
    MOEC_TRY(moec_ckpt_fingerprint(&o->print, o->model->ckpt, err));
    if (n->base) {
        MOEC_TRY(moec_within(err, moec_model_open(&o->base, n->base, err), "--base"));
        MOEC_TRY(moec_ckpt_fingerprint(&o->base_print, o->base->ckpt, err));
    }
    if (n->plain && o->model->packed)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: the source is quantized, and errors would add up; use the unquantized release",
                           moec_ckpt_dir(o->model->ckpt)));
    if (n->stats) {
        MOEC_TRY((n->lean ? moec_stats_load_lean : moec_stats_load)(&o->stats, n->stats, err));
        MOEC_TRY(moec_file_digest(&o->stats_digest, &bytes, n->stats, err));
        MOEC_TRY(moec_within(err, moec_stats_check(o->stats, o->model, err), "%s", n->stats)); /* before anyone counts on its shape */
    }
    if (n->weights)
        MOEC_TRY(moec_within(err, moec_stats_set_weights(o->stats, n->weights, err), "--domain-weight"));
    if (n->protect)
        MOEC_TRY(moec_guard_read(&o->guard, &o->guard_name, n->protect, o->model, o->stats, err));
    if (n->drop_mtp && o->model->mtp_layers == 0)
        st = moec_fail(err, MOEC_EINVAL, "--mtp drop: the model has no multi-token-prediction layers with experts");
done:
    return st;
}

void tool_sources_release(tool_sources *o)
{
    moec_guard_release(&o->guard);
    moec_free(o->guard_name);
    moec_stats_free(o->stats);
    moec_model_close(o->base);
    moec_model_close(o->model);
}
